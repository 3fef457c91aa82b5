"""LayerNorm in Triton. The maths stands in `gptfast/ops/layer_norm.py`.

Rows of up to MAX_BLOCK columns are held in registers: forward and backward then read every element
once. Wider rows are swept in blocks: forward reads x three times, backward dy and x twice.

dw and db are summed in two stages. Backward runs a fixed number of programs; each walks over its
own rows and keeps the sums of its columns, which it writes to its row of `partial` (P, 2, N) in
fp32. A second kernel adds those rows in order, so the result is the same every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MAX_BLOCK = 16384  # columns in registers: 64 fp32 values a thread at 8 warps, x and dy together 128


@dataclass(frozen=True)
class Config:
    """How a launch is cut up."""

    block_n: int  # columns a program handles at a time, a power of two
    num_warps: int
    programs: int  # of backward: rows of `partial`


def pick_config(M: int, N: int) -> Config:
    """Launch sizes for M rows of N columns.

    num_warps gives a thread 8 (narrow) to 64 (MAX_BLOCK) elements: 128-bit loads throughout.
    Backward's programs are a function of M alone (the result must not depend on the card): 256
    fill the 132 to 148 multiprocessors of today's large cards, and `partial` stays below 1 % of the
    traffic once every program has some 64 rows.
    """
    block_n = min(triton.next_power_of_2(max(N, 1)), MAX_BLOCK)
    num_warps = min(max(block_n // 256, 1), 8)
    return Config(block_n, num_warps, programs=max(1, min(M, 256)))


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    eps,
    HAS_W: tl.constexpr,
    HAS_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * N
    y_ptr += row * N
    offs = tl.arange(0, BLOCK_N)
    if ONE_BLOCK:
        mask = offs < N
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, 0) / N
        centred = tl.where(mask, x - mean, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / N + eps)
        y = _affine(centred * rstd, w_ptr, b_ptr, offs, mask, HAS_W, HAS_B)
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        total = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, N, BLOCK_N):
            mask = start + offs < N
            total += tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / N
        squares = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, N, BLOCK_N):
            mask = start + offs < N
            x = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
            centred = tl.where(mask, x - mean, 0.0)
            squares += centred * centred
        rstd = 1 / tl.sqrt(tl.sum(squares, 0) / N + eps)
        for start in range(0, N, BLOCK_N):
            cols = start + offs
            mask = cols < N
            x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            y = _affine((x - mean) * rstd, w_ptr, b_ptr, cols, mask, HAS_W, HAS_B)
            tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _affine(xhat, w_ptr, b_ptr, cols, mask, HAS_W: tl.constexpr, HAS_B: tl.constexpr):
    y = xhat
    if HAS_W:
        y *= tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_B:
        y += tl.load(b_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def layer_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    M,
    N,
    HAS_W: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows p, p + P, p + 2 P, ... for program p of P: N fits into one block."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    offs = tl.arange(0, BLOCK_N)
    mask = offs < N
    dw = tl.zeros((BLOCK_N,), tl.float32)
    db = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(tl.cdiv(M - tl.program_id(0), programs)):
        row = program + i * programs
        at = row * N + offs
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        xhat = tl.where(mask, (x - mean) * rstd, 0.0)
        if NEEDS_DX:
            wdy = dy
            if HAS_W:
                wdy *= tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            c1 = tl.sum(wdy * xhat, 0) / N
            c2 = tl.sum(wdy, 0) / N
            dx = (wdy - c1 * xhat - c2) * rstd
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEEDS_DW:
            dw += dy * xhat
            db += dy
    if NEEDS_DW:
        partial_ptr += program * 2 * N
        tl.store(partial_ptr + offs, dw, mask=mask)
        tl.store(partial_ptr + N + offs, db, mask=mask)


@triton.jit
def layer_norm_bwd_dx_wide_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    N,
    HAS_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx of one row per program, swept twice: N is wider than a block."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * N
    x_ptr += row * N
    dx_ptr += row * N
    offs = tl.arange(0, BLOCK_N)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    sum1 = tl.zeros((BLOCK_N,), tl.float32)
    sum2 = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        wdy, xhat = _wdy_xhat(dy_ptr, x_ptr, w_ptr, mean, rstd, start + offs, N, HAS_W)
        sum1 += wdy * xhat
        sum2 += wdy
    c1 = tl.sum(sum1, 0) / N
    c2 = tl.sum(sum2, 0) / N
    for start in range(0, N, BLOCK_N):
        cols = start + offs
        wdy, xhat = _wdy_xhat(dy_ptr, x_ptr, w_ptr, mean, rstd, cols, N, HAS_W)
        dx = (wdy - c1 * xhat - c2) * rstd
        tl.store(dx_ptr + cols, dx.to(dx_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def _wdy_xhat(dy_ptr, x_ptr, w_ptr, mean, rstd, cols, N, HAS_W: tl.constexpr):
    mask = cols < N
    wdy = tl.load(dy_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_W:
        wdy *= tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return wdy, tl.where(mask, (x - mean) * rstd, 0.0)


@triton.jit
def layer_norm_bwd_dw_wide_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, partial_ptr, M, N, BLOCK_N: tl.constexpr
):
    """Sums of one block of columns over the rows p, p + P, ...: N is wider than a block."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    program, programs = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    mask = cols < N
    dw = tl.zeros((BLOCK_N,), tl.float32)
    db = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(tl.cdiv(M - tl.program_id(1), programs)):
        row = program + i * programs
        at = row * N + cols
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dw += dy * (x - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row)
        db += dy
    partial_ptr += program * 2 * N
    tl.store(partial_ptr + cols, dw, mask=mask)
    tl.store(partial_ptr + N + cols, db, mask=mask)


@triton.jit
def layer_norm_bwd_sum_kernel(partial_ptr, dw_ptr, db_ptr, programs, N, BLOCK_N: tl.constexpr):
    """dw_j = sum_p partial_p0j and db_j = sum_p partial_p1j, in the order of p."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    dw = tl.zeros((BLOCK_N,), tl.float32)
    db = tl.zeros((BLOCK_N,), tl.float32)
    for _ in range(programs):
        dw += tl.load(partial_ptr + cols, mask=mask, other=0.0)
        db += tl.load(partial_ptr + N + cols, mask=mask, other=0.0)
        partial_ptr += 2 * N
    tl.store(dw_ptr + cols, dw, mask=mask)
    tl.store(db_ptr + cols, db, mask=mask)


def layer_norm_fwd(
    x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::layer_norm_fwd`."""
    x = x.contiguous()
    N = x.shape[-1]
    y = torch.empty_like(x)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    M = mean.numel()
    if M:
        config = pick_config(M, N)
        layer_norm_fwd_kernel[(M,)](
            x,
            None if w is None else w.contiguous(),
            None if b is None else b.contiguous(),
            y,
            mean,
            rstd,
            N,
            eps,
            HAS_W=w is not None,
            HAS_B=b is not None,
            ONE_BLOCK=config.block_n >= N,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return y, mean, rstd


def layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::layer_norm_bwd`."""
    dy, x, mean, rstd = dy.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous()
    w = None if w is None else w.contiguous()
    M, N = mean.numel(), x.shape[-1]
    needs_dw = needs[1] or needs[2]
    dx = torch.empty_like(x) if needs[0] else x.new_empty(0)
    dw = x.new_zeros(N if needs_dw else 0, dtype=torch.float32)
    db = torch.zeros_like(dw)
    if M and N:
        config = pick_config(M, N)
        block_n, warps = config.block_n, config.num_warps
        partial_shape = (config.programs, 2, N) if needs_dw else (0,)
        partial = torch.empty(partial_shape, dtype=torch.float32, device=x.device)
        blocks = triton.cdiv(N, block_n)
        if blocks == 1:
            layer_norm_bwd_kernel[(config.programs,)](
                dy,
                x,
                w,
                mean,
                rstd,
                dx,
                partial,
                M,
                N,
                HAS_W=w is not None,
                NEEDS_DX=needs[0],
                NEEDS_DW=needs_dw,
                BLOCK_N=block_n,
                num_warps=warps,
            )
        else:
            if needs[0]:
                layer_norm_bwd_dx_wide_kernel[(M,)](
                    dy, x, w, mean, rstd, dx, N,
                    HAS_W=w is not None, BLOCK_N=block_n, num_warps=warps,
                )  # fmt: skip
            if needs_dw:
                layer_norm_bwd_dw_wide_kernel[(blocks, config.programs)](
                    dy, x, mean, rstd, partial, M, N, BLOCK_N=block_n, num_warps=warps
                )
        if needs_dw:
            sum_block = min(block_n, 256)
            layer_norm_bwd_sum_kernel[(triton.cdiv(N, sum_block),)](
                partial, dw, db, config.programs, N, BLOCK_N=sum_block, num_warps=1
            )
    return dx, dw if needs[1] else dw.new_empty(0), db if needs[2] else db.new_empty(0)
