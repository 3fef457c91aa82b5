"""How attention_qkv is tested: as attention, on the heads that lie in qkv.

A case's shape is (B, T, D). Options: heads, (H, H_kv), and those of attention but lse and Dv.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gptfast.ops import attention_qkv
from gptfast.ops.attention_qkv import split_heads
from gptfast.testing import attention
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.judge import Magnitude
from gptfast.testing.memory import LAYOUTS


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    (B, T, D), (H, H_kv) = case.shape, case.options["heads"]
    qkv = draw((B, T, (H + 2 * H_kv) * D), case.values).to(dtype)
    return {"qkv": qkv, **attention.score_inputs(case, B, H)}


def _call(i: Inputs, options: Options) -> torch.Tensor:
    return attention_qkv(i["qkv"], *options["heads"], **attention.keywords(i, options))


def _split(i: Inputs, options: Options) -> dict[str, Any]:
    """The inputs as `attention`'s."""
    q, k, v = split_heads(i["qkv"], *options["heads"])
    return {**i, "q": q, "k": k, "v": v}


def _merge(*parts: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) each, as (B, T, columns)."""
    return torch.cat([x.transpose(1, 2).flatten(2) for x in parts], -1)


def _peer(i: Inputs, options: Options) -> torch.Tensor:
    return _merge(attention.peer(_split(i, options), options))


def _magnitudes(i: Inputs, options: Options, dy: torch.Tensor) -> dict[str, Magnitude]:
    H = options["heads"][0]
    do = dy.unflatten(-1, (H, -1)).transpose(1, 2) if dy.numel() else dy.new_empty(0)
    of = attention.magnitudes(_split(i, options), options, do)

    def merged(*names: str) -> Magnitude:
        parts = [of[name] for name in names]
        terms, condition, factors = (
            _merge(*(getattr(p, field) for p in parts))
            for field in ("terms", "condition", "factors")
        )
        return Magnitude(terms, condition, max(p.length for p in parts), factors=factors)

    return {"result": merged("result"), "qkv": merged("q", "k", "v")}


def _case(
    shape: tuple[int, ...],
    heads: tuple[int, int],
    values: str = "normal",
    layout: str = "contiguous",
    grad_layout: str = "contiguous",
    **options: Any,
) -> Case:
    return Case("attention_qkv", shape, values, layout, grad_layout, {"heads": heads, **options})


def _cases() -> Iterator[Case]:
    for T in (1, 3, 16, 65, 130):
        yield _case((2, T, 16), (2, 2), causal=True)
    # Head dims of whole vectors of 16 bytes, whose gradients are made in place, and others.
    for D in (4, 7, 40, 64):
        yield _case((1, 20, D), (4, 2), causal=True)
        yield _case((1, 20, D), (3, 1))
    for layout in LAYOUTS[1:]:
        yield _case((2, 20, 8), (2, 1), layout=layout, causal=True)
        yield _case((2, 20, 8), (2, 1), grad_layout=layout, causal=True)
    yield _case((2, 33, 8), (4, 2), causal=True, dropout_p=0.2)
    yield _case((2, 33, 8), (4, 2), window=(9, 3), softcap=3.0, alibi="own", scale=0.4)
    yield _case((1, 20, 8), (2, 2), "nan", causal=True)


ROW = OpRow(
    inputs=_inputs,
    call=_call,
    peer=_peer,
    magnitudes=_magnitudes,
    gradients=("qkv",),
    matrix_units=True,
    cases=tuple(_cases()),
    examples=(
        _case((2, 70, 16), (4, 2)),
        _case((1, 9, 8), (2, 2), causal=True, dropout_p=0.2),
    ),
    gradchecks=(_case((1, 6, 3), (4, 2), causal=True),),
    tail=lambda n: _case((1, n, n), (2, 1), causal=n % 2 == 0),
    many=_case((2, 200, 32), (4, 2), causal=True),
)
