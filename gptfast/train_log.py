"""What a training run writes into its folder and shows while it goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from gptfast import checkpoint
from gptfast.tokenizer import stage
from gptfast.train_config import TrainConfig

__all__ = ["Reporter", "RunFolder", "perplexity"]

LINE_SECONDS = 10.0  # between lines where standard output is no terminal


class RunFolder:
    """The folder of a run: `train.json`, `metrics.jsonl` and the checkpoints."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path, self.config = path, config
        self.begun = False
        self.last_step = 0  # of the rows in metrics.jsonl
        if not config.resume and path.is_dir() and any(path.iterdir()):
            raise FileExistsError(
                f"{path}: expected a new or empty folder, got one with files; add --resume to "
                "continue its run, or choose another --out"
            )

    def make(self) -> None:
        """Make the folder, so that one that cannot be written is known before any work is done."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path, os.W_OK):
            raise PermissionError(f"{self.path}: expected a folder that can be written")

    def begin(self, step: int) -> None:
        """Write the settings, and drop the rows after `step`."""
        settings = json.dumps(dataclasses.asdict(self.config), indent=2) + "\n"
        _replace(self.path / "train.json", settings)
        metrics = self.path / "metrics.jsonl"
        rows = [row for row in _read_rows(metrics) if row["step"] <= step]
        self.last_step = rows[-1]["step"] if rows else 0
        _replace(metrics, "".join(json.dumps(row) + "\n" for row in rows))
        self.begun = True

    def log(self, row: dict[str, Any]) -> None:
        """Append a row."""
        file = self.path / "metrics.jsonl"
        try:
            with file.open("a") as opened:
                opened.write(json.dumps(row) + "\n")
        except OSError as error:  # a full disk names no file
            raise OSError(
                f"cannot write {file}: {error}; {checkpoint.last_good(self.path)}"
            ) from error
        self.last_step = row["step"]

    def synchronise(self) -> None:
        """Have the rows on the disk before a checkpoint that relies on them."""
        with (self.path / "metrics.jsonl").open("a") as file:
            os.fsync(file.fileno())


def _read_rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    rows = []
    # What follows the last line's end was cut short by a kill.
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f"{file}, line {number}: expected a JSON object, got {line!r:.80}")
        rows.append(row)
    return rows


def _replace(file: Path, text: str) -> None:
    temporary = stage(file, text.encode())
    os.replace(temporary, file)


class Reporter:
    """What a run prints: a progress bar on a terminal, else a line now and then."""

    def __init__(self, config: TrainConfig, quiet: bool) -> None:
        self.config, self.quiet = config, quiet
        self.printed = -math.inf  # when the last line was
        self.bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            disable=quiet or not sys.stdout.isatty(),
        )

    def __enter__(self) -> Reporter:
        self.bar.start()
        self.task = self.bar.add_task("train", total=self.config.max_iters, numbers="")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def print(self, text: str = "") -> None:
        """Print a line, above the bar where there is one."""
        if self.quiet:
            return
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self.printed = time.perf_counter()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=step)

    def row(self, row: dict[str, Any]) -> None:
        """Show a row of the metrics."""
        loss, val_loss, rate = row["train_loss"], row["val_loss"], row["tok_per_s"]
        numbers = f"loss {loss:.4f}  ppl {perplexity(loss):.2f}  {rate:,.0f} tok/s"
        self.bar.update(self.task, numbers=numbers)
        due = self.bar.disable and time.perf_counter() - self.printed >= LINE_SECONDS
        if due or val_loss is not None:
            c = self.config
            tokens_per_step = c.gradient_accumulation * c.batch_size * c.block_size
            left = max(0, c.max_iters - row["step"]) * tokens_per_step / rate
            val = "" if val_loss is None else f"  val {val_loss:.4f}"
            self.print(f"step {row['step']:>6}/{c.max_iters}  {numbers}{val}  {left:,.0f} s left")


def perplexity(loss: float) -> float:
    """exp(loss)."""
    return math.exp(min(loss, 700.0))  # a larger loss overflows
