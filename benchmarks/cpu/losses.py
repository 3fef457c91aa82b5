"""cross_entropy, and the head of the model together with its loss."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import gptfast
from benchmarks.ceiling import Sweep
from benchmarks.cpu.differentiated import built, example_cases
from benchmarks.cpu.works import Built, Limit, Work

ROWS, CHANNELS, VOCABULARY, PADDED = 4096, 768, 50257, 50304


def _cross_entropy(dtype: torch.dtype, compile: bool) -> Built:
    logits = torch.randn(ROWS, VOCABULARY).to(dtype)
    target = torch.randint(VOCABULARY, (ROWS,))
    # Read forward, read backward, and the gradient written.
    limit = Limit(3 * logits.numel() * dtype.itemsize, Sweep(2, 1))
    return built(
        (logits, target),
        gptfast.cross_entropy,
        F.cross_entropy,
        {"fwd+bwd": limit},
        example_cases("cross_entropy"),
        dtype,
        compile,
    )


def _linear_cross_entropy(dtype: torch.dtype, compile: bool) -> Built:
    x = torch.randn(ROWS, CHANNELS).to(dtype)
    w = (torch.randn(PADDED, CHANNELS) * 0.02).to(dtype)
    target = torch.randint(PADDED, (ROWS,))
    more = {}
    if hasattr(F, "linear_cross_entropy"):
        more["torch F.linear_cross_entropy"] = F.linear_cross_entropy
    return built(
        (x, w, target),
        gptfast.linear_cross_entropy,
        lambda x, w, target: F.cross_entropy(F.linear(x, w), target),
        # The products of the logits, of dx and of dw; what is computed twice does not count.
        {"fwd+bwd": Limit(flops=3 * 2.0 * ROWS * CHANNELS * PADDED)},
        example_cases("linear_cross_entropy"),
        dtype,
        compile,
        more,
    )


WORKS = (
    Work("cross_entropy", "cross_entropy", f"{ROWS}x{VOCABULARY}", _cross_entropy, seconds=0.8),
    Work(
        "linear_cross_entropy",
        "linear_cross_entropy",
        f"{ROWS}x{CHANNELS}x{PADDED}",
        _linear_cross_entropy,
        seconds=4,
    ),
)
