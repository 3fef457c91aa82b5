"""Ops: forward and backward alone, or both in one call, for every contender."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.cpu.works import Built, Call, Limit, compiled
from benchmarks.timing import COMPILED, EAGER, OURS
from gptfast.testing import OPS, Case, run_case

Function = Callable[..., Any]


def built(
    inputs: Sequence[torch.Tensor],
    ours: Function,
    peer: Function,
    limits: Mapping[str, Limit],
    cases: Sequence[Case],
    dtype: torch.dtype,
    compile: bool,
    more: Mapping[str, Function] | None = None,
    reference: Function | None = None,
    alike: bool = True,
    differentiable: bool = True,
) -> Built:
    """A work whose contenders are functions of `inputs`.

    Args:
        inputs: what the functions take; the floating-point ones get gradients.
        ours, peer: gptfast's function and PyTorch's.
        limits: by pass; they decide which passes are timed.
        cases: on which gptfast is judged before anything is timed.
        dtype: of the cases.
        compile: whether a compiled `peer` takes part.
        more: other contenders.
        reference: what gptfast must agree with, where `peer` leaves something out.
        alike: whether both compute the same: not where each draws its own dropout.
        differentiable: whether inputs get gradients; else only "fwd" can be timed.
    """
    functions: dict[str, Function] = {OURS: ours, EAGER: peer, **(more or {})}
    if compile:
        functions[COMPILED] = compiled(peer)
    calls: dict[str, dict[str, Call]] = {name: {} for name in limits}
    torch.manual_seed(0)
    results = functions[EAGER](*_leaves(inputs, differentiable))
    dys = [torch.randn_like(y) for y in _tuple(results)]
    for name, function in functions.items():
        for passes, call in _passes(function, _leaves(inputs, differentiable), dys).items():
            if passes in calls:
                calls[passes][name] = call

    def check() -> None:
        for case in cases:
            run_case(case, "auto", dtype)
        if alike:
            judge_alike(inputs, ours, reference or peer, dys, dtype, differentiable)

    return Built(calls, limits, check)


def _passes(
    function: Function, leaves: Sequence[torch.Tensor], dys: Sequence[torch.Tensor]
) -> dict[str, Call]:
    wanted = [x for x in leaves if x.requires_grad]
    held: list[Any] = []  # the graph that "bwd" walks again and again

    def bwd() -> Any:
        if not held:
            held.append(_tuple(function(*leaves)))
        return torch.autograd.grad(held[0], wanted, dys, retain_graph=True, allow_unused=True)

    def both() -> Any:
        return torch.autograd.grad(_tuple(function(*leaves)), wanted, dys, allow_unused=True)

    return {"fwd": lambda: function(*leaves), "bwd": bwd, "fwd+bwd": both}


def judge_alike(
    inputs: Sequence[torch.Tensor],
    ours: Function,
    peer: Function,
    dys: Sequence[torch.Tensor],
    dtype: torch.dtype,
    differentiable: bool = True,
) -> None:
    """Raise unless gptfast agrees with PyTorch in fp32 at the size that is timed.

    The cases have judged every element against fp64; this holds in norm that the calls which are
    timed compute the same thing: to a few roundings of bf16, or of fp32 sums of up to 50304 terms.
    (PyTorch's own bf16 sums, such as layer_norm's gradient of the weight, may be off by as much as
    they are.)
    """
    found = []
    for function, wide in ((ours, False), (peer, True)):
        cast = [x.float() if wide and x.is_floating_point() else x for x in inputs]
        leaves = _leaves(cast, differentiable)
        wanted = [x for x in leaves if x.requires_grad]
        outputs = _tuple(function(*leaves))
        incoming = [dy.to(y.dtype) for y, dy in zip(outputs, dys, strict=True)]
        grads = torch.autograd.grad(outputs, wanted, incoming) if wanted else ()
        found.append([x.detach().float() for x in (*outputs, *grads)])
    allowed = 1e-5 if dtype == torch.float32 else 0.02
    for number, (got, expected) in enumerate(zip(*found, strict=True)):
        off, size = (torch.linalg.vector_norm(x) for x in (got - expected, expected))
        if not off <= allowed * size:
            raise AssertionError(f"result {number} differs by {off / size:.1e} in norm")


def example_cases(op: str) -> tuple[Case, ...]:
    """The plain cases of an op, and one with work for several threads."""
    row = OPS[op]
    return (*row.examples, row.many)


def _leaves(inputs: Sequence[torch.Tensor], differentiable: bool) -> list[torch.Tensor]:
    return [x.detach().requires_grad_(differentiable and x.is_floating_point()) for x in inputs]


def _tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
