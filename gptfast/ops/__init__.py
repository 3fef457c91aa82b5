"""The ops: one file each, with maths, reference, registration and public function."""

from gptfast.ops.add_layer_norm import add_layer_norm
from gptfast.ops.add_rms_norm import add_rms_norm
from gptfast.ops.attention import attention
from gptfast.ops.attention_decode import attention_decode
from gptfast.ops.attention_decode_append import attention_decode_append
from gptfast.ops.attention_qkv import attention_qkv
from gptfast.ops.attention_varlen import attention_varlen
from gptfast.ops.bias_gelu import bias_gelu
from gptfast.ops.cross_entropy import cross_entropy, cross_entropy_with_gradient
from gptfast.ops.dropout_add import dropout_add
from gptfast.ops.embedding import embedding
from gptfast.ops.gelu import gelu
from gptfast.ops.glu import geglu, swiglu
from gptfast.ops.kv_cache_append import kv_cache_append
from gptfast.ops.layer_norm import layer_norm
from gptfast.ops.linear_cross_entropy import linear_cross_entropy
from gptfast.ops.linear_decode import (
    QuantizedWeight,
    dequantize_weight,
    linear_decode,
    quantize_weight,
)
from gptfast.ops.linear_gelu import linear_gelu
from gptfast.ops.rms_norm import rms_norm
from gptfast.ops.rope import rope, rope_cache
from gptfast.ops.sample import sample

__all__ = [
    "QuantizedWeight",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "attention_decode_append",
    "attention_qkv",
    "attention_varlen",
    "bias_gelu",
    "cross_entropy",
    "cross_entropy_with_gradient",
    "dequantize_weight",
    "dropout_add",
    "embedding",
    "geglu",
    "gelu",
    "kv_cache_append",
    "layer_norm",
    "linear_cross_entropy",
    "linear_decode",
    "linear_gelu",
    "quantize_weight",
    "rms_norm",
    "rope",
    "rope_cache",
    "sample",
    "swiglu",
]
