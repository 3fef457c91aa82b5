"""layer_norm, add_layer_norm, dropout_add, gelu and bias_gelu: works that memory bounds.

And linear_gelu, which is bias_gelu with the product before it.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

import gptfast
from benchmarks.ceiling import Sweep
from benchmarks.cpu.differentiated import built, example_cases
from benchmarks.cpu.works import Built, Limit, Work

ROWS, CHANNELS = 4096, 768
DROPOUT = 0.1


def _limit(elements: int, dtype: torch.dtype, reads: int, writes: int) -> Limit:
    traffic = Sweep(reads, writes)
    return Limit(traffic.moved * elements * dtype.itemsize, traffic)


def _layer_norm(dtype: torch.dtype, compile: bool) -> Built:
    x = torch.randn(ROWS, CHANNELS).to(dtype)
    w, b = torch.randn(2, CHANNELS).to(dtype)
    n = x.numel()
    return built(
        (x, w, b),
        gptfast.layer_norm,
        lambda x, w, b: F.layer_norm(x, (CHANNELS,), w, b),
        {"fwd": _limit(n, dtype, 1, 1), "bwd": _limit(n, dtype, 2, 1)},
        example_cases("layer_norm"),
        dtype,
        compile,
    )


def _add_layer_norm(dtype: torch.dtype, compile: bool) -> Built:
    x, residual = torch.randn(2, ROWS, CHANNELS).to(dtype)
    w, b = torch.randn(2, CHANNELS).to(dtype)

    def peer(
        x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r = residual + x
        return F.layer_norm(r, (CHANNELS,), w, b), r

    n = x.numel()
    return built(
        (x, residual, w, b),
        gptfast.add_layer_norm,
        peer,
        # Both gradients of the sum are the same tensor.
        {"fwd": _limit(n, dtype, 2, 2), "bwd": _limit(n, dtype, 3, 1)},
        example_cases("add_layer_norm"),
        dtype,
        compile,
    )


def _dropout_add(dtype: torch.dtype, compile: bool) -> Built:
    """Masks are drawn by other generators: only the cases, which know ours, can judge it."""
    x, residual = torch.randn(2, ROWS, CHANNELS).to(dtype)
    seed = torch.tensor(1)
    n = x.numel()
    return built(
        (x, residual),
        lambda x, residual: gptfast.dropout_add(x, residual, DROPOUT, seed),
        lambda x, residual: residual + F.dropout(x, DROPOUT),
        # The residual's gradient is the incoming one.
        {"fwd": _limit(n, dtype, 2, 1), "bwd": _limit(n, dtype, 1, 1)},
        example_cases("dropout_add"),
        dtype,
        compile,
        alike=False,
    )


def _gelu(dtype: torch.dtype, compile: bool) -> Built:
    x = torch.randn(ROWS, 4 * CHANNELS).to(dtype)
    n = x.numel()
    return built(
        (x,),
        gptfast.gelu,
        lambda x: F.gelu(x, approximate="tanh"),
        {"fwd": _limit(n, dtype, 1, 1), "bwd": _limit(n, dtype, 2, 1)},
        example_cases("gelu"),
        dtype,
        compile,
    )


def _bias_gelu(dtype: torch.dtype, compile: bool) -> Built:
    """The peer is GELU alone: PyTorch adds the bias in the linear layer before, for nothing.

    Its backward sums no gradient of the bias either.
    """
    x = torch.randn(ROWS, 4 * CHANNELS).to(dtype)
    bias = torch.randn(4 * CHANNELS).to(dtype)
    n = x.numel()

    return built(
        (x, bias),
        gptfast.bias_gelu,
        lambda x, bias: F.gelu(x, approximate="tanh"),
        {"fwd": _limit(n, dtype, 1, 1), "bwd": _limit(n, dtype, 2, 1)},
        example_cases("bias_gelu"),
        dtype,
        compile,
        reference=lambda x, bias: F.gelu(x + bias, approximate="tanh"),
    )


def _linear_gelu(dtype: torch.dtype, compile: bool) -> Built:
    """Without gradients, as GPT calls it."""
    x = torch.randn(ROWS, CHANNELS).to(dtype)
    w = (torch.randn(4 * CHANNELS, CHANNELS) * CHANNELS**-0.5).to(dtype)
    bias = torch.randn(4 * CHANNELS).to(dtype)
    return built(
        (x, w, bias),
        gptfast.linear_gelu,
        lambda x, w, bias: F.gelu(F.linear(x, w, bias), approximate="tanh"),
        {"fwd": Limit(flops=2.0 * ROWS * w.numel())},
        example_cases("linear_gelu"),
        dtype,
        compile,
        # What it is made of where there are no tiles.
        {"gptfast, in two": lambda x, w, bias: gptfast.bias_gelu(F.linear(x, w), bias)},
        differentiable=False,
    )


WORKS = (
    Work("layer_norm", "layer_norm", f"{ROWS}x{CHANNELS}", _layer_norm),
    Work("add_layer_norm", "add_layer_norm", f"{ROWS}x{CHANNELS}", _add_layer_norm),
    Work("dropout_add", "dropout_add", f"{ROWS}x{CHANNELS} p{DROPOUT}", _dropout_add),
    Work("gelu", "gelu", f"{ROWS}x{4 * CHANNELS}", _gelu),
    Work("bias_gelu", "bias_gelu", f"{ROWS}x{4 * CHANNELS}", _bias_gelu),
    Work("linear_gelu", "linear_gelu", f"{ROWS}x{CHANNELS}x{4 * CHANNELS}", _linear_gelu, 0.2),
)
