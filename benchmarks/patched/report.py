"""The rows of the benchmark, the file they are kept in, and the tables of the documentation."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """A line of the table: seconds of the unpatched and of the patched model.

    `ratio` says how many times faster the patched model is: the median over the rounds, which lies
    from `low` to `high` with 95 % confidence; None where there were too few rounds to say so.
    again: the same ratio for one more copy of the unpatched model: what chance does.
    What failed has no figures. forced: every op, also where it was measured to be slower.
    """

    family: str
    work: str
    dtype: str
    compiled: bool
    threads: int = field(default_factory=torch.get_num_threads)
    replaced: int = 0
    unpatched: float | None = None
    patched: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    again: float | None = None
    torch_version: str = str(torch.__version__)
    failed: str = ""  # what went wrong
    forced: bool = False


@dataclass(frozen=True)
class ModuleRow:
    """A module of one op on an input of so many elements: seconds, patched and not."""

    op: str
    work: str
    dtype: str
    compiled: bool
    elements: int
    unpatched: float
    patched: float

    @property
    def ratio(self) -> float:
        """How many times faster the patched module is."""
        return self.unpatched / self.patched


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows of a file: a line for each family and work, eager beside compiled."""
    lines: dict[tuple[str, ...], dict[bool, Row]] = {}
    for given in rows:
        row = Row(**given)
        lines.setdefault((row.family, row.dtype, row.work), {})[row.compiled] = row
    table = [
        "| family | dtype | work | modules | eager, ms | patched, ms | ratio | copy "
        "| compiled, ms | patched, ms | ratio | copy |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (family, dtype, work), by_mode in lines.items():
        cells = [family, dtype, work, str(max(row.replaced for row in by_mode.values()))]
        for mode in (False, True):
            cells += _figures(by_mode.get(mode))
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def _figures(row: Row | None) -> list[str]:
    """Milliseconds of both models, their ratio, and that of the unpatched model to its copy."""
    if row is None or row.unpatched is None or row.patched is None or row.ratio is None:
        return ["" if row is None else "failed", "", "", ""]
    ratio = f"{row.ratio:.2f}"
    ratio = f"**{ratio}**" if float(ratio) < 0.97 else ratio
    if row.low is not None:
        ratio += f" ({row.low:.2f} to {row.high:.2f})"
    again = "" if row.again is None else f"{row.again:.2f}"
    return [f"{1e3 * row.unpatched:.1f}", f"{1e3 * row.patched:.1f}", ratio, again]


def markdown_of_modules(rows: list[dict[str, Any]]) -> str:
    """The ratios of a file of modules: a line for each op and work, a column for each size."""
    lines: dict[tuple[str, ...], dict[int, float]] = {}
    for given in rows:
        row = ModuleRow(**given)
        mode = "compiled" if row.compiled else "eager"
        lines.setdefault((row.op, row.dtype, mode, row.work), {})[row.elements] = row.ratio
    sizes = sorted({size for line in lines.values() for size in line})
    head = " | ".join(f"{size:,}" for size in sizes)
    table = [
        f"| op | dtype | mode | work | {head} |",
        "|---|---|---|---" + "|--:" * len(sizes) + "|",
    ]
    for key, line in lines.items():
        ratios = (f"{line[size]:.2f}" if size in line else "" for size in sizes)
        table.append(f"| {' | '.join((*key, *ratios))} |")
    return "\n".join(table)


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, none if it is not there."""
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    return rows


def write(file: Path, rows: list[Any]) -> None:
    """Put rows into a JSON file, in place of those of the same work that are there.

    One that failed replaces no figures: a mishap would lose what took an hour.
    """
    fresh = [asdict(row) for row in rows]
    figures = {"unpatched", "patched", "ratio", "low", "high", "again"}
    figures |= {"replaced", "threads", "torch_version", "failed"}

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(value for name, value in row.items() if name not in figures)

    kept = [asdict(Row(**row)) if "family" in row else row for row in read(file)]
    known = {key(row) for row in kept if row["unpatched"] is not None}
    fresh = [row for row in fresh if row["unpatched"] is not None or key(row) not in known]
    replaced = {key(row) for row in fresh}
    kept = [row for row in kept if key(row) not in replaced]
    lines = ",\n".join(json.dumps(row) for row in [*kept, *fresh])
    unfinished = file.with_name(f"{file.name}.tmp")
    unfinished.write_text(f"[\n{lines}\n]\n")
    os.replace(unfinished, file)  # whoever stops this finds the rows of before, or all
