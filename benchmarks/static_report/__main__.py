"""`python -m benchmarks.static_report`: see the package."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9's default, without its warning

import triton
import tyro
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table as RichTable

from benchmarks.static_report.report import REPORTED, REPORTED_OPS, entries, make_rows
from benchmarks.static_report.table import FILE, Row, Table, as_dicts, by_key, worse
from gptfast.backend import dtype_name
from gptfast.testing import DTYPES

Names = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


def main(
    op: Annotated[Names, tyro.conf.arg(help="Only this op of gptfast.testing; may repeat.")] = (),
    target: Annotated[Names, tyro.conf.arg(help="Only this GPU target; may repeat.")] = (),
    dtype: Annotated[Names, tyro.conf.arg(help="Only this dtype; may repeat.")] = (),
    case: Annotated[str, tyro.conf.arg(help="Only cases with this in their name.")] = "",
    json_file: Annotated[
        Path | None, tyro.conf.arg(name="json", help="Also write the rows to this file.")
    ] = None,
    write: Annotated[
        bool, tyro.conf.arg(help=f"Write the rows into {FILE.name}, unless one is worse there.")
    ] = False,
    accept_worse: Annotated[bool, tyro.conf.arg(help="Write rows that got worse, too.")] = False,
    fresh: Annotated[bool, tyro.conf.arg(help="Forget the results of earlier runs.")] = False,
    processes: Annotated[int, tyro.conf.arg(help="How many compile or execute at a time.")] = 2,
) -> None:
    """Registers, spills, memory traffic, matrix instructions of the Triton kernels, with no GPU."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for given, known, what in (
        (op, REPORTED_OPS, "op"),
        (target, REPORTED, "target"),
        (dtype, tuple(dtype_name(d) for d in DTYPES), "dtype"),
    ):
        if set(given) - set(known):
            raise SystemExit(f"--{what} must be one of {', '.join(known)}; got {', '.join(given)}")
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("recording launches", total=None)
        reported = list(entries(op, dtype, target, case))
        rows, failures = make_rows(
            reported,
            processes,
            cached=not fresh,
            on_jobs=lambda n: bar.update(task, total=n, description="compiling, executing"),
            on_done=lambda: bar.advance(task),
        )
    print_rows(rows, console)
    for failure in failures:
        console.print(failure, style="red", markup=False)
    if json_file is not None:
        json_file.write_text(json.dumps(as_dicts(rows), indent=1) + "\n")
    committed = Table.read()
    complaints = compare(committed, rows, console)
    if write:
        if failures:
            raise SystemExit("not written: see the failures above")
        if complaints and not accept_worse:
            raise SystemExit("not written: entries got worse (--accept-worse writes them)")

        def covered(row: Row) -> bool:
            return (
                (not op or row.op in op)
                and (not dtype or row.dtype in dtype)
                and (not target or row.target in target)
                and case in f"{row.op}-{row.shape}"
            )

        kept = {key: row for key, row in committed.rows.items() if not covered(row)}
        Table(triton.__version__, {**kept, **by_key(rows)}).write()
        console.print(f"{len(rows)} rows written to {FILE.name}")
    if failures:
        raise SystemExit(1)


def compare(committed: Table, rows: list[Row], console: Console) -> list[str]:
    """What is worse than in the committed table; nothing, where another Triton made that."""
    if committed.triton != triton.__version__:
        return []
    complaints = []
    for row in rows:
        before = committed.rows.get(row.key)
        if before is not None:
            complaints += [f"worse: {', '.join(row.key)}: {why}" for why in worse(before, row)]
    for complaint in complaints:
        console.print(complaint, style="red", markup=False)
    return complaints


def print_rows(rows: list[Row], console: Console) -> None:
    """The rows as a table for people, a block for each call of an op."""
    table = RichTable(title=f"Triton {triton.__version__}")
    table.add_column("kernel")
    table.add_column("target")
    for name in ("regs", "spills", "smem", "warps", "matrix", "load", "store", "flops"):
        table.add_column(name, justify="right")
    before = None
    for row in rows:
        call = (row.op, row.shape, row.dtype, row.call)
        if call != before:
            table.add_section()
            table.add_row(f"[bold]{row.call} {row.shape} {row.dtype}")
            before = call
        matrix = ", ".join(f"{kind} {number}" for kind, number in row.matrix_instr.items())
        table.add_row(
            f"  {row.kernel.replace('_kernel', '')}",
            row.target,
            str(row.regs),
            f"[red]{row.spills}" if row.spills else "0",
            str(row.smem),
            f"{row.occupancy:.0%}",
            matrix,
            str(row.load_bits),
            str(row.store_bits),
            f"{row.flops:.1e}",
        )
    console.print(table)
    ratios = RichTable()
    for name in ("call", "target", "bytes", "asked for"):
        ratios.add_column(name)
    seen = set()
    for row in rows:
        line = _ratios(row)
        if line not in seen:
            seen.add(line)
            name = f"{row.call} {row.shape} {row.dtype}"
            same = [r.target for r in rows if line == _ratios(r)]
            targets = ", ".join(dict.fromkeys(same))
            ratios.add_row(name, targets, f"{row.bytes_ratio:.3f}", f"{row.issued_ratio:.2f}")
    console.print(ratios)
    console.print(
        "regs, spills (bytes): a thread. warps: predicted occupancy. matrix: products of the "
        "source by the instruction that they became. load, store: bits of the widest.\n"
        "bytes: DRAM traffic of the call over the least possible; asked for: the same of every "
        "load and store."
    )


def _ratios(row: Row) -> tuple[str, str, str, float, float]:
    return (row.call, row.shape, row.dtype, row.bytes_ratio, row.issued_ratio)


if __name__ == "__main__":
    tyro.cli(main)
