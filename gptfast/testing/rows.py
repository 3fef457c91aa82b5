"""The table of all ops."""

from __future__ import annotations

from collections.abc import Mapping

from gptfast.testing import (
    attention,
    bias_gelu,
    cross_entropy,
    embedding,
    gelu,
    glu,
    layer_norm,
    linear_cross_entropy,
    rope,
)
from gptfast.testing.case import Case, OpRow

OPS: Mapping[str, OpRow] = {
    "attention": attention.ROW,
    "bias_gelu": bias_gelu.ROW,
    "cross_entropy": cross_entropy.ROW,
    "embedding": embedding.ROW,
    "gelu": gelu.ROW,
    "glu": glu.ROW,
    "layer_norm": layer_norm.ROW,
    "linear_cross_entropy": linear_cross_entropy.ROW,
    "rope": rope.ROW,
}
CASES: tuple[Case, ...] = tuple(case for row in OPS.values() for case in row.cases)
