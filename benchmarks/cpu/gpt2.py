"""GPT-2 124M: a training step, and a forward pass with its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cpu.works import Built, Call, Limit, Work, compiled
from benchmarks.run import check_equal
from benchmarks.stock_gpt import StockGPT
from benchmarks.timing import COMPILED, EAGER, OURS
from gptfast import optim
from gptfast.models import GPT, GPTConfig
from gptfast.ops.adamw import OP as ADAMW


def _flops(config: GPTConfig, tokens: int, backward: bool) -> float:
    """Of the products: 2 per weight and token forward, twice that backward; and attention's."""
    C, T = config.n_embd, config.block_size
    weights = 12 * config.n_layer * C * C + config.vocab_size * C
    # Half of T x T scores: q k^T and p v.
    attention = config.n_layer * 2 * T * C
    return (2 * weights * (3 if backward else 1) + attention * (3.5 if backward else 1)) * tokens


def _models(config: GPTConfig) -> dict[str, Any]:
    torch.manual_seed(0)
    weights = GPT(config).state_dict()
    models: dict[str, Any] = {OURS: GPT(config), EAGER: StockGPT(config)}
    for model in models.values():
        model.load_state_dict(weights)
    return models


def _batch(config: GPTConfig, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, batch_size, config.block_size)
    x, y = torch.randint(config.vocab_size, shape, generator=generator)
    return x, y


def _optimizer(name: str, model: torch.nn.Module, bf16: bool) -> torch.optim.Optimizer:
    if name == OURS and (bf16 or ADAMW.has_kernel(next(model.parameters()))):
        return optim.AdamW(model.parameters(), lr=1e-4, master_weights=bf16)
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _loss(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """(x, y) to the loss; gptfast is told that nothing else is wanted."""
    options = {"loss_only": True} if name == OURS else {}
    return lambda x, y: forward(x, y, **options)[1]


@torch.no_grad()
def _check_losses(
    models: dict[str, Any], x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype
) -> None:
    ours, theirs = (_loss(name, models[name])(x, y) for name in (OURS, EAGER))
    # As in check_equal for fp32; bf16 rounds each of 12 layers' results by up to 2^-8.
    bound = 2e-4 if dtype == torch.float32 else 1e-2
    if not (ours - theirs).abs() <= bound * theirs.abs():
        raise AssertionError(f"gptfast's loss is {ours}, stock PyTorch's {theirs}")


def _step(
    loss_of: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
    autocast: bool,
) -> Call:
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _training(batch_size: int, T: int) -> Callable[[torch.dtype, bool], Built]:
    def build(dtype: torch.dtype, compile: bool) -> Built:
        """fp32 weights, in bf16 under autocast; there ours in bf16 with fp32 masters.

        That is `gptfast train --master-weights`: both ways the weights that are updated are fp32.
        """
        config = GPTConfig.preset("gpt2", block_size=T)
        x, y = _batch(config, batch_size)
        models = _models(config)
        forwards: dict[str, Any] = dict(models)
        if compile:
            models[COMPILED] = StockGPT(config)
            models[COMPILED].load_state_dict(models[EAGER].state_dict())
            forwards[COMPILED] = compiled(models[COMPILED])
        bf16 = dtype == torch.bfloat16
        if bf16:
            models[OURS].to(dtype)
        calls = {
            name: _step(
                _loss(name, forwards[name]),
                _optimizer(name, model, bf16),
                x,
                y,
                autocast=bf16 and name != OURS,
            )
            for name, model in models.items()
        }
        limit = Limit(flops=_flops(config, x.numel(), True))

        def check() -> None:
            fp32 = GPT(config)
            fp32.load_state_dict(models[EAGER].state_dict())
            check_equal(fp32, models[EAGER], x, y)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                _check_losses(models, x, y, dtype)

        return Built({"step": calls}, {"step": limit}, check)

    return build


def _forward(dtype: torch.dtype, compile: bool) -> Built:
    """Inference: weights in `dtype`, and for torch.compile frozen, so that it may pack them."""
    config = GPTConfig.preset("gpt2")
    x, y = _batch(config, 1)
    models = _models(config)
    limit = Limit(flops=_flops(config, x.numel(), False))

    def check() -> None:
        _check_losses(models, x, y, dtype)

    def call(name: str, forward: Callable[..., Any]) -> Call:
        loss_of = _loss(name, forward)

        @torch.no_grad()
        def run() -> Any:
            return loss_of(x, y)

        return run

    for model in models.values():
        model.to(dtype).eval()
    calls = {name: call(name, model) for name, model in models.items()}
    if compile:
        calls[COMPILED] = call(COMPILED, compiled(models[EAGER], freezing=True))
    return Built({"fwd": calls}, {"fwd": limit}, check)


WORKS = (
    Work("gpt2_step_B4_T256", "gpt2", "124M B4 T256", _training(4, 256), seconds=4),
    Work("gpt2_step_B1_T1024", "gpt2", "124M B1 T1024", _training(1, 1024), seconds=4),
    Work("gpt2_forward_T1024", "gpt2", "124M B1 T1024, with loss", _forward, seconds=1),
)
