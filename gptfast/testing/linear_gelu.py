"""How linear_gelu is tested. A case's shape is (..., N, C).

Options: approximate, bias (a dtype; the default is x's).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gptfast.ops import linear_gelu
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.gelu import LENGTH, activation_sizes
from gptfast.testing.judge import Magnitude
from gptfast.testing.memory import LAYOUTS


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    *rows, N, C = case.shape
    name = case.options.get("bias")
    return {
        "x": draw((*rows, C), case.values).to(dtype),
        "weight": (draw((N, C)) * max(C, 1) ** -0.5).to(dtype),  # h of deviation 1
        "bias": draw((N,)).to(getattr(torch, name) if name else dtype),
    }


def _magnitudes(i: Inputs, options: Options, dy: torch.Tensor) -> dict[str, Magnitude]:
    x, w, b, dy = i["x"].flatten(0, -2), i["weight"], i["bias"], dy.flatten(0, -2)
    (M, C), N = x.shape, w.shape[0]
    h, size = x @ w.mT, x.abs() @ w.abs().mT + b.abs()
    sizes, dy = activation_sizes(h + b, options.get("approximate", "tanh")), dy.abs()
    # |gelu''| is below 1 everywhere, and is the curvature over |z|.
    bend = torch.where((h + b).abs() > 1, sizes.curvature / (h + b).abs(), 1.0)
    terms, moves = dy * sizes.slope, dy * (sizes.slope_moves + bend * size)
    # h is rounded to the storage dtype, and so may dz be before it is multiplied.
    from_h = dy * bend * h.abs()
    ones, x, w = torch.ones_like(terms), x.abs(), w.abs()
    length = M + C + N + LENGTH

    def times(factor: torch.Tensor, of: Any) -> Magnitude:
        parts = (of(d) @ factor for d in (terms, moves, terms + from_h, ones))
        t, m, stored, factors = parts
        return Magnitude(t, m, length, stored, factors)

    rows = i["x"].shape[:-1]
    dx = times(w, lambda d: d)
    return {
        "result": Magnitude(
            sizes.value.view(*rows, N),
            (sizes.value_moves + size * sizes.slope).view(*rows, N),
            C + LENGTH,
            (h.abs() * sizes.slope).view(*rows, N),
        ),
        "x": dx._replace(
            **{
                name: getattr(dx, name).view(*rows, C)
                for name in ("terms", "condition", "stored", "factors")
            }
        ),
        "weight": times(x, lambda d: d.mT),
        "bias": Magnitude(terms.sum(0), moves.sum(0), length, from_h.sum(0)),
    }


def _cases() -> Iterator[Case]:
    def case(shape: tuple[int, ...], values: str = "normal", **kwargs: Any) -> Case:
        return Case("linear_gelu", shape, values, **kwargs)

    # (M, N, C): within a tile, its neighbours, one row, output or channel, no rows, more
    # dimensions; and several blocks of 24 panels of 32 outputs.
    for approximate in ("tanh", "none"):
        options = {"approximate": approximate}
        for shape in (
            *((5, 37, 19), (1, 50, 8), (6, 1, 8), (6, 9, 1), (2, 3, 17, 12), (0, 16, 8), (3, 0, 4)),
            *((3, 4, 0), (65, 130, 33), (40, 1570, 40)),
        ):
            yield case(shape, options=options)
        for values in ("large", "offset", "constant", "nan"):
            yield case((5, 37, 16), values, options=options)
    for layout in LAYOUTS[1:]:
        yield case((6, 41, 12), layout=layout, grad_layout=layout)
    yield case((6, 41, 12), options={"bias": "float32"})


ROW = OpRow(
    inputs=_inputs,
    call=lambda i, o: linear_gelu(i["x"], i["weight"], i["bias"], o.get("approximate", "tanh")),
    peer=lambda i, o: F.gelu(
        F.linear(i["x"], i["weight"], i["bias"].to(i["x"].dtype)),
        approximate=o.get("approximate", "tanh"),
    ),
    magnitudes=_magnitudes,
    gradients=("x", "weight", "bias"),
    matrix_units=True,
    cases=tuple(_cases()),
    examples=(Case("linear_gelu", (9, 37, 24)),),
    gradchecks=(
        Case("linear_gelu", (3, 5, 4), options={"approximate": "none"}),
        Case("linear_gelu", (2, 2, 3, 2)),
    ),
    tail=lambda n: Case("linear_gelu", (3, n, n)),
    many=Case("linear_gelu", (300, 400, 40)),
)
