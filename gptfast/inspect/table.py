"""Where a model's parameters and the FLOPs of a token are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from gptfast.models import GPT, GPTConfig
from gptfast.plan import keys_seen

EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")


class Row(NamedTuple):
    """One tensor, or one product without weights, of which a model has `times`.

    parameters and flops are those of one; flops are forward, a token, a multiply-add being two.
    """

    part: str
    shape: tuple[int, ...] | None
    times: int
    parameters: int
    flops: float


def parameter_rows(config: GPTConfig) -> list[Row]:
    """Every parameter of a model, and the products of attention, in the order of a forward pass.

    A block stands for all n_layer of them; the FLOPs of norms, activations and softmax, some
    thousandths of the whole, are left out.
    """
    with torch.device("meta"):
        model = GPT(config)
    rows = []
    scores = Row("attn: q k^T, p v", None, config.n_layer, 0, 4 * keys_seen(config) * config.n_embd)
    for name, parameter in model.named_parameters():
        first_block, in_block = "transformer.h.0.", name.startswith("transformer.h.")
        if in_block and not name.startswith(first_block):
            continue
        part = "h.*." + name.removeprefix(first_block) if in_block else name
        if part == "h.*.attn.c_proj.weight":
            rows.append(scores)
        multiplies = parameter.dim() == 2 and name not in EMBEDDINGS
        n = parameter.numel()
        flops = 2.0 * n if multiplies else 0.0
        times = config.n_layer if in_block else 1
        rows.append(Row(part.removeprefix("transformer."), tuple(parameter.shape), times, n, flops))
    if config.tied:
        V, C = config.vocab_size, config.n_embd
        rows.append(Row("lm_head.weight (wte)", (V, C), 1, 0, 2.0 * V * C))
    return rows


def print_parameters(config: GPTConfig, title: str, console: Console) -> None:
    """The rows as a table, with their sums."""
    rows = parameter_rows(config)
    parameters = sum(row.times * row.parameters for row in rows)
    flops = sum(row.times * row.flops for row in rows)
    table = Table(title=f"{title}; MFLOPs of one token, forward", box=box.SIMPLE)
    table.add_column("part")
    for column in ("shape", "times", "parameters", "share", "MFLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        own, work = row.times * row.parameters, row.times * row.flops
        table.add_row(
            row.part,
            "" if row.shape is None else " x ".join(map(str, row.shape)),
            str(row.times),
            f"{own:,}" if own else "",
            f"{own / parameters:.2%}" if own else "",
            f"{work / 1e6:,.2f}" if work else "",
        )
    table.add_section()
    table.add_row("all", "", "", f"{parameters:,}", "", f"{flops / 1e6:,.2f}")
    linear_biases = [r for r in rows if r.part.endswith("bias") and "ln_" not in r.part]
    positions = [r for r in rows if r.part == "wpe.weight"]
    for name, left_out in (
        ("without linear biases", linear_biases),
        ("without positions", positions),
    ):
        taken = sum(r.times * r.parameters for r in left_out)
        if taken:
            table.add_row(name, "", "", f"{parameters - taken:,}", "", "")
    console.print(table)
