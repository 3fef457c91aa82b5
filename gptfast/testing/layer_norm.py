"""How layer_norm is tested.

Options: weight, bias (None, "same" or a dtype), eps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gptfast.ops import layer_norm
from gptfast.testing.case import Case, Inputs, OpRow
from gptfast.testing.judge import Magnitude
from gptfast.testing.memory import LAYOUTS


def parameters(
    case: Case, dtype: torch.dtype, draw: Any, **means: float
) -> dict[str, torch.Tensor | None]:
    """The parameters (N,) of a norm by name, each as its option says, about its mean."""
    found: dict[str, torch.Tensor | None] = {}
    for name, mean in means.items():
        kind = case.options.get(name, "same")
        found[name] = None
        if kind is not None:
            own = dtype if kind == "same" else getattr(torch, kind)
            found[name] = (draw((case.shape[-1],)) + mean).to(own)
    return found


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    given = parameters(case, dtype, draw, weight=1, bias=0)
    return {"x": draw(case.shape, case.values).to(dtype), **given}


def magnitudes(
    i: Inputs, eps: float, dy: torch.Tensor, *, centre: bool = True
) -> dict[str, Magnitude]:
    """Of y = layer_norm(x), as "result", and its gradients; without `centre`, of rms_norm."""
    x, w, b = i["x"], i["weight"], i.get("bias")
    N = x.shape[-1]
    x, dy = (t.unsqueeze(0).flatten(0, -2) for t in (x, dy))
    w = torch.ones(N).to(x) if w is None else w
    centred = x - x.mean(-1, keepdim=True) if centre else x
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat = (centred * rstd).abs()
    # How far xhat moves when the mean does, by u.
    shift = rstd * x.abs().mean(-1, keepdim=True) * float(centre)
    wdy = (w * dy).abs()
    c1, c1_moves = (wdy * xhat).mean(-1, keepdim=True), (wdy * shift).mean(-1, keepdim=True)
    c2 = wdy.mean(-1, keepdim=True) * float(centre)
    bias = torch.zeros(N).to(x) if b is None else b.abs()
    M, shape = x.shape[0], i["x"].shape
    return {
        "result": Magnitude(
            (xhat * w.abs() + bias).view(shape), (shift * w.abs()).expand(x.shape).view(shape), N
        ),
        "x": Magnitude(
            (rstd * (wdy + c1 * xhat + c2)).view(shape),
            (rstd * (c1 * shift + c1_moves * (xhat + shift))).view(shape),
            N,
        ),
        "weight": Magnitude((dy.abs() * xhat).sum(0), (dy.abs() * shift).sum(0), M + N),
        "bias": Magnitude(dy.abs().sum(0), torch.zeros(N).to(x), M),
    }


def _cases() -> Iterator[Case]:
    # One row and column, no rows, no columns, more dimensions, wide rows, and so many rows that dw
    # and db are summed in several blocks.
    for shape in (
        *((8, 64), (5, 37), (1, 768), (1, 1), (7,), (2, 3, 50), (0, 16), (3, 0), (0, 0), (2, 0, 5)),
        *((3, 4099), (2, 17003), (2, 32768), (130, 24), (2100, 3)),
    ):
        yield Case("layer_norm", shape)
    for values in ("offset", "spread", "tiny", "constant", "nan", "nonfinite"):
        yield Case("layer_norm", (6, 48), values)
        yield Case("layer_norm", (3, 769), values)
    for layout in LAYOUTS[1:]:
        yield Case("layer_norm", (6, 41), layout=layout)
        yield Case("layer_norm", (2, 3, 16), layout=layout, grad_layout=layout)
        yield Case("layer_norm", (6, 41), grad_layout=layout)
    for weight in (None, "float32", "bfloat16", "float16"):
        yield Case("layer_norm", (9, 33), options={"weight": weight, "bias": weight})
    yield Case("layer_norm", (9, 33), options={"bias": None})
    yield Case("layer_norm", (9, 33), options={"weight": None, "eps": 0.1})


ROW = OpRow(
    inputs=_inputs,
    call=lambda i, o: layer_norm(i["x"], i["weight"], i["bias"], o.get("eps", 1e-5)),
    peer=lambda i, o: F.layer_norm(
        i["x"], i["x"].shape[-1:], i["weight"], i["bias"], o.get("eps", 1e-5)
    ),
    magnitudes=lambda i, o, dy: magnitudes(i, o.get("eps", 1e-5), dy),
    gradients=("x", "weight", "bias"),
    cases=tuple(_cases()),
    examples=(Case("layer_norm", (9, 33)),),
    gradchecks=(
        Case("layer_norm", (4, 6)),
        Case("layer_norm", (6,)),
        Case("layer_norm", (2, 3, 5), options={"weight": None, "bias": None}),
    ),
    tail=lambda n: Case("layer_norm", (3, n)),
    many=Case("layer_norm", (2100, 67)),
    # GPT-2's width, Llama's, and one wider than a block of columns. Backward's partial sums grow
    # with the rows, so few rows tell as much of the bytes as many.
    reports=(
        Case("layer_norm", (2048, 768)),
        Case("layer_norm", (512, 4096)),
        Case("layer_norm", (64, 32768)),
        Case("layer_norm", (128, 17003)),
    ),
)
