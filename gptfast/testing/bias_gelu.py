"""How bias_gelu is tested.

Options: approximate, bias (a dtype; the default is x's).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gptfast.ops import bias_gelu
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.gelu import LENGTH, activation_sizes
from gptfast.testing.judge import Magnitude
from gptfast.testing.memory import LAYOUTS


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    name = case.options.get("bias")
    bias = draw(case.shape[-1:]).to(getattr(torch, name) if name else dtype)
    return {"x": draw(case.shape, case.values).to(dtype), "bias": bias}


def _magnitudes(i: Inputs, options: Options, dy: torch.Tensor) -> dict[str, Magnitude]:
    z, N = i["x"] + i["bias"], i["bias"].numel()
    sizes, dy = activation_sizes(z, options.get("approximate", "tanh")), dy.abs()
    # z is rounded once, by u |z|, before anything else is done with it.
    value_moves = sizes.value_moves + z.abs() * sizes.slope
    terms, moves = dy * sizes.slope, dy * (sizes.slope_moves + sizes.curvature)
    M = z.numel() // max(N, 1)
    return {
        "result": Magnitude(sizes.value, value_moves, LENGTH),
        "x": Magnitude(terms, moves, LENGTH),
        "bias": Magnitude(terms.reshape(M, N).sum(0), moves.reshape(M, N).sum(0), M + LENGTH),
    }


def _cases() -> Iterator[Case]:
    # Rows narrower and wider than a tile of 1024 elements, and so many that several runs sum dbias.
    for approximate in ("tanh", "none"):
        options = {"approximate": approximate}
        shapes = ((4, 64), (5, 37), (7,), (1, 1), (2, 3, 50), (0, 16), (3, 0), (3, 1027), (700, 3))
        for shape in shapes:
            yield Case("bias_gelu", shape, options=options)
        for values in ("large", "offset", "spread", "tiny", "constant", "nan"):
            yield Case("bias_gelu", (4, 129), values, options=options)
    for layout in LAYOUTS[1:]:
        yield Case("bias_gelu", (6, 41), layout=layout)
        yield Case("bias_gelu", (2, 3, 16), layout=layout, grad_layout=layout)
        yield Case("bias_gelu", (6, 41), grad_layout=layout)
    for bias in ("float32", "bfloat16", "float16"):
        yield Case("bias_gelu", (9, 33), options={"bias": bias})


ROW = OpRow(
    inputs=_inputs,
    call=lambda i, o: bias_gelu(i["x"], i["bias"], o.get("approximate", "tanh")),
    peer=lambda i, o: F.gelu(i["x"] + i["bias"], approximate=o.get("approximate", "tanh")),
    magnitudes=_magnitudes,
    gradients=("x", "bias"),
    cases=tuple(_cases()),
    examples=(Case("bias_gelu", (9, 33)),),
    gradchecks=(
        Case("bias_gelu", (3, 5), options={"approximate": "none"}),
        Case("bias_gelu", (2, 2, 3)),
        Case("bias_gelu", (4,)),
    ),
    tail=lambda n: Case("bias_gelu", (3, n), options={"approximate": "none"} if n % 2 else {}),
    many=Case("bias_gelu", (600, 211)),
    reports=tuple(
        Case("bias_gelu", (256, N), options={"approximate": a})
        for N, a in ((3072, "tanh"), (3072, "none"), (6400, "tanh"))
    ),
)
