"""Interleaved timing: contenders take turns, so that a machine that slows down slows them all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

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
    """Time every contender `rounds` times in turn; see `take_turns`."""
    samples = take_turns(
        contenders,
        rounds=rounds,
        warmup=warmup,
        seconds_per_turn=seconds_per_turn,
        on_turn=on_turn,
    )
    return {name: summarise(times) for name, times in samples.items()}


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    seconds_per_turn: float,
    on_turn: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call of every contender in each of `rounds` rounds.

    Every second round is the one before it backwards, and each pair of rounds begins with the next
    contender: each comes after itself, and after another, as often as the others do.

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
    for number in range(rounds):
        order = list(contenders.items())
        first = number // 2 % len(order)
        order = order[first:] + order[:first]
        for name, call in reversed(order) if number % 2 else order:
            calls = 0
            start = time.perf_counter()
            while calls == 0 or time.perf_counter() - start < seconds_per_turn:
                call()
                calls += 1
            samples[name].append((time.perf_counter() - start) / calls)
            on_turn()
    return samples


def summarise(times: list[float]) -> Timing:
    """Median and percentiles of a list of seconds."""
    if len(times) == 1:
        return Timing(times[0], times[0], times[0])
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), p20, p80)


@dataclass(frozen=True)
class Ratio:
    """How many times as long one contender takes as another: median, and where it surely lies."""

    median: float
    low: float | None
    high: float | None


def paired_ratio(times: Sequence[float], others: Sequence[float]) -> Ratio:
    """times / others, round by round: what slows a machine down slows both of a round.

    From `low` to `high` the median of infinitely many rounds lies with 95 % confidence, whatever
    the distribution, if no round has to do with another: of n ratios, as many lie below it as
    heads in n throws of a coin. Fewer than six rounds can not say so much: None.
    """
    ratios = sorted(a / b for a, b in zip(times, others, strict=True))
    n = len(ratios)
    at_most = accumulate(math.comb(n, k) / 2**n for k in range(n))  # k heads
    k = sum(p <= 0.025 for p in at_most) - 1
    low, high = (ratios[k], ratios[n - 1 - k]) if k >= 0 else (None, None)
    return Ratio(statistics.median(ratios), low, high)
