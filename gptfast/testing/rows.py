"""The table of all ops."""

from __future__ import annotations

from collections.abc import Mapping

from gptfast.testing import attention, cross_entropy, gelu, layer_norm
from gptfast.testing.case import Case, OpRow

OPS: Mapping[str, OpRow] = {
    "attention": attention.ROW,
    "cross_entropy": cross_entropy.ROW,
    "gelu": gelu.ROW,
    "layer_norm": layer_norm.ROW,
}
CASES: tuple[Case, ...] = tuple(case for row in OPS.values() for case in row.cases)
