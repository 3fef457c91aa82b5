"""Gated linear units in Triton. The maths stands in `gptfast/ops/glu.py`.

One program per tile. Forward reads gate and up and writes y once; backward reads dy, gate and up
and writes dgate and dup once, recomputing the activation, which moves no more bytes than saving it
would. Rows of gate and up may lie apart (halves of one projection), and so may those of their
gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptfast.kernels.gelu import Config, gelu_phi, gelu_slope, pick_config
from gptfast.ops.glu import as_matrix, empty_gradients, halves, matrix_shape
from gptfast.targets import target_of


@triton.jit
def _cdf(g, ACTIVATION: tl.constexpr):
    """act(g) / g."""
    if ACTIVATION == "silu":
        return tl.sigmoid(g)
    return gelu_phi(g, ACTIVATION == "gelu_tanh")


@triton.jit
def _slope(g, cdf, ACTIVATION: tl.constexpr):
    """act'(g), where cdf = act(g) / g."""
    if ACTIVATION == "silu":
        # Beyond |g| = 200 the slope is 0 or 1: leaving g out there keeps infinity from the product.
        c = tl.where(tl.abs(g) > 200, 0.0, g)
        return cdf * (1 + c * tl.sigmoid(-g))
    return gelu_slope(g, cdf, ACTIVATION == "gelu_tanh")


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows (a column, int64), columns (a row) and mask of this program's tile."""
    col_blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // col_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return rows, cols, (rows < M) & (cols < N)


@triton.jit
def glu_fwd_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    stride_gate_row,
    stride_up_row,
    M,
    N,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = act(gate) up of one tile."""
    rows, cols, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    g = tl.load(gate_ptr + rows * stride_gate_row + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + rows * stride_up_row + cols, mask=mask, other=0.0).to(tl.float32)
    y = g * _cdf(g, ACTIVATION) * u
    tl.store(y_ptr + rows * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu_bwd_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    stride_gate_row,
    stride_up_row,
    stride_grad_row,
    M,
    N,
    ACTIVATION: tl.constexpr,
    NEEDS_GATE: tl.constexpr,
    NEEDS_UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dgate and dup of one tile."""
    rows, cols, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    dy = tl.load(dy_ptr + rows * N + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + rows * stride_gate_row + cols, mask=mask, other=0.0).to(tl.float32)
    cdf = _cdf(g, ACTIVATION)
    at = rows * stride_grad_row + cols
    if NEEDS_GATE:
        u = tl.load(up_ptr + rows * stride_up_row + cols, mask=mask, other=0.0).to(tl.float32)
        dgate = dy * u * _slope(g, cdf, ACTIVATION)
        tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    if NEEDS_UP:
        tl.store(dup_ptr + at, (dy * (g * cdf)).to(dup_ptr.dtype.element_ty), mask=mask)


def _grid(M: int, N: int, config: Config) -> tuple[int]:
    return (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)


def glu_fwd(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    """The `triton` backend of `gptfast::glu_fwd`."""
    gate, up = halves(gate, up)
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel():
        gate, up = as_matrix(gate), as_matrix(up)
        M, N = matrix_shape(gate, up)
        config = pick_config(N, target_of(gate.device))
        glu_fwd_kernel[_grid(M, N, config)](
            gate,
            up,
            y,
            gate.stride(0),
            up.stride(0),
            M,
            N,
            ACTIVATION=activation,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return y


def glu_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::glu_bwd`."""
    dgate, dup, *grads = empty_gradients(gate, up, needs)
    gate, up = halves(gate, up)
    if dy.numel() and any(needs):
        dy, gate, up = dy.contiguous(), as_matrix(gate), as_matrix(up)
        dgate, dup = (x if x is None else as_matrix(x) for x in (dgate, dup))
        written = [x for x in (dgate, dup) if x is not None]
        M, N = matrix_shape(gate, up, *written)
        config = pick_config(N, target_of(gate.device))
        glu_bwd_kernel[_grid(M, N, config)](
            dy,
            gate,
            up,
            dgate,
            dup,
            gate.stride(0),
            up.stride(0),
            written[0].stride(0),
            M,
            N,
            ACTIVATION=activation,
            NEEDS_GATE=dgate is not None,
            NEEDS_UP=dup is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return grads[0], grads[1]
