"""GELU, and bias + GELU, in Triton. The maths stands in `gptfast/ops/gelu.py` and `bias_gelu.py`.

x is a matrix (M, N) with a row of N biases; without a bias it is one row of all its elements.

Forward: one program per tile of x; it reads x and writes y once. Backward: one program per block of
columns and run of rows; it reads dy and x and writes dx once. Phi is recomputed there, which moves
no more bytes than saving it would. dbias is summed in two stages: each program keeps the sums of
its columns and writes them to its row of `partial` (P, N) in fp32; a second kernel adds those rows,
in the same order every time. That adds 8 P N bytes, P <= M / 16, to the 3 M N elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptfast.targets import Target, target_of
from gptfast.tuning import tunable

# Tensors stand left of these in products: constexpr * tensor is no tensor in the interpreter.
TWO_SQRT_2_OVER_PI = tl.constexpr(2 * 0.7978845608028654)
CUBIC = tl.constexpr(0.044715)
THREE_CUBIC = tl.constexpr(3 * 0.044715)
SQRT_HALF = tl.constexpr(0.7071067811865476)
# erfc(z) = exp(-z^2) t P(t) for z >= 0, t = 1 / (1 + 0.4 z), as in csrc/cpu/simd.h.
P0 = tl.constexpr(0.2257106552)
P1 = tl.constexpr(0.2248800578)
P2 = tl.constexpr(0.2155107445)
P3 = tl.constexpr(0.1269447636)
P4 = tl.constexpr(0.2799106741)
P5 = tl.constexpr(-0.2988717371)
P6 = tl.constexpr(0.5647598426)
P7 = tl.constexpr(-0.5117258100)
P8 = tl.constexpr(0.2034763795)
P9 = tl.constexpr(-0.03059556352)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@dataclass(frozen=True)
class Config:
    """A tile of an elementwise kernel: rows and columns, powers of two."""

    block_m: int
    block_n: int
    num_warps: int


@tunable
def pick_config(N: int, target: Target) -> Config:
    """Tiles for rows of N elements.

    8 elements a thread: a 128-bit load of bf16, two of fp32. With 4 warps a multiprocessor holds
    enough programs to keep all its threads busy; a tile is as wide as the row, if that is short.
    """
    num_warps = 4
    elements = 8 * num_warps * target.warp_size
    block_n = min(triton.next_power_of_2(max(N, 1)), elements)
    return Config(elements // block_n, block_n, num_warps)


def row_runs(M: int, N: int) -> int:
    """Into how many runs backward cuts M rows of N columns: the rows P of `partial`.

    A run of at least 16 rows keeps `partial` below 8.4 % of bf16 traffic; one of 2048 elements is
    no less than a tile. 2^20 / N runs of blocks of 1024 columns are 1024 programs, which fill any
    card: more would only make `partial` larger. A function of the shape alone.
    """
    rows = max(16, triton.cdiv(2048, max(N, 1)))
    return max(1, min(triton.cdiv(M, rows), triton.cdiv(2**20, max(N, 1))))


@triton.jit
def gelu_phi(x, TANH: tl.constexpr):
    """Phi(x)."""
    if TANH:
        return tl.sigmoid((x + x * x * x * CUBIC) * TWO_SQRT_2_OVER_PI)
    # 1 + erf would have no digits left for x far below zero.
    t = 1 / (tl.abs(x) * SQRT_HALF * 0.4 + 1)
    p = ((((t * P9 + P8) * t + P7) * t + P6) * t + P5) * t + P4
    p = (((p * t + P3) * t + P2) * t + P1) * t + P0
    tail = _gaussian(x) * t * p * 0.5
    return tl.where(x > 0, 1 - tail, tail)


@triton.jit
def _gaussian(x):
    """exp(-x^2 / 2)."""
    z = x * SQRT_HALF
    return tl.exp(-z * z)


@triton.jit
def gelu_slope(x, phi, TANH: tl.constexpr):
    """Phi(x) + x Phi'(x)."""
    if TANH:
        # Beyond |x| = 10 the slope is 0 or 1: leaving x out there keeps x^2 from overflowing.
        c = tl.where(tl.abs(x) > 10, 0.0, x)
        # 1 - Phi as Phi(-x): a subtraction would lose digits that the large factors bring back.
        return phi + c * phi * gelu_phi(-c, TANH) * (1 + c * c * THREE_CUBIC) * TWO_SQRT_2_OVER_PI
    c = tl.where(tl.abs(x) > 15, 0.0, x)
    return phi + c * _gaussian(x) * INV_SQRT_2PI


@triton.jit
def load_bias(bias_ptr, cols, N):
    """The biases of some columns, as a row in fp32."""
    return tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def gelu_fwd_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    TANH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = z Phi(z) of one tile, z = x or x + bias."""
    col_blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // col_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = rows[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    z = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += load_bias(bias_ptr, cols, N)
    tl.store(y_ptr + at, (z * gelu_phi(z, TANH)).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_bwd_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,
    M,
    N,
    rows_per_run,
    TANH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx of one block of columns of one run of rows, and its sums over those rows."""
    col_blocks = tl.cdiv(N, BLOCK_N)
    run = (tl.program_id(0) // col_blocks).to(tl.int64)
    cols = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = run * rows_per_run
    end = tl.minimum(begin + rows_per_run, M)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BIAS:
        bias = load_bias(bias_ptr, cols, N)
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        at = rows[:, None] * N + cols[None, :]
        mask = (rows < end)[:, None] & (cols < N)[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += bias
        dz = dy * gelu_slope(z, gelu_phi(z, TANH), TANH)
        if NEEDS_DX:
            tl.store(dx_ptr + at, dz.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEEDS_DB:
            sums += dz  # 0 where there is no row: dy is
    if NEEDS_DB:
        tl.store(partial_ptr + run * N + cols, tl.sum(sums, 0), mask=cols < N)


@triton.jit
def gelu_bwd_sum_kernel(partial_ptr, db_ptr, runs, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dbias_j = sum_p partial_pj of one block of columns."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, runs, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        at = rows.to(tl.int64)[:, None] * N + cols[None, :]
        mask = (rows < runs)[:, None] & (cols < N)[None, :]
        sums += tl.load(partial_ptr + at, mask=mask, other=0.0)
    tl.store(db_ptr + cols, tl.sum(sums, 0), mask=cols < N)


def _forward(
    x: torch.Tensor, bias: torch.Tensor | None, M: int, N: int, approximate: str
) -> torch.Tensor:
    y = torch.empty_like(x)
    if x.numel():
        config = pick_config(N, target_of(x.device))
        grid = (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)
        gelu_fwd_kernel[grid](
            x,
            bias,
            y,
            M,
            N,
            TANH=approximate == "tanh",
            HAS_BIAS=bias is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return y


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    M: int,
    N: int,
    approximate: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    empty = x.new_empty(0)
    dx = torch.empty_like(x) if needs[0] else empty
    make = torch.empty if x.numel() else torch.zeros
    db = make(N, dtype=torch.float32, device=x.device) if needs[1] else empty
    if not x.numel():
        return dx, db
    config = pick_config(N, target_of(x.device))
    runs = row_runs(M, N)
    partial = torch.empty((runs, N) if needs[1] else (0,), dtype=torch.float32, device=x.device)
    gelu_bwd_kernel[(runs * triton.cdiv(N, config.block_n),)](
        dy,
        x,
        bias,
        dx,
        partial,
        M,
        N,
        triton.cdiv(M, runs),
        TANH=approximate == "tanh",
        HAS_BIAS=bias is not None,
        NEEDS_DX=needs[0],
        NEEDS_DB=needs[1],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )
    if needs[1]:
        gelu_bwd_sum_kernel[(triton.cdiv(N, 32),)](partial, db, runs, N, BLOCK_M=32, BLOCK_N=32)
    return dx, db


def gelu_fwd(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """The `triton` backend of `gptfast::gelu_fwd`."""
    return _forward(x.contiguous(), None, 1, x.numel(), approximate)


def gelu_bwd(dy: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    """The `triton` backend of `gptfast::gelu_bwd`."""
    needs = [True, False]
    return _backward(dy.contiguous(), x.contiguous(), None, 1, x.numel(), approximate, needs)[0]


def bias_gelu_fwd(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    """The `triton` backend of `gptfast::bias_gelu_fwd`."""
    N = bias.numel()
    M = x.numel() // max(N, 1)
    return _forward(x.contiguous(), bias.contiguous(), M, N, approximate)


def bias_gelu_bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, approximate: str, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::bias_gelu_bwd`."""
    N = bias.numel()
    M = x.numel() // max(N, 1)
    dy, x, bias = dy.contiguous(), x.contiguous(), bias.contiguous()
    return _backward(dy, x, bias, M, N, approximate, needs)
