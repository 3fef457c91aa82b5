"""Attention of a few new tokens to a cache of keys and values, for inference.

Sequence b has L_b = cache_seqlens_b keys in the cache, the new ones included, and T queries, the
last of which sees the last key. With the diagonal d_ij = j - (i + L_b - T):

x_ij = scale q_i . k_j
s_ij = softcap tanh(x_ij / softcap) + slope d_ij      (without softcap: s_ij = x_ij + slope d_ij)
visible: -left <= d_ij <= 0
lse_i = log sum_j exp(s_ij),  o_i = sum_j exp(s_ij - lse_i) v_j

A query that sees no key has o = 0 and lse = -inf. Keys that no query sees are not read.

Keys may be visited in parts, each giving an o and an lse of its own. They merge exactly:

lse = log sum_parts exp(lse_part),  o = sum_parts exp(lse_part - lse) o_part

A contiguous cache is a paged one with one page a sequence: (pages, tokens, H_kv, D) in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gptfast import backend
from gptfast.ops.attention import Options, cpu_options, make_options, why_not_triton
from gptfast.ops.attention import why_not_cuda as why_not_cuda_heads
from gptfast.ops.layout import empty_output, heads_of, unit_stride
from gptfast.ops.library import (
    check_device,
    check_dtypes,
    check_floating,
    define,
    statistics_dtype,
)
from gptfast.targets import Target, target_of

Tensors2 = tuple[torch.Tensor, torch.Tensor]
CUDA_ROWS = 16  # of a block of the CUDA kernel
MAX_PARTS = 128
MAX_QUERIES = 16  # a sequence: with more of them, `attention` has tiles that fit better


def reference_fwd(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    left: int,
    softcap: float,
) -> Tensors2:
    """The formula in PyTorch."""
    dtype = statistics_dtype(q.dtype)
    _, H, T, _ = q.shape
    H_kv = k_cache.shape[2]
    lengths = cache_seqlens.long()
    k, v = (_rows_of_sequences(x, lengths, block_table) for x in (k_cache, v_cache))
    i, j = (torch.arange(n, device=q.device) for n in (T, k.shape[1]))
    distance = j - (i[:, None] + lengths[:, None, None] - T)  # (B, T, S)
    visible = distance <= 0
    if left >= 0:
        visible &= distance >= -left
    # What no query sees may be anything, NaN too, and 0 NaN is NaN.
    unseen = ~visible.any(1)[..., None, None]
    k, v = (x.to(dtype).masked_fill(unseen, 0) for x in (k, v))
    scores = torch.einsum("bhgtd,bshd->bhgts", q.to(dtype).unflatten(1, (H_kv, -1)), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(dtype).unflatten(-1, (H_kv, H // H_kv))
        scores = scores + slopes[..., None, None] * distance[:, None, None]
    scores = scores.masked_fill(~visible[:, None, None], -math.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse == -math.inf, math.inf).unsqueeze(-1))
    o = empty_output(q, v.shape[-1])
    o.copy_(torch.einsum("bhgts,bshd->bhgtd", p, v).flatten(1, 2))
    return o, lse.flatten(1, 2)


def _rows_of_sequences(
    cache: torch.Tensor, lengths: torch.Tensor, block_table: torch.Tensor | None
) -> torch.Tensor:
    """(B, S, H_kv, D): each sequence's rows of a cache, in order.

    S is the room there is; on a CPU, where that needs no synchronisation, the longest length.
    """
    if block_table is not None:
        # Entries that belong to no sequence may be anything.
        pages = block_table.long().clamp(0, max(cache.shape[0] - 1, 0))
        cache = cache[pages].flatten(1, 2)
    if lengths.device.type == "cpu":
        cache = cache[:, : int(lengths.max()) if lengths.numel() else 0]
    return cache


def capacity(k_cache: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """How many tokens a sequence has room for."""
    pages = 1 if block_table is None else block_table.shape[1]
    return pages * k_cache.shape[1]


def pick_parts(
    programs: int, S: int, rows: int, D: int, Dv: int, itemsize: int, target: Target
) -> int:
    """In how many parts a GPU visits the keys of a sequence; `programs`: with one part each.

    Enough parts for two programs a multiprocessor, which is what kernels have room for. A part's
    fp32 o is written and read again, 8 Dv bytes a row, which may be an eighth of the
    (D + Dv) itemsize bytes of each of its keys; and below 256 keys a program is over before it has
    begun.
    """
    wanted = -(-2 * target.multiprocessors // max(programs, 1))
    least = max(256, -(-8 * 8 * Dv * rows // ((D + Dv) * itemsize)))
    return max(1, min(wanted, S // least, MAX_PARTS))


def cpu_fwd(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    left: int,
    softcap: float,
) -> Tensors2:
    """The `cpu` backend of the forward op."""
    q, k_cache, v_cache = unit_stride(q), unit_stride(k_cache), unit_stride(v_cache)
    cache_seqlens = cache_seqlens.contiguous()
    table = None if block_table is None else block_table.contiguous()
    o = empty_output(q, v_cache.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    backend.extension().attention_decode_fwd(  # type: ignore[union-attr]
        heads_of(q),
        pages_of(k_cache),
        pages_of(v_cache),
        heads_of(o),
        lse.data_ptr(),
        cpu_shape(q, k_cache, v_cache, cache_seqlens, table),
        cpu_options(Options(None, alibi_slopes, scale, left, 0, softcap, 0.0)),
        backend.DTYPE_CODES[q.dtype],
    )
    return o, lse


def pages_of(cache: torch.Tensor) -> tuple[int, int, int, int]:
    """`heads_of` of a cache's pages: address, strides of pages, heads and slots."""
    page, slot, head = cache.stride()[:3]
    return cache.data_ptr(), page, head, slot


def cpu_shape(
    x: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    table: torch.Tensor | None,
) -> tuple[int, ...]:
    """The kernels' CacheShape, for x (B, H, T, D); also of `kv_cache_append`."""
    B, H, T, _ = x.shape
    _, page_size, H_kv, D = k_cache.shape
    pages = (0, 0) if table is None else (table.data_ptr(), table.shape[1])
    return B, H, H_kv, T, D, v_cache.shape[3], cache_seqlens.data_ptr(), *pages, page_size


def cuda_fwd(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    left: int,
    softcap: float,
) -> Tensors2:
    """The `cuda` backend of the forward op."""
    nowhere = (0, 0, 0, 0)
    return run_cuda_fwd(
        *(q, k_cache, v_cache, (nowhere, nowhere, 0, 0, 0, 0, False), cache_seqlens),
        *(block_table, alibi_slopes, scale, left, softcap),
    )


def run_cuda_fwd(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    new_tokens: tuple[Any, ...],
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    left: int,
    softcap: float,
) -> Tensors2:
    """Also of `attention_decode_append`; new_tokens: the launcher's struct of that name."""
    B, H, T, D = q.shape
    page_size, H_kv, Dv = v_cache.shape[1:]
    S = capacity(k_cache, block_table)
    o = empty_output(q, Dv)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    if not q.numel():
        return o, lse
    cache_seqlens = cache_seqlens.contiguous()
    table = None if block_table is None else block_table.contiguous()
    slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    rows = T * H // H_kv
    blocks = B * H_kv * -(-rows // CUDA_ROWS)
    parts = pick_parts(blocks, S, min(rows, CUDA_ROWS), D, Dv, 2, target_of(q.device))
    part_o = part_lse = None
    if parts > 1:
        part_o = q.new_empty(parts, B, T, H, Dv, dtype=torch.float32)
        part_lse = q.new_empty(parts, B, H, T, dtype=torch.float32)
    backend.launch_cuda(
        "attention_decode_fwd",
        q,
        *(heads_of(x) for x in (q, k_cache.transpose(1, 2), v_cache.transpose(1, 2))),
        new_tokens,
        cache_seqlens,
        table,
        0 if table is None else table.shape[1],
        page_size,
        (0, 0) if slopes is None else (slopes.data_ptr(), (0, *slopes.stride())[-2]),
        *(o, lse, part_o, part_lse, parts),
        *(B, H, H_kv, T, S, D, Dv, scale, left, softcap),
    )
    return o, lse


def why_not_cuda(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why the CUDA kernel cannot take this call, or None: see that of `attention`."""
    return why_not_cuda_heads(q, k_cache.transpose(1, 2), v_cache.transpose(1, 2))


OP = backend.Op(
    "attention_decode",
    {
        "torch": backend.Implementation(reference_fwd),
        "cpu": backend.Implementation(cpu_fwd),
        "triton": backend.triton_implementation(
            "attention_decode", why_not=why_not_triton, forward_only=True
        ),
        "cuda": backend.Implementation(cuda_fwd, why_not=why_not_cuda),
    },
)


def _fwd(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    left: int,
    softcap: float,
) -> Tensors2:
    used = None if left < 0 else left + q.shape[2]
    check_entries("attention_decode", k_cache, cache_seqlens, block_table, used)
    return OP.choose(q, k_cache, v_cache).fwd(
        q, k_cache, v_cache, cache_seqlens, block_table, alibi_slopes, scale, left, softcap
    )


def _fake_fwd(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *_: Any) -> Tensors2:
    o = empty_output(q, v_cache.shape[-1])
    return o, q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))


attention_decode_fwd = define(
    "attention_decode_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,"
    " Tensor? block_table, Tensor? alibi_slopes, float scale, int left, float softcap)"
    " -> (Tensor, Tensor)",
    _fwd,
    _fake_fwd,
)


def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    window: Sequence[int] | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """o = softmax(scale q k^T) v of 1 to 16 new tokens a sequence, causal, from a KV cache.

    Each sequence has a length of its own. The keys and values of the new tokens are in the cache
    already: `kv_cache_append` puts them there.

        gptfast.kv_cache_append(k, v, k_cache, v_cache, cache_seqlens)
        o = gptfast.attention_decode(q, k_cache, v_cache, cache_seqlens)

    Args:
        q: (B, H, T, D), any strides, T at most 16; float32, bfloat16, float16 (float64 on the torch
            backend). Query i sees the keys j <= i + cache_seqlens[b] - T: the last one sees all.
        k_cache: (B, S_max, H_kv, D), or with a block table (num_pages, page_size, H_kv, D), in q's
            dtype, any strides. H_kv divides H: each key head serves H / H_kv query heads. A cache
            that keeps its heads before its tokens is passed as its `transpose(1, 2)`.
        v_cache: the same but for its head dim Dv.
        cache_seqlens: int32 (B,), how many keys of each sequence are valid, the new ones included.
            Slots behind them may hold anything.
        block_table: int32 (B, max_pages): token j of sequence b lies in page block_table[b, j //
            page_size], slot j % page_size. Entries behind a sequence's last page may be anything.
        scale: factor of the scores; None means 1 / sqrt(D).
        window: (left, right) as in `attention` with `causal`, where right does nothing: a query
            sees its own key and `left` before it; -1 sets no limit. Keys that fell out of the
            window are not read, so their pages may be gone.
        softcap: scores become softcap tanh(score / softcap), before the mask and ALiBi.
        alibi_slopes: float32 (H,) or (B, H): slope times the distance is taken from each score.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        o (B, H, T, Dv) in q's dtype, laid out as (B, T, H, Dv) so that merging the heads copies
        nothing. A query that sees no key, as in a sequence of length 0, gets zeros. With return_lse
        a tuple (o, lse): lse is (B, H, T), float32, -inf where a query sees no key. On a given kind
        of card the bits depend on shapes and lengths alone.

    Raises:
        TypeError: q or a cache is not floating point, their dtypes differ (also under autocast,
            which would copy the cache), or the integers are not int32.
        ValueError: shapes that do not fit, more than 16 queries, or an option outside its range.
        IndexError: on a CPU, a length outside the cache or a page that is not there. On a GPU that
            would need a synchronisation: lengths are taken as the nearest in range, and pages are
            the caller's to get right.
        RuntimeError: tensors on different devices; a backend is forced that cannot run the call;
            differentiation, since this is for inference.

    Limits:
        Head dims over 256 run on the PyTorch reference on a GPU. The query heads of one key head
        are packed into one tile of up to 64 rows (16 for the widest heads on the smallest cards);
        beyond, keys and values are read once for every tile. A few long sequences are split among
        programs, which takes 4 (Dv + 1) bytes for each row and part. On a CPU it takes 4 (Dv + 2)
        for each query, head and 256 keys of the longest sequence.

    Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Kwon et al., "Efficient
    Memory Management for Large Language Model Serving with PagedAttention", 2023.
    """
    op = "attention_decode"
    check_caches(op, q, "q", k_cache, v_cache, cache_seqlens, block_table)
    check_queries(op, q, k_cache)
    options = make_options(op, q.shape[0], q, True, scale, 0.0, None, window, softcap, alibi_slopes)
    o, lse = attention_decode_fwd(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        options.alibi_slopes,
        options.scale,
        options.left,
        options.softcap,
    )
    return (o, lse) if return_lse else o


def check_caches(
    op: str,
    x: torch.Tensor,
    name: str,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
) -> None:
    """Raise unless caches, lengths and table fit together and to x, named `name`, (B, H, T, D).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.
        RuntimeError: tensors on different devices.
    """
    for title, tensor, letters in (
        (name, x, "(B, H, T, D)"),
        ("k_cache", k_cache, "(B, S_max, H_kv, D) or (num_pages, page_size, H_kv, D)"),
        ("v_cache", v_cache, "(B, S_max, H_kv, Dv) or (num_pages, page_size, H_kv, Dv)"),
    ):
        check_floating(op, title, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {title} must be {letters}, got {tuple(tensor.shape)}")
        if tensor.shape[-1] == 0:
            raise ValueError(f"{op}: head dim of {title} must be at least 1, got 0")
    check_dtypes(op, x.dtype, k_cache=k_cache, v_cache=v_cache)
    check_dtypes(op, torch.int32, cache_seqlens=cache_seqlens, block_table=block_table)
    check_device(
        op,
        x.device,
        k_cache=k_cache,
        v_cache=v_cache,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
    )
    B = x.shape[0]
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"{op}: v_cache must be {(*k_cache.shape[:3],)} and its head dim as k_cache, "
            f"got {tuple(v_cache.shape)}"
        )
    if tuple(cache_seqlens.shape) != (B,):
        raise ValueError(f"{op}: cache_seqlens must be ({B},), got {tuple(cache_seqlens.shape)}")
    if block_table is None:
        if k_cache.shape[0] != B:
            raise ValueError(
                f"{op}: k_cache must have {B} sequences as {name}, got {k_cache.shape[0]}; "
                "a paged one needs a block_table"
            )
    elif block_table.dim() != 2 or block_table.shape[0] != B:
        raise ValueError(
            f"{op}: block_table must be ({B}, max_pages), got {tuple(block_table.shape)}"
        )


def check_queries(op: str, q: torch.Tensor, k_cache: torch.Tensor) -> None:
    """Raise ValueError unless q's head dim, heads and tokens fit."""
    _, H, T, D = q.shape
    H_kv = k_cache.shape[2]
    if k_cache.shape[3] != D:
        raise ValueError(f"{op}: head dim of k_cache must be {D} as q's, got {k_cache.shape[3]}")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"{op}: key heads must divide {H} query heads, got {H_kv}")
    if T > MAX_QUERIES:
        raise ValueError(
            f"{op}: q must have at most {MAX_QUERIES} tokens a sequence, got {T}; "
            "gptfast.attention takes any number"
        )


def check_entries(
    op: str,
    k_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    used: int | None,
) -> None:
    """Raise IndexError for a length or a page outside the cache; on a CPU only.

    used: how many keys of a sequence, counted from its last, the op touches; None for all.
    """
    if cache_seqlens.device.type != "cpu" or not cache_seqlens.numel():
        return
    room = capacity(k_cache, block_table)
    for b, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= room:
            raise IndexError(f"{op}: cache_seqlens must be in [0, {room}], got {length} at {b}")
    if block_table is None:
        return
    num_pages, page_size = k_cache.shape[:2]
    start = torch.arange(block_table.shape[1], device=block_table.device) * page_size
    touched = start < cache_seqlens[:, None]
    if used is not None:
        touched &= start + page_size > cache_seqlens[:, None] - used
    wrong = touched & ((block_table < 0) | (block_table >= num_pages))
    if wrong.any():
        b, n = wrong.nonzero()[0].tolist()
        raise IndexError(
            f"{op}: block_table must be in [0, {num_pages}), got {int(block_table[b, n])} "
            f"at ({b}, {n})"
        )
