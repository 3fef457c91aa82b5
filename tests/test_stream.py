"""Results so large that the CPU kernels stream them past the caches, at every SIMD level."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import gptfast

LARGE = 20_000_000  # bytes: kStreamBytes of csrc/cpu/stream.h
NORM_TRAFFIC = 16_000_000  # bytes: kStreamTraffic of csrc/cpu/layer_norm.cpp


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
@pytest.mark.parametrize("columns", [2048, 2056, 2051])
@pytest.mark.parametrize("packed", [True, False])
def test_swiglu(isa, dtype, columns, packed):
    rows = LARGE // dtype.itemsize // columns + 3
    if packed:  # gradients whose rows are halves of those of one tensor
        leaves = (torch.randn(rows, 2 * columns).to(dtype).requires_grad_(),)
        gate, up = leaves[0].chunk(2, -1)
    else:
        gate, up = leaves = tuple(
            torch.randn(rows, columns).to(dtype).requires_grad_() for _ in range(2)
        )
    dy = torch.randn(rows, columns).to(dtype)
    expected = (F.silu(gate.float()) * up.float()).to(dtype)
    grads = torch.autograd.grad(expected, leaves, dy)
    for _ in range(2):
        got = gptfast.swiglu(gate, up)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, leaves, dy), grads)
        del got
    for wanted in () if packed else leaves:
        got = gptfast.swiglu(*(x if x is wanted else x.detach() for x in leaves))
        (grad,) = torch.autograd.grad(got, wanted, dy)
        torch.testing.assert_close(grad, grads[0 if wanted is gate else 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [8192, 8201])
def test_cross_entropy(isa, dtype, columns):
    logits = large(dtype, columns)
    target = torch.randint(columns, logits.shape[:1])
    (grad,) = torch.autograd.grad(F.cross_entropy(logits.float(), target, reduction="sum"), logits)
    for _ in range(2):
        loss = gptfast.cross_entropy(logits, target, reduction="sum")
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], grad)
    x = logits * 1  # no leaf: its memory takes the gradient
    loss = gptfast.cross_entropy(x, target, reduction="sum", inplace_backward=True)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [768, 771])
def test_add_layer_norm(isa, dtype, columns):
    rows = NORM_TRAFFIC // (4 * dtype.itemsize * columns) + 3  # of x, residual, y and r
    x, residual = torch.randn(2, rows, columns).to(dtype).unbind(0)
    stream = (residual.float() + x.float()).to(dtype)
    expected = F.layer_norm(stream.float(), (columns,)).to(dtype)
    for _ in range(2):
        y, r = gptfast.add_layer_norm(x, residual)
        assert torch.equal(r, stream)
        torch.testing.assert_close(y, expected)
        del y, r
