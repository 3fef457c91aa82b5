"""How glu is tested, through `swiglu` and `geglu`. A case's shape is that of the result.

Options: activation, packed (gate and up in one tensor, with no `up`). In layout "packed" gate and
up are views of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gptfast.ops import geglu, swiglu
from gptfast.ops.glu import ACTIVATIONS, GELU_FORMS
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.gelu import LENGTH, activation_sizes
from gptfast.testing.judge import Magnitude
from gptfast.testing.memory import LAYOUTS


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    gate, up = draw(case.shape, case.values).to(dtype), draw(case.shape).to(dtype)
    if case.options.get("packed"):
        return {"gate": torch.cat([gate, up], -1), "up": None}
    if case.layout == "packed":
        gate, up = torch.cat([gate, up], -1).chunk(2, -1)
    return {"gate": gate, "up": up}


def _call(i: Inputs, options: Options) -> torch.Tensor:
    activation = options.get("activation", "silu")
    if activation == "silu":
        return swiglu(i["gate"], i["up"])
    return geglu(i["gate"], i["up"], GELU_FORMS[activation])


def _halves(i: Inputs) -> tuple[torch.Tensor, ...]:
    return i["gate"].chunk(2, -1) if i["up"] is None else (i["gate"], i["up"])


def _peer(i: Inputs, options: Options) -> torch.Tensor:
    gate, up = _halves(i)
    activation = options.get("activation", "silu")
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate=GELU_FORMS[activation]) * up


def _magnitudes(i: Inputs, options: Options, dy: torch.Tensor) -> dict[str, Magnitude]:
    gate, up = (x.abs() if n else x for n, x in enumerate(_halves(i)))
    form, dy = options.get("activation", "silu"), dy.abs()
    sizes = activation_sizes(gate, GELU_FORMS.get(form, "silu"))
    dgate = Magnitude(dy * up * sizes.slope, dy * up * sizes.slope_moves, LENGTH)
    dup = Magnitude(dy * sizes.value, dy * sizes.value_moves, LENGTH)
    result = Magnitude(up * sizes.value, up * sizes.value_moves, LENGTH)
    if i["up"] is not None:
        return {"result": result, "gate": dgate, "up": dup}
    terms, moves = (torch.cat([a, b], -1) for a, b in zip(dgate[:2], dup[:2], strict=True))
    return {"result": result, "gate": Magnitude(terms, moves, LENGTH)}


def _cases() -> Iterator[Case]:
    for activation in ACTIVATIONS:
        options: dict[str, Any] = {"activation": activation}
        # One element, none, odd widths, and rows wider than a tile of 1024 elements.
        for shape in ((), (1,), (4, 64), (3, 7, 11), (0, 5), (5, 0), (2, 1027)):
            yield Case("glu", shape, options=options)
        for values in ("large", "offset", "spread", "tiny", "nan"):
            yield Case("glu", (4, 129), values, options=options)
        yield Case("glu", (5, 3, 21), options={**options, "packed": True})
        yield Case("glu", (5, 33), layout="packed", options=options)
    for layout in LAYOUTS[1:]:
        yield Case("glu", (6, 41), layout=layout)
        yield Case("glu", (6, 41), grad_layout=layout)
        yield Case("glu", (2, 3, 16), layout=layout, grad_layout=layout, options={"packed": True})
    for shape in ((7,), (0, 5), (5, 0), (3, 1040), (400, 3)):
        yield Case("glu", shape, options={"packed": True})
        yield Case("glu", shape, layout="packed")


ROW = OpRow(
    inputs=_inputs,
    call=_call,
    peer=_peer,
    magnitudes=_magnitudes,
    gradients=("gate", "up"),
    cases=tuple(_cases()),
    examples=(Case("glu", (6, 41)), Case("glu", (6, 41), options={"packed": True})),
    gradchecks=tuple(
        Case("glu", (3, 5), options={"activation": a, "packed": packed})
        for a in ACTIVATIONS
        for packed in (False, True)
    ),
    tail=lambda n: Case(
        "glu", (3, n), options={"activation": ACTIVATIONS[n % 3], "packed": n % 2 == 0}
    ),
    many=Case("glu", (300, 411)),
    # Llama's widths, and Gemma's activation.
    reports=(
        Case("glu", (16, 8192)),
        Case("glu", (16, 11008), options={"packed": True}),
        Case("glu", (16, 8192), options={"activation": "gelu_tanh"}),
        Case("glu", (16, 8192), options={"activation": "gelu", "packed": True}),
    ),
)
