"""GELU in Triton: one program per BLOCK contiguous elements.

Forward reads x and writes y once; backward reads dy and x and writes dx once. Phi is recomputed in
backward, which moves no more bytes than saving it would. The maths stands in `gptfast/ops/gelu.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # with 4 warps, 8 elements a thread: a 128-bit load each of bf16, two of fp32
NUM_WARPS = 4

# Tensors stand left of these in products: constexpr * tensor is no tensor in the interpreter.
TWO_SQRT_2_OVER_PI = tl.constexpr(2 * 0.7978845608028654)
CUBIC = tl.constexpr(0.044715)
THREE_CUBIC = tl.constexpr(3 * 0.044715)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _phi(x, TANH: tl.constexpr):
    if TANH:
        return tl.sigmoid((x + x * x * x * CUBIC) * TWO_SQRT_2_OVER_PI)
    return 0.5 * (1 + tl.erf(x * SQRT_HALF))


@triton.jit
def gelu_fwd_kernel(x_ptr, y_ptr, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """y = x Phi(x)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, (x * _phi(x, TANH)).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_bwd_kernel(dy_ptr, x_ptr, dx_ptr, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """dx = dy (Phi(x) + x Phi'(x))."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    phi = _phi(x, TANH)
    if TANH:
        # Beyond |x| = 10 the slope is 0 or 1: leaving x out there keeps x^2 from overflowing.
        c = tl.where(tl.abs(x) > 10, 0.0, x)
        # 1 - Phi as Phi(-x): a subtraction would lose digits that the large factors bring back.
        slope = phi + c * phi * _phi(-c, TANH) * (1 + c * c * THREE_CUBIC) * TWO_SQRT_2_OVER_PI
    else:
        c = tl.where(tl.abs(x) > 15, 0.0, x)
        slope = phi + c * tl.exp(-0.5 * x * x) * INV_SQRT_2PI
    tl.store(dx_ptr + offs, (dy * slope).to(dx_ptr.dtype.element_ty), mask=mask)


def gelu_fwd(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """The `triton` backend of `gptfast::gelu_fwd`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        gelu_fwd_kernel[grid](
            x, y, x.numel(), TANH=approximate == "tanh", BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return y


def gelu_bwd(dy: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    """The `triton` backend of `gptfast::gelu_bwd`."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        gelu_bwd_kernel[grid](
            dy, x, dx, x.numel(), TANH=approximate == "tanh", BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return dx
