"""Interleaved timing: contenders take turns, so that a machine that slows down slows them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

OURS, EAGER, COMPILED = "gptfast", "torch eager", "torch.compile"  # who is timed


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    seconds_per_turn: float,
    on_turn: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every contender `rounds` times in turn, each turn repeating it for `seconds_per_turn`.

    Args:
        contenders: what to call, by name.
        rounds: turns each contender gets.
        warmup: calls of each contender before the first turn, untimed.
        seconds_per_turn: a turn repeats the call until this much time has gone, at least once.
        on_turn: called after each turn, for a progress bar.
    """
    for call in contenders.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            calls = 0
            start = time.perf_counter()
            while calls == 0 or time.perf_counter() - start < seconds_per_turn:
                call()
                calls += 1
            samples[name].append((time.perf_counter() - start) / calls)
            on_turn()
    return {name: summarise(times) for name, times in samples.items()}


def summarise(times: list[float]) -> Timing:
    """Median and percentiles of a list of seconds."""
    if len(times) == 1:
        return Timing(times[0], times[0], times[0])
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), p20, p80)
