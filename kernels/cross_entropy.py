"""Cross-entropy in Triton. The maths stands in `gptfast/ops/cross_entropy.py`.

Forward: one program per row, which sweeps the vocabulary once with a running maximum and a running
sum in each lane: x is read once. Backward: one program per block of a row, x read and dx written
once; dx may be x.

A row of 50257 half-precision logits starts at any even address, and 128-bit accesses want multiples
of 16 bytes. So the blocks of a row are counted from its first aligned logit on. They need no mask
either, which would cut the accesses just as well. What is left, fewer than 8 logits in front and
less than a block behind, is swept together, with a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptfast.kernels.tanh import tanh_and_slope
from gptfast.ops.cross_entropy import check_targets
from gptfast.targets import Target, target_of
from gptfast.tuning import tunable

MAX_BLOCK = 4096
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum before the first logit, finite


@dataclass(frozen=True)
class Config:
    """How a launch is cut up."""

    block_v: int  # logits that a program handles at a time, a power of two
    num_warps: int


@tunable
def pick_config(V: int, target: Target) -> Config:
    """Launch sizes for rows of V logits.

    16 logits a thread: two or four 128-bit loads on their way at once, in 40 to 60 registers, so
    that 1024 threads fit into the 64 K registers of a multiprocessor (sums for weighted smoothing
    make it 115, and 512 threads). 256 threads in a program: what a row leaves over behind its last
    block stays small, and the maximum of a block, a barrier each, comes from 8 warps or 4.
    """
    block_v = min(triton.next_power_of_2(max(V, 16)), MAX_BLOCK)
    return Config(block_v, num_warps=max(block_v // 16 // target.warp_size, 1))


@triton.jit
def softcapped(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """z and dz/dx."""
    z, slope = x, 1.0
    if HAS_SOFTCAP:
        t, slope = tanh_and_slope(x / softcap)
        z = t * softcap
    return z, slope


@triton.jit
def row_loss(
    lse,
    z_t,
    w_t,
    w_sum,
    wz_sum,
    V,
    label_smoothing,
    z_loss,
    HAS_W: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """The loss of rows, from lse, the target's z, and sum_c w_c and sum_c w_c z_c."""
    loss = (lse - z_t) * (1 - label_smoothing)
    if HAS_W:
        loss *= w_t
    if SMOOTH:
        loss += (w_sum * lse - wz_sum) * (label_smoothing / V)
    return loss + lse * lse * z_loss


@triton.jit
def logit_gradient(
    x,
    is_target,
    dloss,
    lse,
    w_t,
    w,
    w_sum,
    V,
    label_smoothing,
    z_loss,
    softcap,
    HAS_W: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """dx, for arguments that are broadcast against x."""
    z, slope = softcapped(x, softcap, HAS_SOFTCAP)
    hit = w_t * (1 - label_smoothing)
    a = lse * z_loss * 2 + hit
    smooth = label_smoothing / V
    if SMOOTH:
        a += w_sum * smooth
    dx = tl.exp(z - lse) * a
    if SMOOTH:
        dx -= w * smooth
    return tl.where(is_target, dx - hit, dx) * dloss * slope


@triton.jit
def _row_blocks(row, V, ALIGN: tl.constexpr, BLOCK_V: tl.constexpr):
    """Index of the row's first aligned logit, logits before it, whole blocks from there on."""
    aligned = tl.cdiv(row * V, ALIGN) * ALIGN
    lead = tl.minimum(aligned - row * V, V).to(tl.int32)
    return aligned, lead, (V - lead) // BLOCK_V


@triton.jit
def _left_over(start, lead, whole, V, BLOCK_V: tl.constexpr):
    """Columns of a block of what is left over, and which of them exist."""
    k = start + tl.arange(0, BLOCK_V)
    return tl.where(k < lead, k, k + whole * BLOCK_V), k < V - whole * BLOCK_V


@triton.jit
def _take_in(
    x,
    mask,
    w_ptr,
    cols,
    top,
    total,
    w_sum,
    wz_sum,
    softcap,
    HAS_W: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Running maximum and sums with another block of logits."""
    z, _ = softcapped(x.to(tl.float32), softcap, HAS_SOFTCAP)
    if MASKED:
        z = tl.where(mask, z, -float("inf"))
    new_top = tl.maximum(top, tl.max(z, 0))
    total = total * tl.exp(top - new_top) + tl.exp(z - new_top)
    if SMOOTH:
        wz = z
        if HAS_W:
            w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            w_sum += w
            wz *= w
        wz_sum += tl.where(mask, wz, 0.0)
    return new_top, total, w_sum, wz_sum


@triton.jit
def cross_entropy_fwd_kernel(
    x_ptr,
    target_ptr,
    w_ptr,
    loss_ptr,
    lse_ptr,
    V,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    HAS_W: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """loss and lse of one row."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(target_ptr + row)
    if t == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        return
    offs = tl.arange(0, BLOCK_V)
    top = LOWEST
    total = tl.zeros((BLOCK_V,), tl.float32)
    w_sum = tl.zeros((BLOCK_V,), tl.float32)
    wz_sum = tl.zeros((BLOCK_V,), tl.float32)
    aligned, lead, whole = _row_blocks(row, V, ALIGN, BLOCK_V)
    everywhere = offs >= 0
    for block in range(whole):
        cols = lead + block * BLOCK_V + offs
        x = tl.load(x_ptr + aligned + block * BLOCK_V + offs)
        top, total, w_sum, wz_sum = _take_in(
            x, everywhere, w_ptr, cols, top, total, w_sum, wz_sum, softcap,
            HAS_W, SMOOTH, HAS_SOFTCAP, False,
        )  # fmt: skip
    x_ptr += row * V
    for start in range(0, V - whole * BLOCK_V, BLOCK_V):
        cols, mask = _left_over(start, lead, whole, V, BLOCK_V)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0)
        top, total, w_sum, wz_sum = _take_in(
            x, mask, w_ptr, cols, top, total, w_sum, wz_sum, softcap,
            HAS_W, SMOOTH, HAS_SOFTCAP, True,
        )  # fmt: skip
    # A target outside [0, V) makes lse NaN, and so the loss and the gradient: a look from the host
    # would wait for the card.
    known = (t >= 0) & (t < V)
    lse = tl.where(known, top + tl.log(tl.sum(total, 0)), float("nan"))
    x_t = tl.load(x_ptr + t, mask=known, other=0.0).to(tl.float32)
    z_t, _ = softcapped(x_t, softcap, HAS_SOFTCAP)
    w_t = tl.load(w_ptr + t, mask=known, other=0.0).to(tl.float32) if HAS_W else 1.0
    weights = tl.sum(w_sum, 0) if HAS_W else V
    loss = row_loss(
        lse, z_t, w_t, weights, tl.sum(wz_sum, 0), V, label_smoothing, z_loss, HAS_W, SMOOTH
    )
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)


@triton.jit
def cross_entropy_bwd_kernel(
    dloss_ptr,
    x_ptr,
    target_ptr,
    w_ptr,
    w_sum_ptr,
    lse_ptr,
    dx_ptr,
    stride_dloss,
    V,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    HAS_W: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dx of one block of a row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    aligned, lead, whole = _row_blocks(row, V, ALIGN, BLOCK_V)
    offs = tl.arange(0, BLOCK_V)
    if block < whole:
        cols = lead + block * BLOCK_V + offs
        at = aligned + block * BLOCK_V + offs
        dx = _block_gradient(
            dloss_ptr + row * stride_dloss, tl.load(x_ptr + at), target_ptr, w_ptr, w_sum_ptr,
            lse_ptr, row, cols, offs >= 0, V, ignore_index, label_smoothing, z_loss, softcap,
            HAS_W, SMOOTH, HAS_SOFTCAP,
        )  # fmt: skip
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty))
    else:
        cols, mask = _left_over((block - whole) * BLOCK_V, lead, whole, V, BLOCK_V)
        at = row * V + cols
        dx = _block_gradient(
            dloss_ptr + row * stride_dloss, tl.load(x_ptr + at, mask=mask, other=0.0), target_ptr,
            w_ptr, w_sum_ptr, lse_ptr, row, cols, mask, V, ignore_index, label_smoothing, z_loss,
            softcap, HAS_W, SMOOTH, HAS_SOFTCAP,
        )  # fmt: skip
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _block_gradient(
    dloss_ptr,
    x,
    target_ptr,
    w_ptr,
    w_sum_ptr,
    lse_ptr,
    row,
    cols,
    mask,
    V,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    HAS_W: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    t = tl.load(target_ptr + row)
    known = (t >= 0) & (t < V)
    w_t, w, w_sum = 1.0, 1.0, 1.0 * V
    if HAS_W:
        w_t = tl.load(w_ptr + t, mask=known, other=0.0).to(tl.float32)
        if SMOOTH:
            w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            w_sum = tl.load(w_sum_ptr)
    is_target = cols == tl.where(known, t, -1).to(tl.int32)
    dx = logit_gradient(
        x.to(tl.float32), is_target, tl.load(dloss_ptr), tl.load(lse_ptr + row), w_t, w,
        w_sum, V, label_smoothing, z_loss, softcap, HAS_W, SMOOTH, HAS_SOFTCAP,
    )  # fmt: skip
    return tl.where(t == ignore_index, 0.0, dx)


def loss_flags(
    weight: torch.Tensor | None, label_smoothing: float, softcap: float | None
) -> dict[str, bool]:
    """The constexpr flags that every kernel of a loss takes."""
    return {
        "HAS_W": weight is not None,
        "SMOOTH": label_smoothing != 0,
        "HAS_SOFTCAP": softcap is not None,
    }


def weight_sum(weight: torch.Tensor | None, label_smoothing: float) -> torch.Tensor | None:
    """sum_c w_c, where smoothing needs it."""
    return weight.sum(dtype=torch.float32) if weight is not None and label_smoothing else None


def cross_entropy_fwd(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::cross_entropy_fwd`."""
    x, target = x.contiguous(), target.contiguous()
    M, V = x.shape
    if x.device.type == "cpu":
        check_targets("cross_entropy", target, V, ignore_index)
    loss = torch.empty(M, dtype=torch.float32, device=x.device)
    lse = torch.empty_like(loss)
    if M:
        config = pick_config(V, target_of(x.device))
        cross_entropy_fwd_kernel[(M,)](
            x,
            target,
            None if weight is None else weight.contiguous(),
            loss,
            lse,
            V,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap or 0.0,
            **loss_flags(weight, label_smoothing, softcap),
            ALIGN=16 // x.element_size(),
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )
    return loss, lse


def cross_entropy_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    inplace: bool = False,
) -> torch.Tensor:
    """The `triton` backend of `gptfast::cross_entropy_bwd` and `cross_entropy_bwd_`."""
    x = x.contiguous()
    M, V = x.shape
    dx = x if inplace else torch.empty_like(x)
    if x.numel():
        config = pick_config(V, target_of(x.device))
        cross_entropy_bwd_kernel[(M, triton.cdiv(V, config.block_v))](
            dloss,
            x,
            target.contiguous(),
            None if weight is None else weight.contiguous(),
            weight_sum(weight, label_smoothing),
            lse.contiguous(),
            dx,
            dloss.stride(0),  # 0 where it is the gradient of a mean
            V,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap or 0.0,
            **loss_flags(weight, label_smoothing, softcap),
            ALIGN=16 // x.element_size(),
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )
    return dx
