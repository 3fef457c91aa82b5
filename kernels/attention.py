"""Flash attention in Triton. The maths stands in `gptfast/ops/attention.py`.

Forward: one program per (block of queries, batch and head); it walks over the blocks of keys that
its queries see. It reads its queries once, each of those keys and values once, and writes o and
lse once. Backward is two kernels. The first has the same programs: it computes delta, which it
stores, and walks over the same keys for dq. In the second a program owns a block of keys and walks
over the queries that see them, of every query head that shares the key head, for dk and dv; where
their sums do not fit into registers together, it runs twice, for one of them each time. No program
writes what another one writes: deterministic, with no atomics.

What a window or the diagonal hides from a whole block is skipped; masks are computed only in
blocks that an edge cuts. `attention_varlen` runs the same kernels with VARLEN: a program finds the
ends of its sequence in cu_seqlens.

Products take their operands in the input dtype and accumulate in fp32, on the matrix units; all
other arithmetic is fp32. Softmax works in base 2: exp2(s log2(e)) is one instruction.

The kernels have more than 15 arguments: four to seven tensors with up to three strides each need
that many, and a line each makes this file longer than 500.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gptfast.kernels.philox import dropout_factors
from gptfast.kernels.precision import fp32_precision
from gptfast.kernels.tanh import tanh_and_slope
from gptfast.ops.attention import Options, Tensors3
from gptfast.ops.layout import empty_output
from gptfast.ops.philox import dropout_threshold
from gptfast.targets import Target, target_of
from gptfast.tuning import tunable

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one kernel."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


# BLOCK_D -> (block_m, block_n, num_warps, num_stages) without dropout and with it; BLOCK_D - 1 is
# for fewer columns, whose loads are masked, where those need other tiles. Registers decide: of the
# tiles tried, an entry is the largest for which the compiler (Triton 3.9) spills none; where tiles
# were timed, the fastest of those. Dropout has its own entries because its counters (four words of
# Philox for eight scores) need up to 80 registers. The static report compiles all entries without
# dropout, and those of 64 and 128 with it; a window, a softcap and ALiBi together at 64; packed
# sequences at 64 and 128. An entry has to hold for all of these.
Tile = tuple[int, int, int, int]
Tiles = Mapping[str, Mapping[int, tuple[Tile, Tile]]]

# mma.sync keeps accumulators and operands in registers. At BLOCK_D = 256 shared memory decides,
# too: sm_86, sm_89 and sm_120 have 99 KiB.
MMA_SYNC: Tiles = {
    "fwd": {
        16: ((128, 64, 4, 3), (128, 64, 4, 3)),
        32: ((128, 64, 4, 3), (128, 64, 4, 3)),
        64: ((128, 64, 8, 3), (128, 64, 8, 2)),
        128: ((128, 32, 8, 3), (64, 64, 8, 3)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2)),
    },
    "dq": {
        16: ((128, 64, 4, 2), (128, 64, 8, 2)),
        32: ((128, 64, 8, 2), (128, 64, 8, 2)),
        64: ((128, 32, 8, 2), (128, 16, 8, 2)),
        128: ((128, 32, 8, 2), (64, 64, 8, 2)),
        256: ((32, 32, 8, 2), (32, 32, 8, 2)),
    },
    "dkdv": {
        16: ((64, 128, 4, 2), (64, 128, 8, 2)),
        32: ((64, 128, 8, 2), (64, 128, 8, 2)),
        64: ((32, 128, 8, 2), (16, 128, 8, 2)),
        128: ((32, 64, 8, 2), (16, 64, 8, 2)),
        256: ((16, 64, 8, 2), (16, 64, 8, 2)),
    },
}
# wgmma takes operands from shared memory, of which there is plenty; it needs 64 rows for 4 warps.
# The entries of 64 and 128 without dropout are the fastest of six to nine timed on an H100: two or
# three programs of 4 warps beside each other on a multiprocessor, one multiplying while another
# takes exponentials, beat one of 8 warps with larger tiles (backward of 64 columns by 1.6).
# dk and dv of 64 columns: 64 x 64, as fast as what stands here, spills 104 bytes. Of 128 columns:
# 32 x 64 with 4 warps is the one entry that spills, 304 bytes at most (168 with Triton 3.6, with
# which it was timed): backward of B 2, H 16, T 4096 takes 1.15 ms with it, and 2.10 with 8 warps,
# the nearest that spills none.
# dk and dv of 256 columns do not fit beside each other: every tile with wgmma spills, 112 bytes at
# least. A launch each has room for 128 keys, and takes five products for four: backward of B 2,
# H 8, T 4096 took 2.05 ms, with mma.sync in tiles of 32 x 32 3.24.
WGMMA: Tiles = {
    "fwd": {
        16: ((128, 64, 4, 3), (128, 64, 4, 3)),
        32: ((128, 64, 4, 3), (128, 64, 8, 3)),
        64: ((64, 64, 4, 3), (128, 64, 8, 3)),
        128: ((64, 64, 4, 3), (128, 64, 8, 3)),
        256: ((128, 32, 8, 3), (128, 16, 8, 3)),
    },
    "dq": {
        16: ((128, 64, 4, 2), (128, 64, 8, 2)),
        32: ((128, 64, 4, 2), (128, 64, 8, 2)),
        64: ((64, 64, 4, 3), (128, 64, 8, 2)),
        128: ((128, 64, 8, 3), (128, 32, 8, 2)),
        256: ((128, 32, 8, 2), (128, 16, 8, 2)),
    },
    "dkdv": {
        16: ((64, 64, 4, 2), (64, 128, 8, 2)),
        32: ((64, 128, 8, 2), (64, 64, 4, 2)),
        64: ((32, 64, 4, 2), (32, 128, 8, 2)),
        127: ((16, 64, 8, 2), (16, 128, 8, 2)),
        128: ((32, 64, 4, 2), (16, 64, 8, 2)),
    },
    "dk": {256: ((32, 128, 8, 2), (16, 128, 8, 2))},
    "dv": {256: ((32, 128, 8, 2), (32, 64, 8, 2))},
}
# tcgen05 keeps accumulators in tensor memory: dk and dv of 64 keys and 256 columns, with their
# scores, take all of it.
TCGEN05: Tiles = {
    "fwd": {
        16: ((128, 64, 8, 3), (128, 64, 8, 3)),
        32: ((128, 64, 8, 3), (128, 64, 8, 3)),
        64: ((128, 64, 8, 3), (128, 64, 8, 3)),
        128: ((128, 64, 8, 3), (128, 64, 8, 3)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2)),
    },
    "dq": {
        16: ((128, 64, 8, 2), (128, 64, 8, 2)),
        32: ((128, 64, 8, 2), (128, 64, 8, 2)),
        64: ((128, 64, 8, 2), (128, 64, 8, 2)),
        128: ((64, 64, 8, 2), (64, 64, 8, 2)),
        256: ((64, 32, 8, 1), (64, 32, 8, 1)),
    },
    "dkdv": {
        16: ((64, 128, 8, 2), (64, 128, 8, 2)),
        32: ((64, 128, 8, 2), (64, 128, 8, 2)),
        64: ((32, 128, 8, 1), (64, 128, 8, 2)),
        128: ((32, 64, 8, 1), (32, 64, 8, 1)),
        256: ((32, 64, 8, 2), (32, 64, 8, 2)),
    },
}
# MFMA's accumulators may lie in the second half of the register file; local memory is 64 KiB.
MFMA: Tiles = {
    "fwd": {
        16: ((128, 64, 4, 3), (128, 64, 4, 3)),
        32: ((128, 64, 4, 3), (128, 64, 4, 3)),
        64: ((128, 64, 4, 3), (128, 64, 4, 3)),
        128: ((128, 64, 8, 2), (128, 32, 8, 3)),
        256: ((64, 32, 8, 1), (32, 32, 8, 1)),
    },
    "dq": {
        16: ((64, 64, 4, 2), (64, 64, 4, 2)),
        32: ((64, 64, 4, 2), (64, 64, 4, 2)),
        64: ((64, 64, 4, 2), (64, 64, 4, 2)),
        128: ((64, 32, 8, 2), (32, 32, 4, 2)),
        256: ((32, 16, 8, 1), (32, 16, 8, 1)),
    },
    "dkdv": {
        16: ((32, 64, 4, 2), (32, 64, 4, 2)),
        32: ((32, 64, 4, 2), (32, 64, 4, 2)),
        64: ((32, 64, 4, 2), (32, 64, 4, 2)),
        128: ((32, 32, 4, 1), (32, 32, 4, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1)),
    },
}
# fp32 at full precision: NVIDIA multiplies it outside the matrix units, with both operands in
# registers. Small tiles, nearly the same everywhere. Not "tf32x3", which splits every operand: dk
# and dv at a head dim of 128 then spill on sm_90 even with tiles of 16 x 16, where "ieee" takes 16
# x 32 with 128 registers.
FP32: Tiles = {
    "fwd": {
        16: ((32, 32, 4, 2), (32, 32, 4, 2)),
        32: ((32, 32, 4, 2), (32, 32, 4, 2)),
        64: ((32, 32, 4, 2), (32, 32, 4, 2)),
        128: ((32, 32, 8, 1), (16, 16, 8, 1)),
        256: ((16, 16, 16, 1), (16, 16, 8, 1)),
    },
    "dq": {
        16: ((32, 32, 4, 2), (32, 32, 8, 1)),
        32: ((32, 32, 4, 2), (32, 32, 8, 1)),
        64: ((32, 32, 4, 2), (32, 32, 8, 1)),
        128: ((16, 16, 8, 1), (16, 16, 8, 1)),
        256: ((16, 16, 8, 2), (16, 16, 8, 2)),
    },
    "dkdv": {
        16: ((16, 32, 8, 1), (16, 32, 8, 1)),
        32: ((16, 32, 8, 1), (16, 32, 8, 1)),
        64: ((16, 32, 8, 2), (16, 32, 8, 1)),
        128: ((16, 32, 8, 1), (16, 16, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1)),
    },
}
FP32_SM80: Tiles = {
    **FP32,
    "dkdv": {
        **FP32["dkdv"],
        64: ((32, 32, 8, 1), (16, 32, 8, 1)),
        128: ((32, 32, 8, 1), (16, 16, 8, 2)),
    },
}
FP32_SM90: Tiles = {
    **FP32,
    "dkdv": {
        **FP32["dkdv"],
        64: ((32, 32, 8, 2), (16, 32, 8, 1)),
        128: ((16, 32, 16, 1), (16, 16, 8, 1)),
    },
}
FP32_SM120: Tiles = {
    **FP32,
    "dkdv": {**FP32["dkdv"], 64: ((16, 32, 8, 1), (16, 32, 8, 1))},
}
FP32_MFMA: Tiles = {
    "fwd": {**FP32["fwd"], 256: ((32, 16, 8, 1), (16, 16, 8, 1))},
    "dq": {**FP32["dq"], 256: ((16, 16, 4, 1), (16, 16, 4, 1))},
    "dkdv": {
        **FP32["dkdv"],
        64: ((16, 32, 8, 1), (16, 32, 8, 1)),
        256: ((16, 16, 4, 2), (16, 16, 4, 2)),
    },
}
FP32_UNITS: Mapping[str, Tiles] = {
    "sm_80": FP32_SM80,
    "sm_90": FP32_SM90,
    "sm_120": FP32_SM120,
    "gfx942": FP32_MFMA,
}
UNITS: Mapping[str, Tiles] = {"sm_90": WGMMA, "sm_100": TCGEN05, "gfx942": MFMA}


@tunable
def pick_config(
    kernel: str, D: int, Dv: int, itemsize: int, dropout: bool, target: Target
) -> Config:
    """Tiles of a kernel for head dims and the size of an element.

    Args:
        kernel: "fwd", "dq" or "dkdv"; "dk" or "dv" where `key_gradients` says so.
        D, Dv, itemsize, dropout, target: of the call.
    """
    widths, width = _tiles(itemsize, target)[kernel], _block_d(max(D, Dv))
    if min(D, Dv) < width and width - 1 in widths:
        width -= 1
    return Config(*widths[width][dropout])


def key_gradients(D: int, Dv: int, itemsize: int, target: Target) -> tuple[str, ...]:
    """The launches that make dk and dv, as `pick_config` names them: one, or one for each."""
    alone = _tiles(itemsize, target).get("dk", {})
    return ("dk", "dv") if _block_d(max(D, Dv)) in alone else ("dkdv",)


def _tiles(itemsize: int, target: Target) -> Tiles:
    if itemsize == 4:
        return FP32_UNITS.get(target.name, FP32)
    return UNITS.get(target.name, MMA_SYNC)


def _block_d(D: int) -> int:
    """Columns of a tile: products need 16."""
    return max(16, triton.next_power_of_2(D))


@triton.jit
def _row(ptr, b, h, row, stride_batch, stride_head, stride_row):
    """Where a row of a head begins. Strides are in vectors of 16 bytes: see `_align_rows`."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    return ptr + (b * stride_batch + h * stride_head + row * stride_row) * VECTOR


@triton.jit
def _load_rows(
    ptr, rows, stride_row, N, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr
):
    """Rows x BLOCK_D of a tensor, zero past N rows and D columns; WHOLE: no row is past N."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + (rows.to(tl.int64) * stride_row * VECTOR)[:, None] + offs_d[None, :]
    if WHOLE:
        if D == BLOCK_D:
            return tl.load(ptrs)
        return tl.load(ptrs, mask=offs_d[None, :] < D, other=0.0)
    if D == BLOCK_D:
        return tl.load(ptrs, mask=rows[:, None] < N, other=0.0)
    return tl.load(ptrs, mask=(rows[:, None] < N) & (offs_d[None, :] < D), other=0.0)


@triton.jit
def _store_rows(ptr, x, rows, stride_row, N, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of `_load_rows`."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + (rows.to(tl.int64) * stride_row * VECTOR)[:, None] + offs_d[None, :]
    mask = rows[:, None] < N
    if D != BLOCK_D:
        mask &= offs_d[None, :] < D
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sequence(cu_seqlens_ptr, b, length, VARLEN: tl.constexpr):
    """Row of the first token of sequence b in a packed tensor, and how many tokens it has."""
    start = 0
    if VARLEN:
        first = tl.load(cu_seqlens_ptr + b)
        length = tl.load(cu_seqlens_ptr + b + 1) - first
        start = first.to(tl.int64)
    return start, length  # one return: Triton compiles those of branches not taken, too


@triton.jit
def _visible_range(
    first,
    rows,
    columns,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Columns that a block of rows sees, those from `first` of `rows`, as blocks of columns.

    Returns begin, whole_begin, whole_end, end. [begin, end) holds every column that some row sees;
    every row sees all of [whole_begin, whole_end), which consists of whole blocks. begin is the
    start of a block, too.
    """
    # The diagonal of the first and of the last row.
    near = first + columns - rows
    far = tl.minimum(first + BLOCK_ROWS, rows) - 1 + columns - rows
    begin, whole_begin = 0, 0
    end, whole_end = columns, columns // BLOCK_COLS * BLOCK_COLS
    if HAS_RIGHT:
        end = tl.minimum(end, tl.maximum(0, far + right + 1))
        seen = tl.maximum(0, near + right + 1) // BLOCK_COLS * BLOCK_COLS
        whole_end = tl.minimum(whole_end, seen)
    if HAS_LEFT:
        begin = tl.maximum(0, near - left) // BLOCK_COLS * BLOCK_COLS
        seen = tl.cdiv(tl.maximum(0, far - left), BLOCK_COLS) * BLOCK_COLS
        whole_begin = tl.minimum(seen, end)
        whole_end = tl.maximum(whole_end, whole_begin)
    return begin, whole_begin, whole_end, end


@triton.jit
def _visible(i, j, T, S, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether query i sees key j, for indices that broadcast against each other."""
    visible = (j < S) & (i < T)
    if HAS_LEFT:
        visible &= j >= i + S - T - left
    if HAS_RIGHT:
        visible &= j <= i + S - T + right
    return visible


@triton.jit
def _scores(
    a,
    b,
    i,
    j,
    diagonal,
    scale,
    softcap,
    slope,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s = log2(e) f(a b^T) before masking and, with a softcap, its damping ds/dx.

    a and b are rows of queries and keys, either way round; i and j are indices of queries and keys
    that broadcast to the tile; the diagonal is S - T.
    """
    x = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    damping = 1.0
    if HAS_SOFTCAP:
        s, damping = tanh_and_slope(x * (scale / softcap))
        s *= softcap * LOG2E
    else:
        s = x * (scale * LOG2E)
    if HAS_ALIBI:
        s -= tl.abs(i + diagonal - j).to(tl.float32) * (slope * LOG2E)
    return s, damping


@triton.jit
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    seed_ptr,
    slopes_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_batch,
    stride_k_head,
    stride_k_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_o_batch,
    stride_o_head,
    stride_o_row,
    stride_lse_batch,
    stride_lse_head,
    stride_slopes_batch,
    blocks,
    H,
    GROUP,
    T,
    S,
    left,
    right,
    scale,
    softcap,
    dropout_threshold,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and lse of one block of queries of one head."""
    # The longest causal rows first.
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    start_q, T = _sequence(cu_seqlens_q_ptr, b, T, VARLEN)
    start_k, S = _sequence(cu_seqlens_k_ptr, b, S, VARLEN)
    if VARLEN:  # noqa: SIM102 - the compiler decides the outer one
        if first >= T:
            return
    q_ptr = _row(q_ptr, b, h, start_q, stride_q_batch, stride_q_head, stride_q_row)
    k_ptr = _row(k_ptr, b, h // GROUP, start_k, stride_k_batch, stride_k_head, stride_k_row)
    v_ptr = _row(v_ptr, b, h // GROUP, start_k, stride_v_batch, stride_v_head, stride_v_row)
    o_ptr = _row(o_ptr, b, h, start_q, stride_o_batch, stride_o_head, stride_o_row)
    lse_ptr += b * stride_lse_batch + h * stride_lse_head + start_q
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    slope = tl.load(slopes_ptr + b * stride_slopes_batch + h) if HAS_ALIBI else 0.0
    offs_m = first + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr, offs_m, stride_q_row, T, D, BLOCK_D, False)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    begin, whole_begin, whole_end, end = _visible_range(
        first, T, S, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    whole = whole_end - whole_begin
    for masked in tl.static_range(2):
        lo = begin if masked else whole_begin
        hi = end - whole if masked else whole_end
        for at in range(lo, hi, BLOCK_N):
            start = at
            if masked:  # the edges on both sides of the whole blocks
                start = tl.where(at < whole_begin, at, at + whole)
            offs_n = start + tl.arange(0, BLOCK_N)
            i, j = offs_m[:, None], offs_n[None, :]
            k = _load_rows(k_ptr, offs_n, stride_k_row, S, D, BLOCK_D, masked == 0)
            s, _damping = _scores(
                q, k, i, j, S - T, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI, PRECISION
            )
            if masked:
                visible = _visible(i, j, T, S, left, right, HAS_LEFT, HAS_RIGHT)
                s = tl.where(visible, s, -float("inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            # A row that has seen no key yet: exp2(-inf - 0) = 0 instead of NaN.
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            p = tl.exp2(s - base[:, None])
            factor = tl.exp2(top - base)
            total = total * factor + tl.sum(p, 1)
            acc = acc * factor[:, None]
            if HAS_DROPOUT:
                p *= dropout_factors(seed, bh, first, start, dropout_threshold, BLOCK_M, BLOCK_N)
            v = _load_rows(v_ptr, offs_n, stride_v_row, S, DV, BLOCK_DV, masked == 0)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            top = new_top
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, -float("inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < T)
    _store_rows(o_ptr, acc, offs_m, stride_o_row, T, DV, BLOCK_DV)


@triton.jit
def _load_lse2(lse_ptr, offs_m, T):
    """Log-sum-exp in base 2; infinite, so that p = 0, past T and where a query saw no key."""
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < T, other=float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)


@triton.jit
def attention_bwd_dq_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    dq_ptr,
    seed_ptr,
    slopes_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_do_batch,
    stride_do_head,
    stride_do_row,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_batch,
    stride_k_head,
    stride_k_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_o_batch,
    stride_o_head,
    stride_o_row,
    stride_dq_batch,
    stride_dq_head,
    stride_dq_row,
    stride_lse_batch,
    stride_lse_head,
    stride_slopes_batch,
    blocks,
    H,
    GROUP,
    T,
    S,
    left,
    right,
    scale,
    softcap,
    dropout_threshold,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    NEEDS_DQ: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta and dq of one block of queries of one head; lse, dlse and delta lie alike."""
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    start_q, T = _sequence(cu_seqlens_q_ptr, b, T, VARLEN)
    start_k, S = _sequence(cu_seqlens_k_ptr, b, S, VARLEN)
    if VARLEN:  # noqa: SIM102 - the compiler decides the outer one
        if first >= T:
            return
    offs_m = first + tl.arange(0, BLOCK_M)
    o_ptr = _row(o_ptr, b, h, start_q, stride_o_batch, stride_o_head, stride_o_row)
    do_ptr = _row(do_ptr, b, h, start_q, stride_do_batch, stride_do_head, stride_do_row)
    at_lse = b * stride_lse_batch + h * stride_lse_head + start_q
    do = _load_rows(do_ptr, offs_m, stride_do_row, T, DV, BLOCK_DV, False)
    o = _load_rows(o_ptr, offs_m, stride_o_row, T, DV, BLOCK_DV, False)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at_lse + offs_m, mask=offs_m < T, other=0.0)
    tl.store(delta_ptr + at_lse + offs_m, delta, mask=offs_m < T)

    if NEEDS_DQ:
        q_ptr = _row(q_ptr, b, h, start_q, stride_q_batch, stride_q_head, stride_q_row)
        k_ptr = _row(k_ptr, b, h // GROUP, start_k, stride_k_batch, stride_k_head, stride_k_row)
        v_ptr = _row(v_ptr, b, h // GROUP, start_k, stride_v_batch, stride_v_head, stride_v_row)
        dq_ptr = _row(dq_ptr, b, h, start_q, stride_dq_batch, stride_dq_head, stride_dq_row)
        seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
        slope = tl.load(slopes_ptr + b * stride_slopes_batch + h) if HAS_ALIBI else 0.0
        q = _load_rows(q_ptr, offs_m, stride_q_row, T, D, BLOCK_D, False)
        lse2 = _load_lse2(lse_ptr + at_lse, offs_m, T)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        begin, whole_begin, whole_end, end = _visible_range(
            first, T, S, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
        )
        whole = whole_end - whole_begin
        for masked in tl.static_range(2):
            lo = begin if masked else whole_begin
            hi = end - whole if masked else whole_end
            for at in range(lo, hi, BLOCK_N):
                start = at
                if masked:
                    start = tl.where(at < whole_begin, at, at + whole)
                offs_n = start + tl.arange(0, BLOCK_N)
                i, j = offs_m[:, None], offs_n[None, :]
                k = _load_rows(k_ptr, offs_n, stride_k_row, S, D, BLOCK_D, masked == 0)
                v = _load_rows(v_ptr, offs_n, stride_v_row, S, DV, BLOCK_DV, masked == 0)
                s, damping = _scores(
                    q, k, i, j, S - T, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI, PRECISION
                )
                p = tl.exp2(s - lse2[:, None])
                if masked:
                    p = tl.where(_visible(i, j, T, S, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                if HAS_DROPOUT:
                    dp *= dropout_factors(
                        seed, bh, first, start, dropout_threshold, BLOCK_M, BLOCK_N
                    )
                dx = p * (dp - delta[:, None])
                if HAS_SOFTCAP:
                    dx *= damping
                dq = tl.dot(dx.to(k.dtype), k, dq, input_precision=PRECISION)
        _store_rows(dq_ptr, dq * scale, offs_m, stride_dq_row, T, D, BLOCK_D)


@triton.jit
def attention_bwd_dkdv_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    seed_ptr,
    slopes_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_do_batch,
    stride_do_head,
    stride_do_row,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_batch,
    stride_k_head,
    stride_k_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_dk_batch,
    stride_dk_head,
    stride_dk_row,
    stride_dv_batch,
    stride_dv_head,
    stride_dv_row,
    stride_lse_batch,
    stride_lse_head,
    stride_slopes_batch,
    blocks,
    H,
    GROUP,
    T,
    S,
    left,
    right,
    scale,
    softcap,
    dropout_threshold,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv, or one of them, of one block of keys of one key head.

    Tiles of scores are (keys, queries).
    """
    first = tl.program_id(0) % blocks * BLOCK_N
    kv_heads = H // GROUP
    b = (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    h_kv = (tl.program_id(0) // blocks % kv_heads).to(tl.int64)
    start_q, T = _sequence(cu_seqlens_q_ptr, b, T, VARLEN)
    start_k, S = _sequence(cu_seqlens_k_ptr, b, S, VARLEN)
    if VARLEN:  # noqa: SIM102 - the compiler decides the outer one
        if first >= S:
            return
    k_ptr = _row(k_ptr, b, h_kv, start_k, stride_k_batch, stride_k_head, stride_k_row)
    v_ptr = _row(v_ptr, b, h_kv, start_k, stride_v_batch, stride_v_head, stride_v_row)
    dk_ptr = _row(dk_ptr, b, h_kv, start_k, stride_dk_batch, stride_dk_head, stride_dk_row)
    dv_ptr = _row(dv_ptr, b, h_kv, start_k, stride_dv_batch, stride_dv_head, stride_dv_row)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    offs_n = first + tl.arange(0, BLOCK_N)
    k = _load_rows(k_ptr, offs_n, stride_k_row, S, D, BLOCK_D, False)
    if NEEDS_DK:
        v = _load_rows(v_ptr, offs_n, stride_v_row, S, DV, BLOCK_DV, False)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)

    # Seen from the keys, left and right change places.
    begin, whole_begin, whole_end, end = _visible_range(
        first, S, T, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_N, BLOCK_M
    )
    whole = whole_end - whole_begin
    for member in range(GROUP):
        h = h_kv * GROUP + member
        bh = b * H + h
        at_lse = b * stride_lse_batch + h * stride_lse_head + start_q
        slope = tl.load(slopes_ptr + b * stride_slopes_batch + h) if HAS_ALIBI else 0.0
        q_head = _row(q_ptr, b, h, start_q, stride_q_batch, stride_q_head, stride_q_row)
        do_head = _row(do_ptr, b, h, start_q, stride_do_batch, stride_do_head, stride_do_row)
        for masked in tl.static_range(2):
            lo = begin if masked else whole_begin
            hi = end - whole if masked else whole_end
            for at in range(lo, hi, BLOCK_M):
                start = at
                if masked:
                    start = tl.where(at < whole_begin, at, at + whole)
                offs_m = start + tl.arange(0, BLOCK_M)
                i, j = offs_m[None, :], offs_n[:, None]
                q = _load_rows(q_head, offs_m, stride_q_row, T, D, BLOCK_D, masked == 0)
                do = _load_rows(do_head, offs_m, stride_do_row, T, DV, BLOCK_DV, masked == 0)
                lse2 = _load_lse2(lse_ptr + at_lse, offs_m, T)
                s, damping = _scores(
                    k, q, i, j, S - T, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI, PRECISION
                )
                p = tl.exp2(s - lse2[None, :])
                if masked:
                    p = tl.where(_visible(i, j, T, S, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
                if NEEDS_DK:
                    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                if HAS_DROPOUT:
                    z = dropout_factors(seed, bh, start, first, dropout_threshold, BLOCK_M, BLOCK_N)
                    z = tl.trans(z)
                if NEEDS_DK:
                    delta = tl.load(delta_ptr + at_lse + offs_m, mask=offs_m < T, other=0.0)
                    if HAS_DROPOUT:
                        dp *= z
                    dx = p * (dp - delta[None, :])
                    if HAS_SOFTCAP:
                        dx *= damping
                if NEEDS_DV:
                    if HAS_DROPOUT:
                        p *= z
                    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                if NEEDS_DK:
                    dk = tl.dot(dx.to(q.dtype), q, dk, input_precision=PRECISION)
    if NEEDS_DK:
        _store_rows(dk_ptr, dk * scale, offs_n, stride_dk_row, S, D, BLOCK_D)
    if NEEDS_DV:
        _store_rows(dv_ptr, dv, offs_n, stride_dv_row, S, DV, BLOCK_DV)


class _Sequences(NamedTuple):
    """B sequences, the longest of T queries and S keys; cu_seqlens where they are packed."""

    B: int
    T: int
    S: int
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None


def _launch(
    kernel: Any,
    name: str,
    tensors: tuple[torch.Tensor | None, ...],
    strided: tuple[torch.Tensor, ...],
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: _Sequences,
    options: Options,
    flags: Mapping[str, bool],
) -> None:
    """Run one of the kernels: a program per block of tokens of each head of each sequence.

    `tensors` are its own pointers, `strided` those whose three strides it takes, in its order, and
    `flags` those constants that it alone has.
    """
    B, T, S, cu_seqlens_q, cu_seqlens_k = sequences
    packed = cu_seqlens_q is not None
    slopes = None if options.alibi_slopes is None else options.alibi_slopes.contiguous()
    H, D, Dv = q.shape[1], q.shape[-1], v.shape[-1]
    target = target_of(q.device)
    dropout = options.dropout_p > 0
    config = pick_config(name, D, Dv, q.element_size(), dropout, target)
    blocks, heads = triton.cdiv(T, config.block_m), H
    if name in ("dkdv", "dk", "dv"):
        blocks, heads = triton.cdiv(S, config.block_n), k.shape[1]
    kernel[(blocks * B * heads,)](
        *tensors,
        options.seed,
        slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        *(n for x in strided for n in _strides(x, packed)),
        0 if packed else lse.stride(0),
        lse.stride(1),
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        blocks,
        H,
        H // k.shape[1],
        T,
        S,
        options.left,
        options.right,
        options.scale,
        options.softcap,
        dropout_threshold(options.dropout_p),
        # A window that hides no key of the longest sequence is none.
        HAS_LEFT=0 <= options.left < S - 1,
        HAS_RIGHT=0 <= options.right < T - 1,
        HAS_SOFTCAP=options.softcap > 0,
        HAS_ALIBI=slopes is not None,
        HAS_DROPOUT=dropout,
        VARLEN=packed,
        **flags,
        D=D,
        DV=Dv,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=_block_d(D),
        BLOCK_DV=_block_d(Dv),
        PRECISION=fp32_precision(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _strides(x: torch.Tensor, packed: bool) -> tuple[int, ...]:
    """Of batch, head and row, in vectors of 16 bytes; 0 for what is there once, and may be odd."""
    sizes = (1 if packed else x.shape[0], *x.shape[1:3])
    vector = 16 // x.element_size()
    return tuple(0 if n == 1 else x.stride(dim) // vector for dim, n in enumerate(sizes))


def _align_rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy with zeros behind its rows, so that every row is whole vectors of 16 bytes.

    A misaligned row would be loaded element by element, with an address in registers for each. Only
    strides in such vectors tell the compiler that there is none: it knows of other arguments
    whether 16 divides them, and of a product what divides its factors, but takes no hint.
    """
    if _is_aligned(x):
        return x
    vector, D = 16 // x.element_size(), x.shape[-1]
    padded = empty_output(x, triton.cdiv(D, vector) * vector)
    padded[..., :D].copy_(x)
    padded[..., D:].zero_()
    return padded


def _is_aligned(x: torch.Tensor) -> bool:
    vector = 16 // x.element_size()
    sizes = (x.shape[-1], *(x.stride(dim) for dim in range(3) if x.shape[dim] > 1))
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(n % vector == 0 for n in sizes)


def _cut(x: torch.Tensor, D: int) -> torch.Tensor:
    """The first D columns, without the zeros of `_align_rows`."""
    return x if x.shape[-1] == D else empty_output(x, D).copy_(x[..., :D])


def _fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: _Sequences, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, T, D) tensors; packed ones as (1, H, N, D)."""
    Dv = v.shape[-1]
    q, k, v = _align_rows(q), _align_rows(k), _align_rows(v)
    o = empty_output(q, v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if q.numel():
        tensors = (q, k, v, o, lse)
        _launch(
            attention_fwd_kernel, "fwd", tensors, tensors[:4], lse, q, k, v, sequences, options, {}
        )
    return _cut(o, Dv), lse


def _bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    sequences: _Sequences,
    options: Options,
    needs: list[bool],
    into: Tensors3 | None = None,
) -> Tensors3:
    """As `_fwd`. Gradients that are needed go to `into`, if given, else to fresh memory."""
    D, Dv = q.shape[-1], v.shape[-1]
    do, q, k, v, o = (_align_rows(x) for x in (do, q, k, v, o))
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    empty = q.new_empty(0)
    delta = torch.empty_like(lse)
    if into is not None and all(_is_aligned(g) for g in into):
        dq, dk, dv = into
    else:
        dq = empty_output(q) if needs[0] else empty
        dk = empty_output(k) if needs[1] else empty
        dv = empty_output(v) if needs[2] else empty
    common = (lse, q, k, v, sequences, options)
    if q.numel() and (needs[0] or needs[1]):  # dv alone takes no delta
        _launch(
            attention_bwd_dq_kernel,
            "dq",
            (do, q, k, v, o, lse, dlse, delta, dq),
            (do, q, k, v, o, dq if needs[0] else q),
            *common,
            {"HAS_DLSE": dlse is not None, "NEEDS_DQ": needs[0]},
        )
    if not q.numel():  # perhaps not even a head
        dk.zero_()
        dv.zero_()
    wanted = {"dkdv": needs[1:], "dk": [needs[1], False], "dv": [False, needs[2]]}
    for name in key_gradients(k.shape[-1], v.shape[-1], k.element_size(), target_of(k.device)):
        if any(wanted[name]) and k.numel() and q.numel():
            _launch(
                attention_bwd_dkdv_kernel,
                name,
                (do, q, k, v, lse, delta, dk, dv),
                (do, q, k, v, dk if needs[1] else k, dv if needs[2] else v),
                *common,
                dict(zip(("NEEDS_DK", "NEEDS_DV"), wanted[name], strict=True)),
            )
    if into is not None:
        for g, out in zip((dq, dk, dv), into, strict=True):
            if g is not out:
                out.copy_(g[..., : out.shape[-1]])
        return into
    return (
        _cut(dq, D) if needs[0] else empty,
        _cut(dk, D) if needs[1] else empty,
        _cut(dv, Dv) if needs[2] else empty,
    )


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::attention_fwd`."""
    return _fwd(q, k, v, _Sequences(q.shape[0], q.shape[2], k.shape[2]), Options(*options))


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    *rest: Any,
) -> Tensors3:
    """The `triton` backend of `gptfast::attention_bwd`; see `gptfast.ops.attention`."""
    *options, needs, into = rest
    sequences = _Sequences(q.shape[0], q.shape[2], k.shape[2])
    return _bwd(do, q, k, v, o, lse, dlse, sequences, Options(*options), needs, into)


def attention_varlen_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::attention_varlen_fwd`."""
    sequences = _packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    o, lse = _fwd(_by_head(q), _by_head(k), _by_head(v), sequences, Options(*options))
    return o[0].transpose(0, 1), lse[0]


def attention_varlen_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::attention_varlen_bwd`."""
    *options, needs = rest
    sequences = _packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    do, q, k, v, o = (_by_head(x) for x in (do, q, k, v, o))
    lse, dlse = lse[None], None if dlse is None else dlse[None]
    grads = _bwd(do, q, k, v, o, lse, dlse, sequences, Options(*options), needs)
    return tuple(  # type: ignore[return-value]
        g[0].transpose(0, 1) if need else g for g, need in zip(grads, needs, strict=True)
    )


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """(N, H, D) as (1, H, N, D)."""
    return x.transpose(0, 1).unsqueeze(0)


def _packed(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> _Sequences:
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return _Sequences(len(cu_seqlens_q) - 1, max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k)
