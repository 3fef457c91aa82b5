"""Results so large that the CPU kernels stream them past the caches, at every SIMD level."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import gptfast

LARGE = 20_000_000  # bytes: kStreamBytes of csrc/cpu/stream.h


def large(dtype, N):
    rows = LARGE // dtype.itemsize // N + 3
    return torch.randn(rows, N).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [2048, 2051])
def test_bias_gelu(isa, dtype, columns):
    x, bias = large(dtype, columns), torch.randn(columns)
    dy = torch.randn_like(x)
    expected = F.gelu(x.float() + bias, approximate="tanh").to(dtype)
    grad = torch.autograd.grad(expected, x, dy)
    for _ in range(2):  # in fresh memory, and in what the first call has left
        got = gptfast.bias_gelu(x, bias)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, x, dy), grad)
        del got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [8192, 8201])
def test_cross_entropy(isa, dtype, columns):
    logits = large(dtype, columns)
    target = torch.randint(columns, logits.shape[:1])
    (grad,) = torch.autograd.grad(F.cross_entropy(logits.float(), target, reduction="sum"), logits)
    for _ in range(2):
        loss = gptfast.cross_entropy(logits, target, reduction="sum")
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], grad)
