"""Times the families or the modules asked for, and writes or shows their rows."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from benchmarks.documents import show_table
from benchmarks.patched.families import DTYPES, FAMILIES
from benchmarks.patched.models import failed_family, run_family, works_of
from benchmarks.patched.modules import MODULES, run_module
from benchmarks.patched.report import Row, markdown, markdown_of_modules, read, write


def main(
    only: Annotated[
        str | None, tyro.conf.arg(help="Only families (or ops) with this in their names.")
    ] = None,
    dtype: Annotated[
        str, tyro.conf.arg(help="float32, bfloat16, or both: of the weights, too.")
    ] = "both",
    compile: Annotated[
        str, tyro.conf.arg(help="no, yes, or both: whether torch.compile is timed.")
    ] = "both",
    modules: Annotated[
        bool, tyro.conf.arg(help="Single modules of each op instead of whole models.")
    ] = False,
    force: Annotated[
        bool, tyro.conf.arg(help="Every op, also where it was measured to be slower.")
    ] = False,
    json_file: Annotated[
        Path | None, tyro.conf.arg(name="json", help="Also put the rows into this file.")
    ] = None,
    show: Annotated[
        Path | None, tyro.conf.arg(help="Print the rows of a file in Markdown, and time nothing.")
    ] = None,
    resume: Annotated[
        bool, tyro.conf.arg(help="Leave out what the file of --json has all rows of.")
    ] = False,
    into: Annotated[
        Path | None,
        tyro.conf.arg(help="Put what --show prints between the marks of the file in this one."),
    ] = None,
    rounds: Annotated[int, tyro.conf.arg(help="Turns each contender gets.")] = 31,
    seconds: Annotated[float, tyro.conf.arg(help="How long a turn is.")] = 0.05,
) -> None:
    """Time models of others with and without `gptfast.patch`."""
    console = Console()
    to_markdown = markdown_of_modules if modules else markdown
    if show is not None:
        show_table(to_markdown(json.loads(show.read_text())), show.name, into)
        return
    dtypes = tuple(DTYPES) if dtype == "both" else (dtype,)
    if not set(dtypes) <= set(DTYPES):
        raise SystemExit(f"--dtype must be one of {', '.join(DTYPES)} or both, got {dtype!r}")
    modes = {"no": (False,), "yes": (True,), "both": (False, True)}.get(compile)
    if modes is None:
        raise SystemExit(f"--compile must be no, yes or both, got {compile!r}")
    known = [name for name in (MODULES if modules else FAMILIES) if only is None or only in name]
    if not known:
        raise SystemExit(f"--only: nothing has {only!r} in its name")
    if resume and (json_file is None or modules):
        raise SystemExit("--resume: expected --json FILE, and no --modules")
    there = [Row(**row) for row in read(json_file)] if resume and json_file else []
    here = (str(torch.__version__), torch.get_num_threads())
    for version, threads in {(row.torch_version, row.threads) for row in there} - {here}:
        raise SystemExit(
            f"--resume: expected rows of torch {here[0]} and {here[1]} threads in {json_file}, "
            f"got some of torch {version} and {threads}"
        )
    timed = (row for row in there if row.low is not None and row.again is not None)
    finished = (row for row in timed if row.forced == force)
    done = {(row.family, row.work, row.dtype, row.compiled) for row in finished}
    rows: list[Any] = []
    start = time.monotonic()
    for compiled, kind, name in itertools.product(modes, dtypes, known):
        if modules:
            fresh: list[Any] = list(run_module(name, kind, compiled, rounds, seconds))
        elif {(name, work, kind, compiled) for work in works_of(name, compiled)} <= done:
            continue
        else:
            try:
                fresh = list(run_family(name, kind, compiled, rounds, seconds, console, force))
            except Exception as error:  # the other families are timed all the same
                fresh = list(failed_family(name, kind, compiled, error, force))
        rows += fresh
        if json_file is not None:
            write(json_file, fresh)
        mode = "compiled" if compiled else "eager"
        results = [
            f"{row.work} failed, {row.failed}"
            if getattr(row, "failed", "")
            else f"{row.work} {row.ratio:.2f}"
            for row in fresh
        ]
        console.print(
            f"{time.monotonic() - start:5.0f} s  {name}, {kind}, {mode}: {', '.join(results)}",
            markup=False,
            highlight=False,
        )
    print(to_markdown([asdict(row) for row in rows]))
    if any(getattr(row, "failed", "") for row in rows):
        raise SystemExit("Some works failed: no figure is given for them.")


if __name__ == "__main__":
    tyro.cli(main)
