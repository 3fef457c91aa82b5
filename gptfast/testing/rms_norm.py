"""How rms_norm is tested.

Options: weight (None, "same" or a dtype), eps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gptfast.ops import rms_norm
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.layer_norm import magnitudes, parameters
from gptfast.testing.memory import LAYOUTS

EPS = 1e-5  # the default depends on the dtype, which the exact result must not


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    x = draw(case.shape, case.values).to(dtype)
    return {"x": x, **parameters(case, dtype, draw, weight=1)}


def _peer(i: Inputs, options: Options) -> torch.Tensor:
    return F.rms_norm(i["x"], i["x"].shape[-1:], i["weight"], options.get("eps", EPS))


def _cases() -> Iterator[Case]:
    # One row and column, no rows, no columns, wide rows, and so many rows that dw is summed in
    # several blocks.
    for shape in (
        *((8, 64), (5, 37), (1, 768), (1, 1), (7,), (2, 3, 50), (0, 16), (3, 0)),
        *((3, 4099), (2, 17003), (130, 24), (2100, 3)),
    ):
        yield Case("rms_norm", shape)
    # An infinity makes the other elements of its row 0: no rounding bound can be derived from it.
    for values in ("offset", "spread", "tiny", "constant", "nan"):
        yield Case("rms_norm", (6, 48), values)
        yield Case("rms_norm", (3, 769), values)
    for layout in LAYOUTS[1:]:
        yield Case("rms_norm", (6, 41), layout=layout)
        yield Case("rms_norm", (6, 41), grad_layout=layout)
    for weight in (None, "float32", "bfloat16", "float16"):
        yield Case("rms_norm", (9, 33), options={"weight": weight})
    yield Case("rms_norm", (9, 33), options={"weight": None, "eps": 0.1})


ROW = OpRow(
    inputs=_inputs,
    call=lambda i, o: rms_norm(i["x"], i["weight"], o.get("eps", EPS)),
    peer=_peer,
    magnitudes=lambda i, o, dy: magnitudes(i, o.get("eps", EPS), dy, centre=False),
    gradients=("x", "weight"),
    cases=tuple(_cases()),
    examples=(Case("rms_norm", (9, 33)),),
    gradchecks=(
        Case("rms_norm", (4, 6)),
        Case("rms_norm", (6,)),
        Case("rms_norm", (2, 3, 5), options={"weight": None}),
    ),
    tail=lambda n: Case("rms_norm", (3, n)),
    many=Case("rms_norm", (2100, 67)),
    reports=(Case("rms_norm", (512, 4096)), Case("rms_norm", (128, 17003))),
)
