"""Settings of a training run, and presets of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from gptfast import checkpoint
from gptfast.models import GPTConfig
from gptfast.models.config import ARCHITECTURES

__all__ = ["PRESETS", "TrainConfig", "changed_settings", "read_settings"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Raises:
        ValueError: a setting is out of range.
    """

    out: str = "out/shakespeare-char-cpu"
    """Folder of the run: settings, metrics and checkpoints; new or empty unless --resume."""
    resume: FlagCreatePairsOff[bool] = False
    """Continue from the last checkpoint in --out (start if none), by default with its settings."""

    file: Annotated[str | None, arg(metavar="FILE")] = None
    """Text: a path, or tinyshakespeare (fetched once). None is nine packaged plays."""
    data: Annotated[str | None, arg(metavar="DIR")] = None
    """Folder made by `gptfast prepare`, instead of --file; its tokenizer is used."""
    tokenizer: Literal["char", "gpt2"] = "char"
    """Tokens of --file: its characters, or GPT-2's byte pairs."""
    val_fraction: float = 0.1
    """Last part of --file that is kept for validation."""
    sampling: Literal["random", "epochs"] = "random"
    """Windows of a batch: anywhere in the text, or each once an epoch, shuffled."""
    separate_documents: bool = False
    """Let no token see what is before its document's end-of-text token; gpt2's tokenizer alone."""

    architecture: Literal["gpt2", "llama", "nanochat"] = "gpt2"
    """Options of the model: rotary positions, RMS norms, SwiGLU, ... (`gptfast.models.config`)."""
    n_layer: int = 4
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads; divides n-embd."""
    n_embd: int = 128
    """Channels: width of the residual stream."""
    block_size: int = 64
    """Tokens the model sees at most, and length of the training windows."""
    vocab_size: Annotated[int | None, arg(metavar="INT")] = None
    """Tokens of the model, at least the tokenizer's. None is as many."""
    dropout: float = 0.0
    """Probability of dropping embeddings, attention scores and residual branches."""
    bias: bool = False
    """Biases in linear layers and LayerNorms, of gpt2."""

    max_iters: int = 2000
    """Training steps."""
    batch_size: int = 12
    """Windows in a batch."""
    gradient_accumulation: int = 1
    """Batches in a step, of all processes together; a multiple of their number."""
    tokens_per_step: Annotated[int | None, arg(metavar="INT")] = None
    """Tokens in a step, instead of --gradient-accumulation: 524288 for GPT-2's half a million."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices in blocks; the others still have AdamW, with the same rate."""
    learning_rate: float = 1e-3
    """Largest learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay to --min-lr after warm-up; wsd stays at the largest rate, then falls in a line."""
    decay_fraction: float = 0.2
    """Last part of the steps in which wsd decays."""
    min_lr: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Learning rate at the end of the decay. None is a tenth of the largest."""
    warmup_iters: int = 100
    """Steps of linear warm-up."""
    lr_decay_iters: Annotated[int | None, arg(metavar="INT")] = None
    """Step at which the decay ends. None is the last one."""
    weight_decay: float = 0.1
    """AdamW's, for matrices; biases and norms have none."""
    beta1: float = 0.9
    """AdamW's average of gradients."""
    beta2: float = 0.99
    """AdamW's average of squared gradients."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 never clips."""
    ema: float = 0.0
    """Average the weights over steps, with this decay (0.999, say); the average is evaluated, and
    saved as the model. 0 does not."""

    log_interval: int = 10
    """Steps between rows of metrics.jsonl."""
    eval_interval: int = 250
    """Steps between estimates of the validation loss."""
    eval_iters: int = 20
    """Batches in an estimate. The last evaluation, after training, takes the whole split."""
    checkpoint_interval: int = 250
    """Steps between checkpoints, best a multiple of --eval-interval; last and best are kept."""
    sample_interval: Annotated[int | None, arg(metavar="INT")] = None
    """Steps between samples of text, a multiple of --eval-interval. None: only at the end."""
    hellaswag: Annotated[str | None, arg(metavar="FILE")] = None
    """HellaSwag's items, which are scored at every estimate."""
    hellaswag_items: int = 200
    """How many of them."""
    tensorboard: bool = False
    """Also write the metrics to tensorboard/ in --out."""
    wandb: Annotated[str | None, arg(metavar="PROJECT")] = None
    """Also send them to Weights & Biases."""
    plot: bool = False
    """Draw curve.png in --out at every estimate."""

    seed: int = 1337
    """Decides initial weights, batches and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto is the GPU where there is one."""
    dtype: Literal["auto", "fastest", "float32", "bfloat16", "float16"] = "auto"
    """Of the arithmetic; weights are float32. auto: float32 on a CPU, 16 bits on a GPU. fastest:
    bfloat16 on a CPU, too, where it has AMX."""
    master_weights: bool = False
    """Weights and gradients in bfloat16, and float32 copies of the weights in AdamW: nothing is
    cast in a step. Only with --dtype bfloat16."""
    backend: Literal["auto", "torch", "cpu", "triton", "cuda"] = "auto"
    """Kernels of gptfast to use; auto takes the best that can run."""
    fused_loss: Annotated[bool | None, arg(metavar="{True,False}")] = None
    """Whether training never stores the logits. None is where that is faster."""
    compile: bool = False
    """Compile the model with torch.compile."""
    recompute: bool = False
    """Keep only the input of each block for backward, which computes the rest again."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Of several processes: the model in each, or weights, gradients and optimizer split."""
    rank_timeout: float = 600.0
    """Seconds that a process waits for the others before it stops."""

    def __post_init__(self) -> None:
        checkpoint.check_types(TrainConfig, vars(self))
        for name in (
            *("batch_size", "gradient_accumulation", "tokens_per_step", "max_iters"),
            *("log_interval", "eval_interval", "eval_iters", "checkpoint_interval"),
            *("sample_interval", "hellaswag_items", "lr_decay_iters"),
        ):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")
        for name in ("warmup_iters", "weight_decay", "grad_clip"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "at least 0")
        for name in ("beta1", "beta2", "ema"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("decay_fraction", 0 < self.decay_fraction <= 1, "in (0, 1]")
        self._require("rank_timeout", 0 < self.rank_timeout < math.inf, "above 0")
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "above 0")
        if self.min_lr is not None:
            limit = f"in [0, learning_rate {self.learning_rate}]"
            self._require("min_lr", 0 <= self.min_lr <= self.learning_rate, limit)
        if self.tokens_per_step is not None:
            batch = self.batch_size * self.block_size
            limit = f"a multiple of batch_size x block_size = {batch}"
            self._require("tokens_per_step", self.tokens_per_step % batch == 0, limit)
        if self.sample_interval is not None:
            limit = f"a multiple of eval_interval {self.eval_interval}"
            self._require("sample_interval", self.sample_interval % self.eval_interval == 0, limit)
        self._require("seed", 0 <= self.seed < 2**63, "in [0, 2^63)")
        if self.file is not None and self.data is not None:
            raise ValueError(f"expected file or data, got both: {self.file!r} and {self.data!r}")
        self.model_config(1)  # checks the sizes

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TrainConfig:
        """Settings by name, with changes: shakespeare-char-cpu, shakespeare-char, gpt2 or demo.

        Raises:
            ValueError: unknown name, or a setting out of range.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return dataclasses.replace(PRESETS[name], **changes)

    def model_config(self, vocab_size: int) -> GPTConfig:
        """Sizes of the model for a tokenizer of `vocab_size` tokens.

        Raises:
            ValueError: sizes out of range, or more tokens than `self.vocab_size`.
        """
        if self.vocab_size is not None and vocab_size > self.vocab_size:
            raise ValueError(
                f"vocab_size must be at least the tokenizer's {vocab_size}, got {self.vocab_size}"
            )
        return GPTConfig(
            block_size=self.block_size,
            vocab_size=vocab_size if self.vocab_size is None else self.vocab_size,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            dropout=self.dropout,
            **{"bias": self.bias, **ARCHITECTURES[self.architecture]},
        )

    @property
    def accumulation(self) -> int:
        """Batches in a step, of all processes together."""
        if self.tokens_per_step is None:
            return self.gradient_accumulation
        return self.tokens_per_step // (self.batch_size * self.block_size)

    @property
    def step_tokens(self) -> int:
        """Tokens in a step, of all processes together."""
        return self.accumulation * self.batch_size * self.block_size

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        high = self.learning_rate
        low = high / 10 if self.min_lr is None else self.min_lr
        end = self.lr_decay_iters or self.max_iters
        if step < self.warmup_iters:
            return high * (step + 1) / (self.warmup_iters + 1)
        if self.schedule == "constant":
            return high
        if step >= end:
            return low
        start = self.warmup_iters
        if self.schedule == "wsd":
            start = max(start, end - max(1, round(self.decay_fraction * end)))
        progress = max(0.0, (step - start) / (end - start))
        if self.schedule == "cosine":
            return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2
        return high + (low - high) * progress


PRESETS = {
    # nanoGPT's recipe for a CPU, 0.80M parameters, but for the learning rate: twice nanoGPT's 1e-3
    # lowers the validation loss on Tiny Shakespeare from 1.90 to 1.80.
    "shakespeare-char-cpu": TrainConfig(learning_rate=2e-3, min_lr=1e-4),
    # nanoGPT's recipe for a GPU, and the lecture's model: 10.65M parameters.
    "shakespeare-char": TrainConfig(
        out="out/shakespeare-char",
        dtype="fastest",
        n_layer=6,
        n_head=6,
        n_embd=384,
        block_size=256,
        dropout=0.2,
        batch_size=64,
        max_iters=5000,
        eval_iters=200,
    ),
    # GPT-2 of 124M parameters, half a million tokens a step.
    "gpt2": TrainConfig(
        out="out/gpt2",
        tokenizer="gpt2",
        n_layer=12,
        n_head=12,
        n_embd=768,
        block_size=1024,
        bias=True,
        batch_size=12,
        gradient_accumulation=40,
        max_iters=600_000,
        learning_rate=6e-4,
        warmup_iters=2000,
        beta2=0.95,
        eval_interval=1000,
        eval_iters=200,
        checkpoint_interval=1000,
    ),
    # About a minute on two slow CPU cores; shallow, since more steps beat more layers in that time.
    "demo": TrainConfig(
        out="out/demo",
        n_layer=2,
        batch_size=16,
        max_iters=1750,
        learning_rate=4e-3,
        warmup_iters=60,
    ),
}


def read_settings(out: str | os.PathLike[str]) -> TrainConfig | None:
    """The settings of the run in a folder; None where no run has begun.

    Raises:
        ValueError: `train.json` is damaged.
    """
    file = Path(out) / "train.json"
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON: {error}") from error
    return checkpoint.read_fields(TrainConfig, values, str(file))


def changed_settings(config: TrainConfig) -> list[str]:
    """Settings that are not those of the run in `config.out`, as "name old -> new"."""
    before = read_settings(config.out)
    if before is None:
        return []
    old, new = dataclasses.asdict(before), dataclasses.asdict(config)
    return [
        f"{name} {old[name]} -> {new[name]}"
        for name in new
        if name not in ("out", "resume") and old[name] != new[name]
    ]
