"""Training: a GPT on a text, from settings to checkpoints.

One step, over A = gradient_accumulation batches of B = batch_size windows of T = block_size tokens:

    g = sum_a (tokens_a / tokens) d loss_a / d w,  then g <- g min(1, grad_clip / |g|)
    w <- AdamW(w, g, lr),  with weight decay on matrices only
    lr: linear warm-up, then the schedule: half a cosine from learning_rate to min_lr, say

Of several processes (`gptfast.distributed`) each computes its share of the A batches; they do the
same step as one process with the same settings.

The run's folder holds `train.json` (the settings), `metrics.jsonl` (a JSON object per logged step)
and checkpoints. Batches, dropout and initial weights depend on the seed alone, and estimates of the
validation loss are made on fixed windows: a resumed run repeats the losses of one that was never
stopped, bit by bit on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from gptfast import checkpoint
from gptfast.backend import use_backend
from gptfast.data import Loader, document_bounds
from gptfast.distributed import ProcessLostError, Ranks, is_lost, processes, shard, whole
from gptfast.evaluate import hellaswag, read_hellaswag
from gptfast.generate import generate_text, pick_device
from gptfast.memory import keep_freed_memory
from gptfast.models import GPT
from gptfast.optim import AdamW
from gptfast.stopping import stop_signals
from gptfast.tokenizer import GPT2Tokenizer
from gptfast.trackers import make_trackers
from gptfast.train_config import PRESETS, TrainConfig, read_settings
from gptfast.train_log import Reporter, RunFolder, conclude, introduce
from gptfast.train_setup import (
    check_settings,
    load_same,
    make_optimizers,
    open_dataset,
    pick_dtype,
    recompute,
)
from gptfast.train_state import restore_state, save_state
from gptfast.validation import validation_loss

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
        ProcessLostError: another process of the run was lost, or did not answer in time.
    """
    with processes(config.rank_timeout) as ranks:
        try:
            return _train(config, ranks, quiet or not ranks.first)
        except RuntimeError as error:
            if ranks.world_size == 1 or not is_lost(error):
                raise
            raise ProcessLostError(
                f"rank {ranks.rank} of {ranks.world_size}: another process was lost, or did not "
                f"answer within rank_timeout {config.rank_timeout:g} s, so training stops; "
                f"{checkpoint.last_good(config.out)} ({str(error).splitlines()[0]:.200})"
            ) from error


def _train(config: TrainConfig, ranks: Ranks, quiet: bool) -> TrainResult:
    path = Path(config.out)
    ranks.on_first(lambda: RunFolder.check(path, config))
    folder = RunFolder(path, config, writes=ranks.first)
    device = pick_device(config.device)
    if device.type == "cuda" and ranks.world_size > 1:
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    # "auto" here would override the environment's GPTFAST_BACKEND.
    backend = use_backend(config.backend) if config.backend != "auto" else contextlib.nullcontext()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), backend:
        trainer = Trainer(config, folder, device, ranks)
        with Reporter(config, quiet) as report, _tracked(config, folder, ranks), trainer:
            introduce(trainer, report)
            interrupted = trainer.run(report)
            if interrupted is None:
                trainer.finish(report)
        if ranks.first:
            conclude(trainer, interrupted, report)
    return TrainResult(
        step=trainer.step,
        train_loss=trainer.row.get("train_loss"),
        val_loss=trainer.val_loss,
        checkpoint=checkpoint.latest(folder.path),
        interrupted=interrupted,
    )


@contextlib.contextmanager
def _tracked(config: TrainConfig, folder: RunFolder, ranks: Ranks) -> Iterator[None]:
    """Send the rows of the folder to the trackers that are asked for."""
    if ranks.first:
        folder.trackers = make_trackers(
            folder.path,
            dataclasses.asdict(config),
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            plot=config.plot,
        )
    try:
        yield
    finally:
        for tracker in folder.trackers:
            tracker.close()


class Trainer:
    """Model, optimizers and data of one run, and its progress."""

    def __init__(
        self, config: TrainConfig, folder: RunFolder, device: torch.device, ranks: Ranks
    ) -> None:
        self.config, self.folder, self.device, self.ranks = config, folder, device, ranks
        self.dataset = open_dataset(config)
        self.dtype, self.dtype_reason = pick_dtype(config.dtype, device)
        self.fsdp = config.strategy == "fsdp" and ranks.world_size > 1
        check_settings(
            config, self.dataset.tokenizer, self.dtype, self.dtype_reason, ranks.world_size
        )
        self.micro_batches = config.accumulation // ranks.world_size  # of this process in a step
        self.weights_dtype = self.dtype if config.master_weights else torch.float32
        self.generator = torch.Generator().manual_seed(config.seed)  # of the batches
        torch.manual_seed(config.seed)
        self.step = 0
        self.elapsed = 0.0  # seconds of training; evaluation and saving do not count
        self.row: dict[str, Any] = {}  # of metrics.jsonl, the last one
        self.val_loss: float | None = None  # over the whole split, at the end
        self.hellaswag_items = (
            [] if config.hellaswag is None
            else read_hellaswag(config.hellaswag, config.hellaswag_items)
        )  # fmt: skip
        self.loader = self._make_loader() if config.sampling == "epochs" else None

        model_config = config.model_config(self.dataset.vocab_size)
        self.resumed_from = checkpoint.latest(folder.path) if config.resume else None
        if self.resumed_from is None:
            self.model = GPT(model_config).to(device, self.weights_dtype)
        else:
            self.model = load_same(self.resumed_from, model_config, self.dataset.tokenizer, device)
            self.model.to(self.weights_dtype)
        self.model.fused_loss = config.fused_loss
        blocks = list(cast(torch.nn.ModuleList, self.model.transformer["h"]))
        if config.recompute:
            recompute(blocks)
        if self.fsdp:
            shard(self.model, blocks, self.dtype)
        self.parameters = list(self.model.parameters())
        self.average: list[torch.Tensor] = []
        if config.ema:
            self.average = [p.detach().clone() for p in self.parameters]
        self.optimizers = make_optimizers(self.model, self.parameters, config, self.fsdp)
        # Gradients in float16 underflow unless the loss is scaled up.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        if ranks.world_size > 1:  # of dropout, which each process draws for itself
            torch.manual_seed(config.seed + ranks.rank)
        if self.resumed_from is not None:
            restore_state(self, self.resumed_from)
        self.model.train()
        self.forward: Callable[..., Any] = self.model
        self.ddp: torch.nn.parallel.DistributedDataParallel | None = None
        if ranks.world_size > 1 and not self.fsdp:
            self.forward = self.ddp = torch.nn.parallel.DistributedDataParallel(self.model)
        if config.compile:
            self.forward = torch.compile(self.forward)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.loader is not None:
            self.loader.close()

    def _make_loader(self) -> Loader:
        config, ranks = self.config, self.ranks
        return Loader(
            self.dataset,
            "train",
            config.batch_size,
            config.block_size,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            pin_memory=self.device.type == "cuda",
        )

    def run(self, report: Reporter) -> signal.Signals | None:
        """Train to the last step, or to a signal to stop; returns that signal."""
        config, ranks = self.config, self.ranks
        ranks.on_first(self.folder.make)
        clock, logged = time.perf_counter(), self.step  # of the steps since the last row
        with stop_signals() as stop:
            while self.step < config.max_iters:
                loss = self._update()
                self.step += 1
                report.advance(self.step)
                if not self.folder.begun:  # not earlier: a run that cannot run leaves no files
                    self.folder.begin(self.step - 1)

                # Looked at once: a signal may come at any moment, and to one process alone.
                stopping = ranks.largest(stop[0] if stop else 0)
                last = self.step == config.max_iters
                evaluate = last or self.step % config.eval_interval == 0
                save = last or self.step % config.checkpoint_interval == 0
                log = evaluate or save or self.step % config.log_interval == 0
                if not (log or stopping):
                    continue
                # Waits for the device.
                train_loss = ranks.total(loss.item()) / ranks.world_size
                self._check_loss("train", train_loss)
                seconds = time.perf_counter() - clock
                self.elapsed += seconds
                self.row = {
                    "step": self.step,
                    "train_loss": train_loss,
                    "val_loss": None,
                    "tok_per_s": (self.step - logged) * config.step_tokens / seconds,
                    "lr": config.lr(self.step - 1),
                    "elapsed": self.elapsed,
                }
                if evaluate:
                    with self.averaged():
                        self.row["val_loss"] = self._estimate()
                        self.row.update(self._scores(report))
                # The last row waits for the final evaluation; meanwhile the checkpoint has it.
                if log and not last:
                    self.folder.log(self.row)
                    report.row(self.row)
                if save or stopping:
                    save_state(self)
                if stopping and not last:
                    return signal.Signals(stopping)
                clock, logged = time.perf_counter(), self.step
        return None

    def finish(self, report: Reporter) -> None:
        """Evaluate the whole validation split and write the last row."""
        val = self.dataset.val
        if len(val) > 1:
            with self.averaged():
                self.val_loss = self._whole_split(report.validated)
        self.row["val_loss"] = self.val_loss
        if not self.folder.begun:  # resumed after the last step
            self.folder.begin(self.step)
        if self.folder.last_step < self.step:
            self.folder.log(self.row)
        report.row(self.row)

    def _update(self) -> torch.Tensor:
        """One step of the optimizers; returns the mean loss of this process's tokens."""
        config = self.config
        lr = config.lr(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        total = torch.zeros((), device=self.device)
        for n in range(self.micro_batches):
            x, y = self._train_batch()
            with self._synchronised(n == self.micro_batches - 1), self._autocast():
                # Its share of the step's tokens; all batches have as many.
                loss = self._loss(self.forward, x, y) / self.micro_batches
            with self._synchronised(n == self.micro_batches - 1):
                self.scaler.scale(loss).backward()
            total += loss.detach()
        clips = isinstance(self.optimizers[0], AdamW)  # by itself
        if config.grad_clip > 0 and not clips:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.average:
            torch._foreach_lerp_(
                self.average, [p.detach() for p in self.parameters], 1 - config.ema
            )
        return total

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Let the processes add up their gradients behind a step's last batch alone."""
        if self.fsdp:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        if self.ddp is None or last:
            return contextlib.nullcontext()
        return self.ddp.no_sync()

    def _loss(self, model: Callable[..., Any], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        inputs = {}
        if self.config.separate_documents:
            first_token = cast(GPT2Tokenizer, self.dataset.tokenizer).end_of_text
            inputs["documents"] = document_bounds(x, first_token).to(self.device)
        if self.device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        return model(x, y, loss_only=True, **inputs)[1]

    def _train_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch of this process, on the CPU."""
        if self.loader is not None:
            return self.loader.next()
        # All processes draw all batches, and each takes its own.
        batches = [self._draw("train", self.generator) for _ in range(self.ranks.world_size)]
        return batches[self.ranks.rank]

    def _draw(
        self, split: Literal["train", "val"], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.dataset.batch(split, self.config.batch_size, self.config.block_size, generator)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == self.weights_dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the average of its weights, where one is kept."""
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def settle(self) -> None:
        """Let go of weights that fsdp keeps together behind a forward without a backward."""
        if self.fsdp:
            self.model.reshard()  # type: ignore[operator]

    @torch.no_grad()
    def _swap_average(self) -> None:
        self.settle()
        for parameter, average in zip(self.parameters, self.average, strict=bool(self.average)):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def _estimate(self) -> float | None:
        """Validation loss over `eval_iters` batches, or over the whole split where that is less."""
        config, ranks = self.config, self.ranks
        tokens = config.eval_iters * config.batch_size * config.block_size
        if len(self.dataset.val) <= 1:
            return None
        if len(self.dataset.val) <= max(tokens, config.block_size):
            return self._whole_split()
        generator = torch.Generator().manual_seed(config.seed)
        total = torch.zeros((), device=self.device)
        self.model.eval()
        # As many batches for each process, since fsdp needs all of them in each forward.
        for n in range(math.ceil(config.eval_iters / ranks.world_size) * ranks.world_size):
            x, y = self._draw("val", generator)
            if n % ranks.world_size == ranks.rank:
                with self._autocast():
                    loss = self._evaluated(x, y)
                if n < config.eval_iters:
                    total += loss
        self.model.train()
        loss_ = ranks.total(total.item()) / config.eval_iters
        self._check_loss("validation", loss_)
        return loss_

    def _evaluated(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # Not by way of DDP, which would have to be called by all.
        return self._loss(self.model if self.ddp is not None else self.forward, x, y)

    def _whole_split(self, on_done: Callable[[int, int], None] = lambda done, total: None) -> float:
        self.model.eval()
        with self._autocast():
            loss = validation_loss(
                lambda x, y: (None, self._evaluated(x, y)),
                self.dataset.val,
                self.config.batch_size,
                self.config.block_size,
                self.device,
                self.ranks,
                on_done,
            )
        self.model.train()
        self._check_loss("validation", loss)
        return loss

    def _scores(self, report: Reporter) -> dict[str, float]:
        """What is measured at an estimate besides the loss; and a sample, where one is due."""
        config = self.config
        sample = config.sample_interval and self.step % config.sample_interval == 0
        if not (self.hellaswag_items or sample):
            return {}
        model = self._whole_model()
        if model is None:
            return {}
        scores = {}
        model.eval()
        if self.hellaswag_items:
            with self._autocast():
                found = hellaswag(model, self.dataset.tokenizer, self.hellaswag_items)
            scores["hellaswag"] = found["acc_norm"]
        if sample:
            report.print(f"\nsample after step {self.step}:\n{self.sample(model)}\n")
        model.train()
        return scores

    def sample(self, model: GPT) -> str:
        """A text by a model, always of the same random numbers."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return "".join(
            generate_text(
                model,
                self.dataset.tokenizer,
                "",
                SAMPLE_TOKENS,
                temperature=0.8,
                generator=generator,
            )
        )

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The model's weights as they are, put together; all processes must call this."""
        self.settle()
        return {name: whole(p.detach()) for name, p in self.model.named_parameters()}

    def _whole_model(self) -> GPT | None:
        """A model that is not split, on rank 0; all processes must call this."""
        if not self.fsdp:
            return self.model if self.ranks.first else None
        weights = self.whole_weights()
        if not self.ranks.first:
            return None
        model = GPT(self.model.config).to(self.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        return model

    def _check_loss(self, kind: str, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the {kind} loss is {loss} at step {self.step}, so training stops "
                f"(a smaller learning_rate may help); {checkpoint.last_good(self.folder.path)}"
            )
