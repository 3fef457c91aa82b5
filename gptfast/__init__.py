"""gptfast: fused kernels for GPT models, checked against PyTorch."""

from gptfast._version import __version__
from gptfast.backend import use_backend
from gptfast.memory import keep_freed_memory
from gptfast.ops import (
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_decode,
    attention_qkv,
    attention_varlen,
    bias_gelu,
    cross_entropy,
    dropout_add,
    embedding,
    geglu,
    gelu,
    kv_cache_append,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rope,
    rope_cache,
    swiglu,
)

__all__ = [
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "attention_qkv",
    "attention_varlen",
    "bias_gelu",
    "cross_entropy",
    "dropout_add",
    "embedding",
    "geglu",
    "gelu",
    "keep_freed_memory",
    "kv_cache_append",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "rope_cache",
    "swiglu",
    "use_backend",
]
