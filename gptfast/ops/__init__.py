"""The ops: one file each, with maths, reference, registration and public function."""

from gptfast.ops.attention import attention
from gptfast.ops.bias_gelu import bias_gelu
from gptfast.ops.cross_entropy import cross_entropy
from gptfast.ops.embedding import embedding
from gptfast.ops.gelu import gelu
from gptfast.ops.glu import geglu, swiglu
from gptfast.ops.layer_norm import layer_norm
from gptfast.ops.linear_cross_entropy import linear_cross_entropy
from gptfast.ops.rope import rope, rope_cache

__all__ = [
    "attention",
    "bias_gelu",
    "cross_entropy",
    "embedding",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "rope",
    "rope_cache",
    "swiglu",
]
