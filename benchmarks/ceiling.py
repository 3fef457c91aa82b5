"""What this machine can do at best: bytes per second by working set, and operations by dtype.

    python -m benchmarks.ceiling --threads 1 2 --json ceiling.json

Every CPU benchmark prints its times as a percentage of these limits. Bandwidth is that of a C++
loop which does nothing but load and store; PyTorch's own sum, fill and copy stay below it.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.timing import interleave
from gptfast import backend

MB = 1e6
# From sets within the second-level cache to sets beyond any cache.
WORKING_SETS_MB = (1, 4, 16, 64, 256, 1024)
HUGE_PAGE = 2**21


@dataclass(frozen=True)
class Sweep:
    """Memory traffic: how many arrays are read and written, `in_place` of them both."""

    reads: int
    writes: int
    in_place: int = 0

    @property
    def moved(self) -> int:
        """Array lengths that cross the bus."""
        return self.reads + self.writes

    @property
    def arrays(self) -> int:
        """Arrays in memory."""
        return self.reads + self.writes - self.in_place


SWEEPS = {
    "read": Sweep(1, 0),
    "write": Sweep(0, 1),
    "copy": Sweep(1, 1),
    "2 reads, 1 write": Sweep(2, 1),
}


@dataclass(frozen=True)
class Bandwidth:
    """A line of the table of bandwidths."""

    traffic: str
    working_set_mb: int
    threads: int
    gb_per_s: float
    stream_gb_per_s: float | None  # with stores that pass by the caches


@dataclass(frozen=True)
class Rate:
    """A line of the table of arithmetic."""

    what: str
    dtype: str
    threads: int
    gflop_per_s: float


def aligned_memory(nbytes: int) -> torch.Tensor:
    """Zeroed bytes that start at a huge page, and lie in huge pages where the system gives them."""
    mapping = mmap.mmap(-1, nbytes + HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping
    start = -raw.data_ptr() % HUGE_PAGE
    return raw[start : start + nbytes].zero_()


class SweepCall:
    """A call that sweeps arrays of its own, moving `total_bytes` in all as `traffic` says.

    With `stream` the stores pass by the caches.
    """

    def __init__(self, traffic: Sweep, total_bytes: float, stream: bool) -> None:
        self.nbytes = max(int(total_bytes / traffic.moved) // 64, 1) * 64
        self.arrays = [aligned_memory(self.nbytes) for _ in range(traffic.arrays)]
        addresses = [array.data_ptr() for array in self.arrays]
        self.reads = torch.tensor(addresses[: traffic.reads], dtype=torch.int64)
        self.writes = torch.tensor(addresses[traffic.reads - traffic.in_place :], dtype=torch.int64)
        self.stream = stream
        self.sweep = backend.extension().ceiling_sweep  # type: ignore[union-attr]

    def __call__(self) -> None:
        reads, writes = self.reads, self.writes
        self.sweep(
            reads.data_ptr(),
            reads.numel(),
            writes.data_ptr(),
            writes.numel(),
            self.nbytes,
            self.stream,
        )


def bandwidths(seconds: float) -> Iterator[Bandwidth]:
    """Bandwidth of every traffic by working set, on the threads that are set."""
    for megabytes in WORKING_SETS_MB:
        for name, traffic in SWEEPS.items():
            moved = megabytes * MB * traffic.moved / traffic.arrays
            kinds = ("plain", "stream") if traffic.writes else ("plain",)
            calls = {kind: SweepCall(traffic, moved, kind == "stream") for kind in kinds}
            timings = interleave(calls, rounds=5, warmup=2, seconds_per_turn=seconds)
            rate = {kind: moved / timings[kind].p20 / 1e9 for kind in calls}
            threads = torch.get_num_threads()
            yield Bandwidth(name, megabytes, threads, rate["plain"], rate.get("stream"))


def arithmetic() -> dict[tuple[str, str], tuple[Callable[[], Any], float]]:
    """(what, dtype) to a call and its floating-point operations."""
    probes = backend.extension()
    assert probes is not None
    found: dict[tuple[str, str], tuple[Callable[[], Any], float]] = {}

    def probe(what: str, dtype: str, call: Callable[[int], float], steps: int) -> None:
        flops = call(steps)
        if flops:
            found[what, dtype] = (lambda: call(steps)), flops

    probe("multiply-adds on registers", "float32", probes.ceiling_fma, 2**20)
    tiles = probes.ceiling_tiles
    probe("tile products on registers", "bfloat16", lambda n: tiles(n, False), 2**17)
    probe("tile products from the L2 cache", "bfloat16", lambda n: tiles(n, True), 2**17)
    n = 2048
    for dtype in (torch.float32, torch.bfloat16):
        key = f"torch product of {n} x {n}, weight packed", backend.dtype_name(dtype)
        found[key] = packed_product(n, dtype), 2.0 * n**3
    return found


def packed_product(n: int, dtype: torch.dtype) -> Callable[[], Any]:
    """x W^T, all n x n, by PyTorch's vendor library with W packed once, as inductor calls it."""
    x, weight = torch.randn(2, n, n).to(dtype)
    if dtype == torch.bfloat16:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, n)
        return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, n)
    return lambda: torch.ops.mkl._mkl_linear(x, packed, weight, None, n)


def rates(seconds: float) -> Iterator[Rate]:
    """Arithmetic of every kind, on the threads that are set."""
    calls = arithmetic()
    with torch.inference_mode():
        timings = interleave(
            {str(key): call for key, (call, _) in calls.items()},
            rounds=5,
            warmup=2,
            seconds_per_turn=seconds,
        )
    for key, (_, flops) in calls.items():
        yield Rate(*key, torch.get_num_threads(), flops / timings[str(key)].p20 / 1e9)


def print_tables(found: list[Bandwidth], computed: list[Rate], console: Console) -> None:
    """The lines as tables for people."""
    table = Table(title="GB/s by working set; in brackets with stores that pass by the caches")
    for column in ("traffic", "threads", *(f"{m} MB" for m in WORKING_SETS_MB)):
        table.add_column(column, justify="left" if column == "traffic" else "right")
    for name in SWEEPS:
        for threads in sorted({b.threads for b in found}):
            cells = [
                f"{b.gb_per_s:.0f}"
                + ("" if b.stream_gb_per_s is None else f" ({b.stream_gb_per_s:.0f})")
                for b in found
                if (b.traffic, b.threads) == (name, threads)
            ]
            table.add_row(name, str(threads), *cells)
    console.print(table)
    table = Table(title="GFLOP/s")
    for column in ("what", "dtype", "threads", "GFLOP/s"):
        table.add_column(column, justify="right" if column in ("threads", "GFLOP/s") else "left")
    for rate in computed:
        table.add_row(rate.what, rate.dtype, str(rate.threads), f"{rate.gflop_per_s:,.0f}")
    console.print(table)


def main(
    threads: Annotated[
        list[int] | None, tyro.conf.arg(help="Numbers of threads; default: 1 and all cores.")
    ] = None,
    json_file: Annotated[
        Path | None, tyro.conf.arg(name="json", help="Also write the lines to this file.")
    ] = None,
    seconds: Annotated[float, tyro.conf.arg(help="How long a turn lasts.")] = 0.05,
) -> None:
    """Measure the limits of this machine."""
    if backend.extension() is None:
        raise SystemExit(f"the loops are in gptfast._C, which is not built. {backend.HOW_TO_BUILD}")
    found: list[Bandwidth] = []
    computed: list[Rate] = []
    for n in threads or sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(n)
        found += bandwidths(seconds)
        computed += rates(seconds)
    print_tables(found, computed, Console())
    if json_file is not None:
        lines = {"bandwidth": found, "arithmetic": computed}
        text = {name: [asdict(line) for line in some] for name, some in lines.items()}  # type: ignore[attr-defined]
        json_file.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
