"""How rope is tested. A case's shape is q's, (B, H, T, D).

Options: H_kv, R (dimensions turned), interleaved, per_batch (tables for each sequence), table (a
dtype; float32 if not given). In layout "packed" q and k are views of one (B, T, H + H_kv, D)
tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gptfast.ops import rope
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.judge import Magnitude
from gptfast.testing.memory import LAYOUTS


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    B, H, T, D = case.shape
    H_kv, half = case.options.get("H_kv", H), case.options.get("R", D // 2 * 2) // 2
    angle = 3 * draw((B, T, half) if case.options.get("per_batch") else (T, half))
    table = getattr(torch, case.options.get("table", "float32"))
    if case.layout == "packed":
        both = draw((B, T, H + H_kv, D), case.values).to(dtype)
        q, k = (x.transpose(1, 2) for x in both.split([H, H_kv], 2))
    else:
        q, k = (draw((B, heads, T, D), case.values).to(dtype) for heads in (H, H_kv))
    return {"q": q, "k": k, "cos": angle.cos().to(table), "sin": angle.sin().to(table)}


def _pairs(x: torch.Tensor, R: int, options: Options) -> tuple[torch.Tensor, ...]:
    if options.get("interleaved"):
        return x[..., :R].unflatten(-1, (R // 2, 2)).unbind(-1)
    return x[..., :R].unflatten(-1, (2, R // 2)).unbind(-2)


def _joined(
    x1: torch.Tensor, x2: torch.Tensor, rest: torch.Tensor, options: Options
) -> torch.Tensor:
    dim = -1 if options.get("interleaved") else -2
    return torch.cat([torch.stack([x1, x2], dim).flatten(-2), rest], -1)


def peer(i: Inputs, options: Options) -> tuple[torch.Tensor, ...]:
    """As a product of complex numbers."""
    cos, sin = (i[name].unsqueeze(-3) for name in ("cos", "sin"))
    R = 2 * cos.shape[-1]

    def turn(x: torch.Tensor) -> torch.Tensor:
        y = torch.complex(*_pairs(x, R, options)) * torch.complex(cos, sin)
        return _joined(y.real, y.imag, x[..., R:], options)

    return turn(i["q"]), turn(i["k"])


def magnitudes(
    i: Inputs, options: Options, dq: torch.Tensor, dk: torch.Tensor
) -> dict[str, Magnitude]:
    """See `Magnitude`: of both results and both gradients."""
    cos, sin = (i[name].unsqueeze(-3).abs() for name in ("cos", "sin"))
    R = 2 * cos.shape[-1]

    def size(x: torch.Tensor) -> Magnitude:
        x1, x2 = _pairs(x.abs(), R, options)
        rest = torch.zeros_like(x[..., R:])  # nothing is computed there
        terms = _joined(x1 * cos + x2 * sin, x2 * cos + x1 * sin, rest, options)
        return Magnitude(terms, torch.zeros_like(terms), 2)

    return {"turned_q": size(i["q"]), "turned_k": size(i["k"]), "q": size(dq), "k": size(dk)}


def _cases() -> Iterator[Case]:
    for interleaved in (False, True):
        options: dict[str, Any] = {"interleaved": interleaved}
        # Nothing, one token, head dims that are no powers of two or odd, more heads than a tile.
        for shape in ((0, 2, 3, 4), (2, 2, 0, 4), (1, 1, 1, 2), (2, 3, 5, 16), (1, 2, 7, 40)):
            yield Case("rope", shape, options=options)
        yield Case("rope", (1, 3, 4, 37), options=options)
        yield Case("rope", (1, 70, 3, 8), options={**options, "H_kv": 2})
        yield Case("rope", (3, 4, 5, 24), options={**options, "H_kv": 1, "R": 8})
        yield Case("rope", (2, 2, 6, 20), options={**options, "R": 2, "per_batch": True})
        yield Case("rope", (2, 2, 6, 12), options={**options, "table": "bfloat16"})
        for values in ("large", "spread", "tiny", "nan"):
            yield Case("rope", (2, 2, 3, 16), values, options=options)
        for layout in (*LAYOUTS[1:], "packed"):
            yield Case("rope", (2, 2, 5, 12), layout=layout, options={**options, "H_kv": 1})
        for layout in LAYOUTS[1:]:
            yield Case("rope", (2, 2, 5, 12), grad_layout=layout, options={**options, "R": 8})


ROW = OpRow(
    inputs=_inputs,
    call=lambda i, o: rope(
        i["q"], i["k"], i["cos"], i["sin"], interleaved=o.get("interleaved", False)
    ),
    peer=peer,
    magnitudes=magnitudes,
    gradients=("q", "k"),
    results=("turned_q", "turned_k"),
    cases=tuple(_cases()),
    examples=(
        Case("rope", (2, 4, 5, 12), options={"H_kv": 2, "R": 8}),
        Case("rope", (2, 3, 5, 8), options={"interleaved": True, "per_batch": True}),
    ),
    gradchecks=tuple(
        Case("rope", (2, 2, 3, 6), options={"H_kv": 1, "R": 4, "interleaved": interleaved})
        for interleaved in (False, True)
    ),
    tail=lambda n: Case("rope", (1, 2, n, 2 * n), options={"interleaved": n % 2 == 0}),
    many=Case("rope", (4, 6, 100, 32), options={"H_kv": 2}),
    # Llama's heads, GPT-NeoX's partial ones, GPT-J's.
    reports=(
        Case("rope", (1, 32, 32, 128), options={"H_kv": 8}),
        Case("rope", (1, 64, 16, 96), options={"R": 24}),
        Case("rope", (1, 16, 32, 256), options={"R": 64, "interleaved": True}),
        Case("rope", (1, 12, 64, 64), options={"interleaved": True}),
    ),
)
