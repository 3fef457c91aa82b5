"""Training: a GPT on a text, from settings to checkpoints.

One step, over A = gradient_accumulation batches of B = batch_size windows of T = block_size tokens:

    g = sum_a (tokens_a / tokens) d loss_a / d w,  then g <- g min(1, grad_clip / |g|)
    w <- AdamW(w, g, lr),  with weight decay on matrices only
    lr: linear warm-up, then half a cosine from learning_rate to min_lr

The run's folder holds `train.json` (the settings), `metrics.jsonl` (a JSON object per logged step)
and checkpoints. Batches, dropout and initial weights depend on the seed alone, and estimates of the
validation loss are made on fixed windows: a resumed run repeats the losses of one that was never
stopped, bit by bit on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from gptfast import checkpoint
from gptfast.backend import dtype_name, use_backend
from gptfast.data import Dataset, read_text, resolve_source
from gptfast.generate import generate_text, pick_device
from gptfast.memory import keep_freed_memory
from gptfast.models import GPT, GPTConfig
from gptfast.ops.adamw import OP as ADAMW
from gptfast.optim import AdamW
from gptfast.tokenizer import Tokenizer
from gptfast.train_config import PRESETS, TrainConfig, changed_settings, read_settings
from gptfast.train_log import Reporter, RunFolder, perplexity

__all__ = [
    "PRESETS",
    "TrainConfig",
    "TrainResult",
    "read_settings",
    "train",
    "validation_loss",
]

SAMPLE_TOKENS = 250


@dataclass(frozen=True)
class TrainResult:
    """What came of a run.

    `val_loss` is that of the whole validation split; None without one, or when interrupted.
    """

    step: int
    train_loss: float | None
    val_loss: float | None
    checkpoint: Path | None
    interrupted: signal.Signals | None = None


def train(config: TrainConfig, *, quiet: bool = False) -> TrainResult:
    """Train a GPT, or continue its training.

    Ctrl-C and SIGTERM finish the step, save a checkpoint and return; a second one stops at once.

    Args:
        config: the settings.
        quiet: print nothing.

    Returns:
        The result; model and tokenizer are in its checkpoint.

    Raises:
        FileExistsError: `config.out` is not empty and `config.resume` is not set.
        FileNotFoundError: no such text or prepared folder.
        ValueError: the data, or the checkpoint to resume from, is damaged or does not fit the
            settings.
        FloatingPointError: the loss or the weights are not finite any more.
        OSError: the folder cannot be written.
        RuntimeError: no such device, or the forced backend cannot run the model.
    """
    folder = RunFolder(Path(config.out), config)
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    # "auto" here would override the environment's GPTFAST_BACKEND.
    backend = use_backend(config.backend) if config.backend != "auto" else contextlib.nullcontext()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), backend:
        trainer = _Trainer(config, folder, device)
        with Reporter(config, quiet) as report:
            _introduce(trainer, report)
            interrupted = trainer.run(report)
            if interrupted is None:
                trainer.finish(report)
        _conclude(trainer, interrupted, report)
    return TrainResult(
        step=trainer.step,
        train_loss=trainer.row.get("train_loss"),
        val_loss=trainer.val_loss,
        checkpoint=checkpoint.latest(folder.path),
        interrupted=interrupted,
    )


class _Trainer:
    """Model, optimizer and data of one run, and its progress."""

    def __init__(self, config: TrainConfig, folder: RunFolder, device: torch.device) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.dataset = _open_dataset(config)
        self.dtype, self.dtype_reason = _pick_dtype(config.dtype, device)
        if config.master_weights and self.dtype != torch.bfloat16:
            raise ValueError(
                "master_weights: dtype must be bfloat16, "
                f"got {dtype_name(self.dtype)} ({self.dtype_reason})"
            )
        self.weights_dtype = self.dtype if config.master_weights else torch.float32
        self.generator = torch.Generator().manual_seed(config.seed)  # of the batches
        torch.manual_seed(config.seed)
        self.step = 0
        self.elapsed = 0.0  # seconds of training; evaluation and saving do not count
        self.row: dict[str, Any] = {}  # of metrics.jsonl, the last one
        self.val_loss: float | None = None  # over the whole split, at the end

        model_config = config.model_config(self.dataset.vocab_size)
        self.resumed_from = checkpoint.latest(folder.path) if config.resume else None
        if self.resumed_from is None:
            self.model = GPT(model_config).to(device, self.weights_dtype)
        else:
            self.model = _load_same(self.resumed_from, model_config, self.dataset.tokenizer, device)
            self.model.to(self.weights_dtype)
        self.parameters = list(self.model.parameters())
        self.model.fused_loss = config.fused_loss
        self.optimizer = _optimizer(self.parameters, config)
        # Gradients in float16 underflow unless the loss is scaled up.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        if self.resumed_from is not None:
            self._restore(self.resumed_from)
        self.model.train()
        self.forward: Callable[..., Any] = self.model
        if config.compile:
            self.forward = torch.compile(self.model)

    def run(self, report: Reporter) -> signal.Signals | None:
        """Train to the last step, or to a signal to stop; returns that signal."""
        config = self.config
        tokens_per_step = config.gradient_accumulation * config.batch_size * config.block_size
        self.folder.make()
        clock, logged = time.perf_counter(), self.step  # of the steps since the last row
        with _stop_signals() as stop:
            while self.step < config.max_iters:
                loss = self._update()
                self.step += 1
                report.advance(self.step)
                if not self.folder.begun:  # not earlier: a run that cannot run leaves no files
                    self.folder.begin(self.step - 1)

                stopping = bool(stop)  # looked at once: a signal may come at any moment
                last = self.step == config.max_iters
                evaluate = last or self.step % config.eval_interval == 0
                save = last or self.step % config.checkpoint_interval == 0
                log = evaluate or save or self.step % config.log_interval == 0
                if not (log or stopping):
                    continue
                train_loss = loss.item()  # waits for the device
                self._check_loss("train", train_loss)
                seconds = time.perf_counter() - clock
                self.elapsed += seconds
                self.row = {
                    "step": self.step,
                    "train_loss": train_loss,
                    "val_loss": self._estimate() if evaluate else None,
                    "tok_per_s": (self.step - logged) * tokens_per_step / seconds,
                    "lr": config.lr(self.step - 1),
                    "elapsed": self.elapsed,
                }
                # The last row waits for the final evaluation; meanwhile the checkpoint has it.
                if log and not last:
                    self.folder.log(self.row)
                    report.row(self.row)
                if save or stopping:
                    self._save()
                if stopping and not last:
                    return stop[0]
                clock, logged = time.perf_counter(), self.step
        return None

    def finish(self, report: Reporter) -> None:
        """Evaluate the whole validation split and write the last row."""
        val = self.dataset.val
        if len(val) > 1:
            self.val_loss = self._whole_split()
        self.row["val_loss"] = self.val_loss
        if not self.folder.begun:  # resumed after the last step
            self.folder.begin(self.step)
        if self.folder.last_step < self.step:
            self.folder.log(self.row)
        report.row(self.row)

    def _update(self) -> torch.Tensor:
        """One step of the optimizer; returns the mean loss of its tokens, on the device."""
        config = self.config
        lr = config.lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        for _ in range(config.gradient_accumulation):
            x, y = self._batch("train", self.generator)
            with self._autocast():
                _, loss = self.forward(x, y, loss_only=True)
            # Its share of the step's tokens; all batches have as many.
            loss = loss / config.gradient_accumulation
            self.scaler.scale(loss).backward()
            total += loss.detach()
        if config.grad_clip > 0 and not isinstance(self.optimizer, AdamW):  # which clips by itself
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _batch(
        self, split: Literal["train", "val"], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.dataset.batch(split, self.config.batch_size, self.config.block_size, generator)
        if self.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == self.weights_dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @torch.no_grad()
    def _estimate(self) -> float | None:
        """Validation loss over `eval_iters` batches, or over the whole split where that is less."""
        config = self.config
        tokens = config.eval_iters * config.batch_size * config.block_size
        if len(self.dataset.val) <= 1:
            return None
        if len(self.dataset.val) <= max(tokens, config.block_size):
            return self._whole_split()
        generator = torch.Generator().manual_seed(config.seed)
        total = torch.zeros((), device=self.device)
        self.model.eval()
        for _ in range(config.eval_iters):
            x, y = self._batch("val", generator)
            with self._autocast():
                total += self.forward(x, y, loss_only=True)[1]
        self.model.train()
        loss = total.item() / config.eval_iters
        self._check_loss("validation", loss)
        return loss

    def _whole_split(self) -> float:
        self.model.eval()
        with self._autocast():
            loss = validation_loss(
                partial(self.forward, loss_only=True),
                self.dataset.val,
                self.config.batch_size,
                self.config.block_size,
                self.device,
            )
        self.model.train()
        self._check_loss("validation", loss)
        return loss

    def _check_loss(self, kind: str, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the {kind} loss is {loss} at step {self.step}, so training stops "
                f"(a smaller learning_rate may help); {checkpoint.last_good(self.folder.path)}"
            )

    def _save(self) -> None:
        generators = {"data": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        self.folder.synchronise()
        checkpoint.save(
            self.folder.path,
            self.step,
            self.model,
            self.dataset.tokenizer,
            val_loss=self.row["val_loss"],
            training={
                "train_tokens": len(self.dataset.train),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "generators": generators,
                "row": self.row,
            },
        )

    def _restore(self, path: Path) -> None:
        state = checkpoint.load_training(path)
        file = path / "training.pt"
        settings = [
            {key: group[key] for key in ("betas", "weight_decay")}
            for group in self.optimizer.param_groups
        ]
        try:
            self.row = dict(state["row"])
            self.step, self.elapsed = int(self.row["step"]), float(self.row["elapsed"])
            train_tokens = state["train_tokens"]
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty unless it was float16
                self.scaler.load_state_dict(state["scaler"])
            self.generator.set_state(state["generators"]["data"])
            torch.set_rng_state(state["generators"]["torch"])
            if self.device.type == "cuda" and "cuda" in state["generators"]:
                torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{file}: expected the training state of this model: {error!r:.300}"
            ) from error
        masters = any("master" in s for s in state["optimizer"]["state"].values())
        if masters != (wanted := self.config.master_weights):
            raise ValueError(
                f"{file}: expected master_weights {wanted} by the settings, got {masters}"
            )
        # The optimizer does not look at shapes before its next step.
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                given = getattr(moments.get(name), "shape", None)
                if given != (shape := parameter.shape):
                    raise ValueError(f"{file}: expected {name} of {tuple(shape)}, got {given}")
        if train_tokens != len(self.dataset.train):
            raise ValueError(
                f"{file}: expected to go on with its {train_tokens} training tokens, "
                f"got {len(self.dataset.train)}"
            )
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)  # the settings may have changed


@torch.no_grad()
def validation_loss(
    model: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    tokens: npt.NDArray[np.unsignedinteger[Any]],
    batch_size: int,
    block_size: int,
    device: torch.device | str = "cpu",
) -> float:
    """Mean loss over all tokens but the first, each predicted once, in windows that do not overlap.

    Args:
        model: a `GPT` in evaluation mode, or anything that is called like one.
        tokens: (N,) token ids, N >= 2.
        batch_size: windows at a time.
        block_size: tokens in a window; the last one may be shorter.
        device: where the model is.

    Raises:
        ValueError: fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"validation: expected at least 2 tokens, got {len(tokens)}")
    count = len(tokens) - 1  # targets
    total = torch.zeros((), dtype=torch.float64, device=device)
    start = 0
    while start < count:
        rows = max(1, min(batch_size, (count - start) // block_size))
        length = min(block_size, count - start)
        window = np.asarray(tokens[start : start + rows * length + 1]).astype(np.int64)
        both = torch.from_numpy(window).to(device)
        x, y = both[:-1].view(rows, length), both[1:].view(rows, length)
        loss = model(x, y)[1]
        if loss is not None:
            total += loss.double() * y.numel()
        start += y.numel()
    return total.item() / count


def _open_dataset(config: TrainConfig) -> Dataset:
    if config.data is not None:
        return Dataset.open(config.data)
    text = read_text(resolve_source(config.file))
    return Dataset.in_memory(text, config.tokenizer, config.val_fraction)


def _pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cpu":
        return torch.float32, "auto: the safe choice on a CPU"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "auto: this GPU has it"
    return torch.float16, "auto: this GPU has no bfloat16"


def _optimizer(
    parameters: list[torch.nn.Parameter], config: TrainConfig
) -> AdamW | torch.optim.AdamW:
    """AdamW: ours, which clips as well, where it has a kernel; else PyTorch's fused one."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    settings: Any = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    if config.master_weights or ADAMW.has_kernel(parameters[0]):
        max_norm, masters = config.grad_clip or None, config.master_weights
        return AdamW(groups, **settings, max_norm=max_norm, master_weights=masters)
    return torch.optim.AdamW(groups, **settings, fused=True)


def _load_same(path: Path, expected: GPTConfig, tokenizer: Tokenizer, device: torch.device) -> GPT:
    """The model of a checkpoint, after comparing its sizes and tokenizer with those of the run."""
    loaded = checkpoint.load(path, device)
    config, tokens = path / "config.json", path / "tokenizer.json"
    given = dataclasses.asdict(loaded.model.config)
    for name, value in dataclasses.asdict(expected).items():
        if given[name] != value:
            raise ValueError(
                f"{config}: expected {name} {value} by the settings, got {given[name]}"
            )
    if loaded.tokenizer.to_dict() != tokenizer.to_dict():
        raise ValueError(f"{tokens}: expected the tokenizer of the data, got another")
    return loaded.model


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one acts as usual."""
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        restore()

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()


def _introduce(trainer: _Trainer, report: Reporter) -> None:
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
    report.advance(trainer.step)


def _conclude(trainer: _Trainer, interrupted: signal.Signals | None, report: Reporter) -> None:
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
        pieces = generate_text(
            trainer.model,
            trainer.dataset.tokenizer,
            "",
            SAMPLE_TOKENS,
            temperature=0.8,
            generator=torch.Generator().manual_seed(trainer.config.seed),
        )
        report.print(f"\nsample:\n{''.join(pieces)}\n")
    last, best = checkpoint.latest(path), checkpoint.best(path)
    report.print(f"checkpoint: {last}" + ("" if best == last else f", and the best: {best}"))
    report.print(f"to generate: gptfast generate --checkpoint {out}")
