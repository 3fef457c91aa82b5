"""HellaSwag and LAMBADA by name: the published files, fetched once into the user's cache.

LAMBADA's is OpenAI's version, which GPT-2's published scores are of.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path
from typing import NamedTuple

__all__ = ["PUBLISHED", "evaluation_file"]


class Published(NamedTuple):
    """A file that is known by its contents."""

    url: str
    sha256: str


PUBLISHED = {
    "hellaswag": Published(
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
    "lambada": Published(
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
}
MAX_BYTES = 1 << 26  # several times the larger file


def evaluation_file(name_or_path: str | os.PathLike[str]) -> Path:
    """The file that "hellaswag", "lambada" or a path means.

    A file that bears one of the names is reached as "./lambada".

    Raises:
        ConnectionError: a name whose file is not in the cache and cannot be fetched.
        ValueError: what is in the cache, or was fetched, is not that file.
    """
    published = PUBLISHED.get(str(name_or_path))
    if published is None:
        return Path(name_or_path)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    file = Path(cache) / "gptfast" / f"{name_or_path}.jsonl"
    if file.exists():
        data, origin = file.read_bytes(), f"{file} (delete it to fetch it again)"
    else:
        origin = published.url
        try:
            with urllib.request.urlopen(published.url, timeout=30) as response:
                data = response.read(MAX_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"cannot fetch {published.url}: {error}; give the path of a file"
            ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != published.sha256:
        raise ValueError(f"{origin}: expected sha256 {published.sha256}, got {digest}")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        half.write_bytes(data)
        half.replace(file)
    return file
