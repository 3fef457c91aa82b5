"""Attention to a KV cache in Triton. The maths stands in `gptfast/ops/attention_decode.py`.

A program of the first kernel takes one part of the keys of one key head of one sequence, and up to
64 rows: the pairs of a query and one of the heads that share the key head, packed, so that even a
single query fills a tile of the matrix units and keys and values are read once for all of them. It
reads those keys, values and queries once, and writes o and lse of its part. Where a few sequences
would leave the card idle, their keys are split in parts, whose results, fp32, the second kernel
merges: a program reads the parts of one row and writes its o and lse. With one part the first
kernel writes o and lse itself and there is no second.

The length of a sequence is known to the kernel alone, so each program works out its part of
whatever there is. A part without keys writes only lse = -inf, and the merge skips it. The order of
all sums follows from shapes and lengths: deterministic.

Decoding is bound by reading the cache. Products take their operands in the input dtype and
accumulate in fp32; all other arithmetic is fp32.

The first kernel has more than 15 arguments: three tensors with three strides each need that many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptfast.kernels.attention import LN2, _block_d, _scores
from gptfast.kernels.precision import fp32_precision
from gptfast.ops.attention_decode import capacity, pick_parts
from gptfast.ops.layout import empty_output, unit_stride
from gptfast.targets import Target, target_of
from gptfast.tuning import tunable


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of the first kernel."""

    block_m: int  # rows: pairs of query and head
    block_n: int  # keys
    num_warps: int
    num_stages: int


MAX_STAGES = 4


@tunable
def pick_config(rows: int, D: int, Dv: int, itemsize: int, target: Target) -> Config:
    """Tiles for a number of rows, head dims and element size in bytes.

    Two programs share a multiprocessor's memory, so that one computes while the other waits.

    Rows: 16, the least that matrix units take, up to 64 as long as the queries leave half of that
    share free. An accumulator of 64 x 128 spills with 4 warps on sm_80.

    Keys: the copies under way must cover the latency of memory, some 30 KB a multiprocessor. So a
    program has two tiles of keys and values or more, and a tile is the largest of 64, 32 and 16
    keys that leaves room for that. More than 4 tiles gain nothing.

    fp32: a product of three TF32 terms keeps its operands twice in registers, and every warp all
    queries. The limits are those that spill nowhere with every option on. Nor may rows that are no
    whole vectors of 16 bytes: each of their elements has its address in registers.
    """
    block_d, block_dv = _block_d(D), _block_d(Dv)
    widest = max(block_d, block_dv)
    room = target.shared_memory_total // 2
    max_m, max_n = (64, 64) if itemsize < 4 else (32, 32) if widest <= 128 else (16, 16)
    odd = bool(D * itemsize % 16 or Dv * itemsize % 16)
    if odd:
        max_m, max_n = 16, 16
    sizes = (64, 32, 16)
    fits_m = (m for m in sizes if m <= max_m and 2 * m * block_d * itemsize <= room)
    block_m = min(next(fits_m, 16), max(16, triton.next_power_of_2(rows)))
    tile = (block_d + block_dv) * itemsize  # bytes a key
    block_n = next((n for n in sizes if n <= max_n and 2 * n * tile <= room), 16)
    wide = odd or (block_m * block_dv >= 64 * 128 if itemsize < 4 else widest >= 128)
    if block_m == 64 and wide and target.name == "sm_100":
        block_n = min(block_n, 32)  # of 64 keys the compiler spills 8 bytes
    most_stages = 2 if itemsize == 4 else MAX_STAGES
    stages = min(max(room // (block_n * tile), 1), most_stages)
    return Config(block_m, block_n, 8 if wide else 4, stages)


def _precision_of(D: int, Dv: int, target: Target) -> str:
    """How products of fp32 are taken: on the matrix units, where that needs no spills.

    A tile has 16 rows though there be one query: without matrix units their products would take
    longer than reading the cache. Of the widest heads the queries, split in two TF32 terms, would
    take all registers of every warp.
    """
    precision = fp32_precision()
    splits = precision == "ieee" and target.platform == "cuda" and max(D, Dv) <= 128
    return "tf32x3" if splits else precision


@triton.jit
def cache_rows(table_ptr, b, j, mask, PAGE: tl.constexpr):
    """Page and slot of tokens j of sequence b; PAGE is the size of a page, 0 without a table."""
    if PAGE:
        page, slot = tl.load(table_ptr + j // PAGE, mask=mask, other=0).to(tl.int64), j % PAGE
    else:
        page, slot = b, j
    return page, slot


@triton.jit
def attention_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    table_ptr,
    slopes_ptr,
    o_ptr,
    lse_ptr,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    stride_v_page,
    stride_v_row,
    stride_v_head,
    stride_slopes_batch,
    B,
    H,
    GROUP,
    T,
    S,
    left,
    scale,
    softcap,
    PAGE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    IS_PART: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and lse of one part of the keys, for one block of the rows of one key head."""
    row_blocks = tl.cdiv(T * GROUP, BLOCK_M)
    heads = H // GROUP
    # The blocks of rows that read the same keys are neighbours.
    first = tl.program_id(0) % row_blocks * BLOCK_M
    bh = tl.program_id(0) // row_blocks
    b, h_kv = (bh // heads).to(tl.int64), bh % heads
    part, parts = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    L = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), S)

    rows = first + tl.arange(0, BLOCK_M)
    i = rows // GROUP
    h = h_kv * GROUP + rows % GROUP
    present = i < T
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    in_d, in_dv = offs_d[None, :] < D, offs_dv[None, :] < DV
    q_rows = h.to(tl.int64) * stride_q_head + i.to(tl.int64) * stride_q_row
    q_ptrs = q_ptr + b * stride_q_batch + q_rows[:, None] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=present[:, None] & in_d, other=0.0)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + b * stride_slopes_batch + h, mask=present, other=0.0)[:, None]

    # Keys that some row of the block sees, then this part of their tiles.
    diagonal = L - T
    last = tl.minimum((first + BLOCK_M - 1) // GROUP, T - 1)
    hi = tl.maximum(last + diagonal + 1, 0)
    lo = 0
    if HAS_LEFT:
        lo = tl.minimum(tl.maximum(first // GROUP + diagonal - left, 0), hi)
    share = tl.cdiv(tl.cdiv(hi - lo, BLOCK_N), parts) * BLOCK_N
    begin = tl.minimum(lo + part.to(tl.int32) * share, hi)
    end = tl.minimum(begin + share, hi)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    if PAGE:
        table_ptr += b * (S // PAGE)
    k_ptr += h_kv.to(tl.int64) * stride_k_head
    v_ptr += h_kv.to(tl.int64) * stride_v_head
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        used = j < end
        page, slot = cache_rows(table_ptr, b, j, used, PAGE)
        slot = slot.to(tl.int64)
        k_ptrs = k_ptr + (page * stride_k_page + slot * stride_k_row)[:, None] + offs_d[None, :]
        k = tl.load(k_ptrs, mask=used[:, None] & in_d, other=0.0)
        s, _ = _scores(
            q,
            k,
            i[:, None],
            j[None, :],
            diagonal,
            scale,
            softcap,
            slope,
            HAS_SOFTCAP,
            HAS_ALIBI,
            PRECISION,
        )
        visible = used[None, :] & (j[None, :] <= i[:, None] + diagonal)
        if HAS_LEFT:
            visible &= j[None, :] >= i[:, None] + diagonal - left
        s = tl.where(visible, s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row that has seen no key yet: exp2(-inf - 0) = 0 instead of NaN.
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        factor = tl.exp2(top - base)
        total = total * factor + tl.sum(p, 1)
        v_ptrs = v_ptr + (page * stride_v_page + slot * stride_v_row)[:, None] + offs_dv[None, :]
        v = tl.load(v_ptrs, mask=used[:, None] & in_dv, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision=PRECISION)
        top = new_top

    empty = total == 0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, -float("inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse_ptr + ((part * B + b) * H + h) * T + i, lse, mask=present)
    queries = T
    if IS_PART:
        queries = tl.where(begin < end, T, 0)
    acc = acc / total[:, None]
    o_ptrs = o_ptr + (((part * B + b) * T + i) * H + h)[:, None] * DV + offs_dv[None, :]
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=(i < queries)[:, None] & in_dv)


@triton.jit
def attention_decode_merge_kernel(
    part_o_ptr,
    part_lse_ptr,
    o_ptr,
    lse_ptr,
    parts,
    H,
    T,
    DV: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """o and lse of one row from those of its parts."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lse_row = (row // (H * T) * H + row % H) * T + row // H % T  # rows are (B, T, H), lse (B, H, T)
    offs = tl.arange(0, BLOCK_PARTS)
    offs_dv = tl.arange(0, BLOCK_DV)
    top = -float("inf")
    total = 0.0
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = (start + offs).to(tl.int64)
        lse = tl.load(part_lse_ptr + part * rows + lse_row, mask=part < parts, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        w = tl.exp(lse - base)
        factor = tl.exp(top - base)
        # A part without keys has written no o.
        mask = (lse > -float("inf"))[:, None] & (offs_dv[None, :] < DV)
        o_ptrs = part_o_ptr + (part * rows + row)[:, None] * DV + offs_dv[None, :]
        o = tl.load(o_ptrs, mask=mask, other=0.0)
        total = total * factor + tl.sum(w, 0)
        acc = acc * factor + tl.sum(o * w[:, None], 0)
        top = new_top
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    acc = acc / total
    tl.store(lse_ptr + lse_row, tl.where(empty, -float("inf"), top + tl.log(total)))
    tl.store(o_ptr + row * DV + offs_dv, acc.to(o_ptr.dtype.element_ty), mask=offs_dv < DV)


def attention_decode_fwd(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    left: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::attention_decode_fwd`."""
    q, k_cache, v_cache = unit_stride(q), unit_stride(k_cache), unit_stride(v_cache)
    slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    B, H, T, D = q.shape
    H_kv, Dv = v_cache.shape[2:]
    S = capacity(k_cache, block_table)
    o = empty_output(q, Dv)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if not q.numel():
        return o, lse
    left = left if left < S else -1  # all keys; and a sum with it stays within 32 bits
    target = target_of(q.device)
    rows = T * H // H_kv
    config = pick_config(rows, D, Dv, q.element_size(), target)
    programs = B * H_kv * triton.cdiv(rows, config.block_m)
    parts = pick_parts(programs, S, min(rows, config.block_m), D, Dv, q.element_size(), target)
    part_o, part_lse = o, lse
    if parts > 1:
        part_o = torch.empty((parts, B, T, H, Dv), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((parts, B, H, T), dtype=torch.float32, device=q.device)
    attention_decode_kernel[(programs, parts)](
        q,
        k_cache,
        v_cache,
        cache_seqlens.contiguous(),
        None if block_table is None else block_table.contiguous(),
        slopes,
        part_o,
        part_lse,
        *q.stride()[:3],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        B,
        H,
        H // H_kv,
        T,
        S,
        left,
        scale,
        softcap,
        PAGE=0 if block_table is None else k_cache.shape[1],
        HAS_LEFT=left >= 0,
        HAS_SOFTCAP=softcap > 0,
        HAS_ALIBI=slopes is not None,
        IS_PART=parts > 1,
        D=D,
        DV=Dv,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=_block_d(D),
        BLOCK_DV=_block_d(Dv),
        PRECISION=_precision_of(D, Dv, target),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if parts > 1:
        attention_decode_merge_kernel[(B * T * H,)](
            part_o,
            part_lse,
            o,
            lse,
            parts,
            H,
            T,
            DV=Dv,
            BLOCK_PARTS=min(16, triton.next_power_of_2(parts)),
            BLOCK_DV=_block_d(Dv),
            num_warps=4,
        )
    return o, lse
