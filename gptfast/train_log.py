"""What a training run writes into its folder and shows while it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from gptfast import checkpoint
from gptfast.backend import dtype_name
from gptfast.tokenizer import stage
from gptfast.trackers import Tracker
from gptfast.train_config import TrainConfig, changed_settings

if TYPE_CHECKING:
    from gptfast.train import Trainer

__all__ = ["Reporter", "RunFolder", "conclude", "introduce", "perplexity"]

LINE_SECONDS = 10.0  # between lines where standard output is no terminal


class RunFolder:
    """The folder of a run: `train.json`, `metrics.jsonl` and the checkpoints."""

    def __init__(self, path: Path, config: TrainConfig, writes: bool = True) -> None:
        self.path, self.config = path, config
        self.writes = writes  # as one of several processes does
        self.trackers: list[Tracker] = []
        self.begun = False
        self.last_step = 0  # of the rows in metrics.jsonl

    @staticmethod
    def check(path: Path, config: TrainConfig) -> None:
        """Raise FileExistsError where a new run would mix with what is there."""
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
        self.begun = True
        if not self.writes:
            return
        settings = json.dumps(dataclasses.asdict(self.config), indent=2) + "\n"
        metrics = self.path / "metrics.jsonl"
        rows = [row for row in _read_rows(metrics) if row["step"] <= step]
        self.last_step = rows[-1]["step"] if rows else 0
        with self._writing("train.json"):
            _replace(self.path / "train.json", settings)
        with self._writing("metrics.jsonl"):
            _replace(metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.last_step = row["step"]
        if not self.writes:
            return
        with self._writing("metrics.jsonl"), (self.path / "metrics.jsonl").open("a") as opened:
            opened.write(json.dumps(row) + "\n")
        for tracker in self.trackers:
            tracker.row(row)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a full disk names no file
            file = self.path / name
            raise OSError(
                f"cannot write {file}: {error}; {checkpoint.last_good(self.path)}"
            ) from error

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
        self.validating: tuple[TaskID, float] | None = None  # its bar, and when it began
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

    def validated(self, done: int, total: int) -> None:
        """Show how much of the validation split is done."""
        now = time.perf_counter()
        if self.validating is None:
            self.validating = self.bar.add_task("validate", total=total, numbers="validation"), now
            self.printed = now  # a short one needs no line
            return
        task, started = self.validating
        self.bar.update(task, completed=done)
        if self.bar.disable and now - self.printed >= LINE_SECONDS and done < total:
            left = (now - started) * (total - done) / done
            self.print(f"validating {done:,}/{total:,} tokens  {left:,.0f} s left")

    def row(self, row: dict[str, Any]) -> None:
        """Show a row of the metrics."""
        loss, val_loss, rate = row["train_loss"], row["val_loss"], row["tok_per_s"]
        numbers = f"loss {loss:.4f}  ppl {perplexity(loss):.2f}  {rate:,.0f} tok/s"
        self.bar.update(self.task, numbers=numbers)
        due = self.bar.disable and time.perf_counter() - self.printed >= LINE_SECONDS
        if due or val_loss is not None:
            c = self.config
            left = max(0, c.max_iters - row["step"]) * c.step_tokens / rate
            val = "" if val_loss is None else f"  val {val_loss:.4f}"
            self.print(f"step {row['step']:>6}/{c.max_iters}  {numbers}{val}  {left:,.0f} s left")


def perplexity(loss: float) -> float:
    """exp(loss)."""
    return math.exp(min(loss, 700.0))  # a larger loss overflows


def introduce(trainer: Trainer, report: Reporter) -> None:
    """Say what is trained, on what, with what."""
    config, model, dataset = trainer.config, trainer.model, trainer.dataset
    if trainer.resumed_from is not None:
        report.print(f"resuming  {trainer.resumed_from}")
        for change in changed_settings(config):
            report.print(f"changed   {change}")
    elif config.resume:
        report.print(f"resuming  nothing: no checkpoint in {config.out}, so this run starts")
    report.print(
        f"model     {model.num_parameters():,} parameters: n_layer {config.n_layer}, "
        f"n_head {config.n_head}, n_embd {config.n_embd}, block_size {config.block_size}, "
        f"vocab_size {model.config.vocab_size}"
    )
    report.print(f"data      {len(dataset.train):,} tokens, and {len(dataset.val):,} to validate")
    report.print(
        f"device    {trainer.device}, {dtype_name(trainer.dtype)} ({trainer.dtype_reason}), "
        f"backend {config.backend}, {torch.get_num_threads()} threads"
    )
    if trainer.ranks.world_size > 1:
        report.print(
            f"processes {trainer.ranks.world_size}, {config.strategy}: {trainer.micro_batches} of "
            f"a step's {config.accumulation} batches each"
        )
    report.advance(trainer.step)


def conclude(trainer: Trainer, interrupted: signal.Signals | None, report: Reporter) -> None:
    """Say what came of it, where it is, and how to go on."""
    path, out = trainer.folder.path, shlex.quote(trainer.config.out)
    if interrupted is not None:
        report.print(
            f"stopped by {interrupted.name} after step {trainer.step}; "
            f"to go on: gptfast train --out {out} --resume"
        )
        return
    if trainer.val_loss is not None:
        report.print(
            f"\nvalidation loss over the whole split: {trainer.val_loss:.4f} "
            f"(perplexity {perplexity(trainer.val_loss):.2f})"
        )
    if not report.quiet:
        # As it was saved: whole, and with averaged weights where they are kept.
        saved = checkpoint.latest(path)
        model = trainer.model
        if saved is not None and (trainer.fsdp or trainer.average):
            model = checkpoint.load(saved, trainer.device).model
        report.print(f"\nsample:\n{trainer.sample(model)}\n")
    last, best = checkpoint.latest(path), checkpoint.best(path)
    report.print(f"checkpoint: {last}" + ("" if best == last else f", and the best: {best}"))
    report.print(f"to generate: gptfast generate --checkpoint {out}")
