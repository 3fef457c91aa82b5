"""The table of all ops."""

from __future__ import annotations

from collections.abc import Mapping

from gptfast.testing import (
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_decode,
    attention_decode_append,
    attention_qkv,
    attention_varlen,
    bias_gelu,
    cross_entropy,
    dropout_add,
    embedding,
    gelu,
    glu,
    kv_cache_append,
    layer_norm,
    linear_cross_entropy,
    linear_decode,
    linear_gelu,
    rms_norm,
    rope,
)
from gptfast.testing.case import Case, OpRow

OPS: Mapping[str, OpRow] = {
    "add_layer_norm": add_layer_norm.ROW,
    "add_rms_norm": add_rms_norm.ROW,
    "attention": attention.ROW,
    "attention_decode": attention_decode.ROW,
    "attention_decode_append": attention_decode_append.ROW,
    "attention_qkv": attention_qkv.ROW,
    "attention_varlen": attention_varlen.ROW,
    "bias_gelu": bias_gelu.ROW,
    "cross_entropy": cross_entropy.ROW,
    "dropout_add": dropout_add.ROW,
    "embedding": embedding.ROW,
    "gelu": gelu.ROW,
    "glu": glu.ROW,
    "kv_cache_append": kv_cache_append.ROW,
    "layer_norm": layer_norm.ROW,
    "linear_cross_entropy": linear_cross_entropy.ROW,
    "linear_decode": linear_decode.ROW,
    "linear_gelu": linear_gelu.ROW,
    "rms_norm": rms_norm.ROW,
    "rope": rope.ROW,
}
CASES: tuple[Case, ...] = tuple(case for row in OPS.values() for case in row.cases)
