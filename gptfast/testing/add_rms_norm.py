"""How add_rms_norm is tested; options and cases are add_layer_norm's, without a bias."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from gptfast.ops import add_rms_norm
from gptfast.testing.add_layer_norm import (
    ALL,
    EPS,
    PLAIN,
    cases,
    examples,
    gradchecks,
    inputs,
    magnitudes,
    reports,
    stream,
)
from gptfast.testing.case import Case, Inputs, OpRow, Options


def _peer(i: Inputs, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    r = stream(i, options)
    return F.rms_norm(r, r.shape[-1:], i["weight"], options.get("eps", EPS)), r


ROW = OpRow(
    inputs=lambda case, dtype, draw: inputs(case, dtype, draw, weight=1, x_bias=0),
    call=lambda i, o: add_rms_norm(
        i["x"],
        i["residual"],
        i["weight"],
        o.get("eps", EPS),
        x_bias=i["x_bias"],
        dropout_p=o.get("p", 0.0),
        seed=i["seed"],
    ),
    peer=_peer,
    magnitudes=lambda i, o, dy, dr: magnitudes(i, o, dy, dr, centre=False),
    gradients=("x", "residual", "weight", "x_bias"),
    cases=tuple(cases("add_rms_norm")),
    examples=examples("add_rms_norm"),
    gradchecks=gradchecks("add_rms_norm"),
    tail=lambda n: Case("add_rms_norm", (3, n), options=ALL if n % 2 else PLAIN),
    many=Case("add_rms_norm", (2100, 67), options=ALL),
    results=("y", "residual_out"),
    like={"residual_out": "residual"},
    reports=reports("add_rms_norm"),
)
