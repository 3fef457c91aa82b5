"""How attention_decode is tested.

Options: scale, window, softcap; alibi (bool); ragged (bool): sequences of different lengths, one of
them empty; page_size: of a paged cache, whose pages lie in random order.

What no query sees is NaN: slots behind a sequence, those that fell out of the window, and pages of
nobody. Entries of the table for pages that no query sees are no pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gptfast.ops import attention_decode
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.judge import UNDERFLOW, Magnitude
from gptfast.testing.memory import LAYOUTS


def lengths_of(case: Case, draw: Any) -> torch.Tensor:
    """How many keys each sequence has; of the ragged ones, all for the first, none for the last."""
    B, S = case.shape[0], case.shape[4]
    if not case.options.get("ragged"):
        return torch.full((B,), S, dtype=torch.int32)
    lengths = (torch.special.ndtr(draw((B,))) * (S + 1)).int().clamp(max=S)
    lengths[:1], lengths[-1:] = S, 0
    return lengths


def table_of(case: Case, lengths: torch.Tensor, draw: Any) -> torch.Tensor:
    """(B, max_pages): the pages of each sequence, in random order among two more than needed."""
    B, S, page_size = case.shape[0], case.shape[4], case.options["page_size"]
    max_pages = -(-S // page_size)
    table = draw((B * max_pages + 2,)).argsort().int()[: B * max_pages].view(B, max_pages)
    start, length = torch.arange(max_pages) * page_size, lengths[:, None]
    nobodys = start >= length
    left = case.options.get("window", (-1,))[0]
    if left >= 0:
        nobodys |= start + page_size <= length - case.shape[3] - left
    return table.masked_fill(nobodys, -7)


def cache_shape(case: Case) -> tuple[int, int]:
    """The first two dimensions of a cache."""
    B, S, page_size = case.shape[0], case.shape[4], case.options.get("page_size")
    return (B, S) if page_size is None else (B * -(-S // page_size) + 2, page_size)


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    B, H, H_kv, T, _, D, Dv = case.shape
    lengths = lengths_of(case, draw)
    table = table_of(case, lengths, draw) if "page_size" in case.options else None
    pages, page_size = cache_shape(case)
    caches = [draw((pages, page_size, H_kv, n), case.values).to(dtype) for n in (D, Dv)]
    unseen = torch.ones(pages, page_size, dtype=torch.bool)
    for b in range(B):
        page, slot = _places(lengths, table, page_size, case.options, T, b)
        unseen[page, slot] = False
    k, v = (x.masked_fill(unseen[..., None, None], math.nan) for x in caches)
    return {
        "q": draw((B, H, T, D), case.values).to(dtype),
        "k_cache": k,
        "v_cache": v,
        "cache_seqlens": lengths,
        "block_table": table,
        "alibi_slopes": 2.0 ** -(torch.arange(H) + 1.0) if case.options.get("alibi") else None,
    }


def _places(
    lengths: torch.Tensor,
    table: torch.Tensor | None,
    page_size: int,
    options: Options,
    T: int,
    b: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and slot of each key of sequence b that some query sees."""
    length = int(lengths[b])
    left = options.get("window", (-1,))[0]
    first = max(length - T - left, 0) if left >= 0 else 0
    j = torch.arange(first, length)
    if table is None:
        return torch.full_like(j, b), j
    return table.cpu()[b, j // page_size].long(), j % page_size


def _call(i: Inputs, options: Options) -> Any:
    names = ("scale", "window", "softcap")
    return attention_decode(
        i["q"],
        i["k_cache"],
        i["v_cache"],
        i["cache_seqlens"],
        block_table=i["block_table"],
        alibi_slopes=i["alibi_slopes"],
        return_lse=True,
        **{name: options[name] for name in names if name in options},
    )


def _sequence(i: Inputs, options: Options, b: int) -> tuple[torch.Tensor, ...]:
    """q, k, v (1, H or H_kv, ., D) of sequence b; for each (T, keys) distance and visibility."""
    q, lengths = i["q"][b : b + 1], i["cache_seqlens"]
    T = q.shape[2]
    page, slot = _places(lengths, i["block_table"], i["k_cache"].shape[1], options, T, b)
    k, v = (i[name][page, slot].transpose(0, 1)[None] for name in ("k_cache", "v_cache"))
    j = torch.arange(int(lengths[b]) - len(slot), int(lengths[b]), device=q.device)
    distance = j - (torch.arange(T, device=q.device)[:, None] + int(lengths[b]) - T)
    visible = distance <= 0
    left = options.get("window", (-1,))[0]
    if left >= 0:
        visible &= distance >= -left
    return q, k, v, distance, visible


def _scores(
    i: Inputs, options: Options, q: torch.Tensor, k: torch.Tensor, distance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores before the mask (1, H, T, keys), and the absolute values of what they are sums of."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = options.get("scale", 1 / math.sqrt(q.shape[-1]))
    scores, size = q @ k.mT * scale, q.abs() @ k.abs().mT * abs(scale)
    cap = options.get("softcap")
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if i["alibi_slopes"] is not None:
        bias = i["alibi_slopes"].to(q.dtype)[:, None, None] * distance
        scores, size = scores + bias, size + bias.abs()
    return scores, size


def peer(i: Inputs, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's own attention for each sequence, or where it lacks an option, spelled out."""
    q = i["q"]
    dtype = torch.promote_types(q.dtype, torch.float32)
    o, lse = (
        q.new_empty(*q.shape[:3], i["v_cache"].shape[-1]),
        q.new_empty(q.shape[:3], dtype=dtype),
    )
    for b in range(q.shape[0]):
        one, k, v, distance, visible = _sequence(i, options, b)
        scores, _ = _scores(i, options, one.to(dtype), k.to(dtype), distance)
        scores = scores.masked_fill(~visible, -math.inf)
        lse[b] = torch.logsumexp(scores, -1)
        if options.get("softcap") or options.get("alibi"):  # which PyTorch's op has not
            p = torch.exp(scores - lse[b, ..., None].nan_to_num(neginf=math.inf))
            v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
            o[b] = (p @ v.to(dtype)).to(q.dtype)
        else:
            scale = options.get("scale")
            o[b] = F.scaled_dot_product_attention(one, k, v, visible, scale=scale, enable_gqa=True)
    return o, lse


def magnitudes(
    i: Inputs, options: Options, do: torch.Tensor, dlse: torch.Tensor
) -> dict[str, Magnitude]:
    """See `Magnitude`: of o and lse."""
    o, o_moves, lse_moves = torch.zeros_like(do), torch.zeros_like(do), torch.zeros_like(dlse)
    for b in range(do.shape[0]):
        q, k, v, distance, visible = _sequence(i, options, b)
        if not distance.numel():
            continue
        scores, size = _scores(i, options, q, k, distance)
        scores = scores.masked_fill(~visible, -math.inf)
        lse = torch.logsumexp(scores, -1, keepdim=True).nan_to_num(neginf=0)
        p = torch.exp(scores - lse) + UNDERFLOW
        # lse = top + log(sum): it moves by as much as the scores do, and rounds both terms.
        top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0).abs()
        moves = (p * size).sum(-1, keepdim=True) + lse.abs() + top
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1).abs()
        o[b], o_moves[b] = p @ v, (p * (size + moves)) @ v
        lse_moves[b] = moves.squeeze(-1)
    length = max(*i["cache_seqlens"].tolist(), i["q"].shape[-1], 1)
    return {
        "o": Magnitude(o, o_moves, length),
        # Not among the terms: p is rounded to the storage dtype for o, not for lse.
        "lse": Magnitude(torch.zeros_like(dlse), lse_moves, length),
    }


def _case(
    shape: tuple[int, ...], values: str = "normal", layout: str = "contiguous", **options: Any
) -> Case:
    return Case("attention_decode", shape, values, layout, options=options)


def _cases() -> Iterator[Case]:
    # One query and 16, one key, more queries than keys, a tile of 64 keys and its neighbours, no
    # room, no queries, no sequences.
    for T, S in ((1, 1), (1, 63), (1, 65), (2, 64), (16, 130), (5, 3), (1, 0), (0, 5)):
        yield _case((1, 2, 2, T, S, 16, 16))
    yield _case((0, 2, 1, 1, 5, 8, 8))
    # Heads in a group, from one to 70 rows: a tile of 16, of 64, and two tiles.
    for H, H_kv, T in ((6, 6, 1), (6, 3, 1), (6, 1, 3), (12, 1, 1), (7, 1, 10), (4, 2, 16)):
        yield _case((2, H, H_kv, T, 40, 16, 16), ragged=True)
    for D, Dv in (
        (1, 1),
        (8, 24),
        (40, 40),
        (80, 64),
        (96, 128),
        (111, 16),
        (128, 128),
        (256, 256),
    ):
        yield _case((2, 2, 1, 2, 33, D, Dv), ragged=True)
    # Several parts, on every target.
    for T in (1, 4):
        yield _case((3, 4, 2, T, 1100, 16, 16), ragged=True)
        yield _case((3, 4, 2, T, 1100, 16, 8), ragged=True, page_size=48)
    for page_size in (1, 5, 16, 64, 100):
        yield _case((4, 4, 2, 2, 90, 16, 16), ragged=True, page_size=page_size)
    # Windows of the query's own key, shorter than a tile, over several tiles, of everything.
    for left in (0, 5, 100, 1000):
        yield _case((3, 4, 2, 3, 170, 16, 16), ragged=True, window=(left, 0))
        yield _case((3, 4, 2, 3, 170, 16, 16), ragged=True, window=(left, -1), page_size=7)
    yield _case((2, 2, 1, 2, 1300, 16, 16), ragged=True, window=(900, 0))
    for cap in (0.7, 50.0):
        yield _case((3, 4, 2, 2, 70, 16, 16), ragged=True, softcap=cap)
    yield _case((3, 4, 2, 2, 70, 16, 16), ragged=True, alibi=True)
    yield _case(
        (3, 4, 2, 2, 70, 16, 16), "large", ragged=True, alibi=True, softcap=5.0, page_size=9
    )
    for scale in (0.0, -0.3, 2.0):
        yield _case((2, 2, 2, 2, 40, 8, 8), ragged=True, scale=scale)
    for values in ("large", "tiny", "constant"):
        yield _case((2, 2, 2, 2, 70, 24, 24), values, ragged=True)
    yield _case((2, 2, 2, 1, 40, 8, 8), "nan")
    for layout in LAYOUTS[1:]:
        yield _case((2, 4, 2, 3, 20, 9, 9), layout=layout)
    for layout in LAYOUTS[1:4]:
        yield _case((2, 4, 2, 3, 20, 9, 9), layout=layout, page_size=8)
    # Many keys: sums that must not lose small terms.
    yield _case((1, 1, 1, 1, 10_000, 16, 16))


ROW = OpRow(
    inputs=_inputs,
    call=_call,
    peer=peer,
    magnitudes=magnitudes,
    gradients=(),
    results=("o", "lse"),
    float32_result=("lse",),
    matrix_units=True,
    cases=tuple(_cases()),
    examples=(
        _case((2, 4, 2, 3, 40, 16, 16)),
        _case((3, 4, 2, 1, 40, 16, 8), ragged=True, page_size=8, window=(20, 0), alibi=True),
        _case((2, 2, 1, 1, 600, 16, 16), ragged=True),  # in parts
    ),
    gradchecks=(),
    tail=lambda n: _case((2, 2, 1, n % 16 + 1, n + 2, n, n + 1), page_size=3 if n % 2 else n),
    many=_case((3, 4, 2, 4, 700, 32, 32), ragged=True),
    # GPT-2's heads and Llama's, one query and several, contiguous and paged.
    reports=(
        _case((2, 12, 12, 1, 1024, 64, 64)),
        _case((2, 8, 2, 1, 1024, 128, 128)),
        _case((2, 8, 2, 1, 1024, 128, 128), page_size=16),
        _case((1, 8, 1, 8, 1024, 128, 128)),
        _case((1, 4, 1, 1, 1024, 80, 80)),
        _case((1, 4, 1, 1, 1024, 256, 256)),
        _case((2, 8, 2, 1, 1024, 128, 128), window=(511, 0), softcap=30.0),
    ),
)
