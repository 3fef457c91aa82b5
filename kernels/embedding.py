"""Embedding in Triton. The maths stands in `gptfast/ops/embedding.py`.

Forward: one program per tile of tokens and columns; it reads a row of w and writes a row of y each.

Backward sorts the tokens (stably, so that equal ones keep their order) and gives each row of dw to
one program per block of columns: it sums the rows of dy that belong to it, in fp32, and writes its
row once, zeros too. So dy (M, N) is read and dw (V, N) written exactly once. A token that occurs
very often would keep its program busy for long. So the sorted tokens are cut into chunks of about
sqrt(M), and chunks of nothing but one token are summed first, each by a program of its own, into a
row of `partial` (M / chunk, N) in fp32: then no program adds more than some 5 sqrt(M) rows. Beside
the sort's own traffic, that moves at most 8 M N / chunk bytes, and 16 M + 24 V of integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptfast.ops.embedding import check_tokens
from gptfast.ops.layout import unit_stride
from gptfast.targets import Target, target_of
from gptfast.tuning import tunable


@dataclass(frozen=True)
class Config:
    """A tile: rows (tokens) and columns, powers of two."""

    block_m: int
    block_n: int
    num_warps: int


@tunable
def pick_config(N: int, target: Target, backward: bool) -> Config:
    """Tiles for rows of N elements.

    Forward has 8 elements a thread, a 128-bit load of bf16. Backward's rows are read through an
    index, so four of them are under way at a time, 32 fp32 values a thread; most rows of dw get
    none or one, and more would only be masked off.
    """
    num_warps = 4
    elements = 8 * num_warps * target.warp_size
    block_n = min(triton.next_power_of_2(max(N, 1)), elements)
    return Config(4 if backward else elements // block_n, block_n, num_warps)


def chunk_size(M: int) -> int:
    """Tokens in a chunk: with 2 chunk rows at a segment's ends and M / chunk between, the least is
    near sqrt(M). From 64 on, `partial` adds less than 7 % to bf16 traffic.
    """
    return max(64, triton.next_power_of_2(int(M**0.5)))


@triton.jit
def embedding_fwd_kernel(
    w_ptr,
    idx_ptr,
    y_ptr,
    stride_w_row,
    M,
    V,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y of one tile of tokens and columns."""
    col_blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // col_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(idx_ptr + rows, mask=rows < M, other=-1).to(tl.int64)
    # A token outside [0, V) makes its row NaN: a look from the host would wait for the card.
    known = (token >= 0) & (token < V)
    mask = (cols < N)[None, :]
    at = token[:, None] * stride_w_row + cols[None, :]
    w = tl.load(w_ptr + at, mask=known[:, None] & mask, other=float("nan"))
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], w, mask=(rows < M)[:, None] & mask)


@triton.jit
def _sum_rows(
    acc, dy_ptr, order_ptr, begin, end, cols, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """acc + the rows of dy that the sorted positions [begin, end) come from, by position mod
    BLOCK_M."""
    for start in range(begin, end, BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        rows = tl.load(order_ptr + at, mask=at < end, other=0)
        mask = (at < end)[:, None] & (cols < N)[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * N + cols[None, :], mask=mask, other=0.0)
        acc += dy.to(tl.float32)
    return acc


@triton.jit
def embedding_bwd_chunk_kernel(
    dy_ptr,
    token_ptr,
    order_ptr,
    partial_ptr,
    V,
    N,
    padding_idx,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums of one block of columns over one chunk, where that is all one token."""
    col_blocks = tl.cdiv(N, BLOCK_N)
    chunk = (tl.program_id(0) // col_blocks).to(tl.int64)
    cols = (tl.program_id(0) % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = chunk * CHUNK
    token = tl.load(token_ptr + begin)
    counts = (token >= 0) & (token < V) & (token != padding_idx)
    if counts & (token == tl.load(token_ptr + begin + CHUNK - 1)):
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _sum_rows(acc, dy_ptr, order_ptr, begin, begin + CHUNK, cols, N, BLOCK_M, BLOCK_N)
        tl.store(partial_ptr + chunk * N + cols, tl.sum(acc, 0), mask=cols < N)


@triton.jit
def embedding_bwd_kernel(
    dy_ptr,
    order_ptr,
    first_ptr,
    partial_ptr,
    dw_ptr,
    N,
    padding_idx,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of columns of one row of dw."""
    col_blocks = tl.cdiv(N, BLOCK_N)
    v = (tl.program_id(0) // col_blocks).to(tl.int64)
    cols = (tl.program_id(0) % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(first_ptr + v)
    end = tl.load(first_ptr + v + 1)
    end = tl.where(v == padding_idx, begin, end)
    # Whole chunks in [begin, end), and what sticks out at either end; without one, all in front.
    low = tl.cdiv(begin, CHUNK)
    high = end // CHUNK
    front = tl.minimum(low * CHUNK, end)
    back = tl.maximum(high * CHUNK, front)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _sum_rows(acc, dy_ptr, order_ptr, begin, front, cols, N, BLOCK_M, BLOCK_N)
    for start in range(low, high, BLOCK_M):
        chunks = start + tl.arange(0, BLOCK_M)
        mask = (chunks < high)[:, None] & (cols < N)[None, :]
        acc += tl.load(partial_ptr + chunks[:, None] * N + cols[None, :], mask=mask, other=0.0)
    acc = _sum_rows(acc, dy_ptr, order_ptr, back, end, cols, N, BLOCK_M, BLOCK_N)
    dw = tl.sum(acc, 0).to(dw_ptr.dtype.element_ty)
    tl.store(dw_ptr + v * N + cols, dw, mask=cols < N)


def embedding_fwd(weight: torch.Tensor, idx: torch.Tensor, padding_idx: int) -> torch.Tensor:
    """The `triton` backend of `gptfast::embedding_fwd`."""
    V, N = weight.shape
    check_tokens(idx, V)
    weight, idx = unit_stride(weight), idx.contiguous()
    y = weight.new_empty(*idx.shape, N)
    if y.numel():
        M = idx.numel()
        config = pick_config(N, target_of(weight.device), backward=False)
        grid = (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)
        embedding_fwd_kernel[grid](
            weight,
            idx,
            y,
            weight.stride(0),
            M,
            V,
            N,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return y


def embedding_bwd(dy: torch.Tensor, idx: torch.Tensor, V: int, padding_idx: int) -> torch.Tensor:
    """The `triton` backend of `gptfast::embedding_bwd`."""
    dy = dy.contiguous()
    M, N = idx.numel(), dy.shape[-1]
    dw = dy.new_empty(V, N)
    if not dw.numel():
        return dw
    tokens, order = torch.sort(idx.reshape(-1), stable=True)
    rows = torch.arange(V + 1, dtype=idx.dtype, device=idx.device)
    first = torch.searchsorted(tokens, rows)  # where each token's segment begins
    config = pick_config(N, target_of(dy.device), backward=True)
    chunk, col_blocks = chunk_size(M), triton.cdiv(N, config.block_n)
    partial = torch.empty((M // chunk, N), dtype=torch.float32, device=dy.device)
    constants = {
        "CHUNK": chunk,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
    }
    if len(partial):
        embedding_bwd_chunk_kernel[(len(partial) * col_blocks,)](
            dy, tokens, order, partial, V, N, padding_idx, **constants
        )
    embedding_bwd_kernel[(V * col_blocks,)](
        dy, order, first, partial, dw, N, padding_idx, **constants
    )
    return dw
