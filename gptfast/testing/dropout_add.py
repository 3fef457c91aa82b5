"""How dropout_add is tested.

Options: p, residual ("same" or "float32").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gptfast.ops import dropout_add
from gptfast.ops.philox import row_factors
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.judge import Magnitude
from gptfast.testing.memory import LAYOUTS

DROPOUT = {"p": 0.3}


def residual_dtype(case: Case, dtype: torch.dtype) -> torch.dtype:
    """As the option `residual` says."""
    return torch.float32 if case.options.get("residual") == "float32" else dtype


def seed_for(p: float) -> torch.Tensor | None:
    """A seed with bits in both halves; None without dropout."""
    return torch.tensor(-(2**62) + 12345) if p else None


def factors(i: Inputs, p: float) -> torch.Tensor | float:
    """z in the dtype of x; 1 without dropout."""
    return row_factors(i["seed"], i["x"].shape, p, i["x"].dtype) if p else 1.0


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    x = draw(case.shape, case.values).to(dtype)
    residual = draw(case.shape).to(residual_dtype(case, dtype))
    return {"x": x, "residual": residual, "seed": seed_for(case.options.get("p", 0.0))}


def _peer(i: Inputs, options: Options) -> torch.Tensor:
    return i["residual"] + i["x"] * factors(i, options.get("p", 0.0))


def _magnitudes(i: Inputs, options: Options, dr: torch.Tensor) -> dict[str, Magnitude]:
    z = factors(i, options.get("p", 0.0))
    terms = i["residual"].abs() + (z * i["x"]).abs()
    zero = torch.zeros_like(terms)
    return {
        "residual_out": Magnitude(terms, zero, 1),
        "x": Magnitude((z * dr).abs(), zero, 1),
        "residual": Magnitude(dr.abs(), zero, 1),
    }


def _cases() -> Iterator[Case]:
    for shape in (
        *((8, 64), (5, 37), (1, 1), (7,), (2, 3, 50), (0, 16), (3, 0), (3, 1100), (300, 3)),
    ):
        yield Case("dropout_add", shape, options=DROPOUT)
    for values in ("tiny", "nan"):
        yield Case("dropout_add", (6, 48), values, options=DROPOUT)
    for layout in LAYOUTS[1:]:
        yield Case("dropout_add", (6, 41), layout=layout, options=DROPOUT)
        yield Case("dropout_add", (6, 41), grad_layout=layout, options=DROPOUT)
    for p in (0.0, 1e-6, 0.999999):
        yield Case("dropout_add", (6, 41), options={"p": p})
        yield Case("dropout_add", (6, 41), options={"p": p, "residual": "float32"})


ROW = OpRow(
    inputs=_inputs,
    call=lambda i, o: dropout_add(i["x"], i["residual"], o.get("p", 0.0), i["seed"]),
    peer=_peer,
    magnitudes=_magnitudes,
    gradients=("x", "residual"),
    cases=tuple(_cases()),
    examples=(
        Case("dropout_add", (9, 33), options=DROPOUT),
        Case("dropout_add", (9, 33)),
        Case("dropout_add", (9, 33), options={**DROPOUT, "residual": "float32"}),
    ),
    gradchecks=(Case("dropout_add", (2, 3, 5), options=DROPOUT), Case("dropout_add", (4, 6))),
    tail=lambda n: Case("dropout_add", (3, n), options=DROPOUT if n % 2 else {}),
    many=Case("dropout_add", (700, 67), options=DROPOUT),
    results=("residual_out",),
    like={"residual_out": "residual"},
    reports=(
        Case("dropout_add", (256, 768), options=DROPOUT),
        Case("dropout_add", (256, 768), options={**DROPOUT, "residual": "float32"}),
    ),
)
