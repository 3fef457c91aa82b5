"""Whole models: forward, a training step and generation."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import gptfast
from benchmarks.patched.families import DTYPES, FAMILIES, Family, check
from benchmarks.patched.report import Row
from benchmarks.timing import paired_ratio, take_turns
from gptfast.patching import OPS


def training_step(family: Family, model: nn.Module, forward: Any) -> Callable[[], object]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = family.batch()

    def step() -> None:
        family.loss(forward, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sharing(model: nn.Module) -> Any:
    """A copy with the model's own parameters and buffers."""
    memory = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memory)


def works_of(name: str, compiled: bool) -> list[str]:
    """What a family is timed with."""
    works = ["forward", "training step"]
    # `generate` of transformers calls the model itself, which `torch.compile` has not changed.
    if FAMILIES[name].generate is not None and not (compiled and name.startswith("transformers")):
        works.append("generation")
    return works


def without_grad(call: Callable[..., object], *args: Any) -> Callable[[], object]:
    """`call(*args)` as it is used in inference."""

    def run() -> None:
        with torch.no_grad():
            call(*args)

    return run


def works(name: str, model: nn.Module, compiled: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by name. Each has modules of its own, in its own mode."""
    family = FAMILIES[name]
    batch = family.batch()
    calls: dict[str, Callable[[], object]] = {}
    for work in works_of(name, compiled):
        own = sharing(model).train(work == "training step")
        dynamic = True if work == "generation" else None
        forward = torch.compile(own, dynamic=dynamic) if compiled else own
        if work == "forward":
            calls[work] = without_grad(family.logits, forward, batch)
        elif work == "training step":
            calls[work] = training_step(family, own, forward)
        else:
            assert family.generate is not None
            calls[work] = without_grad(family.generate, forward, batch)
    return calls


def run_family(
    name: str,
    dtype: str,
    compiled: bool,
    rounds: int,
    seconds: float,
    console: Console,
    force: bool = False,
) -> list[Row]:
    """Time one family, patched and not."""
    family = FAMILIES[name]
    model = family.make().to(DTYPES[dtype])
    patched = sharing(model)
    report = gptfast.patch(patched, ops=OPS) if force else family.patch(patched)
    check(family, model, patched)
    torch._dynamo.reset()
    contenders = {
        who: works(name, m, compiled)
        for who, m in (("unpatched", model), ("patched", patched), ("again", model))
    }
    rows = []
    with Progress(console=console, transient=True) as bar:
        for work in works_of(name, compiled):
            task = bar.add_task(f"{name}, {work}", total=len(contenders) * rounds)
            row = Row(name, work, dtype, compiled, replaced=len(report.replaced), forced=force)
            try:
                times = take_turns(
                    {who: warm(who, calls[work]) for who, calls in contenders.items()},
                    rounds=rounds,
                    warmup=0,
                    seconds_per_turn=seconds,
                    on_turn=lambda task=task: bar.advance(task),  # type: ignore[misc]
                )
            except Exception as error:  # the other works are timed all the same
                rows.append(replace(row, failed=summary(error)))
                continue
            ratio = paired_ratio(times["unpatched"], times["patched"])
            rows.append(
                replace(
                    row,
                    unpatched=statistics.median(times["unpatched"]),
                    patched=statistics.median(times["patched"]),
                    ratio=ratio.median,
                    low=ratio.low,
                    high=ratio.high,
                    again=paired_ratio(times["unpatched"], times["again"]).median,
                )
            )
    return rows


def warm(who: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call after three calls; if one fails, the error says whose it was."""
    try:
        for _ in range(3):
            call()
    except Exception as error:
        raise RuntimeError(f"{who} model: {summary(error)}") from error
    return call


def summary(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def failed_family(
    name: str, dtype: str, compiled: bool, error: Exception, force: bool
) -> list[Row]:
    """The rows of a family that could not be timed."""
    return [
        Row(name, work, dtype, compiled, failed=summary(error), forced=force)
        for work in works_of(name, compiled)
    ]
