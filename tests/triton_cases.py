"""What `test_triton.py` runs with TRITON_INTERPRET=1: the shared cases on the triton backend.

`conftest.py` has repaired the interpreter by then.
"""

from __future__ import annotations

import pytest
import torch

from gptfast.kernels import cross_entropy, layer_norm
from gptfast.testing import CASES, DTYPES, OPS, run_case

LARGE = 3_000  # elements of a case; what is larger takes the interpreter seconds


def work(case):
    """Elements of a case; of the scores, for attention, where dropout costs ten times as much."""
    if case.op != "attention":
        return torch.Size(case.shape).numel()
    B, H, _, T, S, _ = case.shape
    return B * H * T * max(S, 1) * (10 if case.options.get("dropout_p") else 1) // 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if work(c) <= LARGE], ids=str)
def test_case(case, dtype):
    run_case(case, "triton", dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n", [1, 15, 16, 17])
def test_tails(op, n):
    run_case(OPS[op].tail(n), "triton")


def test_rows_wider_than_a_block(monkeypatch):
    monkeypatch.setattr(layer_norm, "MAX_BLOCK", 32)
    monkeypatch.setattr(cross_entropy, "MAX_BLOCK", 16)
    for case in CASES:
        if case.op in ("layer_norm", "cross_entropy") and work(case) <= 700:
            run_case(case, "triton")
