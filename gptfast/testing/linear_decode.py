"""How linear_decode is tested.

Options: weight (a floating dtype, "int8", "int4" or "int4_zero"; the default is x's dtype), bias
(False, or a dtype; the default is x's), activation. Shapes are (..., K, N).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gptfast.ops import linear_decode
from gptfast.ops.linear_decode import GROUP, PANEL, QuantizedWeight, packed_shape
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.gelu import LENGTH, activation_sizes
from gptfast.testing.judge import Magnitude
from gptfast.testing.memory import LAYOUTS

FORMATS = ("float32", "bfloat16", "float16", "int8", "int4", "int4_zero")


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    *rows, K, N = case.shape
    format, bias = case.options.get("weight"), case.options.get("bias")
    inputs = {"x": draw((*rows, K), case.values).to(dtype), "scale": None, "zero": None}

    def integers(shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
        return (draw(shape) * (high - low) / 4 + (high + low) / 2).round().clamp(low, high)

    if format == "int8":
        inputs["weight"] = integers(packed_shape(torch.int8, N, K), -127, 127).to(torch.int8)
        inputs["scale"] = draw((N,))
    elif format in ("int4", "int4_zero"):
        shape = packed_shape(torch.uint8, N, K)
        low, high = integers(shape, 0, 15), integers(shape, 0, 15)
        inputs["weight"] = (low + 16 * high).to(torch.uint8)
        groups = (shape[0], 8 * shape[1] // GROUP, PANEL)
        inputs["scale"] = draw(groups).to(torch.bfloat16)
        if format == "int4_zero":
            inputs["zero"] = integers(groups, 0, 15).to(torch.uint8)
    else:
        inputs["weight"] = draw((N, K)).to(getattr(torch, format) if format else dtype)
    if bias is not False:
        inputs["bias"] = draw((N,)).to(getattr(torch, bias) if bias else dtype)
    return {"bias": None, **inputs}


def _features(i: Inputs) -> int:
    """N; a quantised weight alone does not tell, so cases without a bias have whole panels."""
    if i["bias"] is not None:
        return i["bias"].numel()
    return i["weight"].shape[0] * (1 if i["scale"] is None else PANEL)


def _call(i: Inputs, options: Options) -> torch.Tensor:
    weight = i["weight"]
    if i["scale"] is not None:
        weight = QuantizedWeight(weight, i["scale"], i["zero"], _features(i), i["x"].shape[-1])
    return linear_decode(i["x"], weight, i["bias"], options.get("activation"))


def _weight(i: Inputs) -> torch.Tensor:
    """The (N, K) weight, element by element as the layout is written down."""
    data, scale, N, K = i["weight"], i["scale"], _features(i), i["x"].shape[-1]
    if scale is None:
        return data
    n, k = torch.arange(N, device=data.device)[:, None], torch.arange(K, device=data.device)
    if data.dtype == torch.int8:
        return data[n // PANEL, k // 4, n % PANEL, k % 4].to(scale.dtype) * scale[:, None]
    byte = data[n // PANEL, k // 8, n % PANEL, k % 4].int()
    q = torch.where(k % 8 < 4, byte & 15, byte >> 4).to(scale.dtype)
    at = (n // PANEL, k // GROUP, n % PANEL)
    return (q - (8 if i["zero"] is None else i["zero"][at].to(scale.dtype))) * scale[at]


def _peer(i: Inputs, options: Options) -> torch.Tensor:
    z = F.linear(i["x"], _weight(i).to(i["x"].dtype), i["bias"])
    return F.gelu(z, approximate="tanh") if options.get("activation") else z


def _magnitudes(i: Inputs, options: Options, *_: torch.Tensor) -> dict[str, Magnitude]:
    x, w, b = i["x"], _weight(i).double(), i["bias"]
    K = x.shape[-1]
    terms = F.linear(x.abs(), w.abs(), None if b is None else b.abs())
    moves = torch.zeros_like(terms)
    if i["scale"] is not None and K:
        # Each row of x is rounded to fixed point, which moves every element by u max |x|.
        moves = x.abs().amax(-1, keepdim=True).nan_to_num(posinf=0) * w.abs().sum(1)
    if options.get("activation"):
        # z is off by what it would be without the activation: its bound, in units of the sum's.
        sizes = activation_sizes(F.linear(x, w, b), "tanh")
        terms, moves = sizes.value + terms * sizes.slope, sizes.value_moves + moves * sizes.slope
    return {"result": Magnitude(terms, moves, K + LENGTH)}


def _case(
    shape: tuple[int, ...], values: str = "normal", layout: str = "contiguous", **options: Any
) -> Case:
    return Case("linear_decode", shape, values, layout, options=options)


def _cases() -> Iterator[Case]:
    for weight in FORMATS:
        # Rows around the 4, 16 and 64 that are multiplied at once; panels and groups that are not
        # whole; several dimensions, none, and empty ones.
        for shape in (
            *((1, 64, 48), (2, 96, 16), (3, 33, 17), (4, 100, 31), (5, 128, 33), (11, 70, 20)),
            *((16, 192, 64), (17, 40, 50), (70, 36, 35), (7, 9), (2, 1, 3, 40, 18), (1, 1, 1)),
            *((0, 8, 8), (3, 8, 0), (3, 0, 8)),
        ):
            yield _case(shape, weight=weight)
        yield _case((1, 70, 48), weight=weight, bias=False)
        yield _case((6, 70, 48), weight=weight, bias=False, activation="gelu_tanh")
        yield _case((1, 130, 37), weight=weight, activation="gelu_tanh", bias="float32")
        for values in ("large", "offset", "spread", "tiny", "constant", "nan", "nonfinite"):
            yield _case((5, 130, 37), values, weight=weight)
            yield _case((1, 130, 37), values, weight=weight, activation="gelu_tanh")
        for layout in LAYOUTS[1:]:
            yield _case((3, 41, 22), layout=layout, weight=weight)
        # A sum that must not lose small terms.
        yield _case((2, 5000, 17), weight=weight)
    yield _case((2, 3, 40, 18), layout="transposed", weight="int8")


ROW = OpRow(
    inputs=_inputs,
    call=_call,
    peer=_peer,
    magnitudes=_magnitudes,
    gradients=(),
    cases=tuple(_cases()),
    examples=(
        _case((3, 33, 18)),
        _case((3, 33, 18), weight="int8", activation="gelu_tanh"),
        _case((3, 33, 16), weight="int4_zero", bias=False),
    ),
    gradchecks=(),
    tail=lambda n: _case((n % 17 + 1, n, 66 - n), weight=FORMATS[n % len(FORMATS)]),
    many=_case((21, 700, 530), weight="int4"),
    # GPT-2's first layer of the MLP, for one row and for a batch of eight; in x's dtype, fp32, bf16
    # and fp16 in turn, and quantised; and a row four times as long.
    reports=(
        *(
            _case((M, 768, 3072), weight=weight, activation="gelu_tanh")
            for M in (1, 8)
            for weight in (None, "int8", "int4")
        ),
        _case((1, 768, 3072), weight="int4_zero", bias=False),
        _case((1, 3072, 768), weight="int8"),
    ),
)
