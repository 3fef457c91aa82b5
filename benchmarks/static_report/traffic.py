"""Counts bytes and floating-point operations by executing kernels. A worker; see `worker`.

Memory is counted in sectors of 32 bytes, which is what GPUs fetch, in two ways:

- issued: every load and store of every program;
- DRAM: a sector counts once a launch, however many programs touch it: those that share data run
  side by side and find it in the L2 cache (a row of weights, the keys of a head). A sector that a
  single program touches again counts again once that program has touched NEAR bytes in between:
  its share of the cache is used up by then (a row that is swept three times). Between launches
  nothing stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from benchmarks.static_report.calls import registered_calls, reports_of
from benchmarks.static_report.worker import serve
from gptfast import interpreter as repaired
from gptfast import targets

SECTOR = 32
NEAR = 64 * 1024  # 40 MB of L2 (A100) for some 640 programs that run at a time
PAGE = 1 << 12  # sectors whose state lies together


class Page:
    """State of PAGE sectors within one launch."""

    def __init__(self) -> None:
        self.clock = np.full(PAGE, -1, np.int64)  # when last touched, in bytes that went by
        self.program = np.full(PAGE, -1, np.int64)  # by whom
        self.shared = np.zeros(PAGE, np.bool_)
        self.reads = np.zeros(PAGE, np.int64)
        self.writes = np.zeros(PAGE, np.int64)


class Counter:
    """What one launch moved and computed."""

    def __init__(self) -> None:
        self.pages: dict[int, Page] = {}
        self.clock = 0
        self.issued = 0
        self.flops = 0

    def access(
        self, addresses: np.ndarray, mask: np.ndarray | None, size: int, write: bool
    ) -> None:
        """One load or store of one program."""
        taken = addresses[np.broadcast_to(mask, addresses.shape)] if mask is not None else addresses
        taken = taken.reshape(-1)
        if not taken.size:
            return
        self.issued += taken.size * size
        sectors = taken // np.uint64(SECTOR)
        if sectors.size > 1:
            sectors = sectors[np.concatenate(([True], sectors[1:] != sectors[:-1]))]
        numbers = sectors // np.uint64(PAGE)
        first, last = int(numbers.min()), int(numbers.max())
        if first == last:
            self._touch(first, sectors, write)
        else:
            for number in np.unique(numbers):
                self._touch(int(number), sectors[numbers == number], write)
        self.clock += sectors.size * SECTOR

    def _touch(self, number: int, sectors: np.ndarray, write: bool) -> None:
        page = self.pages.get(number)
        if page is None:
            page = self.pages[number] = Page()
        at = (sectors % np.uint64(PAGE)).astype(np.int64)
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, ny, nz = interpreter.interpreter_builder.grid_dim
        program = (x * ny + y) * nz + z
        before, by = page.clock[at], page.program[at]
        page.shared[at] |= (before >= 0) & (by != program)
        again = (before < 0) | (self.clock - before > NEAR)
        if write:
            page.writes[at] += again | (page.writes[at] == 0)
        else:
            page.reads[at] += again
        page.clock[at] = self.clock
        page.program[at] = program

    def dram(self) -> tuple[int, int]:
        """Bytes read and written."""
        totals = [0, 0]
        for page in self.pages.values():
            for i, count in enumerate((page.reads, page.writes)):
                totals[i] += int(np.where(page.shared, np.minimum(count, 1), count).sum()) * SECTOR
        return totals[0], totals[1]


class Counting:
    """Counts every launch inside the `with` block, in `launches`."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, Counter]] = []
        self.patches: list[Any] = []

    @property
    def now(self) -> Counter:
        return self.launches[-1][1]

    def __enter__(self) -> Counting:
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        call = executor.__call__

        def launch(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches.append((this.fn.__name__, Counter()))
            return call(this, *args, **kwargs)

        self._patch(executor, "__call__", launch)
        self._wrap(builder, "create_masked_load", self._load)
        self._wrap(builder, "create_masked_store", self._store)
        self._wrap(builder, "create_atomic_rmw", self._atomic)
        self._wrap(builder, "create_atomic_cas", self._atomic)
        self._wrap(builder, "create_dot", self._dot)
        for name in dir(builder):
            if name.removeprefix("create_") in repaired.ARITHMETIC:
                self._wrap(builder, name, self._arithmetic)
        self._wrap(interpreter.ReduceOps, "apply_impl", self._reduction)
        self._wrap(interpreter.ScanOps, "apply_impl", self._reduction)
        return self

    def __exit__(self, *_: Any) -> None:
        for patch in reversed(self.patches):
            patch.stop()

    def _patch(self, owner: Any, name: str, new: Any) -> None:
        self.patches.append(mock.patch.object(owner, name, new))
        self.patches[-1].start()

    def _wrap(self, owner: Any, name: str, count: Callable[..., None]) -> None:
        real = getattr(owner, name)

        def wrapped(this: Any, *args: Any, **kwargs: Any) -> Any:
            result = real(this, *args, **kwargs)
            count(result, *args)
            return result

        self._patch(owner, name, wrapped)

    def _load(self, _: Any, pointers: Any, mask: Any, *rest: Any) -> None:
        self.now.access(pointers.data, mask.data, item_size(pointers), write=False)

    def _store(self, _: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
        self.now.access(pointers.data, mask.data, item_size(pointers), write=True)

    def _atomic(self, _: Any, *args: Any) -> None:
        handles = [a for a in args if isinstance(a, interpreter.TensorHandle)]
        pointers, mask = handles[0], handles[2]
        lanes = mask.data if mask.data.dtype == np.bool_ else None
        for write in (False, True):
            self.now.access(pointers.data, lanes, item_size(pointers), write)

    def _dot(self, result: Any, a: Any, *rest: Any) -> None:
        self.now.flops += 2 * result.data.size * a.data.shape[-1]

    def _arithmetic(self, result: Any, *args: Any) -> None:
        if result.dtype.scalar.is_floating() or args[0].dtype.scalar.is_floating():
            self.now.flops += result.data.size

    def _reduction(self, result: Any, value: Any) -> None:
        for part in value if isinstance(value, tuple) else (value,):
            if part.dtype.scalar.is_floating():
                self.now.flops += part.handle.data.size


def item_size(pointers: Any) -> int:
    """Bytes of what a block of pointers points at."""
    return max(pointers.get_element_ty().primitive_bitwidth // 8, 1)


def count_call(job: dict[str, Any]) -> dict[str, Any]:
    """Traffic of one call of a registered op.

    Args:
        job: op, case (as text), dtype, call (its place among the calls of the case), target.

    Returns:
        least: bytes of the distinct memory of the call's arguments and results, as far as a kernel
        touched it (of an embedding's weight, the rows that were looked up). launches: for each
        kernel, bytes read and written, issued bytes, and floating-point operations.
    """
    case = next(c for c in reports_of(job["op"]) if str(c) == job["case"])
    call = registered_calls(case, getattr(torch, job["dtype"]))[job["call"]]
    with targets.assume(job["target"]), Counting() as counting:
        results = call.run()
    results = results if isinstance(results, (list, tuple)) else (results,)
    counters = [counter for _, counter in counting.launches]
    written = {x.data_ptr(): x for x in (*results, *call.writes) if isinstance(x, torch.Tensor)}
    reads = sum(touched_bytes(x, counters) for x in call.reads)
    writes = sum(touched_bytes(x, counters) for x in written.values())
    launches = []
    for name, counter in counting.launches:
        read, wrote = counter.dram()
        launches.append(
            {
                "kernel": name,
                "read": read,
                "written": wrote,
                "issued": counter.issued,
                "flops": counter.flops,
            }
        )
    return {"least": reads + writes, "launches": launches}


def touched_bytes(x: torch.Tensor, counters: list[Counter]) -> int:
    """Bytes of a tensor's own memory, as far as any of the launches touched it."""
    if not x.numel():
        return 0
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    first = x.data_ptr() // SECTOR
    last = (x.data_ptr() + extent * x.element_size() - 1) // SECTOR
    touched = 0
    for number in range(first // PAGE, last // PAGE + 1):
        seen = np.zeros(PAGE, np.bool_)
        for counter in counters:
            if number in counter.pages:
                seen |= counter.pages[number].clock >= 0
        lo, hi = max(first - number * PAGE, 0), min(last - number * PAGE, PAGE - 1)
        touched += int(seen[lo : hi + 1].sum())
    elements = 1
    for n, s in zip(x.shape, x.stride(), strict=True):
        elements *= n if s else 1
    return min(touched * SECTOR, elements * x.element_size())


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("traffic: TRITON_INTERPRET must be 1")
    repaired.install()
    torch.set_num_threads(1)
    serve(count_call)
