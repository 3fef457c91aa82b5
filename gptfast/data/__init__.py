"""Training data: texts to tokens, on disk or in memory, and batches of them.

`prepare` turns files of any size into a folder of shards; `Dataset` opens it, or tokenizes a text
in memory; `Loader` hands out its windows, shuffled.
"""

from gptfast.data.dataset import Dataset
from gptfast.data.loader import Loader, document_bounds
from gptfast.data.named import NAMED
from gptfast.data.preparation import prepare, prepare_text
from gptfast.data.text import (
    TINY_SHAKESPEARE_URL,
    fetch_tiny_shakespeare,
    read_text,
    resolve_source,
)

__all__ = [
    "NAMED",
    "TINY_SHAKESPEARE_URL",
    "Dataset",
    "Loader",
    "document_bounds",
    "fetch_tiny_shakespeare",
    "prepare",
    "prepare_text",
    "read_text",
    "resolve_source",
]
