"""The rows of the benchmark, the file they are kept in, and the table for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.timing import OURS

WARMED = " (warmed)"  # ends the name of a contender that ran on the warmed allocator


@dataclass(frozen=True)
class Row:
    """One contender on one work.

    median_us, p20, p80 are microseconds per call. gbps and gflops count the least that the work
    must move or compute, whatever the contender did. ratio_to_best_peer is the time of the fastest
    PyTorch on the same allocator over this one's. extra_mb is by how much resident memory rises
    during a call; for a training step, the weights and the optimizer's state are in it.
    """

    op: str
    shape: str
    dtype: str
    passes: str  # "pass" in the file
    threads: int
    contender: str
    median_us: float
    p20: float
    p80: float
    gbps: float | None
    gflops: float | None
    pct_of_ceiling: float
    ratio_to_best_peer: float | None
    extra_mb: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two rows share."""
        return (self.op, self.shape, self.dtype, self.passes, self.threads, self.contender)

    def to_json(self) -> dict[str, Any]:
        """The row with the names of the file."""
        return {"pass" if name == "passes" else name: v for name, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        """The row from `to_json`."""
        values = {"passes" if name == "pass" else name: v for name, v in values.items()}
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def read(path: Path) -> list[Row]:
    """The rows of a file, none where there is no such file."""
    return [Row.from_json(v) for v in json.loads(path.read_text())] if path.exists() else []


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, in the place of those of the file with the same key."""
    kept = {row.key: row for row in (*read(path), *rows)}
    path.write_text(json.dumps([row.to_json() for row in kept.values()], indent=1) + "\n")


COLUMNS: tuple[str, ...] = ("work", "dtype", "pass", "threads", "ms", "ratio", "warmed", "ceiling")
COLUMNS += ("warmed", "MB", "peers' MB")
NUMBERS_FROM = COLUMNS.index("threads")


def table(rows: Sequence[Row]) -> Table:
    """gptfast's rows: its time, its ratio to the best PyTorch and its share of the ceiling."""
    found = Table(
        title="gptfast on this CPU: time, PyTorch's best over it, and percent of what the machine "
        "can do; with the allocator as found, and warmed"
    )
    for i, name in enumerate(COLUMNS):
        found.add_column(name, justify="left" if i < NUMBERS_FROM else "right")
    for cells in _cells(rows):
        found.add_row(*cells)
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The same for a page of the documentation."""
    rule = "|".join("---" if i < NUMBERS_FROM else "--:" for i in range(len(COLUMNS)))
    lines = [COLUMNS, *_cells(rows)]
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, f"|{rule}|", *body])


def _cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """A line of the table for each row of gptfast with the allocator as found."""
    by_key = {row.key: row for row in rows}
    for row in rows:
        if row.contender != OURS:
            continue
        warmed = by_key.get((*row.key[:-1], OURS + WARMED))
        peers = [
            r.extra_mb
            for r in rows
            if r.key[:-1] == row.key[:-1] and not r.contender.startswith(OURS)
        ]
        yield (
            row.op,
            row.dtype,
            row.passes,
            str(row.threads),
            f"{row.median_us / 1e3:,.2f}",
            _ratio(row),
            _ratio(warmed),
            _share(row),
            _share(warmed),
            f"{row.extra_mb:,.0f}",
            f"{min(peers):,.0f}" if peers else "",
        )


def _ratio(row: Row | None) -> str:
    return "" if row is None or row.ratio_to_best_peer is None else f"{row.ratio_to_best_peer:.2f}"


def _share(row: Row | None) -> str:
    return "" if row is None else f"{row.pct_of_ceiling:.0f} %"
