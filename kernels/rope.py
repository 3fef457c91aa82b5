"""Rotary position embedding in Triton. The maths stands in `gptfast/ops/rope.py`.

One program per block of tokens and group of sequences. It reads their cos and sin once and then
turns all heads of q and k, a few at a time: q and k are read and written once, and the tables once
per group. Backward is the same kernel with -sin.

The kernel has more than 15 arguments: two tensors with three strides each, and their sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptfast.ops.layout import empty_output, unit_stride
from gptfast.targets import Target, target_of
from gptfast.tuning import tunable


@dataclass(frozen=True)
class Config:
    """A tile: tokens, heads and pairs, powers of two; and the sequences that a program handles."""

    block_t: int
    block_h: int
    block_half: int
    sequences: int
    num_warps: int


@tunable
def pick_config(
    B: int, H: int, T: int, half: int, per_batch: bool, interleaved: bool, target: Target
) -> Config:
    """Tiles for H heads of `half` pairs, at B T tokens.

    8 pairs a thread: two 128-bit loads of bf16; 4 where they are interleaved, one such load: with 8
    the compiler (Triton 3.9, sm_100, fp16) spills to get by with 48 registers. A program takes
    several sequences, so that the tables are not read for each of them, as long as 1024 programs
    are left, which fill any card; tables that differ between sequences (`per_batch`) it must read
    for each anyway.
    """
    num_warps = 4
    pairs = (4 if interleaved else 8) * num_warps * target.warp_size
    block_half = triton.next_power_of_2(half)
    block_h = min(triton.next_power_of_2(max(H, 1)), max(1, pairs // block_half))
    block_t = min(triton.next_power_of_2(max(T, 1)), max(1, pairs // (block_half * block_h)))
    sequences = 1 if per_batch else max(1, min(B, triton.cdiv(T, block_t) * B // 1024))
    return Config(block_t, block_h, block_half, sequences, num_warps)


@triton.jit
def _turn_heads(
    x_ptr,
    y_ptr,
    stride_head,
    stride_row,
    t,
    first,
    heads,
    T,
    cos,
    sin,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One tile: some heads of some tokens of one sequence."""
    h = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
    t = t[:, None, None]
    there = (t < T) & (h < heads)
    x_ptr += t * stride_row + h * stride_head
    y_ptr += (t * heads + h) * D
    dtype = y_ptr.dtype.element_ty
    pair = tl.arange(0, BLOCK_HALF)[None, None, :]
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        mask = there & (d < 2 * HALF)
        x = tl.load(x_ptr + d, mask=mask, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (BLOCK_T, BLOCK_H, BLOCK_HALF, 2)))
        y = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
        y = tl.reshape(y, (BLOCK_T, BLOCK_H, 2 * BLOCK_HALF))
        tl.store(y_ptr + d, y.to(dtype), mask=mask)
    else:
        mask = there & (pair < HALF)
        x1 = tl.load(x_ptr + pair, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + (pair + HALF), mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + pair, (x1 * cos - x2 * sin).to(dtype), mask=mask)
        tl.store(y_ptr + (pair + HALF), (x2 * cos + x1 * sin).to(dtype), mask=mask)
    for start in range(2 * HALF, D, 2 * BLOCK_HALF):
        rest = start + tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        inside = there & (rest < D)
        tl.store(y_ptr + rest, tl.load(x_ptr + rest, mask=inside, other=0.0), mask=inside)


@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_batch,
    stride_k_head,
    stride_k_row,
    stride_cos_batch,
    stride_cos_row,
    B,
    H,
    H_kv,
    T,
    sequences,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HAS_K: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """q and k of BLOCK_T tokens of `sequences` sequences; outputs lie as (B, T, H, D)."""
    blocks = tl.cdiv(T, BLOCK_T)
    t = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = (tl.program_id(0) // blocks).to(tl.int64) * sequences
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (t < T)[:, None] & (pair < HALF)
    at = first * stride_cos_batch + t[:, None] * stride_cos_row + pair
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    if INVERSE:
        sin = -sin
    for b in range(first, tl.minimum(first + sequences, B)):
        for h in range(0, H, BLOCK_H):
            _turn_heads(
                q_ptr + b * stride_q_batch,
                q_out_ptr + b * T * H * D,
                stride_q_head,
                stride_q_row,
                t,
                h,
                H,
                T,
                cos,
                sin,
                D,
                HALF,
                INTERLEAVED,
                BLOCK_T,
                BLOCK_H,
                BLOCK_HALF,
            )
        if HAS_K:
            for h in range(0, H_kv, BLOCK_H):
                _turn_heads(
                    k_ptr + b * stride_k_batch,
                    k_out_ptr + b * T * H_kv * D,
                    stride_k_head,
                    stride_k_row,
                    t,
                    h,
                    H_kv,
                    T,
                    cos,
                    sin,
                    D,
                    HALF,
                    INTERLEAVED,
                    BLOCK_T,
                    BLOCK_H,
                    BLOCK_HALF,
                )


def _launch(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, T, D = q.shape
    q, cos, sin = unit_stride(q), unit_stride(cos), unit_stride(sin)
    k = None if k is None else unit_stride(k)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    q_out = empty_output(q)
    k_out = q.new_empty(0) if k is None else empty_output(k)
    if B * T * D:
        half, per_batch = cos.shape[-1], cos.dim() == 3
        config = pick_config(B, H, T, half, per_batch, interleaved, target_of(q.device))
        grid = (triton.cdiv(T, config.block_t) * triton.cdiv(B, config.sequences),)
        rope_kernel[grid](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            *q.stride()[:3],
            *(q if k is None else k).stride()[:3],
            cos.stride(0) if per_batch else 0,
            cos.stride(-2),
            B,
            H,
            0 if k is None else k.shape[1],
            T,
            config.sequences,
            D=D,
            HALF=half,
            HAS_K=k is not None,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            BLOCK_T=config.block_t,
            BLOCK_H=config.block_h,
            BLOCK_HALF=config.block_half,
            num_warps=config.num_warps,
        )
    return q_out, k_out


def rope_fwd(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::rope_fwd`."""
    return _launch(q, k, cos, sin, interleaved, inverse=False)


def rope_bwd(
    dq: torch.Tensor,
    dk: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::rope_bwd`."""
    return _launch(dq, dk, cos, sin, interleaved, inverse=True)
