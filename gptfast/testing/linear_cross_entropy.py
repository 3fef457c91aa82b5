"""How linear_cross_entropy is tested. A case's shape is (..., V, C).

Options: those of cross_entropy but inplace_backward; bias (bool).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gptfast.ops import linear_cross_entropy
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.cross_entropy import logit_magnitudes, loss_options, plain_loss, targets
from gptfast.testing.judge import Magnitude
from gptfast.testing.memory import LAYOUTS


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    *rows, V, C = case.shape
    scale = max(C, 1) ** -0.5  # logits of deviation 1
    return {
        "x": draw((*rows, C), case.values).to(dtype),
        "linear_weight": (draw((V, C)) * scale).to(dtype),
        "linear_bias": draw((V,)).to(dtype) if case.options.get("bias") else None,
        **targets(Case(case.op, (*rows, V), options=case.options), V, draw),
    }


def _call(i: Inputs, options: Options) -> torch.Tensor:
    return linear_cross_entropy(
        i["x"], i["linear_weight"], i["target"], i["linear_bias"], weight=i["class_weight"],
        **loss_options(options),
    )  # fmt: skip


def _peer(i: Inputs, options: Options) -> torch.Tensor:
    logits = F.linear(i["x"], i["linear_weight"], i["linear_bias"])
    return plain_loss(logits, i["target"], i["class_weight"], options)


def _magnitudes(i: Inputs, options: Options, dloss: torch.Tensor) -> dict[str, Magnitude]:
    x, w, b = i["x"].flatten(0, -2), i["linear_weight"], i["linear_bias"]
    (M, C), V = x.shape, w.shape[0]
    logits, size = F.linear(x, w, b), F.linear(x.abs(), w.abs(), None if b is None else b.abs())
    result, d = logit_magnitudes(logits, size, i, options, dloss)
    # `terms` are what one rounding to the storage dtype is multiplied with. dlogits are rounded to
    # it and so, by the backends that call PyTorch's products, are the logits: dlogits then move as
    # far as logits off by u |logits| move them.
    _, still = logit_magnitudes(logits, 0.0, i, options, dloss)
    _, moved = logit_magnitudes(logits, logits.abs(), i, options, dloss)
    d = d._replace(terms=d.terms + moved.condition - still.condition)
    x, w, length = x.abs(), w.abs(), V + C
    return {
        "result": Magnitude(result.terms, result.condition, result.length + C),
        "x": Magnitude(
            (d.terms @ w).view(i["x"].shape), (d.condition @ w).view(i["x"].shape), length
        ),
        "linear_weight": Magnitude(d.terms.mT @ x, d.condition.mT @ x, M + length),
        "linear_bias": Magnitude(d.terms.sum(0), d.condition.sum(0), M + length),
    }


def _cases() -> Iterator[Case]:
    def case(shape: tuple[int, ...], values: str = "normal", **kwargs: Any) -> Case:
        return Case("linear_cross_entropy", shape, values, **kwargs)

    # (M, V, C): within a tile, its neighbours, one row, class or column, no rows, more dimensions.
    for shape in (
        *((8, 32, 16), (5, 37, 19), (1, 50, 8), (6, 1, 8), (6, 9, 1), (2, 3, 17, 12), (0, 16, 8)),
        *((64, 64, 32), (65, 130, 33), (17, 300, 72)),
    ):
        yield case(shape)
        yield case(shape, options={"bias": True, "reduction": "none"})
    for reduction in ("none", "mean", "sum"):
        for options in (
            {"label_smoothing": 0.1},
            {"weight": True, "ignored": 0.3},
            {"z_loss": 0.1},
            {"softcap": 1.5},
            {"bias": True, "weight": True, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 5.0},
        ):
            yield case((9, 37, 24), options={"reduction": reduction, "ignored": 0.2, **options})
        yield case((4, 9, 8), options={"reduction": reduction, "ignored": 1.0})
        yield case((9, 3, 8), options={"reduction": reduction, "ignore_index": 2})
    for values in ("large", "constant", "nan", "nonfinite", "tiny"):
        yield case((5, 37, 16), values)
    for layout in LAYOUTS[1:]:
        options = {"bias": True, "weight": True, "label_smoothing": 0.2}
        yield case((6, 41, 12), layout=layout, options=options)
        yield case((6, 41, 12), grad_layout=layout, options={"reduction": "none"})


ROW = OpRow(
    inputs=_inputs,
    call=_call,
    peer=_peer,
    magnitudes=_magnitudes,
    gradients=("x", "linear_weight", "linear_bias"),
    float32_result=True,
    matrix_units=True,
    cases=tuple(_cases()),
    examples=(
        Case("linear_cross_entropy", (9, 37, 24), options={"reduction": "none", "bias": True}),
        Case("linear_cross_entropy", (9, 37, 24), options={"label_smoothing": 0.1, "z_loss": 0.1}),
    ),
    gradchecks=(
        Case("linear_cross_entropy", (5, 7, 3)),
        Case(
            "linear_cross_entropy",
            (5, 7, 3),
            options={
                "reduction": "none", "bias": True, "weight": True, "label_smoothing": 0.2,
                "ignored": 0.3, "z_loss": 0.1, "softcap": 2.0,
            },
        ),
    ),
    tail=lambda n: Case("linear_cross_entropy", (3, n, n)),
    many=Case("linear_cross_entropy", (300, 400, 40), options={"bias": True}),
    # The second one with all that follows a product: it takes more registers.
    reports=(
        Case("linear_cross_entropy", (128, 2048, 768)),
        Case(
            "linear_cross_entropy",
            (100, 1000, 768),
            options={"bias": True, "weight": True, "label_smoothing": 0.1, "softcap": 30.0},
        ),
    ),
)  # fmt: skip
