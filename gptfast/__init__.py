"""gptfast: fused kernels for GPT models, checked against PyTorch."""

from gptfast._version import __version__
from gptfast.backend import use_backend
from gptfast.memory import keep_freed_memory
from gptfast.ops import attention, cross_entropy, gelu, layer_norm

__all__ = [
    "__version__",
    "attention",
    "cross_entropy",
    "gelu",
    "keep_freed_memory",
    "layer_norm",
    "use_backend",
]
