"""Writes new keys and values into a cache in Triton: gptfast/ops/kv_cache_append.py says where.

One program copies one token's rows of a block of key heads: it reads and writes each element once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptfast.kernels.attention import _block_d
from gptfast.kernels.attention_decode import cache_rows
from gptfast.ops.attention_decode import capacity
from gptfast.ops.layout import unit_stride

# Elements of k and of v a program: with 4 warps two 128-bit loads of bf16 a thread.
BLOCK = 2048


@triton.jit
def _copy(
    x_ptr,
    cache_ptr,
    h,
    stride_x_head,
    stride_cache_head,
    stride_cache_col,
    mask,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of heads h of one token, from x to the cache."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask[:, None] & (offs_d[None, :] < D)
    x = tl.load(x_ptr + (h * stride_x_head)[:, None] + offs_d[None, :], mask=mask)
    cols = offs_d.to(tl.int64) * stride_cache_col
    tl.store(cache_ptr + (h * stride_cache_head)[:, None] + cols[None, :], x, mask=mask)


@triton.jit
def kv_cache_append_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    lengths_ptr,
    table_ptr,
    stride_k_batch,
    stride_k_head,
    stride_k_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_kc_page,
    stride_kc_row,
    stride_kc_head,
    stride_kc_col,
    stride_vc_page,
    stride_vc_row,
    stride_vc_head,
    stride_vc_col,
    H_KV,
    T,
    S,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One token's keys and values of a block of key heads."""
    b, t = tl.program_id(0).to(tl.int64) // T, tl.program_id(0).to(tl.int64) % T
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    n = tl.load(lengths_ptr + b) - T + t.to(tl.int32)
    fits = (n >= 0) & (n < S)
    if PAGE:
        table_ptr += b * (S // PAGE)
    # For a token that is left out, the first entry of the table: no address outside it is formed.
    page, slot = cache_rows(table_ptr, b, tl.where(fits, n, 0), fits, PAGE)
    slot = slot.to(tl.int64)
    mask = h < tl.where(fits, H_KV, 0)
    _copy(
        k_ptr + b * stride_k_batch + t * stride_k_row,
        k_cache_ptr + page * stride_kc_page + slot * stride_kc_row,
        h,
        stride_k_head,
        stride_kc_head,
        stride_kc_col,
        mask,
        D,
        BLOCK_D,
    )
    _copy(
        v_ptr + b * stride_v_batch + t * stride_v_row,
        v_cache_ptr + page * stride_vc_page + slot * stride_vc_row,
        h,
        stride_v_head,
        stride_vc_head,
        stride_vc_col,
        mask,
        DV,
        BLOCK_DV,
    )


def kv_cache_append_fwd(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
) -> None:
    """The `triton` backend of `gptfast::kv_cache_append_fwd`."""
    k, v = unit_stride(k), unit_stride(v)
    B, H_kv, T, D = k.shape
    Dv = v.shape[-1]
    widest = _block_d(max(D, Dv))
    block_h = min(triton.next_power_of_2(H_kv), max(1, BLOCK // widest))
    kv_cache_append_kernel[(B * T, triton.cdiv(H_kv, block_h))](
        k,
        v,
        k_cache,
        v_cache,
        cache_seqlens.contiguous(),
        None if block_table is None else block_table.contiguous(),
        *k.stride()[:3],
        *v.stride()[:3],
        *k_cache.stride(),
        *v_cache.stride(),
        H_kv,
        T,
        capacity(k_cache, block_table),
        PAGE=0 if block_table is None else k_cache.shape[1],
        D=D,
        DV=Dv,
        BLOCK_H=block_h,
        BLOCK_D=_block_d(D),
        BLOCK_DV=_block_d(Dv),
        num_warps=4,
    )
