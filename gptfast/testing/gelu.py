"""How gelu is tested.

Options: approximate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

from gptfast.ops import gelu
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.judge import Magnitude
from gptfast.testing.memory import LAYOUTS


class Sizes(NamedTuple):
    """Of a = x Phi(x) and a', element by element: what their errors are proportional to.

    value, slope: the absolute values of the terms of a and of a'. value_moves, slope_moves: their
    condition, see `Magnitude`. curvature: how far a' moves when x does, by its own size.
    """

    value: torch.Tensor
    value_moves: torch.Tensor
    slope: torch.Tensor
    slope_moves: torch.Tensor
    curvature: torch.Tensor


def activation_sizes(x: torch.Tensor, form: str) -> Sizes:
    """`Sizes` of GELU, form "tanh" or "none", or with the logistic Phi of "silu", in fp64."""
    if form == "tanh":
        c = x.clamp(-20, 20)
        z = 2 * math.sqrt(2 / math.pi) * (c + 0.044715 * c**3)
        phi, tail = torch.sigmoid(z), torch.sigmoid(-z.abs())
        density = phi * torch.sigmoid(-z) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * c * c)
    elif form == "silu":
        c = z = x.clamp(-700, 700)
        phi, tail = torch.sigmoid(z), torch.sigmoid(-z.abs())
        density = phi * torch.sigmoid(-z)
    else:
        c = x.clamp(-30, 30)
        z = c * c / 2
        phi, tail = (torch.special.erfc(v * math.sqrt(0.5)) / 2 for v in (-c, c.abs()))
        density = torch.exp(-z) / math.sqrt(2 * math.pi)
    # PyTorch's fp64 result, 1 + tanh, has no digits below 2^-53: 2^-52 is u32 2^-28.
    phi = phi + 2.0**-28
    # exp(z (1 + u)) = exp(z) (1 + u z): an error of u in the exponent moves the tail of Phi by u z.
    moves = tail * z.abs()
    bump = c.abs() * density
    return Sizes(
        x.abs() * phi,
        x.abs() * moves,
        phi + bump,
        moves + bump * (1 + z.abs()),
        # |x a''| <= |x| Phi' (2 + |x Phi'' / Phi'|), where the last is at most 2 + 3 |z|.
        bump * (4 + 3 * z.abs()),
    )


LENGTH = 16  # of the sums in a: a polynomial of degree nine, an exp and a reciprocal


def _magnitudes(i: Inputs, options: Options, dy: torch.Tensor) -> dict[str, Magnitude]:
    sizes = activation_sizes(i["x"], options.get("approximate", "tanh"))
    return {
        "result": Magnitude(sizes.value, sizes.value_moves, LENGTH),
        "x": Magnitude(dy.abs() * sizes.slope, dy.abs() * sizes.slope_moves, LENGTH),
    }


def _cases() -> Iterator[Case]:
    for approximate in ("tanh", "none"):
        options = {"approximate": approximate}
        for shape in ((), (1,), (4, 64), (3, 7, 11), (0,), (5, 0), (20_011,)):
            yield Case("gelu", shape, options=options)
        for values in ("large", "offset", "spread", "tiny", "nan"):
            yield Case("gelu", (4, 129), values, options=options)
        for layout in LAYOUTS[1:]:
            yield Case("gelu", (6, 41), layout=layout, options=options)
            yield Case("gelu", (6, 41), grad_layout=layout, options=options)


ROW = OpRow(
    inputs=lambda case, dtype, draw: {"x": draw(case.shape, case.values).to(dtype)},
    call=lambda i, o: gelu(i["x"], **o),
    peer=lambda i, o: F.gelu(i["x"], approximate=o.get("approximate", "tanh")),
    magnitudes=_magnitudes,
    gradients=("x",),
    cases=tuple(_cases()),
    examples=(Case("gelu", (6, 41)),),
    gradchecks=tuple(Case("gelu", (3, 5), options={"approximate": a}) for a in ("none", "tanh")),
    tail=lambda n: Case("gelu", (n,), options={"approximate": "none"} if n % 2 else {}),
    many=Case("gelu", (300, 411)),
    reports=tuple(Case("gelu", (64, 3072), options={"approximate": a}) for a in ("none", "tanh")),
)
