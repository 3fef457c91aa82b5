"""How cross_entropy is tested.

Options: reduction, label_smoothing, weight (bool), ignored (share), ignore_index.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gptfast.ops import cross_entropy
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.judge import UNDERFLOW, Magnitude
from gptfast.testing.memory import LAYOUTS


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    V, rows = case.shape[-1], case.shape[:-1]
    uniform = torch.special.ndtr(draw(rows))
    target = (uniform * V).long().clamp(max=V - 1)
    ignored = torch.special.ndtr(draw(rows)) < case.options.get("ignored", 0.0)
    return {
        "logits": draw(case.shape, case.values).to(dtype),
        "target": target.masked_fill(ignored, case.options.get("ignore_index", -100)),
        "weight": draw((V,)).abs() if case.options.get("weight") else None,
    }


def _options(options: Options) -> dict[str, Any]:
    names = ("ignore_index", "reduction", "label_smoothing")
    return {name: options[name] for name in names if name in options}


def _peer(i: Inputs, options: Options) -> torch.Tensor:
    logits, target, weight = i["logits"], i["target"], i["weight"]
    rows = logits.reshape(-1, logits.shape[-1]) if logits.dim() > 2 else logits
    given = target.reshape(rows.shape[:-1])
    loss = F.cross_entropy(rows, given, weight, **_options(options))
    return loss.view(target.shape) if options.get("reduction") == "none" else loss


def _magnitudes(i: Inputs, options: Options, dloss: torch.Tensor) -> dict[str, Magnitude]:
    x, shape = i["logits"].reshape(-1, i["logits"].shape[-1]), i["target"].shape
    M, V = x.shape
    target, s = i["target"].reshape(-1), options.get("label_smoothing", 0.0)
    w = torch.ones(V).to(x) if i["weight"] is None else i["weight"]
    counted = target != options.get("ignore_index", -100)
    t = torch.where(counted, target, 0)
    lse = torch.logsumexp(x, -1, keepdim=True)
    p = torch.exp(x - lse) + UNDERFLOW
    size = torch.where(x.isfinite(), x.abs(), 0) + lse.abs()  # |x_c| + |lse|
    hit = torch.nn.functional.one_hot(t, V) * (1 - s) * w
    spread = s / V * w.expand(M, V)
    terms = ((hit + spread) * size).sum(-1) * counted
    moves = (hit + spread).sum(-1) * counted  # the log of a sum moves as the sum does, relatively
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        g = dloss.reshape(-1)
        result = Magnitude(terms.view(shape), moves.view(shape), V)
    else:
        count = (w[t] * counted).sum() if reduction == "mean" else torch.ones(()).to(x)
        g = (dloss / count).expand(M)
        result = Magnitude(terms.sum() / count, moves.sum() / count, M + V)
    g = torch.where(counted, g, 0).abs().unsqueeze(-1)
    share = (hit + spread).sum(-1, keepdim=True) * p
    dx = Magnitude(
        (g * (share + hit + spread)).view(i["logits"].shape),
        (g * share * size).view(i["logits"].shape),
        V,
    )
    return {"result": result, "logits": dx}


def _cases() -> Iterator[Case]:
    # 4096 logits are one chunk of the CPU kernel.
    for shape in (
        *((8, 64), (5, 37), (1, 50), (1, 1), (6, 1), (9,), (2, 3, 17), (0, 16)),
        *((2, 4095), (2, 4096), (2, 4097), (3, 8200), (2, 50257)),
    ):
        yield Case("cross_entropy", shape)
    for reduction in ("none", "mean", "sum"):
        for smoothing in (0.0, 0.1, 1.0):
            for weight in (False, True):
                options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
                options |= {"weight": weight, "ignored": 0.3}
                yield Case("cross_entropy", (9, 37), options=options)
        yield Case("cross_entropy", (4, 9), options={"reduction": reduction, "ignored": 1.0})
        yield Case("cross_entropy", (0, 9), options={"reduction": reduction})
        # A class as ignore_index.
        yield Case("cross_entropy", (9, 3), options={"reduction": reduction, "ignore_index": 2})
        for values in ("large", "offset", "spread", "constant", "nan", "nonfinite", "masked"):
            yield Case("cross_entropy", (5, 77), values, options={"reduction": reduction})
    yield Case("cross_entropy", (4, 9000), "masked", options={"reduction": "none"})
    yield Case("cross_entropy", (5, 77), "offset", options={"label_smoothing": 0.1})
    for layout in LAYOUTS[1:]:
        for options in ({"reduction": "none"}, {"weight": True, "label_smoothing": 0.2}):
            yield Case("cross_entropy", (6, 41), layout=layout, options=options)
        yield Case("cross_entropy", (2, 3, 16), layout=layout)
        options = {"reduction": "none"}
        yield Case("cross_entropy", (6, 41), grad_layout=layout, options=options)


ROW = OpRow(
    inputs=_inputs,
    call=lambda i, o: cross_entropy(i["logits"], i["target"], i["weight"], **_options(o)),
    peer=_peer,
    magnitudes=_magnitudes,
    gradients=("logits",),
    float32_result=True,
    cases=tuple(_cases()),
    examples=(
        Case("cross_entropy", (9, 37), options={"reduction": "none"}),
        Case("cross_entropy", (9, 37), options={"label_smoothing": 0.1}),
    ),
    gradchecks=(
        Case("cross_entropy", (5, 7)),
        Case(
            "cross_entropy",
            (5, 7),
            options={"reduction": "none", "weight": True, "label_smoothing": 0.2, "ignored": 0.3},
        ),
        Case("cross_entropy", (5, 7), options={"reduction": "sum", "ignored": 0.3}),
    ),
    tail=lambda n: Case("cross_entropy", (3, n)),
    many=Case("cross_entropy", (40, 2000)),
    reports=(
        Case("cross_entropy", (32, 50257)),
        Case("cross_entropy", (32, 50304), options={"weight": True, "label_smoothing": 0.1}),
        Case("cross_entropy", (16, 128256)),
    ),
)
