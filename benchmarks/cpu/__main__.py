"""Starts a worker for each number of threads and each allocator, and prints what they find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from benchmarks.cpu.report import WARMED, Row, markdown, read, table, write
from benchmarks.cpu.works import all_works
from benchmarks.documents import show_table
from gptfast import backend

FOUND, WARM = "as found", "warmed"
# Never map a tensor by itself, never return memory, and ask for huge pages.
WARM_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    "THP_MEM_ALLOC_ENABLE": "1",
}
DTYPES = ("float32", "bfloat16")


def environment(threads: int, allocator: str) -> dict[str, str]:
    """The environment of a worker."""
    # inductor writes the number of threads into its code, and does not ask for it in its cache.
    cache = Path(tempfile.gettempdir()) / f"gptfast-bench-inductor-{threads}-threads"
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    variables |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return variables | (WARM_ENVIRONMENT if allocator == WARM else {})


def results(options: list[str], threads: int, allocator: str) -> Iterator[dict[str, Any]]:
    """The lines of a worker.

    Raises:
        SystemExit: the worker failed, with the end of what it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        worker = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cpu.worker", *options],
            env=environment(threads, allocator),
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        assert worker.stdout is not None
        for line in worker.stdout:
            yield json.loads(line)
        if worker.wait():
            said.seek(0)
            raise SystemExit(f"the worker failed:\n{said.read()[-4000:]}")


def main(
    only: Annotated[
        list[str] | None, tyro.conf.arg(help="Works by name; default: all.", metavar="NAME ...")
    ] = None,
    threads: Annotated[
        list[int] | None, tyro.conf.arg(help="Numbers of threads; default: 1 and all cores.")
    ] = None,
    dtypes: Annotated[list[str] | None, tyro.conf.arg(help="float32, bfloat16, or both.")] = None,
    allocators: Annotated[
        list[str] | None, tyro.conf.arg(help="'as found', 'warmed', or both.")
    ] = None,
    compile: Annotated[bool, tyro.conf.arg(help="Whether torch.compile takes part.")] = True,
    quick: Annotated[bool, tyro.conf.arg(help="Three short turns each.")] = False,
    json_file: Annotated[
        Path | None,
        tyro.conf.arg(
            name="json", help="Also write the rows to this file, over those of the same work."
        ),
    ] = None,
    show: Annotated[
        Path | None, tyro.conf.arg(help="Print the rows of a file in Markdown, and time nothing.")
    ] = None,
    into: Annotated[
        Path | None,
        tyro.conf.arg(help="Put what --show prints between the marks of the file in this one."),
    ] = None,
) -> None:
    """Time gptfast on this CPU against PyTorch, and print ratios and shares of the ceiling."""
    if show is not None:
        if not show.exists():
            raise SystemExit(f"--show: there is no file {show}")
        show_table(markdown(read(show)), show.name, into)
        return
    # A file or a pipe has room for the whole table.
    console = Console(width=None if sys.stdout.isatty() else 120)
    names = list(all_works())
    _check("--only", only, names)
    _check("--dtypes", dtypes, DTYPES)
    _check("--allocators", allocators, (FOUND, WARM))
    if backend.extension() is None:
        raise SystemExit(
            f"there are no kernels to time: gptfast._C is not built. {backend.HOW_TO_BUILD}"
        )
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise SystemExit(f"--json: there is no folder {json_file.parent}")
    options = ["--works", *(only or names), "--dtypes", *(dtypes or DTYPES)]
    options += [] if compile else ["--no-compile"]
    options += ["--quick"] if quick else []
    rows: list[Row] = []
    refused: set[tuple[str, str]] = set()
    start = time.monotonic()
    for n in threads or sorted({1, torch.get_num_threads()}):
        for i, allocator in enumerate(allocators or (FOUND, WARM)):
            check = [] if i == 0 else ["--no-check"]  # an allocator changes no result
            for line in results(options + check, n, allocator):
                work = (line["op"], line["dtype"])
                if "refused" in line:
                    refused.add(work)
                    console.print(f"[red]not timed: {', '.join(work)}: {line['refused']}")
                if work in refused:
                    continue
                if allocator == WARM:
                    line["contender"] += WARMED
                row = Row.from_json(line)
                rows.append(row)
                console.print(
                    f"{time.monotonic() - start:5.0f} s  {row.op} {row.dtype} {row.passes}, "
                    f"{row.threads} threads, {row.contender}: {row.median_us / 1e3:.3f} ms",
                    highlight=False,
                )
            if json_file is not None:
                write(json_file, rows)
    console.print(table(rows))
    if refused:
        raise SystemExit(f"{len(refused)} of the works were not timed")


def _check(option: str, given: list[str] | None, known: Any) -> None:
    for value in given or ():
        if value not in known:
            raise SystemExit(f"{option} must be of {', '.join(known)}; got {value!r}")


if __name__ == "__main__":
    tyro.cli(main)
