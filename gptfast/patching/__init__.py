"""Let the modules of models that others wrote run on gptfast's ops: `patch`, and what it knows."""

import gptfast.integrations.huggingface_recipes  # noqa: F401 - registers them
from gptfast.patching.functions import cross_entropy, sdpa, sdpa_override
from gptfast.patching.recognise import ACTIVATIONS
from gptfast.patching.registry import OPS, Patched, register
from gptfast.patching.report import Entry, Report
from gptfast.patching.swap import patch, unpatch

__all__ = [
    "ACTIVATIONS",
    "OPS",
    "Entry",
    "Patched",
    "Report",
    "cross_entropy",
    "patch",
    "register",
    "sdpa",
    "sdpa_override",
    "unpatch",
]
