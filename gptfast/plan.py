"""A training run on paper: memory, throughput, time and checkpoint size, before it is paid for.

FLOPs of a token, forward:  2 n  +  4 n_layer T C / 2

n counts the weights that multiply (all but the position embeddings, biases and norms; the tied
embedding once, as the head); the second term is the causal half of q k^T and p v, or what a window
leaves of it. Backward costs
twice that, and once more forward where activations are recomputed.

Throughput is that, over the peak of the cards times an assumed utilisation (MFU). It is a
prediction, never a measurement.

Sources: Chowdhery et al., "PaLM", 2022, appendix B, for MFU; Korthikanti et al., "Reducing
Activation Recomputation", 2022, for activations; the makers' data sheets for the cards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from gptfast.models import GPT, GPTConfig

__all__ = ["GPUS", "Card", "Plan", "make_plan", "parse_gpus", "parse_tokens", "print_plan"]

GB = 1e9


@dataclass(frozen=True)
class Card:
    """A GPU: dense bf16 (or fp16) matrix rate in TFLOP/s, and memory in GB."""

    name: str
    tflops: float
    memory_gb: float


# Dense rates, without the factor of two that data sheets give for sparsity.
GPUS: Mapping[str, Card] = {
    card.name.lower(): card
    for card in (
        Card("T4", 65, 16),
        Card("L4", 121, 24),
        Card("L40S", 362, 48),
        Card("RTX3090", 71, 24),
        Card("RTX4090", 165, 24),
        Card("RTX5090", 209, 32),
        Card("A10G", 70, 24),
        Card("A100-40", 312, 40),
        Card("A100", 312, 80),
        Card("H100", 989, 80),
        Card("H200", 989, 141),
        Card("B200", 2250, 180),
        Card("MI300X", 1307, 192),
    )
}
MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
Strategy = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Plan:
    """What a run needs; bytes are of one card, but for the checkpoint.

    Args:
        config, card, gpus, tokens, batch_size, strategy, recompute, mfu: as planned.
        parameters: all of them.
        flops_per_token: of forward and backward (and recomputed forward).
        weights: fp32 weights, and their bf16 copy.
        gradients: in fp32.
        optimizer: both moments of AdamW, in fp32.
        activations: kept for backward, of `batch_size` sequences.
        checkpoint: one checkpoint with what resuming needs.
        tokens_per_second: of all cards together, at the assumed utilisation.
    """

    config: GPTConfig
    card: Card
    gpus: int
    tokens: float
    batch_size: int
    strategy: Strategy
    recompute: bool
    mfu: float
    parameters: int
    flops_per_token: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    checkpoint: float
    tokens_per_second: float

    @property
    def memory(self) -> float:
        """Bytes on one card."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def fits(self) -> bool:
        """Whether that leaves a tenth of the card to allocator, libraries and driver."""
        return self.memory <= 0.9 * self.card.memory_gb * GB

    @property
    def seconds(self) -> float:
        """Length of the run."""
        return self.tokens / self.tokens_per_second


def make_plan(
    config: GPTConfig,
    card: Card,
    gpus: int = 1,
    *,
    tokens: float,
    batch_size: int = 8,
    strategy: Strategy = "ddp",
    recompute: bool = False,
    mfu: float = 0.4,
) -> Plan:
    """Plan a training run in bf16 with fp32 weights.

    Args:
        config: sizes.
        card: one of `GPUS`, or your own.
        gpus: how many.
        tokens: to train on.
        batch_size: sequences of block_size tokens that one card takes at once.
        strategy: "ddp" holds everything on every card; "fsdp" splits weights, gradients and
            optimizer among them.
        recompute: keep only the input of each block for backward.
        mfu: assumed share of the cards' peak, in (0, 1].

    Raises:
        ValueError: a number out of range, or an unknown strategy.
    """
    for name, value in (("gpus", gpus), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"plan: {name} must be at least 1, got {value}")
    if not tokens > 0:
        raise ValueError(f"plan: tokens must be above 0, got {tokens}")
    if not 0 < mfu <= 1:
        raise ValueError(f"plan: mfu must be in (0, 1], got {mfu}")
    if strategy not in ("ddp", "fsdp"):
        raise ValueError(f"plan: strategy must be 'ddp' or 'fsdp', got {strategy!r}")
    with torch.device("meta"):
        parameters = GPT(config).num_parameters()
    shards = gpus if strategy == "fsdp" else 1
    flops = forward_flops_per_token(config) * (4 if recompute else 3)
    return Plan(
        config=config,
        card=card,
        gpus=gpus,
        tokens=tokens,
        batch_size=batch_size,
        strategy=strategy,
        recompute=recompute,
        mfu=mfu,
        parameters=parameters,
        flops_per_token=flops,
        weights=(4 + 2) * parameters / shards,
        gradients=4 * parameters / shards,
        optimizer=8 * parameters / shards,
        activations=activation_bytes(config, batch_size, recompute),
        checkpoint=12 * parameters,
        tokens_per_second=gpus * card.tflops * 1e12 * mfu / flops,
    )


def multiplying_weights(config: GPTConfig) -> int:
    """Weights that take part in matrix products. In GPT-2 they are four C x C a block for
    attention, eight for the MLP, and the head.
    """
    C, kv_columns = config.n_embd, 2 * config.kv_heads * config.head_dim
    attention = C * (2 * C + kv_columns) * (2 if config.cross_attention else 1)
    mlp = C * config.inner * (3 if config.mlp == "swiglu" else 2)
    return config.n_layer * (attention + mlp) + config.vocab_size * C


def forward_flops_per_token(config: GPTConfig) -> float:
    """FLOPs of one token's forward pass in sequences of block_size; a multiply-add is two."""
    attention = 4 * config.n_layer * keys_seen(config) * config.n_embd
    return 2 * multiplying_weights(config) + attention


def keys_seen(config: GPTConfig) -> float:
    """How many tokens a token sees on average: T / 2 with a causal mask and no window."""
    T = config.block_size
    window = min(config.window or T, T)
    one_side = window - window * window / (2 * T)
    return one_side if config.causal else 2 * one_side


def activation_bytes(config: GPTConfig, batch_size: int, recompute: bool = False) -> float:
    """Bytes kept for backward, in bf16, by a model whose ops recompute what they can.

    A block of GPT-2 keeps, in units of C values a token: the inputs of two norms (2) and their
    outputs (2), q, k, v (3), attention's output (1), the MLP's 4 C before and after GELU (8); with
    dropout nothing more, since masks are drawn again. Where queries and keys are turned or
    normalised, they are kept once more; ReLU keeps its result alone, SwiGLU three tensors. The
    logits are kept in bf16, and their gradient.
    """
    tokens = batch_size * config.block_size
    C, D = config.n_embd, config.head_dim
    heads = C + 2 * config.kv_heads * D
    if config.positions == "rotary" or config.qk_norm:
        heads += C + config.kv_heads * D
    inside = config.inner * {"gelu": 2, "relu": 1, "relu2": 2, "swiglu": 3}[config.mlp]
    block = (5 * C + heads + inside) * 2
    head = 2 * config.vocab_size * 2
    if recompute:  # inputs of all blocks, and one block at work
        return tokens * (config.n_layer * 2 * config.n_embd + block + head)
    return tokens * (config.n_layer * block + head)


def parse_gpus(text: str) -> tuple[int, Card]:
    """ "8xH100" to (8, the card); "H100" is one.

    Raises:
        ValueError: not of that form, or an unknown card.
    """
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?([\w-]+)", text.strip(), re.IGNORECASE)
    if match is None or int(match[1] or 1) < 1:
        raise ValueError(f"gpus must be a card or NxCARD, such as 8xH100; got {text!r}")
    card = GPUS.get(match[2].lower())
    if card is None:
        known = ", ".join(c.name for c in GPUS.values())
        raise ValueError(f"unknown card {match[2]!r}; known: {known}")
    return int(match[1] or 1), card


def parse_tokens(text: str) -> float:
    """ "10B" to 1e10; k, M, B and T stand for powers of a thousand.

    Raises:
        ValueError: not of that form, or not above 0.
    """
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmbt]?)", text.strip().replace(",", "").lower())
    try:
        value = float(match[1]) * MULTIPLES[match[2]] if match else 0.0
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"tokens must be a number such as 10B or 300M, got {text!r}")
    return value


def print_plan(plan: Plan, console: Console) -> None:
    """The plan as a table for people."""
    c = plan.config
    title = f"{plan.gpus} x {plan.card.name}, {plan.strategy}, predicted"
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()

    def row(name: str, value: str, note: str = "") -> None:
        table.add_row(name, value, note)

    sizes = f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, T = {c.block_size}"
    row("parameters", f"{plan.parameters:,}", sizes)
    per_parameter = plan.tokens / plan.parameters
    row("tokens", f"{plan.tokens:,.0f}", f"{per_parameter:.1f} a parameter (about 20 is optimal)")
    passes = "forward, backward, recomputed forward" if plan.recompute else "forward, backward"
    row("FLOPs a token", f"{plan.flops_per_token:.3g}", passes)
    table.add_section()
    for name, size, note in (
        ("weights", plan.weights, "fp32, and a bf16 copy"),
        ("gradients", plan.gradients, "fp32"),
        ("optimizer", plan.optimizer, "AdamW's moments, fp32"),
        ("activations", plan.activations, f"{plan.batch_size} sequences a card"),
    ):
        row(name, f"{size / GB:.2f} GB", note)
    verdict = "fits" if plan.fits else "does NOT fit: smaller batch, recompute, or fsdp"
    row("memory a card", f"{plan.memory / GB:.2f} GB", f"of {plan.card.memory_gb:g}: {verdict}")
    table.add_section()
    row("throughput", f"{plan.tokens_per_second:,.0f} tok/s", f"at {plan.mfu:.0%} of the peak")
    row("time", duration(plan.seconds), f"{plan.gpus * plan.seconds / 3600:,.1f} GPU hours")
    row("checkpoint", f"{plan.checkpoint / GB:.2f} GB", "weights and both moments, fp32")
    console.print(table)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"
