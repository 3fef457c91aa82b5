"""AdamW over the parameters of GPT-2 124M, with and without clipping the norm of the gradients."""

from __future__ import annotations

import torch

from benchmarks.ceiling import Sweep
from benchmarks.cpu.works import Built, Call, Limit, Work, compiled
from benchmarks.timing import COMPILED, EAGER, OURS
from gptfast import optim
from gptfast.models import GPT, GPTConfig

# w, m and v are read and written, g is read.
UPDATE = Sweep(4, 3, in_place=3)
# Clipping must have seen every g before it scales one: g is read twice.
CLIPPED_BYTES, UPDATE_BYTES = 8 * 4, 7 * 4


def _parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    with torch.device("meta"):
        shapes = [p.shape for p in GPT(GPTConfig.preset("gpt2")).parameters()]
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        p.grad = torch.randn(shape, generator=generator) * 1e-3
        made.append(p)
    return made


def _stock(params: list[torch.nn.Parameter], max_norm: float | None, fused: bool) -> Call:
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=fused, foreach=not fused)

    def step() -> None:
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()

    return step


def _adamw(max_norm: float | None, dtype: torch.dtype, compile: bool) -> Built:
    ours = optim.AdamW(_parameters(), lr=1e-4, max_norm=max_norm)
    calls: dict[str, Call] = {OURS: ours.step, EAGER: _stock(_parameters(), max_norm, True)}
    if compile:
        calls[COMPILED] = compiled(_stock(_parameters(), max_norm, False))
    n = sum(p.numel() for p in ours.param_groups[0]["params"])
    moved = n * (UPDATE_BYTES if max_norm is None else CLIPPED_BYTES)

    def check() -> None:
        """One step each from the same start must agree to a few roundings of fp32.

        Theirs gets gradients that were clipped in fp64: clip_grad_norm_ adds up squares in fp32.
        """
        params = [_parameters(1) for _ in range(2)]
        if max_norm is not None:
            grads = [p.grad for p in params[1] if p.grad is not None]
            norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
            torch._foreach_mul_(grads, min(1.0, max_norm / (norm.item() + 1e-6)))
        optim.AdamW(params[0], lr=1e-4, max_norm=max_norm).step()
        _stock(params[1], None, True)()
        for got, expected in zip(*params, strict=True):
            torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-6, atol=1e-8)

    return Built({"step": calls}, {"step": Limit(moved, UPDATE)}, check)


WORKS = (
    Work(
        "adamw",
        "adamw",
        "124M parameters",
        lambda dtype, compile: _adamw(None, dtype, compile),
        seconds=0.3,
        dtypes=(torch.float32,),
    ),
    Work(
        "adamw_clipped",
        "adamw",
        "124M parameters, norm clipped",
        lambda dtype, compile: _adamw(1.0, dtype, compile),
        seconds=0.3,
        dtypes=(torch.float32,),
    ),
)
