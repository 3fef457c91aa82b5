"""Times works in this process and prints a row of JSON for each contender.

Started by `benchmarks.cpu`, which sets the threads and the allocator in the environment.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch._dynamo.config
import torch._functorch.config
import tyro

from benchmarks.ceiling import SweepCall
from benchmarks.cpu import memory
from benchmarks.cpu.report import Row
from benchmarks.cpu.works import Call, Limit, Work, all_works
from benchmarks.timing import COMPILED, OURS, Timing, interleave
from gptfast import backend

CEILING = "ceiling: "  # begins the names of what runs beside the contenders as the limit
TILE_STEPS, FMA_STEPS = 2**16, 2**21  # some 10 ms


def ceilings(limit: Limit, dtype: torch.dtype) -> tuple[dict[str, Call], float]:
    """Calls that do nothing but what `limit` asks for, and how much of it they do.

    The fastest of them is the ceiling: a sweep over arrays of the same size with plain or with
    streaming stores; for products in fp32 multiply-adds on registers, and in bf16, where there is
    AMX, tile products whose operands come from the L2 cache.
    """
    probes = backend.extension()
    assert probes is not None
    if limit.traffic is not None:
        traffic = limit.traffic
        kinds = (False, True) if traffic.writes else (False,)
        calls: dict[str, Call] = {
            f"{CEILING}stream {stream}": SweepCall(traffic, limit.bytes, stream) for stream in kinds
        }
        return calls, limit.bytes
    if dtype == torch.bfloat16:
        flops = probes.ceiling_tiles(TILE_STEPS, True)
        if flops:
            return {f"{CEILING}tiles": lambda: probes.ceiling_tiles(TILE_STEPS, True)}, flops
    flops = probes.ceiling_fma(FMA_STEPS)
    return {f"{CEILING}fma": lambda: probes.ceiling_fma(FMA_STEPS)}, flops


def turns(work: Work, dtype: torch.dtype, quick: bool) -> dict[str, Any]:
    """How many turns each contender gets, their seconds, and the calls before them.

    Long works get more of them in bf16: on a machine shared with others the tile unit falls to a
    quarter of its rate and back, for 0.2 to 5 seconds at a time.
    """
    if quick:
        return {"rounds": 3, "seconds_per_turn": 0.02, "warmup": 2}
    if work.seconds >= 1:
        rounds = 8 if dtype == torch.bfloat16 else 4
        return {"rounds": rounds, "seconds_per_turn": 0.0, "warmup": 1}
    return {"rounds": 11 if work.seconds < 0.05 else 5, "seconds_per_turn": 0.05, "warmup": 2}


def time_work(
    work: Work,
    dtype: torch.dtype,
    compile: bool,
    quick: bool,
    check: bool,
    emit: Callable[[Row], None],
) -> None:
    """Check a work, time it, and emit a row for each contender.

    Raises:
        AssertionError, SystemExit: gptfast computes something else than PyTorch.
    """
    torch.manual_seed(0)
    built = work.build(dtype, compile)
    if check:
        built.check()
    calls, limits = {name: dict(c) for name, c in built.calls.items()}, built.limits
    del built  # its check may hold models, whose memory is measured below
    for passes, contenders in calls.items():
        limit = limits[passes]
        probes, amount = ceilings(limit, dtype)
        timings = interleave({**contenders, **probes}, **turns(work, dtype, quick))
        best = min(timings[name].p20 for name in probes)  # what the machine can do undisturbed
        ceiling = (limit.bytes or limit.flops) / amount * best
        del probes
        peers = [timings[name].median for name in contenders if not name.startswith(OURS)]
        for name in list(contenders):
            used = _memory(contenders, name, held=passes == "step")
            emit(_row(work, dtype, passes, name, timings[name], limit, ceiling, min(peers), used))


def _memory(contenders: dict[str, Call], name: str, held: bool) -> float:
    """MB that a call takes; with `held` also what it keeps between calls, and it ends."""
    extra = memory.extra_mb(contenders[name])
    if not held:
        return extra
    before = memory.resident_mb()
    del contenders[name]
    if name == COMPILED:
        torch._dynamo.reset()
    gc.collect()
    memory.give_back()
    return extra + before - memory.resident_mb()


def _row(
    work: Work,
    dtype: torch.dtype,
    passes: str,
    contender: str,
    timing: Timing,
    limit: Limit,
    ceiling: float,
    best_peer: float,
    extra_mb: float,
) -> Row:
    return Row(
        op=work.name,
        shape=work.shape,
        dtype=backend.dtype_name(dtype),
        passes=passes,
        threads=torch.get_num_threads(),
        contender=contender,
        median_us=timing.median * 1e6,
        p20=timing.p20 * 1e6,
        p80=timing.p80 * 1e6,
        gbps=limit.bytes / timing.median / 1e9 if limit.bytes else None,
        gflops=limit.flops / timing.median / 1e9 if limit.flops else None,
        pct_of_ceiling=100 * ceiling / timing.median,
        ratio_to_best_peer=best_peer / timing.median,
        extra_mb=extra_mb,
    )


def main(
    works: list[str],
    dtypes: Annotated[list[str], tyro.conf.arg(help="float32, bfloat16")],
    compile: bool = True,
    quick: bool = False,
    check: bool = True,
) -> None:
    """Time works, printing rows as lines of JSON and refusals as lines with "refused": why."""
    # Backward is called again and again on one graph, whose buffers must stay.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.cache_size_limit = 64
    lines = sys.stdout
    sys.stdout = sys.stderr  # for what autotuning says

    def say(values: dict[str, object]) -> None:
        print(json.dumps(values), file=lines, flush=True)

    chosen = all_works()
    for name in works:
        work = chosen[name]
        for dtype in work.dtypes:
            if backend.dtype_name(dtype) not in dtypes:
                continue
            try:
                time_work(work, dtype, compile, quick, check, lambda row: say(row.to_json()))
            except (AssertionError, SystemExit) as error:
                say({"op": name, "dtype": backend.dtype_name(dtype), "refused": str(error)})
            torch._dynamo.reset()
            gc.collect()
            memory.give_back()


if __name__ == "__main__":
    tyro.cli(main)
