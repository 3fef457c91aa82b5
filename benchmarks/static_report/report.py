"""From cases to rows of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.static_report.calls import RefusedError, registered_calls, reports_of
from benchmarks.static_report.launches import Launch, Recording, digest, record, source_of
from benchmarks.static_report.table import Row, occupancy
from benchmarks.static_report.worker import run_jobs
from gptfast.backend import dtype_name
from gptfast.targets import TARGETS
from gptfast.testing import DTYPES, OPS, Case

REPORTED = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
REPORTED_OPS = (*OPS, "adamw")
INTERPRET = {"TRITON_INTERPRET": "1"}
OnDone = Callable[[], object]


@dataclass(frozen=True)
class Entry:
    """One call of a registered op on one target, as it would be launched."""

    case: Case
    dtype: torch.dtype
    call: str
    number: int  # of the call, among those of the case
    shapes: tuple[Any, ...]  # of the call's tensors
    target: str
    recording: Recording

    def traffic_key(self) -> str:
        """What the counted bytes depend on: targets with the same tiles share them.

        So do dtypes of one size: a kernel's addresses and operations do not depend on which it is.
        """
        launches = [
            [launch.name, launch.grid, launch.constants, source_of(launch.kernel)]
            for launch in self.recording.launches
        ]
        about = [str(self.case), self.number, self.shapes]
        return digest([about, launches, code_of("traffic"), code_of("calls"), triton.__version__])

    def traffic_job(self) -> dict[str, Any]:
        """For the worker in `traffic`."""
        return {
            "op": self.case.op,
            "case": str(self.case),
            "dtype": dtype_name(self.dtype),
            "call": self.number,
            "target": self.target,
        }


@cache
def code_of(module: str) -> str:
    """A hash of a module of this package."""
    return digest(Path(__file__).with_name(f"{module}.py").read_text())


def compile_key(launch: Launch) -> str:
    """What the compiled kernel, and what is read from it, depends on."""
    return digest([launch.fingerprint(), triton.__version__, code_of("compiled")])


def entries(
    ops: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    targets: Sequence[str] = (),
    text: str = "",
) -> Iterator[Entry]:
    """Everything to report on, or of these ops, dtypes and targets, and of cases with this text."""
    for name in REPORTED_OPS:
        for case in reports_of(name) if not ops or name in ops else ():
            for dtype in DTYPES if text in str(case) else ():
                if not dtypes or dtype_name(dtype) in dtypes:
                    yield from _entries_of(case, dtype, targets or REPORTED)


def _entries_of(case: Case, dtype: torch.dtype, targets: Sequence[str]) -> Iterator[Entry]:
    for number, call in enumerate(registered_calls(case, dtype)):
        shapes = tuple(
            [x.element_size(), *x.shape, *x.stride()] for x in (*call.reads, *call.writes)
        )
        for target in targets:
            try:
                recording = record(call, target)
            except RefusedError:
                continue
            yield Entry(case, dtype, call.name, number, shapes, target, recording)


def fingerprints(entry: Entry) -> dict[tuple[str, ...], tuple[str, list[int]]]:
    """Key of each row that an entry gives -> fingerprint, and which of its launches it covers."""
    found: dict[tuple[str, ...], tuple[str, list[int]]] = {}
    names: dict[str, list[str]] = {}
    for i, launch in enumerate(entry.recording.launches):
        fingerprint = launch.fingerprint()
        variants = names.setdefault(launch.name, [])
        if fingerprint not in variants:
            variants.append(fingerprint)
        number = variants.index(fingerprint) + 1
        key = row_key(entry, launch.name if number == 1 else f"{launch.name}#{number}")
        found.setdefault(key, (fingerprint, []))[1].append(i)
    return found


def row_key(entry: Entry, kernel: str) -> tuple[str, ...]:
    """`Row.key` of a kernel of an entry."""
    case, shape = entry.case, str(entry.case).removeprefix(f"{entry.case.op}-")
    return (case.op, shape, dtype_name(entry.dtype), entry.call, kernel, entry.target)


def make_rows(
    reported: Sequence[Entry],
    processes: int = 2,
    cached: bool = True,
    on_jobs: Callable[[int], object] = lambda n: None,
    on_done: OnDone = lambda: None,
) -> tuple[list[Row], list[str]]:
    """Compile and execute what the entries need.

    Args:
        reported: from `entries`.
        processes: at a time.
        cached: whether results of earlier runs are taken from the disk.
        on_jobs: told how many jobs there are.
        on_done: called after each.

    Returns:
        Rows, and what failed.
    """
    compiles = {
        compile_key(launch): launch.job()
        for entry in reported
        for launch in entry.recording.launches
    }
    # The last dtype is float16, which the interpreter computes faster than bfloat16.
    runs = {entry.traffic_key(): entry.traffic_job() for entry in reported}
    on_jobs(len(compiles) + len(runs))
    answers: dict[str, dict[str, Any]] = {}
    work: tuple[tuple[str, Any, dict[str, str]], ...] = (
        ("compiled", compiles, {}),
        ("traffic", runs, INTERPRET),
    )
    for module, jobs, environment in work:
        for name, answer in run_jobs(module, list(jobs.items()), processes, environment, cached):
            answers[name] = answer
            on_done()
    rows: list[Row] = []
    failures: dict[str, None] = {}
    for entry in reported:
        traffic = answers[entry.traffic_key()]
        if "error" in traffic:
            failures[
                f"{entry.call}, {entry.case}, {dtype_name(entry.dtype)}, executed: "
                f"{traffic['error']}"
            ] = None
            continue
        for key, (fingerprint, numbers) in fingerprints(entry).items():
            launch = entry.recording.launches[numbers[0]]
            facts = answers[compile_key(launch)]
            if "error" in facts:
                failures[f"{', '.join(key)}, compiled: {facts['error']}"] = None
                continue
            rows.append(_row(entry, key, fingerprint, launch, numbers, facts, traffic))
    return rows, list(failures)


def _row(
    entry: Entry,
    key: tuple[str, ...],
    fingerprint: str,
    launch: Launch,
    numbers: list[int],
    facts: dict[str, Any],
    traffic: dict[str, Any],
) -> Row:
    op, shape, dtype, call, kernel, target = key
    moved = sum(x["read"] + x["written"] for x in traffic["launches"])
    issued = sum(x["issued"] for x in traffic["launches"])
    around, least = entry.recording.torch_bytes, max(traffic["least"], 1)
    return Row(
        op=op,
        shape=shape,
        dtype=dtype,
        call=call,
        kernel=kernel,
        target=target,
        config=config_of(launch),
        regs=facts["regs"],
        spills=facts["spills"],
        smem=facts["smem"],
        occupancy=occupancy(
            TARGETS[target], facts["regs"], facts["smem"], facts["tmem"], facts["warps"]
        ),
        matrix_instr=facts["dots"],
        load_bits=facts["load_bits"],
        load_share=facts["load_share"],
        store_bits=facts["store_bits"],
        bytes_ratio=round((moved + around) / least, 3),
        issued_ratio=round((issued + around) / least, 3),
        flops=sum(traffic["launches"][i]["flops"] for i in numbers),
        fingerprint=fingerprint,
    )


def config_of(launch: Launch) -> str:
    """Constants and launch options, for people."""
    options = {name: launch.options[name] for name in ("num_warps", "num_stages")}
    return " ".join(f"{name}={value}" for name, value in {**launch.constants, **options}.items())
