"""How embedding is tested. A case's shape is that of the result: (*tokens, C).

Options: V (rows of the weight), padding_idx, tokens (what the tokens are, a key of `TOKENS`), int32
(bool).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gptfast.ops import embedding
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.judge import Magnitude
from gptfast.testing.memory import LAYOUTS

# (uniform in [0, 1), V) -> tokens
TOKENS = {
    "uniform": lambda u, V: (u * V).long(),
    "positions": lambda u, V: torch.arange(u.numel()).view(u.shape) % V,
    "frequent": lambda u, V: (u**4 * V).long(),  # the first token some V^-1/4 of the time
    "last": lambda u, V: torch.full(u.shape, V - 1),
}


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    V, tokens = case.options["V"], TOKENS[case.options.get("tokens", "uniform")]
    idx = tokens(torch.special.ndtr(draw(case.shape[:-1])), V).clamp(max=V - 1)
    return {
        "idx": idx.int() if case.options.get("int32") else idx,
        "weight": draw((V, case.shape[-1]), case.values).to(dtype),
    }


def _peer(i: Inputs, options: Options) -> torch.Tensor:
    if not i["weight"].shape[1]:  # on a GPU, backward of F.embedding accesses memory illegally
        return i["weight"][i["idx"].long()]
    return F.embedding(i["idx"], i["weight"], options.get("padding_idx"))


def _magnitudes(i: Inputs, options: Options, dy: torch.Tensor) -> dict[str, Magnitude]:
    idx, weight = i["idx"].reshape(-1), i["weight"]
    hit = F.one_hot(idx.long(), weight.shape[0]).to(dy)
    if options.get("padding_idx") is not None:
        hit[:, options["padding_idx"]] = 0
    y = F.embedding(i["idx"], weight)
    # Nothing is computed in forward; a gradient of one term is that term.
    return {
        "result": Magnitude(torch.zeros_like(y), torch.zeros_like(y), 1),
        "weight": Magnitude(
            hit.mT @ dy.reshape(len(idx), weight.shape[1]).abs(),
            torch.zeros_like(weight),
            int(hit.sum(0).max()) if len(idx) else 1,
        ),
    }


def _cases() -> Iterator[Case]:
    # No tokens, one, one without a dimension, no columns, a batch, rows wider than a tile of 1024,
    # a vocabulary that few use.
    for shape, V in (
        *(((0, 8), 5), ((1, 8), 5), ((8,), 5), ((7, 0), 5), ((9, 16), 3), ((3, 5, 37), 11)),
        *(((2, 1027), 4), ((1, 64), 300)),
    ):
        yield Case("embedding", shape, options={"V": V})
    # Tokens that fill several chunks of 64, beside some that do not.
    for tokens in TOKENS:
        yield Case("embedding", (700, 3), options={"V": 13, "tokens": tokens})
        yield Case("embedding", (5, 50, 8), options={"V": 31, "tokens": tokens, "int32": True})
    for padding_idx in (0, 2, -1):
        options: dict[str, Any] = {"V": 4, "padding_idx": padding_idx}
        yield Case("embedding", (3, 9, 5), options=options)
        yield Case("embedding", (300, 3), options={**options, "tokens": "last"})
    for values in ("spread", "tiny", "nan", "nonfinite"):
        yield Case("embedding", (20, 12), values, options={"V": 9})
    for layout in LAYOUTS[1:]:
        yield Case("embedding", (6, 41), layout=layout, options={"V": 5})
        yield Case("embedding", (4, 3, 16), grad_layout=layout, layout=layout, options={"V": 5})
        yield Case("embedding", (30, 9), grad_layout=layout, options={"V": 5})


ROW = OpRow(
    inputs=_inputs,
    call=lambda i, o: embedding(i["idx"], i["weight"], o.get("padding_idx")),
    peer=_peer,
    magnitudes=_magnitudes,
    gradients=("weight",),
    cases=tuple(_cases()),
    examples=(Case("embedding", (9, 5, 7), options={"V": 6, "padding_idx": 2}),),
    gradchecks=(
        Case("embedding", (3, 4, 5), options={"V": 6}),
        Case("embedding", (20, 2), options={"V": 3}),
    ),
    tail=lambda n: Case("embedding", (n, n), options={"V": 3}),
    many=Case("embedding", (3000, 20), options={"V": 40, "tokens": "frequent"}),
    reports=(
        Case("embedding", (1024, 768), options={"V": 1024, "tokens": "frequent"}),
        Case("embedding", (1024, 4096), options={"V": 512, "tokens": "frequent"}),
    ),
)
