"""Single modules of each op, from one row to thousands."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import gptfast
from benchmarks.patched.families import DTYPES
from benchmarks.patched.models import without_grad
from benchmarks.patched.report import ModuleRow
from benchmarks.timing import Timing, interleave
from gptfast.patching import OPS


class Attention(nn.Module):
    """Self-attention of `nn.MultiheadAttention`, causal, heads of 64."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(C, C // 64, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        T = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(T, x.device, x.dtype)
        return self.attn(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


class Gated(nn.Module):
    """A SwiGLU MLP without its products, which are the same either way."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Loss(nn.Module):
    """`nn.CrossEntropyLoss` for the class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(x, torch.ones(x.shape[0], dtype=torch.int64))


class Head(nn.Module):
    """`nn.LinearCrossEntropyLoss` with 8192 classes, for the class 1."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.loss = nn.LinearCrossEntropyLoss(C, 8192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(x, torch.ones(x.shape[0], dtype=torch.int64))


# By op: the module for rows of C columns, and the shape of its input with M rows.
MODULES: dict[str, tuple[Callable[[int], nn.Module], Callable[[int, int], tuple[int, ...]]]] = {
    "layer_norm": (nn.LayerNorm, lambda M, C: (M, C)),
    "rms_norm": (nn.RMSNorm, lambda M, C: (M, C)),
    "gelu": (lambda C: nn.GELU(), lambda M, C: (M, C)),
    "gelu tanh": (lambda C: nn.GELU("tanh"), lambda M, C: (M, C)),
    "glu": (lambda C: Gated(), lambda M, C: (M, C)),
    "attention": (Attention, lambda M, C: (max(M // 128, 1), min(M, 128), C)),
    "cross_entropy": (lambda C: Loss(), lambda M, C: (M, C)),
    "linear_cross_entropy": (Head, lambda M, C: (M, C)),
}
COLUMNS = 256
ROWS = (1, 16, 64, 256, 1024, 4096)


def run_module(op: str, dtype: str, compiled: bool, rounds: int, seconds: float) -> list[ModuleRow]:
    """Time one op's module, forward alone and with backward, from one row to thousands."""
    make, shape = MODULES[op]
    rows = []
    for M in ROWS:
        torch.manual_seed(0)
        torch._dynamo.reset()
        unpatched = make(COLUMNS).to(DTYPES[dtype])
        patched = copy.deepcopy(unpatched)
        gptfast.patch(patched, ops=list(OPS))
        x = torch.randn(shape(M, COLUMNS)).to(DTYPES[dtype])
        calls: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "with backward": {}}
        for name, module in (("unpatched", unpatched), ("patched", patched)):
            forward = torch.compile(module) if compiled else module
            calls["forward"][name] = without_grad(forward, x)
            calls["with backward"][name] = forward_backward(forward, x)
        for work, contenders in calls.items():
            times: dict[str, Timing] = interleave(
                contenders, rounds=rounds, warmup=3, seconds_per_turn=seconds
            )
            figures = (times["unpatched"].median, times["patched"].median)
            rows.append(ModuleRow(op, work, dtype, compiled, x.numel(), *figures))
    return rows


def forward_backward(forward: Any, x: torch.Tensor) -> Callable[[], object]:
    """Forward, and the gradients of everything."""
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        dy = torch.randn_like(forward(x))

    def run() -> None:
        forward(leaf).backward(dy)

    return run
