"""Dropout and the sum of the residual stream in Triton; the maths stands in `ops/dropout_add.py`.

One program per tile of BLOCK_M rows and BLOCK_N columns, which are those of the dropout mask.
Forward reads x and residual and writes residual_out once; backward is the same kernel without a
residual, and reads dresidual_out and writes dx once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptfast.kernels.layer_norm import as_rows
from gptfast.kernels.philox import dropout_factors
from gptfast.ops.philox import dropout_threshold
from gptfast.targets import Target, target_of
from gptfast.tuning import tunable


@dataclass(frozen=True)
class Config:
    """How a launch is cut up."""

    block_m: int
    block_n: int
    num_warps: int


@tunable
def pick_config(N: int, target: Target) -> Config:
    """Tiles for rows of N columns.

    1024 columns at most: 128 threads with 8 elements each, which are one 128-bit load in half
    precision and one call of the generator. Narrower rows come several at a time.
    """
    block_n = min(max(triton.next_power_of_2(N), 16), 1024)
    return Config(1024 // block_n, block_n, num_warps=4)


@triton.jit
def dropout_add_kernel(
    x_ptr,
    residual_ptr,
    out_ptr,
    seed_ptr,
    stride_x_row,
    stride_residual_row,
    M,
    N,
    threshold,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = residual + z x, or z x."""
    blocks = tl.cdiv(N, BLOCK_N)
    first_row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    first_col = tl.program_id(0) % blocks * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    cols = first_col + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (cols < N)
    out = tl.load(x_ptr + rows * stride_x_row + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        head = tl.full((), 0, tl.int32)
        out *= dropout_factors(
            tl.load(seed_ptr), head, first_row, first_col, threshold, BLOCK_M, BLOCK_N
        )
    if HAS_RESIDUAL:
        at = residual_ptr + rows * stride_residual_row + cols
        out += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * N + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if x.numel():
        x = as_rows(x)
        residual = None if residual is None else as_rows(residual)
        M, N = x.shape
        config = pick_config(N, target_of(x.device))
        grid = (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)
        dropout_add_kernel[grid](
            x,
            residual,
            out,
            seed,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            M,
            N,
            dropout_threshold(dropout_p),
            HAS_RESIDUAL=residual is not None,
            HAS_DROPOUT=seed is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return out


def dropout_add_fwd(
    x: torch.Tensor, residual: torch.Tensor, seed: torch.Tensor | None, dropout_p: float
) -> torch.Tensor:
    """The `triton` backend of `gptfast::dropout_add_fwd`."""
    return _launch(x, residual, seed, dropout_p, residual.dtype)


def dropout_add_bwd(
    dresidual_out: torch.Tensor, seed: torch.Tensor, dropout_p: float, dtype: torch.dtype
) -> torch.Tensor:
    """The `triton` backend of `gptfast::dropout_add_bwd`."""
    return _launch(dresidual_out, None, seed, dropout_p, dtype)
