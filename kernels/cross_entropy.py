"""Cross-entropy in Triton. The maths stands in `gptfast/ops/cross_entropy.py`.

Forward: one program per row, which sweeps the vocabulary once with a running maximum and sum in
each lane: x is read once. Backward: one program per block of a row, x read and dx written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptfast.ops.cross_entropy import check_targets

MAX_BLOCK = 4096  # logits a program handles at a time: 16 fp32 values a thread at 8 warps
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum before the first logit, finite


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
    HAS_W: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """loss and lse of one row."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(target_ptr + row)
    if t == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        return
    x_ptr += row * V
    offs = tl.arange(0, BLOCK_V)
    top = tl.full((BLOCK_V,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    weights = tl.zeros((BLOCK_V,), tl.float32)  # sum_c w_c and sum_c w_c x_c, for smoothing
    weighted = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + offs
        mask = cols < V
        x = tl.load(x_ptr + cols, mask=mask, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, x)
        total = total * tl.exp(top - new_top) + tl.exp(x - new_top)
        top = new_top
        if SMOOTH:
            w = tl.where(mask, 1.0, 0.0)
            if HAS_W:
                w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            weights += w
            weighted += tl.where(mask, w * x, 0.0)
    row_top = tl.max(top, 0)
    lse = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), 0))
    # A target outside [0, V) makes the loss NaN: a look from the host would wait for the card.
    known = (t >= 0) & (t < V)
    loss = lse - tl.load(x_ptr + t, mask=known, other=float("nan")).to(tl.float32)
    if HAS_W:
        loss *= tl.load(w_ptr + t, mask=known, other=0.0).to(tl.float32)
    loss *= 1 - label_smoothing
    if SMOOTH:
        loss += (tl.sum(weights, 0) * lse - tl.sum(weighted, 0)) * (label_smoothing / V)
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
    V,
    ignore_index,
    label_smoothing,
    HAS_W: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dx of one block of a row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < V
    t = tl.load(target_ptr + row)
    dx_ptr += row * V
    if t == ignore_index:
        tl.store(dx_ptr + cols, tl.zeros((BLOCK_V,), dx_ptr.dtype.element_ty), mask=mask)
        return
    g = tl.load(dloss_ptr + row)
    smooth = label_smoothing / V
    x = tl.load(x_ptr + row * V + cols, mask=mask, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(lse_ptr + row))
    if HAS_W:
        known = (t >= 0) & (t < V)
        hit = tl.load(w_ptr + t, mask=known, other=0.0).to(tl.float32) * (1 - label_smoothing)
        w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        dx = p * (hit + tl.load(w_sum_ptr) * smooth) - w * smooth
    else:
        hit = 1 - label_smoothing
        dx = p - smooth  # hit + smooth V = 1
    dx = tl.where(cols == t, dx - hit, dx) * g
    tl.store(dx_ptr + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _block(V: int) -> int:
    return min(triton.next_power_of_2(max(V, 1)), MAX_BLOCK)


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 8)


def cross_entropy_fwd(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::cross_entropy_fwd`."""
    x, target = x.contiguous(), target.contiguous()
    M, V = x.shape
    if x.device.type == "cpu":
        check_targets(target, V, ignore_index)
    loss = torch.empty(M, dtype=torch.float32, device=x.device)
    lse = torch.empty_like(loss)
    if M:
        cross_entropy_fwd_kernel[(M,)](
            x,
            target,
            None if weight is None else weight.contiguous(),
            loss,
            lse,
            V,
            ignore_index,
            label_smoothing,
            HAS_W=weight is not None,
            SMOOTH=label_smoothing != 0,
            BLOCK_V=_block(V),
            num_warps=_warps(_block(V)),
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
) -> torch.Tensor:
    """The `triton` backend of `gptfast::cross_entropy_bwd`."""
    x = x.contiguous()
    M, V = x.shape
    dx = torch.empty_like(x)
    if x.numel():
        cross_entropy_bwd_kernel[(M, triton.cdiv(V, _block(V)))](
            dloss.contiguous(),
            x,
            target.contiguous(),
            None if weight is None else weight.contiguous(),
            None if weight is None else weight.sum(dtype=torch.float32),
            lse.contiguous(),
            dx,
            V,
            ignore_index,
            label_smoothing,
            HAS_W=weight is not None,
            BLOCK_V=_block(V),
            num_warps=_warps(_block(V)),
        )
    return dx
