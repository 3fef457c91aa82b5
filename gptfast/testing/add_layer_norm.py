"""How add_layer_norm is tested; `add_rms_norm` likewise.

Options: weight, bias, x_bias (None, "same" or a dtype), residual ("same" or "float32"), p, eps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gptfast.ops import add_layer_norm
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.dropout_add import factors, residual_dtype, seed_for
from gptfast.testing.judge import Magnitude
from gptfast.testing.layer_norm import magnitudes as norm_magnitudes
from gptfast.testing.layer_norm import parameters
from gptfast.testing.memory import LAYOUTS

EPS = 1e-5
PLAIN: Options = {"x_bias": None}
ALL: Options = {"p": 0.3, "residual": "float32"}


def inputs(case: Case, dtype: torch.dtype, draw: Any, **means: float) -> dict[str, Any]:
    """x, residual, seed, and the parameters about these means."""
    return {
        "x": draw(case.shape, case.values).to(dtype),
        "residual": draw(case.shape).to(residual_dtype(case, dtype)),
        **parameters(case, dtype, draw, **means),
        "seed": seed_for(case.options.get("p", 0.0)),
    }


def stream(i: Inputs, options: Options) -> torch.Tensor:
    """residual_out of torch's ops, composed."""
    branch = i["x"] if i["x_bias"] is None else i["x"] + i["x_bias"]
    return i["residual"] + branch * factors(i, options.get("p", 0.0))


def _peer(i: Inputs, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    r = stream(i, options)
    return F.layer_norm(r, r.shape[-1:], i["weight"], i["bias"], options.get("eps", EPS)), r


def magnitudes(
    i: Inputs, options: Options, dy: torch.Tensor, dr: torch.Tensor, *, centre: bool = True
) -> dict[str, Magnitude]:
    """Those of the norm of r, and what they move when r does.

    r moves by u32 times the terms of its sum, and, unless it is fp32, by u |r| when it is rounded
    to the dtype in which it is returned: the norm sees it after that.
    """
    r, eps = stream(i, options), options.get("eps", EPS)
    z, x_bias, w = factors(i, options.get("p", 0.0)), i["x_bias"], i["weight"]
    terms = i["residual"].abs() + (z * i["x"]).abs()
    if x_bias is not None:
        terms = terms + (z * x_bias).abs()
    known = norm_magnitudes({**i, "x": r}, eps, dy, centre=centre)

    centred = r - r.mean(-1, keepdim=True) if centre else r
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat = centred * rstd
    wdy = dy if w is None else w * dy
    c1 = (wdy * xhat).mean(-1, keepdim=True)
    through = wdy - c1 * xhat - (wdy.mean(-1, keepdim=True) if centre else 0)

    def moves(d: torch.Tensor) -> dict[str, torch.Tensor]:
        """How far y and the gradients move when r moves by d, to first order."""
        scale = rstd * (xhat.abs() * d).mean(-1, keepdim=True)  # rstd, relatively
        mean = d.mean(-1, keepdim=True) if centre else 0
        dxhat = rstd * (d + mean) + xhat.abs() * scale
        c1_moves = (wdy.abs() * dxhat).mean(-1, keepdim=True)
        dresidual = rstd * (scale * through.abs() + c1.abs() * dxhat + c1_moves * xhat.abs())
        return {
            "result": dxhat if w is None else w.abs() * dxhat,
            "x": dresidual,
            "weight": _sum(dy.abs() * dxhat),
            "bias": torch.zeros_like(r[..., :1]).sum(),
        }

    computed = moves(terms)
    rounded = None if options.get("residual") == "float32" else moves(r.abs())

    def magnitude(
        name: str, terms: torch.Tensor | float, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> Magnitude:
        own, condition, length, *_ = known[name]
        stored = None if rounded is None else change(rounded[name])
        condition = change(condition + computed[name])
        return Magnitude(change(own + terms), condition, length, stored)

    M = r.shape[:-1].numel()
    of_x = magnitude("x", dr.abs(), lambda t: t * z)
    of_bias = magnitude("x", dr.abs(), lambda t: _sum(t * z))
    result = {
        "y": magnitude("result", 0.0, lambda t: t),
        "residual_out": Magnitude(terms, torch.zeros_like(terms), 2),
        "x": of_x,
        "residual": magnitude("x", dr.abs(), lambda t: t),
        "x_bias": of_bias._replace(length=M + r.shape[-1]),
        "weight": magnitude("weight", 0.0, lambda t: t),
    }
    return {**result, "bias": known["bias"]} if centre else result


def _sum(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(0).flatten(0, -2).sum(0)


def cases(op: str) -> Iterator[Case]:
    """For both ops."""
    for shape in (
        *((8, 64), (5, 37), (1, 1), (7,), (2, 3, 50), (0, 16), (3, 0)),
        *((3, 769), (2, 17003), (2, 32768), (130, 24), (700, 3)),
    ):
        yield Case(op, shape)
    yield Case(op, (3, 769), options=ALL)
    yield Case(op, (130, 24), options=ALL)
    # r is fp32 where its rounding would be no small change: the bound is of first order.
    for values in ("offset", "tiny"):
        yield Case(op, (6, 48), values, options={"residual": "float32"})
    for values in ("spread", "nan"):
        yield Case(op, (6, 48), values)
    for layout in LAYOUTS[1:]:
        yield Case(op, (6, 41), layout=layout)
        yield Case(op, (6, 41), grad_layout=layout, options=ALL)
    for parameter in (None, "float32", "bfloat16"):
        kinds = dict.fromkeys(("weight", "bias", "x_bias"), parameter)
        yield Case(op, (9, 33), options=kinds)
        yield Case(op, (9, 33), options={**kinds, **ALL})
    yield Case(op, (9, 33), options={"weight": None, "eps": 0.1})
    yield Case(op, (9, 33), options={"p": 0.1, "x_bias": None})


def examples(op: str) -> tuple[Case, ...]:
    """For both ops."""
    return (Case(op, (9, 33)), Case(op, (9, 33), options={**PLAIN, **ALL}))


def gradchecks(op: str) -> tuple[Case, ...]:
    """For both ops."""
    return (
        Case(op, (4, 6)),
        Case(op, (2, 3, 5), options={"p": 0.3}),
        Case(op, (6,), options={"weight": None, "bias": None, "x_bias": None}),
    )


def reports(op: str) -> tuple[Case, ...]:
    """For both ops: as in a pre-norm block, with everything, and wider than a block of columns."""
    return (
        Case(op, (2048, 768), options=PLAIN),
        Case(op, (512, 4096), options={**PLAIN, "residual": "float32"}),
        Case(op, (2048, 1024), options=ALL),
        Case(op, (64, 32768), options=PLAIN),
        Case(op, (128, 17003), options=PLAIN),
    )


ROW = OpRow(
    inputs=lambda case, dtype, draw: inputs(case, dtype, draw, weight=1, bias=0, x_bias=0),
    call=lambda i, o: add_layer_norm(
        i["x"],
        i["residual"],
        i["weight"],
        i["bias"],
        o.get("eps", EPS),
        x_bias=i["x_bias"],
        dropout_p=o.get("p", 0.0),
        seed=i["seed"],
    ),
    peer=_peer,
    magnitudes=magnitudes,
    gradients=("x", "residual", "weight", "bias", "x_bias"),
    cases=tuple(cases("add_layer_norm")),
    examples=examples("add_layer_norm"),
    gradchecks=gradchecks("add_layer_norm"),
    tail=lambda n: Case("add_layer_norm", (3, n), options=ALL if n % 2 else PLAIN),
    many=Case("add_layer_norm", (2100, 67), options=ALL),
    results=("y", "residual_out"),
    like={"residual_out": "residual"},
    reports=reports("add_layer_norm"),
)
