"""Where the metrics of a run go besides `metrics.jsonl`: TensorBoard, W&B, a picture."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from gptfast.tokenizer import stage

Row = dict[str, Any]  # of metrics.jsonl


class Tracker(Protocol):
    """Takes the rows of a run."""

    def row(self, row: Row) -> None:
        """Take a row."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def make_trackers(
    folder: Path, settings: Row, *, tensorboard: bool, wandb: str | None, plot: bool
) -> list[Tracker]:
    """The trackers that a run asks for.

    Raises:
        ImportError: the library of one is not installed.
    """
    trackers: list[Tracker] = []
    if tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard"))
    if wandb is not None:
        trackers.append(WeightsAndBiases(wandb, folder, settings))
    if plot:
        trackers.append(Curve(folder))
    return trackers


def _numbers(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}


class TensorBoard:
    """Scalars in TensorBoard's files."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("--tensorboard needs tensorboard: pip install tensorboard") from error
        self.writer = SummaryWriter(str(folder))

    def row(self, row: Row) -> None:
        """Add the numbers of a row at its step."""
        for name, value in _numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WeightsAndBiases:
    """A run of a project of Weights & Biases; a resumed run goes on with it."""

    def __init__(self, project: str, folder: Path, settings: Row) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("--wandb needs wandb: pip install wandb") from error
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "wandb.id"
        if not file.exists():
            file.write_text(secrets.token_hex(8))
        self.run = wandb.init(
            project=project, name=folder.name, id=file.read_text(), resume="allow", config=settings
        )

    def row(self, row: Row) -> None:
        """Log the numbers of a row at its step."""
        self.run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        """Send what is left."""
        self.run.finish()


class Curve:
    """`curve.png` in the run's folder, drawn anew at each estimate of the validation loss."""

    def __init__(self, folder: Path) -> None:
        _matplotlib()
        self.folder = folder

    def row(self, row: Row) -> None:
        """Draw the curve of the rows up to this one."""
        if row["val_loss"] is not None:
            draw_curves([self.folder], self.folder / "curve.png")

    def close(self) -> None:
        """Draw it to the end."""
        if (self.folder / "metrics.jsonl").exists():
            draw_curves([self.folder], self.folder / "curve.png")


def draw_curves(folders: Sequence[Path], out: Path) -> None:
    """Draw training and validation loss of runs over their steps.

    Args:
        folders: of the runs.
        out: the picture, in the format of its suffix.

    Raises:
        FileNotFoundError: a folder without `metrics.jsonl`.
        ValueError: no rows, or damaged ones; or an unknown format.
        ImportError: matplotlib is not installed.
    """
    Figure = _matplotlib()
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, folder in enumerate(folders):
        rows = _read_rows(folder / "metrics.jsonl")
        for name, style in (("train_loss", "-"), ("val_loss", "o--")):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                label = f"{folder.name}: {name.removesuffix('_loss')} {points[-1][1]:.4f}"
                axes.plot(
                    *zip(*points, strict=True), style, color=f"C{number}", label=label,
                    alpha=0.5 if name == "train_loss" else 1, markersize=3,
                )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = stage(out, b"")  # beside it, so that a viewer never sees half a picture
    try:
        figure.savefig(temporary, format=out.suffix.removeprefix(".") or "png", dpi=120)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _matplotlib() -> Any:
    """Its Figure, which draws without a window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a curve needs matplotlib: pip install 'gptfast-kernels[plot]'"
        ) from error
    return Figure


def _read_rows(file: Path) -> list[Row]:
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected the metrics of a run, got no such file")
    rows = []
    for line in file.read_text().split("\n")[:-1]:
        with contextlib.suppress(ValueError):  # the last may be written at this moment
            rows.append(json.loads(line))
    if not rows:
        raise ValueError(f"{file}: expected rows of metrics, got none")
    return rows
