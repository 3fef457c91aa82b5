"""Drop-in modules over the ops, with torch's constructors, parameters and `state_dict`."""

from gptfast.nn.attention import CausalSelfAttention, CrossAttention, KVCache, SelfAttention
from gptfast.nn.embedding import Embedding
from gptfast.nn.gelu import GELU
from gptfast.nn.layer_norm import LayerNorm
from gptfast.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from gptfast.nn.quantized_linear import QuantizedLinear, quantize
from gptfast.nn.rms_norm import RMSNorm

__all__ = [
    "GELU",
    "CausalSelfAttention",
    "CrossAttention",
    "CrossEntropyLoss",
    "Embedding",
    "KVCache",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "QuantizedLinear",
    "RMSNorm",
    "SelfAttention",
    "quantize",
]
