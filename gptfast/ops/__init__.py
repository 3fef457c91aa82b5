"""The ops: one file each, with maths, reference, registration and public function."""

from gptfast.ops.attention import attention
from gptfast.ops.cross_entropy import cross_entropy
from gptfast.ops.gelu import gelu
from gptfast.ops.layer_norm import layer_norm

__all__ = ["attention", "cross_entropy", "gelu", "layer_norm"]
