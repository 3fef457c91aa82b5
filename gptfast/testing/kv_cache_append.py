"""How kv_cache_append is tested: it copies, so results are exact.

Options: ragged (bool) and page_size, as in attention_decode. Shapes are (B, H_kv, T, S, D, Dv). The
op writes in place; the call gives it copies, laid out as the case says, and returns them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gptfast.ops import kv_cache_append
from gptfast.testing.attention_decode import cache_shape, lengths_of, table_of
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.judge import Magnitude


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    B, H_kv, T, S, D, Dv = case.shape
    as_decode = Case(case.op, (B, H_kv, H_kv, T, S, D, Dv), options=case.options)
    lengths = lengths_of(as_decode, draw)
    table = table_of(as_decode, lengths, draw) if "page_size" in case.options else None
    first = cache_shape(as_decode)
    return {
        "k": draw((B, H_kv, T, D), case.values).to(dtype),
        "v": draw((B, H_kv, T, Dv), case.values).to(dtype),
        "k_cache": draw((*first, H_kv, D)).to(dtype),
        "v_cache": draw((*first, H_kv, Dv)).to(dtype),
        "cache_seqlens": lengths,
        "block_table": table,
    }


def copy(x: torch.Tensor) -> torch.Tensor:
    """x with its strides, so that the op meets them, but in memory of its own."""
    if 0 in x.stride():  # not to be written to: many elements are one
        return x.contiguous()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _call(i: Inputs, options: Options) -> Any:
    caches = copy(i["k_cache"]), copy(i["v_cache"])
    kv_cache_append(i["k"], i["v"], *caches, i["cache_seqlens"], i["block_table"])
    return caches


def peer(i: Inputs, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches, token by token."""
    k_cache, v_cache, table = i["k_cache"].clone(), i["v_cache"].clone(), i["block_table"]
    T, page_size = i["k"].shape[2], k_cache.shape[1]
    for b, length in enumerate(i["cache_seqlens"].tolist()):
        for t in range(max(T - length, 0), T):
            n = length - T + t
            at = (b, n) if table is None else (int(table[b, n // page_size]), n % page_size)
            k_cache[at], v_cache[at] = i["k"][b, :, t], i["v"][b, :, t]
    return k_cache, v_cache


def _magnitudes(i: Inputs, options: Options, *_: torch.Tensor) -> dict[str, Magnitude]:
    zeros = {f"new_{name}": torch.zeros_like(i[name]) for name in ("k_cache", "v_cache")}
    return {name: Magnitude(zero, zero, 1) for name, zero in zeros.items()}


def _cases() -> Iterator[Case]:
    def case(shape: tuple[int, ...], layout: str = "contiguous", **options: Any) -> Case:
        return Case("kv_cache_append", shape, layout=layout, options=options)

    for shape in (
        *((1, 1, 1, 1, 1, 1), (2, 3, 1, 9, 16, 16), (3, 2, 7, 20, 8, 24), (2, 33, 2, 5, 111, 64)),
        *((2, 2, 5, 3, 8, 8), (0, 2, 1, 4, 8, 8), (2, 2, 0, 4, 8, 8), (2, 2, 1, 0, 8, 8)),
    ):
        yield case(shape)
        yield case(shape, ragged=True)
    for page_size in (1, 3, 8, 50):
        yield case((4, 2, 3, 30, 16, 8), ragged=True, page_size=page_size)
    for layout in ("transposed", "sliced", "strided"):
        yield case((3, 2, 2, 9, 8, 8), layout, ragged=True)
        yield case((3, 2, 2, 9, 8, 8), layout, page_size=4)


ROW = OpRow(
    inputs=_inputs,
    call=_call,
    peer=peer,
    magnitudes=_magnitudes,
    gradients=(),
    results=("new_k_cache", "new_v_cache"),
    cases=tuple(_cases()),
    examples=(
        Case("kv_cache_append", (2, 3, 2, 9, 16, 16)),
        Case("kv_cache_append", (3, 2, 2, 9, 8, 8), options={"ragged": True, "page_size": 4}),
    ),
    gradchecks=(),
    tail=lambda n: Case("kv_cache_append", (2, n, n % 5, n, n, n + 1)),
    many=Case("kv_cache_append", (4, 4, 50, 200, 32, 32)),
    reports=(
        Case("kv_cache_append", (64, 12, 1, 16, 64, 64)),
        Case("kv_cache_append", (64, 8, 1, 16, 128, 128), options={"page_size": 16}),
    ),
)
