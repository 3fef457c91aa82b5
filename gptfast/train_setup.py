"""What a training run begins with: data, arithmetic, optimizers, and the model to go on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from gptfast import checkpoint
from gptfast.backend import dtype_name, extension
from gptfast.data import Dataset, read_text, resolve_source
from gptfast.models import GPT, GPTConfig
from gptfast.ops.adamw import OP as ADAMW
from gptfast.optim import AdamW
from gptfast.tokenizer import GPT2Tokenizer, Tokenizer
from gptfast.train_config import TrainConfig


def check_settings(
    config: TrainConfig, tokenizer: Tokenizer, dtype: torch.dtype, reason: str, processes: int
) -> None:
    """Raise ValueError where settings do not go with the data, the device or the processes."""
    fsdp = config.strategy == "fsdp" and processes > 1
    if config.master_weights and dtype != torch.bfloat16:
        raise ValueError(
            f"master_weights: dtype must be bfloat16, got {dtype_name(dtype)} ({reason})"
        )
    if config.accumulation % processes:
        raise ValueError(
            f"gradient_accumulation must be a multiple of the {processes} processes, which share a "
            f"step's batches, got {config.accumulation}"
        )
    if config.separate_documents and not isinstance(tokenizer, GPT2Tokenizer):
        raise ValueError(
            "separate_documents needs a tokenizer with an end-of-text token, gpt2, "
            f"got {type(tokenizer).__name__}"
        )
    if config.master_weights and (config.ema or config.optimizer == "muon"):
        raise ValueError("master_weights does not go with ema or muon")
    if fsdp and (config.master_weights or config.optimizer == "muon" or dtype == torch.float16):
        raise ValueError(
            "fsdp does not go with master_weights, muon or float16: its weights are in "
            "float32, and split"
        )


def open_dataset(config: TrainConfig) -> Dataset:
    """The tokens that the settings name."""
    if config.data is not None:
        return Dataset.open(config.data)
    text = read_text(resolve_source(config.file))
    return Dataset.in_memory(text, config.tokenizer, config.val_fraction)


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the arithmetic, and why."""
    if name not in ("auto", "fastest"):
        return getattr(torch, name), "as asked"
    if device.type == "cpu":
        built = extension()
        if name == "auto":
            return torch.float32, "auto: the safe choice on a CPU"
        if built is not None and "amx" in built.cpu_isas():
            return torch.bfloat16, "fastest: this processor multiplies it in tiles (AMX)"
        return torch.float32, "fastest: this processor has no AMX, and bfloat16 would be slower"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, f"{name}: this GPU has it"
    return torch.float16, f"{name}: this GPU has no bfloat16, so the loss is scaled"


def make_optimizers(
    model: GPT, parameters: list[torch.nn.Parameter], config: TrainConfig, fsdp: bool
) -> list[torch.optim.Optimizer]:
    """AdamW, and with muon another one for the matrices in the blocks."""
    if config.optimizer == "adamw" and not fsdp:
        return [_optimizer(parameters, config)]
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(**_adamw_settings(parameters, config), foreach=True)]
    matrices = [p for p in model.transformer["h"].parameters() if p.dim() == 2]
    known = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in known]
    muon = torch.optim.Muon(
        matrices,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",  # so that both have one rate
    )
    return [torch.optim.AdamW(**_adamw_settings(others, config), fused=True), muon]


def _adamw_settings(parameters: list[torch.nn.Parameter], config: TrainConfig) -> dict[str, Any]:
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return {"params": groups, "lr": config.learning_rate, "betas": (config.beta1, config.beta2)}


def _optimizer(
    parameters: list[torch.nn.Parameter], config: TrainConfig
) -> AdamW | torch.optim.AdamW:
    """AdamW: ours, which clips as well, where it has a kernel; else PyTorch's fused one."""
    settings = _adamw_settings(parameters, config)
    if config.master_weights or ADAMW.has_kernel(parameters[0]):
        max_norm, masters = config.grad_clip or None, config.master_weights
        return AdamW(**settings, max_norm=max_norm, master_weights=masters)
    return torch.optim.AdamW(**settings, fused=True)


def recompute(blocks: list[nn.Module]) -> None:
    """Let blocks keep only their inputs for backward; names and parameters stay as they are."""

    def recomputed(function: Callable[..., Any], *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    for block in blocks:
        block.forward = partial(recomputed, block.forward)


def load_same(path: Path, expected: GPTConfig, tokenizer: Tokenizer, device: torch.device) -> GPT:
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
