"""How attention_decode_append is tested: as rope, kv_cache_append and attention_decode in turns.

Shapes and options are those of attention_decode; with R (dimensions turned) there are cos and sin,
and interleaved is as in rope. The op writes in place: the call gives it copies, laid out as the
case says, and returns them. What it must overwrite is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from gptfast.ops import attention_decode_append
from gptfast.testing import attention_decode, kv_cache_append, rope
from gptfast.testing.attention_decode import cache_shape, lengths_of, table_of
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.judge import Magnitude


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    B, H, H_kv, T, _, D, Dv = case.shape
    lengths = lengths_of(case, draw)
    table = table_of(case, lengths, draw) if "page_size" in case.options else None
    first = cache_shape(case)
    caches = {
        "k_cache": draw((*first, H_kv, D), case.values).to(dtype),
        "v_cache": draw((*first, H_kv, Dv), case.values).to(dtype),
    }
    missing = {
        "k": torch.full((B, H_kv, T, D), math.nan, dtype=dtype),
        "v": torch.full((B, H_kv, T, Dv), math.nan, dtype=dtype),
    }
    places = {"cache_seqlens": lengths, "block_table": table}
    k_cache, v_cache = kv_cache_append.peer({**caches, **missing, **places}, {})
    half = case.options.get("R", 0) // 2
    angle = 3 * draw((B, T, half) if case.options.get("per_batch") else (T, half))
    # Multiples of 2^-7 are the same number in every dtype.
    tables = [(x * 128).round() / 128 if half else None for x in (angle.cos(), angle.sin())]
    return {
        "q": draw((B, H, T, D), case.values).to(dtype),
        "k": draw((B, H_kv, T, D), case.values).to(dtype),
        "v": draw((B, H_kv, T, Dv), case.values).to(dtype),
        "k_cache": k_cache,
        "v_cache": v_cache,
        **places,
        "cos": tables[0],
        "sin": tables[1],
        "alibi_slopes": 2.0 ** -(torch.arange(H) + 1.0) if case.options.get("alibi") else None,
    }


def _call(i: Inputs, options: Options) -> Any:
    caches = kv_cache_append.copy(i["k_cache"]), kv_cache_append.copy(i["v_cache"])
    names = ("scale", "window", "softcap", "interleaved")
    results = attention_decode_append(
        i["q"],
        i["k"],
        i["v"],
        *caches,
        i["cache_seqlens"],
        block_table=i["block_table"],
        cos=i["cos"],
        sin=i["sin"],
        alibi_slopes=i["alibi_slopes"],
        return_lse=True,
        **{name: options[name] for name in names if name in options},
    )
    return *results, *caches


def _appended(i: Inputs, options: Options) -> dict[str, Any]:
    """The inputs of attention_decode, with q turned."""
    q, k = i["q"], i["k"]
    if i["cos"] is not None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        wide = {name: i[name].to(dtype) for name in ("q", "k", "cos", "sin")}
        q, k = (x.to(q.dtype) for x in rope.peer(wide, options))
    k_cache, v_cache = kv_cache_append.peer({**i, "k": k}, options)
    return {**i, "q": q, "k_cache": k_cache, "v_cache": v_cache}


def _peer(i: Inputs, options: Options) -> tuple[torch.Tensor, ...]:
    appended = _appended(i, options)
    o, lse = attention_decode.peer(appended, options)
    return o, lse, appended["k_cache"], appended["v_cache"]


def _magnitudes(
    i: Inputs, options: Options, do: torch.Tensor, dlse: torch.Tensor, *_: torch.Tensor
) -> dict[str, Magnitude]:
    of = attention_decode.magnitudes(_appended(i, options), options, do, dlse)
    zeros = {name: torch.zeros_like(i[name]) for name in ("k_cache", "v_cache")}
    sizes = dict(zeros)
    if i["cos"] is not None:
        # Turned queries and keys are rounded to the storage dtype, each once.
        o, lse = of["o"], of["lse"]
        of = {
            "o": Magnitude(o.terms, o.condition, o.length, stored=o.terms + 2 * o.condition),
            "lse": Magnitude(lse.terms, lse.condition, lse.length, stored=2 * lse.condition),
        }
        turned = rope.magnitudes(i, options, i["q"], i["k"])["turned_k"].terms
        new = {**i, **zeros, "k": turned}
        sizes["k_cache"] = kv_cache_append.peer(new, options)[0]
    caches = {
        f"new_{name}": Magnitude(size, torch.zeros_like(size), 2, stored=torch.zeros_like(size))
        for name, size in sizes.items()
    }
    return {**of, **caches}


def _case(shape: tuple[int, ...], layout: str = "contiguous", **options: Any) -> Case:
    return Case("attention_decode_append", shape, layout=layout, options=options)


def _cases() -> Iterator[Case]:
    # One token and many, nothing but new ones, more of them than keys, no room, no sequences.
    for T, S in ((1, 1), (1, 65), (16, 40), (5, 3), (1, 0)):
        yield _case((1, 2, 2, T, S, 16, 16), R=16)
    yield _case((0, 2, 1, 1, 5, 8, 8), R=8)
    yield _case((2, 4, 2, 0, 5, 8, 8), R=8)
    # Dimensions that turn: none, some of a vector of 16 bytes, some of the head, all.
    for R in (0, 4, 24, 40):
        for interleaved in (False, True):
            options: dict[str, Any] = {"R": R, "interleaved": interleaved, "per_batch": True}
            yield _case((2, 4, 2, 2, 33, 40, 24), ragged=True, **options)
    # Several blocks of rows and parts, windows in which some blocks see no new token.
    yield _case((2, 12, 1, 5, 40, 16, 16), ragged=True, R=16)
    yield _case((3, 4, 2, 2, 1100, 16, 16), ragged=True, R=16)
    for left in (0, 2, 60):
        yield _case((2, 12, 2, 7, 90, 16, 16), ragged=True, R=16, window=(left, 0))
    for page_size in (1, 5, 16):
        yield _case((3, 4, 2, 3, 70, 16, 8), ragged=True, R=16, page_size=page_size)
    yield _case((3, 4, 2, 2, 50, 16, 16), R=8, softcap=3.0, alibi=True, page_size=9)
    for D in (96, 128, 256):
        yield _case((1, 2, 1, 2, 20, D, D), R=D)
    for layout in ("transposed", "sliced", "strided"):
        yield _case((2, 4, 2, 3, 20, 9, 9), layout, R=6)


ROW = OpRow(
    inputs=_inputs,
    call=_call,
    peer=_peer,
    magnitudes=_magnitudes,
    gradients=(),
    results=("o", "lse", "new_k_cache", "new_v_cache"),
    float32_result=("lse",),
    matrix_units=True,
    cases=tuple(_cases()),
    examples=(
        _case((2, 4, 2, 3, 40, 16, 16), R=16),
        _case((3, 4, 2, 1, 40, 16, 8), ragged=True, page_size=8, window=(20, 0), alibi=True),
    ),
    gradchecks=(),
    tail=lambda n: _case((2, 2, 1, n % 5 + 1, n + 2, n, n + 1), R=n // 2 * 2),
    many=_case((3, 4, 2, 4, 700, 32, 32), ragged=True, R=32),
    reports=(),  # its kernels are those of the three ops
)
