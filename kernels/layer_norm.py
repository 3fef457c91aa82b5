"""LayerNorm and RMSNorm in Triton, alone or behind the sum of the residual stream.

The maths stands in `gptfast/ops/`: layer_norm.py, rms_norm.py, add_layer_norm.py, add_rms_norm.py.
Here r is what is normalised: x itself, or with HAS_RESIDUAL the stream residual + z (x + x_bias).

Forward: a program owns BLOCK_M rows and holds them in registers; it reads x (and the residual) and
writes y (and r) once. Rows wider than MAX_FORWARD are swept twice: the second time r is read again.

Backward: program p of P walks over the groups of BLOCK_M rows p, p + P, ..., and keeps the sums for
dw, db and dx_bias of its columns in registers. It reads dy, r (and dr) and writes dresidual (and
dx) once, and at the end its sums to its row of `partial` (P, 3, N) in fp32; `norm_sum_kernel` adds
those rows in order, so the result is the same every time. Rows wider than MAX_BACKWARD leave no
room for the sums: `norm_row_means_kernel` first reads dy and r for c1 and c2, and the backward
kernel, with a block of columns for each program of grid axis 1, then reads both a second time.

The kernels have more than 15 arguments, and the file more than 500 lines: every tensor that may be
absent is an argument with its flag, and near copies without them would be many more lines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptfast.kernels.philox import dropout_factors
from gptfast.ops.philox import dropout_threshold
from gptfast.targets import Target, target_of
from gptfast.tuning import tunable

# Columns that a program holds in registers. With 1024 threads each has 64 registers (AMD: 128): 32
# elements of r and what the sums over a row need just fit where inputs are of 16 bits; 16 where
# they are wider, or dropout's counters come beside them, or on sm_120 (and its like, of 1536
# threads) a residual. In backward each of 512 threads has 128
# for its 16 elements: four of 32 bits for each, sums and inputs, fit; with more (three sums, or an
# fp32 stream with two) the compiler spills, as it does with the masks of an unaligned row. Blocks
# are then half as wide, and so they are where rows are swept anyway. Rows of 16384 columns spill in
# backward with 256, 512 and 1024 threads on sm_90, sm_100 and sm_120.
MAX_FORWARD = 32768
MAX_BACKWARD = 8192
SUM_COLUMNS, SUM_ROWS = 32, 128  # tile of `partial`: 128-byte rows, 32 elements a thread


@dataclass(frozen=True)
class Config:
    """How a launch is cut up."""

    block_m: int  # rows and columns that a program handles at a time, powers of two
    block_n: int
    num_warps: int
    programs: int  # of backward: rows of `partial`


@tunable
def pick_config(
    M: int, N: int, itemsize: int, target: Target, sums: int | None = None, read: int = 0
) -> Config:
    """Launch sizes for M rows of N columns of `itemsize` bytes.

    Threads: 16 elements each, two 128-bit loads of every tensor in half precision, four in fp32;
    fewer leave too little in flight to hide the latency of memory, more do not fit into registers.
    Where 16 does not divide N, 8 each: the addresses and masks of single elements take registers.

    block_m: narrow rows come several at a time, until a forward program has 4 warps (of 32) and a
    backward one, of which there are few, 8. But few rows are spread: 512 programs occupy the 132 to
    148 multiprocessors of large cards several times.

    programs: `partial` is written and read once, 8 bytes a sum, program and column, where a row
    takes at least 3 itemsize bytes a column. M itemsize / 64 programs keep it below a tenth of the
    traffic with two sums; nor are there more than run at a time, 512 threads a multiprocessor,
    whose sums fill its registers. Of 16384 x 768 in bf16 on an H100, 264 programs of 256 threads
    take 52 us; 512, in two waves, 68.

    Args:
        M, N, itemsize: as said.
        target: its warps are of 32 or 64 threads.
        sums: of backward, how many gradients of parameters; None means forward.
        read: bytes of the inputs for one element; dropout in forward is an input, of 16 bits.
    """
    block_n = triton.next_power_of_2(max(N, 16))
    if sums is None:
        narrow = read <= (4 if target.threads == 2048 else 2)
        fits = target.platform == "hip" or (itemsize == 2 and narrow)
        most = MAX_FORWARD if fits else MAX_FORWARD // 2
        tile, block_n = 2048, min(block_n, most if N % 16 == 0 else MAX_FORWARD // 4)
    else:
        fits = N <= MAX_BACKWARD and 4 * sums + read <= 16 and N % 16 == 0
        tile, block_n = 4096, min(block_n, MAX_BACKWARD if fits else MAX_BACKWARD // 2)
    block_m = max(1, min(tile // block_n, triton.next_power_of_2(max(M // 512, 1))))
    elements = 16 if N % 16 == 0 else 8
    threads = min(max(block_m * block_n // elements, target.warp_size), 1024)
    resident = target.multiprocessors * max(1, 512 // threads)
    programs = max(1, min(triton.cdiv(M, block_m), resident, M * itemsize // 64))
    return Config(block_m, block_n, threads // target.warp_size, programs)


@triton.jit
def _residual_stream(
    x_ptr,
    residual_ptr,
    x_bias_ptr,
    r_ptr,
    seed_ptr,
    stride_x_row,
    stride_residual_row,
    first_row,
    first_col,
    M,
    N,
    threshold,
    HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of what is normalised, in fp32; with HAS_RESIDUAL it is also written to r."""
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    cols = first_col + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (cols < N)
    r = tl.load(x_ptr + rows * stride_x_row + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        r += tl.load(x_bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        head = tl.full((), 0, tl.int32)
        r *= dropout_factors(
            tl.load(seed_ptr), head, first_row, first_col, threshold, BLOCK_M, BLOCK_N
        )
    if HAS_RESIDUAL:
        at = residual_ptr + rows * stride_residual_row + cols
        r += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        rounded = r.to(r_ptr.dtype.element_ty)
        tl.store(r_ptr + rows * N + cols, rounded, mask=mask)
        r = rounded.to(tl.float32)
    return r


@triton.jit
def _store_normalised(
    r, mean, rstd, w_ptr, b_ptr, y_ptr, rows, cols, M, N, HAS_W: tl.constexpr, HAS_B: tl.constexpr
):
    y = (r - mean[:, None]) * rstd[:, None]
    if HAS_W:
        y *= tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if HAS_B:
        y += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    at = y_ptr + rows[:, None] * N + cols[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _inverse_root(x):
    """1 / sqrt(x), each rounded as IEEE says: fast forms on a GPU are off by 2 ulp each, and dx by
    three times as much."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    x_bias_ptr,
    w_ptr,
    b_ptr,
    seed_ptr,
    y_ptr,
    r_ptr,
    mean_ptr,
    rstd_ptr,
    stride_x_row,
    stride_residual_row,
    M,
    N,
    eps,
    threshold,
    IS_RMS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M rows."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    offs = tl.arange(0, BLOCK_N)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)  # sum over columns of (r - mean)^2
    if ONE_BLOCK:
        r = _residual_stream(
            x_ptr, residual_ptr, x_bias_ptr, r_ptr, seed_ptr, stride_x_row, stride_residual_row,
            first, 0, M, N, threshold, HAS_RESIDUAL, HAS_X_BIAS, HAS_DROPOUT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        live = offs[None, :] < N
        if not IS_RMS:
            mean = tl.sum(tl.where(live, r, 0.0), 1) / N
        centred = tl.where(live, r - mean[:, None], 0.0)
        squares = tl.sum(centred * centred, 1)
        rstd = _inverse_root(squares / N + eps)
        _store_normalised(r, mean, rstd, w_ptr, b_ptr, y_ptr, rows, offs, M, N, HAS_W, HAS_B)
    else:
        for start in range(0, N, BLOCK_N):
            r = _residual_stream(
                x_ptr, residual_ptr, x_bias_ptr, r_ptr, seed_ptr, stride_x_row, stride_residual_row,
                first, start, M, N, threshold, HAS_RESIDUAL, HAS_X_BIAS, HAS_DROPOUT,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            live = start + offs[None, :] < N
            if IS_RMS:
                squares += tl.sum(tl.where(live, r * r, 0.0), 1)
            else:
                # Chan et al., 1979: mean and squares of all columns up to here from those before
                # and those of this block. Nothing cancels, however far the mean is from zero.
                n = tl.minimum(N - start, BLOCK_N)
                share = n / (start + n)
                block_mean = tl.sum(tl.where(live, r, 0.0), 1) / n
                centred = tl.where(live, r - block_mean[:, None], 0.0)
                delta = block_mean - mean
                mean += delta * share
                squares += tl.sum(centred * centred, 1) + delta * delta * share * start
        rstd = _inverse_root(squares / N + eps)
        # With a residual, r is read where this program, perhaps another thread of it, wrote it.
        if HAS_RESIDUAL:
            tl.debug_barrier()
            again_ptr, stride = r_ptr, N
        else:
            again_ptr, stride = x_ptr, stride_x_row
        for start in range(0, N, BLOCK_N):
            cols = start + offs
            mask = (rows[:, None] < M) & (cols[None, :] < N)
            at = again_ptr + rows[:, None] * stride + cols[None, :]
            r = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            _store_normalised(r, mean, rstd, w_ptr, b_ptr, y_ptr, rows, cols, M, N, HAS_W, HAS_B)
    if not IS_RMS:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def _load_tile(ptr, rows, stride_row, cols, M, N):
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    at = ptr + rows[:, None] * stride_row + cols[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_xhat(r_ptr, mean_ptr, rstd_ptr, stride_r_row, rows, cols, M, N, IS_RMS: tl.constexpr):
    """xhat of a tile, zero outside it, and rstd."""
    r = _load_tile(r_ptr, rows, stride_r_row, cols, M, N)
    rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
    if not IS_RMS:
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
        r = tl.where(cols[None, :] < N, r - mean[:, None], 0.0)
    return r * rstd[:, None], rstd


@triton.jit
def _times_w(dy, w_ptr, cols, N, HAS_W: tl.constexpr):
    if HAS_W:
        dy *= tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return dy


@triton.jit
def norm_row_means_kernel(
    dy_ptr,
    r_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    c_ptr,
    stride_dy_row,
    stride_r_row,
    M,
    N,
    IS_RMS: tl.constexpr,
    HAS_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """c1 and c2 of one row wider than a block, to c (2, M)."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    sum1 = tl.zeros((1, BLOCK_N), tl.float32)
    sum2 = tl.zeros((1, BLOCK_N), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        xhat, _ = _load_xhat(r_ptr, mean_ptr, rstd_ptr, stride_r_row, row, cols, M, N, IS_RMS)
        wdy = _load_tile(dy_ptr, row, stride_dy_row, cols, M, N)
        wdy = _times_w(wdy, w_ptr, cols, N, HAS_W)
        sum1 += wdy * xhat
        sum2 += wdy
    tl.store(c_ptr + row, tl.sum(sum1, 1) / N)
    if not IS_RMS:
        tl.store(c_ptr + M + row, tl.sum(sum2, 1) / N)


@triton.jit
def norm_bwd_kernel(
    dy_ptr,
    dr_ptr,
    r_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    c_ptr,
    seed_ptr,
    dx_ptr,
    dresidual_ptr,
    partial_ptr,
    stride_dy_row,
    stride_dr_row,
    stride_r_row,
    M,
    N,
    threshold,
    IS_RMS: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DR: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DRESIDUAL: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    NEEDS_DX_BIAS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Row groups p, p + P, ... of one block of columns, which are all of them with ONE_BLOCK."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    first_col = tl.program_id(1) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dx_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(tl.cdiv(M - tl.program_id(0) * BLOCK_M, programs * BLOCK_M)):
        first_row = (program + i * programs) * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        at = rows[:, None] * N + cols[None, :]
        mask = (rows[:, None] < M) & (cols[None, :] < N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_DY:
            dy = _load_tile(dy_ptr, rows, stride_dy_row, cols, M, N)
            xhat, rstd = _load_xhat(
                r_ptr, mean_ptr, rstd_ptr, stride_r_row, rows, cols, M, N, IS_RMS
            )
            if NEEDS_DW:
                dw += dy * xhat
            if NEEDS_DB:
                db += dy
            if NEEDS_DX or NEEDS_DRESIDUAL or NEEDS_DX_BIAS:
                wdy = _times_w(dy, w_ptr, cols, N, HAS_W)
                if ONE_BLOCK:
                    c1 = tl.sum(wdy * xhat, 1) / N
                else:
                    c1 = tl.load(c_ptr + rows, mask=rows < M, other=0.0)
                total = wdy - c1[:, None] * xhat
                if not IS_RMS:
                    if ONE_BLOCK:
                        c2 = tl.sum(wdy, 1) / N
                    else:
                        c2 = tl.load(c_ptr + M + rows, mask=rows < M, other=0.0)
                    total -= c2[:, None]
                total *= rstd[:, None]
        if HAS_DR:
            total += _load_tile(dr_ptr, rows, stride_dr_row, cols, M, N)
        if NEEDS_DRESIDUAL:
            value = total.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + at, value, mask=mask)
        if NEEDS_DX or NEEDS_DX_BIAS:
            if HAS_DROPOUT:
                head = tl.full((), 0, tl.int32)
                total *= dropout_factors(
                    tl.load(seed_ptr), head, first_row, first_col, threshold, BLOCK_M, BLOCK_N
                )
            if NEEDS_DX:
                tl.store(dx_ptr + at, total.to(dx_ptr.dtype.element_ty), mask=mask)
            if NEEDS_DX_BIAS:
                dx_bias += tl.where(mask, total, 0.0)
    partial_ptr += program * 3 * N + cols
    if NEEDS_DW:
        tl.store(partial_ptr, tl.sum(dw, 0), mask=cols < N)
    if NEEDS_DB:
        tl.store(partial_ptr + N, tl.sum(db, 0), mask=cols < N)
    if NEEDS_DX_BIAS:
        tl.store(partial_ptr + 2 * N, tl.sum(dx_bias, 0), mask=cols < N)


@triton.jit
def norm_sum_kernel(
    partial_ptr,
    dw_ptr,
    db_ptr,
    dx_bias_ptr,
    programs,
    N,
    NEEDS_DW: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    NEEDS_DX_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dw_j = sum_p partial_p0j, db_j = sum_p partial_p1j, dx_bias_j = sum_p partial_p2j."""
    first = tl.program_id(0) * COLUMNS
    if NEEDS_DW:
        _sum_slot(partial_ptr, dw_ptr, first, programs, N, ROWS, COLUMNS)
    if NEEDS_DB:
        _sum_slot(partial_ptr + N, db_ptr, first, programs, N, ROWS, COLUMNS)
    if NEEDS_DX_BIAS:
        _sum_slot(partial_ptr + 2 * N, dx_bias_ptr, first, programs, N, ROWS, COLUMNS)


@triton.jit
def _sum_slot(ptr, sum_ptr, first, programs, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    cols = first + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, programs, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        total += _load_tile(ptr, rows, 3 * N, cols, programs, N)
    tl.store(sum_ptr + cols, tl.sum(total, 0), mask=cols < N)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x as (M, N) with unit stride along N; copied only where its strides forbid that."""
    N = x.shape[-1]
    x = x.reshape(x.shape[:-1].numel(), N)
    return x if N <= 1 or x.stride(1) == 1 else x.contiguous()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    is_rms: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, r, mean and rstd; r is empty without a residual, mean with `is_rms`."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    r = x.new_empty(0)
    if residual is not None:
        r = torch.empty_like(residual, memory_format=torch.contiguous_format)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = rstd.new_empty(0) if is_rms else torch.empty_like(rstd)
    M, N = rstd.numel(), x.shape[-1]
    if M:
        read = x.element_size() + 2 * (seed is not None)
        read += 0 if residual is None else residual.element_size()
        config = pick_config(M, N, x.element_size(), target_of(x.device), read=read)
        x = as_rows(x)
        residual = None if residual is None else as_rows(residual)
        norm_fwd_kernel[(triton.cdiv(M, config.block_m),)](
            x,
            residual,
            _contiguous(x_bias),
            _contiguous(w),
            _contiguous(b),
            seed,
            y,
            r,
            mean,
            rstd,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            M,
            N,
            eps,
            dropout_threshold(dropout_p),
            IS_RMS=is_rms,
            HAS_RESIDUAL=residual is not None,
            HAS_X_BIAS=x_bias is not None,
            HAS_DROPOUT=seed is not None,
            HAS_W=w is not None,
            HAS_B=b is not None,
            ONE_BLOCK=config.block_n >= N,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return y, r, mean, rstd


def _backward(
    r: torch.Tensor,
    dy: torch.Tensor | None,
    dr: torch.Tensor | None,
    w: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dresidual, dx, dw, db, dx_bias; without mean, those of RMSNorm."""
    M, N = rstd.numel(), r.shape[-1]
    dresidual, dx = (
        torch.empty_like(r, dtype=dtype, memory_format=torch.contiguous_format)
        if need
        else r.new_empty(0, dtype=dtype)
        for need, dtype in zip(needs, (r.dtype, x_dtype), strict=False)
    )
    make = torch.empty if M else torch.zeros
    sums = [make(N if need else 0, dtype=torch.float32, device=r.device) for need in needs[2:]]
    if M and N and any(needs):
        read = sum(t.element_size() for t in (r, dy, dr) if t is not None)
        config = pick_config(
            M, N, r.element_size(), target_of(r.device), sums=sum(needs[2:]), read=read
        )
        shape = (config.programs, 3, N) if any(needs[2:]) else (0,)
        partial = torch.empty(shape, dtype=torch.float32, device=r.device)
        blocks = triton.cdiv(N, config.block_n)
        r, rstd, w, mean = as_rows(r), rstd.contiguous(), _contiguous(w), _contiguous(mean)
        dy, dr = (None if g is None else as_rows(g) for g in (dy, dr))
        stride_dy_row, stride_dr_row = (0 if g is None else g.stride(0) for g in (dy, dr))
        c = None
        if blocks > 1 and dy is not None and (needs[0] or needs[1] or needs[4]):
            c = torch.empty((2, M), dtype=torch.float32, device=r.device)
            norm_row_means_kernel[(M,)](
                dy,
                r,
                w,
                mean,
                rstd,
                c,
                stride_dy_row,
                r.stride(0),
                M,
                N,
                IS_RMS=mean is None,
                HAS_W=w is not None,
                BLOCK_N=config.block_n,
                num_warps=config.num_warps,
            )
        norm_bwd_kernel[(config.programs, blocks)](
            dy,
            dr,
            r,
            w,
            mean,
            rstd,
            c,
            seed,
            dx,
            dresidual,
            partial,
            stride_dy_row,
            stride_dr_row,
            r.stride(0),
            M,
            N,
            dropout_threshold(dropout_p),
            IS_RMS=mean is None,
            HAS_DY=dy is not None,
            HAS_DR=dr is not None,
            HAS_W=w is not None,
            HAS_DROPOUT=seed is not None,
            NEEDS_DRESIDUAL=needs[0],
            NEEDS_DX=needs[1],
            NEEDS_DW=needs[2],
            NEEDS_DB=needs[3],
            NEEDS_DX_BIAS=needs[4],
            ONE_BLOCK=blocks == 1,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
        if any(needs[2:]):
            norm_sum_kernel[(triton.cdiv(N, SUM_COLUMNS),)](
                partial,
                *sums,
                config.programs,
                N,
                NEEDS_DW=needs[2],
                NEEDS_DB=needs[3],
                NEEDS_DX_BIAS=needs[4],
                ROWS=SUM_ROWS,
                COLUMNS=SUM_COLUMNS,
            )
    return dresidual, dx, *sums  # type: ignore[return-value]


def layer_norm_fwd(
    x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::layer_norm_fwd`."""
    y, _, mean, rstd = _forward(x, None, w, b, None, None, eps, 0.0, is_rms=False)
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
    dx, _, dw, db, _ = _backward(
        x, dy, None, w, mean, rstd, None, 0.0, x.dtype, [needs[0], False, *needs[1:], False]
    )
    return dx, dw, db


def rms_norm_fwd(
    x: torch.Tensor, w: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::rms_norm_fwd`."""
    y, _, _, rstd = _forward(x, None, w, None, None, None, eps, 0.0, is_rms=True)
    return y, rstd


def rms_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    rstd: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::rms_norm_bwd`."""
    dx, _, dw, _, _ = _backward(
        x, dy, None, w, None, rstd, None, 0.0, x.dtype, [needs[0], False, needs[1], False, False]
    )
    return dx, dw


def add_layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::add_layer_norm_fwd`."""
    return _forward(x, residual, w, b, x_bias, seed, eps, dropout_p, is_rms=False)


add_layer_norm_bwd = _backward  # the `triton` backend of `gptfast::add_layer_norm_bwd`


def add_rms_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    w: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::add_rms_norm_fwd`."""
    y, r, _, rstd = _forward(x, residual, w, None, x_bias, seed, eps, dropout_p, is_rms=True)
    return y, r, rstd


def add_rms_norm_bwd(
    r: torch.Tensor,
    dy: torch.Tensor | None,
    dr: torch.Tensor | None,
    w: torch.Tensor | None,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::add_rms_norm_bwd`."""
    needs = [*needs[:3], False, needs[3]]
    dresidual, dx, dw, _, dx_bias = _backward(
        r, dy, dr, w, None, rstd, seed, dropout_p, x_dtype, needs
    )
    return dresidual, dx, dw, dx_bias
