"""How cross_entropy is tested.

Options: reduction, label_smoothing, z_loss, softcap, inplace_backward, weight (bool), ignored
(share), ignore_index.
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


def targets(case: Case, V: int, draw: Any) -> dict[str, torch.Tensor | None]:
    """Target classes, some of them ignored, and class weights, as a case's options say."""
    rows = case.shape[:-1]
    uniform = torch.special.ndtr(draw(rows))
    target = (uniform * V).long().clamp(max=V - 1)
    ignored = torch.special.ndtr(draw(rows)) < case.options.get("ignored", 0.0)
    return {
        "target": target.masked_fill(ignored, case.options.get("ignore_index", -100)),
        "class_weight": draw((V,)).abs() if case.options.get("weight") else None,
    }


def loss_options(options: Options) -> dict[str, Any]:
    """The options that are arguments of both losses."""
    names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "softcap")
    return {name: options[name] for name in names if name in options}


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    logits = draw(case.shape, case.values).to(dtype)
    return {"logits": logits, **targets(case, case.shape[-1], draw)}


def _call(i: Inputs, options: Options) -> torch.Tensor:
    inplace = options.get("inplace_backward", False)
    # What is overwritten is a tensor of its own, which the inputs are not.
    logits = i["logits"].clone(memory_format=torch.contiguous_format) if inplace else i["logits"]
    return cross_entropy(
        logits, i["target"], i["class_weight"], inplace_backward=inplace, **loss_options(options)
    )


def plain_loss(
    logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """PyTorch's cross_entropy, with softcap and z-loss spelled out, in float32 at least."""
    ignored, reduction = options.get("ignore_index", -100), options.get("reduction", "mean")
    x = logits.reshape(-1, logits.shape[-1])
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    t, w = target.reshape(-1), None if weight is None else weight.to(x.dtype)
    if "softcap" in options:
        x = options["softcap"] * torch.tanh(x / options["softcap"])
    loss = F.cross_entropy(
        x, t, w, ignore_index=ignored, reduction=reduction,
        label_smoothing=options.get("label_smoothing", 0.0),
    )  # fmt: skip
    if "z_loss" in options:
        z_loss = options["z_loss"] * torch.logsumexp(x, -1).square()
        z_loss = z_loss.masked_fill(t == ignored, 0)
        if reduction == "none":
            loss = loss + z_loss
        elif reduction == "sum":
            loss = loss + z_loss.sum()
        else:
            counted = t != ignored
            weights = counted if w is None else w[t.masked_fill(~counted, 0)] * counted
            loss = loss + z_loss.sum() / weights.sum()
    return loss.view(target.shape) if reduction == "none" else loss


def logit_magnitudes(
    x: torch.Tensor,
    moves: torch.Tensor | float,
    i: Inputs,
    options: Options,
    dloss: torch.Tensor,
) -> tuple[Magnitude, Magnitude]:
    """Of the result, and of the gradient of the logits x (M, V), which are off by u moves."""
    M, V = x.shape
    target, s = i["target"].reshape(-1), options.get("label_smoothing", 0.0)
    shape, z_loss, cap = i["target"].shape, options.get("z_loss", 0.0), options.get("softcap")
    w = torch.ones(V).to(x) if i["class_weight"] is None else i["class_weight"]
    counted = target != options.get("ignore_index", -100)
    t = torch.where(counted, target, 0)
    slope, steep = torch.ones_like(x), torch.zeros_like(x)
    if cap is not None:  # the slope is made from exp(-2 |x / k|), which moves by u |2 x / k|
        slope = torch.cosh(x / cap).square().reciprocal()
        steep = torch.where(slope > 0, 2 * (x / cap).abs() + 2 * moves / cap, 0)
        x, moves = cap * torch.tanh(x / cap), slope * moves + cap * torch.tanh(x / cap).abs()
    lse = torch.logsumexp(x, -1, keepdim=True)
    p = torch.exp(x - lse) + UNDERFLOW
    own = torch.where(x.isfinite(), x.abs(), 0)
    moves = torch.where(x.isfinite(), moves + torch.zeros_like(x), 0)
    # The log of a sum moves as the sum does, relatively.
    lse_moves = 1 + (torch.softmax(x, -1) * moves).sum(-1, keepdim=True)
    size, moves = own + lse.abs(), moves + lse_moves  # of z_c - lse
    hit = F.one_hot(t, V) * (1 - s) * w
    spread = s / V * w.expand(M, V)
    squared = (z_loss * lse.square()).squeeze(-1)
    terms = (((hit + spread) * size).sum(-1) + squared) * counted
    condition = ((hit + spread) * moves).sum(-1)
    condition = (condition + (2 * z_loss * lse.abs() * lse_moves).squeeze(-1)) * counted
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        g = dloss.reshape(-1)
        result = Magnitude(terms.view(shape), condition.view(shape), V)
    else:
        count = (w[t] * counted).sum() if reduction == "mean" else torch.ones(()).to(x)
        g = (dloss / count).expand(M)
        result = Magnitude(terms.sum() / count, condition.sum() / count, M + V)
    g = torch.where(counted, g, 0).abs().unsqueeze(-1)
    share = ((hit + spread).sum(-1, keepdim=True) + 2 * z_loss * lse.abs()) * p
    dx_terms = g * slope * (share + hit + spread)
    dx_moves = g * slope * (share * (size + moves) + 2 * z_loss * p * lse_moves)
    return result, Magnitude(dx_terms, dx_moves + dx_terms * steep, V)


def _magnitudes(i: Inputs, options: Options, dloss: torch.Tensor) -> dict[str, Magnitude]:
    rows = i["logits"].reshape(-1, i["logits"].shape[-1])
    result, dx = logit_magnitudes(rows, 0.0, i, options, dloss)
    shape = i["logits"].shape
    return {
        "result": result,
        "logits": Magnitude(dx.terms.view(shape), dx.condition.view(shape), dx.length),
    }


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
        for options in (
            {"z_loss": 0.01},
            {"softcap": 2.0},
            {"z_loss": 0.1, "softcap": 5.0, "weight": True, "label_smoothing": 0.2, "ignored": 0.3},
        ):
            yield Case("cross_entropy", (9, 37), options={"reduction": reduction, **options})
            options = {"reduction": reduction, "inplace_backward": True, **options}
            yield Case("cross_entropy", (3, 5, 41), options=options)
    # Not "offset": 33 times beyond the cap PyTorch's slope 1 - tanh^2 is 0, even in fp64.
    for values in ("large", "constant", "nan", "nonfinite", "masked"):
        yield Case("cross_entropy", (5, 77), values, options={"z_loss": 0.01, "softcap": 30.0})
    yield Case("cross_entropy", (3, 8200), options={"z_loss": 1e-4, "softcap": 30.0})
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
    call=_call,
    peer=lambda i, o: plain_loss(i["logits"], i["target"], i["class_weight"], o),
    magnitudes=_magnitudes,
    gradients=("logits",),
    float32_result=True,
    cases=tuple(_cases()),
    examples=(
        Case("cross_entropy", (9, 37), options={"reduction": "none"}),
        Case("cross_entropy", (9, 37), options={"label_smoothing": 0.1}),
        Case("cross_entropy", (9, 37), options={"z_loss": 0.1, "inplace_backward": True}),
    ),
    gradchecks=(
        Case("cross_entropy", (5, 7)),
        Case(
            "cross_entropy",
            (5, 7),
            options={"reduction": "none", "weight": True, "label_smoothing": 0.2, "ignored": 0.3},
        ),
        Case("cross_entropy", (5, 7), options={"reduction": "sum", "ignored": 0.3}),
        Case(
            "cross_entropy",
            (5, 7),
            options={"reduction": "none", "weight": True, "z_loss": 0.1, "softcap": 2.0},
        ),
    ),
    tail=lambda n: Case("cross_entropy", (3, n)),
    many=Case("cross_entropy", (40, 2000)),
    reports=(
        Case("cross_entropy", (32, 50257)),
        Case("cross_entropy", (32, 50304), options={"weight": True, "label_smoothing": 0.1}),
        Case("cross_entropy", (16, 128256)),
    ),
)
