"""The ops: one file each, with maths, reference, registration and public function."""

from gptfast.ops.attention import attention
from gptfast.ops.bias_gelu import bias_gelu
from gptfast.ops.cross_entropy import cross_entropy
from gptfast.ops.embedding import embedding
from gptfast.ops.gelu import gelu
from gptfast.ops.layer_norm import layer_norm
from gptfast.ops.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "attention",
    "bias_gelu",
    "cross_entropy",
    "embedding",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
]
