"""Products of a few rows with a large weight in Triton. The maths, and the layout of quantised
weights, stand in `gptfast/ops/linear_decode.py`.

A program takes one panel of 16 output channels and up to 16 rows of x, and walks along K: the bytes
of its panel lie one behind the other, and are read once for all its rows. Every row of x is read by
every panel, from the caches. Products and sums are fp32, in as many sums as a tile has weights,
which are added up at the end; the order follows from the shapes: deterministic.

Decoding is bound by reading the weight: of one row, 4 bytes of fp32 need as much arithmetic as one
byte of int8. Of 16 rows int4 is bound by arithmetic, since the products are not the matrix units'.

More than 15 arguments: three tensors of a quantised weight, and two activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptfast.kernels.gelu import gelu_phi
from gptfast.ops.layout import as_rows
from gptfast.ops.linear_decode import PANEL
from gptfast.targets import Target, target_of
from gptfast.tuning import tunable

MAX_ROWS = 16


@dataclass(frozen=True)
class Config:
    """Rows and weights along K of a tile, powers of two."""

    block_m: int
    block_k: int
    num_warps: int


@tunable
def pick_config(M: int, K: int, target: Target) -> Config:
    """Tiles for M rows of K elements.

    The sums of a tile, 16 block_m block_k, stay in registers: 64 a thread. A tile has at least the
    64 weights that the layout of int8 fills K up to, and at most as many as K has.
    """
    block_m = min(triton.next_power_of_2(M), MAX_ROWS)
    num_warps = 4 if block_m <= 8 else 8
    sums = 64 * num_warps * target.warp_size // (PANEL * block_m)
    return Config(block_m, max(64, min(sums, triton.next_power_of_2(max(K, 1)))), num_warps)


@triton.jit
def load_int8(data_ptr, panel, steps, first, BLOCK_K: tl.constexpr):
    """Weights first ... first + BLOCK_K of a panel: (BLOCK_K, 16) in fp32, without their scale."""
    step = first // 4 + tl.arange(0, BLOCK_K // 4)
    at = (panel * steps + step)[:, None] * 64 + tl.arange(0, 64)[None, :]
    q = tl.load(data_ptr + at, mask=(step < steps)[:, None], other=0)
    q = tl.permute(tl.reshape(q, (BLOCK_K // 4, 16, 4)), (0, 2, 1))
    return tl.reshape(q, (BLOCK_K, 16)).to(tl.float32)


@triton.jit
def load_int4(
    data_ptr,
    scale_ptr,
    zero_ptr,
    panel,
    steps,
    first,
    HAS_ZERO: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same of int4, with their scale."""
    step = first // 8 + tl.arange(0, BLOCK_K // 8)
    at = (panel * steps + step)[:, None] * 64 + tl.arange(0, 64)[None, :]
    bytes = tl.load(data_ptr + at, mask=(step < steps)[:, None], other=0)
    halves = tl.reshape(tl.join(bytes & 15, bytes >> 4), (BLOCK_K // 8, 16, 4, 2))
    q = tl.reshape(tl.permute(halves, (0, 3, 2, 1)), (BLOCK_K // 32, 32, 16)).to(tl.float32)
    groups = steps // 4
    group = first // 32 + tl.arange(0, BLOCK_K // 32)
    at = (panel * groups + group)[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = (group < groups)[:, None]
    scale = tl.load(scale_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_ZERO:
        q -= tl.load(zero_ptr + at, mask=mask, other=0).to(tl.float32)[:, None, :]
    else:
        q -= 8.0
    return tl.reshape(q * scale[:, None, :], (BLOCK_K, 16))


@triton.jit
def load_float(data_ptr, panel, N, K, first, BLOCK_K: tl.constexpr):
    """The same of a weight (N, K) in floats."""
    n = panel * 16 + tl.arange(0, 16).to(tl.int64)
    k = first + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(data_ptr + n[:, None] * K + k[None, :], mask=mask, other=0.0)
    return tl.trans(w.to(tl.float32))


@triton.jit
def linear_decode_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    stride_x_row,
    M,
    N,
    K,
    steps,
    FORMAT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y of 16 channels for BLOCK_M rows; `steps`: of the panel's data, along K."""
    panel = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums = tl.zeros((BLOCK_M, BLOCK_K, 16), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = (rows < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_x_row + k[None, :], mask=mask, other=0.0)
        if FORMAT == "int8":
            w = load_int8(data_ptr, panel, steps, first, BLOCK_K)
        elif FORMAT == "int4":
            w = load_int4(data_ptr, scale_ptr, zero_ptr, panel, steps, first, HAS_ZERO, BLOCK_K)
        else:
            w = load_float(data_ptr, panel, N, K, first, BLOCK_K)
        sums += x.to(tl.float32)[:, :, None] * w[None, :, :]
    z = tl.sum(sums, 1)
    n = panel * 16 + tl.arange(0, 16)
    if FORMAT == "int8":
        z *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        z += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        z *= gelu_phi(z, True)
    mask = (rows < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + n[None, :], z.to(y_ptr.dtype.element_ty), mask=mask)


def linear_decode_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str | None,
) -> torch.Tensor:
    """The `triton` backend of `gptfast::linear_decode_fwd`."""
    rows = as_rows(x)
    M, K = rows.shape
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    config = pick_config(M, K, target_of(x.device))
    format = {torch.int8: "int8", torch.uint8: "int4"}.get(weight.dtype, "float")
    linear_decode_kernel[(triton.cdiv(out_features, PANEL), triton.cdiv(M, config.block_m))](
        rows,
        weight.contiguous(),
        None if scale is None else scale.contiguous(),
        None if zero is None else zero.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        rows.stride(0),
        M,
        out_features,
        K,
        0 if scale is None else weight.shape[1],
        FORMAT=format,
        HAS_ZERO=zero is not None,
        HAS_BIAS=bias is not None,
        GELU=activation is not None,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
    )
    return y
