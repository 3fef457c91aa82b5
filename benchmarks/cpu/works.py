"""What is timed: calls, the bytes or operations they cannot do without, a check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor

from benchmarks.ceiling import Sweep

Call = Callable[[], object]


@dataclass(frozen=True)
class Limit:
    """The least that a work must do: bytes moved as `traffic` says, or products of some dtype."""

    bytes: float = 0.0
    traffic: Sweep | None = None
    flops: float = 0.0


@dataclass(frozen=True)
class Built:
    """A work in one dtype, ready to be timed.

    Args:
        calls: by pass ("fwd", "bwd", "fwd+bwd", "step"), then by contender.
        limits: by pass.
        check: raises where gptfast computes something else than PyTorch.
    """

    calls: Mapping[str, Mapping[str, Call]]
    limits: Mapping[str, Limit]
    check: Callable[[], None]


@dataclass(frozen=True)
class Work:
    """A line of the table, in every dtype.

    Args:
        name: unique; what `--only` takes.
        op: name in `gptfast.testing.OPS`, or of the optimizer or model.
        shape: for people.
        build: makes it for a dtype; with `compiled` also with torch.compile.
        dtypes: in which it is timed.
        seconds: about what PyTorch takes with one thread: long works get fewer turns.
    """

    name: str
    op: str
    shape: str
    build: Callable[[torch.dtype, bool], Built]
    seconds: float = 0.02
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile` as the strongest peer: the mode max-autotune, and static shapes."""
    settings = {**torch._inductor.list_mode_options("max-autotune"), **options}
    return torch.compile(function, dynamic=False, options=settings)


def all_works() -> dict[str, Work]:
    """Every work by name, in the order of the table."""
    from benchmarks.cpu import gpt2, lookups, losses, optimizers, pointwise, scores

    modules = (pointwise, lookups, scores, losses, optimizers, gpt2)
    return {work.name: work for module in modules for work in module.WORKS}
