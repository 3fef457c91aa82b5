"""Flash attention in Triton. The maths stands in `gptfast/ops/attention.py`.

Forward: one program per (block of queries, batch and head); it walks over the blocks of keys up to
the diagonal. Backward: `delta`, then one kernel whose programs own a block of keys and walk over
the queries (dk, dv, also over the query heads that share a key head), and one whose programs own a
block of queries and walk over the keys (dq). No program writes what another one writes:
deterministic, with no atomics. Masks are computed only in blocks that the diagonal or the end of
the sequence cuts.

Products take their operands in the input dtype and accumulate in fp32, on the matrix units; all
other arithmetic is fp32. Softmax works in base 2: exp2(s log2(e)) is one instruction.

The kernels have more than 15 arguments: four tensors with three strides each need that many, and a
line each makes this file longer than 500.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptfast.kernels.philox import dropout_factors
from gptfast.ops.attention import empty_output, unit_stride
from gptfast.ops.philox import dropout_threshold

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one kernel."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


def pick_config(D: int, itemsize: int, backward: bool) -> Config:
    """Tiles for a head dim and element size in bytes.

    Registers decide: the fp32 accumulator of a tile of 128 x 64 takes 64 registers a thread with 4
    warps. Backward holds two accumulators, and fp32 operands take twice the shared memory, so both
    get smaller tiles.
    """
    block_d = max(16, triton.next_power_of_2(D))
    if backward:
        block = 64 if block_d * itemsize <= 256 else 32
        return Config(block, block, num_warps=4 if block_d <= 128 else 8, num_stages=2)
    if block_d * itemsize <= 128:
        return Config(128, 64, num_warps=4, num_stages=3)
    if block_d * itemsize <= 512:
        return Config(64, 64, num_warps=4 if block_d <= 128 else 8, num_stages=2)
    return Config(32, 32, num_warps=8, num_stages=2)


@triton.jit
def _load_rows(ptr, rows, stride_row, offs_d, N, D, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr):
    """Rows x BLOCK_D of a tensor, zero past N rows and D columns."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride_row + offs_d[None, :]
    if EVEN_N and EVEN_D:
        return tl.load(ptrs)
    if EVEN_D:
        return tl.load(ptrs, mask=rows[:, None] < N, other=0.0)
    return tl.load(ptrs, mask=(rows[:, None] < N) & (offs_d[None, :] < D), other=0.0)


@triton.jit
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    seed_ptr,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_batch,
    stride_k_head,
    stride_k_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_o_batch,
    stride_o_head,
    stride_o_row,
    H,
    GROUP,
    T,
    S,
    D,
    scale,
    dropout_threshold,
    IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and lse of one block of queries of one head."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest causal rows first
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    q_ptr += b * stride_q_batch + h * stride_q_head
    k_ptr += b * stride_k_batch + (h // GROUP) * stride_k_head
    v_ptr += b * stride_v_batch + (h // GROUP) * stride_v_head
    o_ptr += b * stride_o_batch + h * stride_o_head
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q = _load_rows(q_ptr, offs_m, stride_q_row, offs_d, T, D, False, EVEN_D)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    scale2 = scale * LOG2E
    end = S
    whole = S // BLOCK_N * BLOCK_N  # keys before this need no mask
    if IS_CAUSAL:
        end = tl.minimum(S, tl.maximum(0, tl.minimum(first + BLOCK_M, T) + S - T))
        whole = tl.minimum(whole, tl.maximum(0, first + 1 + S - T) // BLOCK_N * BLOCK_N)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    for masked in tl.static_range(2):
        lo = whole if masked else 0
        hi = end if masked else whole
        for start in range(lo, hi, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            k = _load_rows(k_ptr, offs_n, stride_k_row, offs_d, S, D, masked == 0, EVEN_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            if masked:
                visible = offs_n[None, :] < S
                if IS_CAUSAL:
                    visible &= offs_n[None, :] <= offs_m[:, None] + S - T
                s = tl.where(visible, s, -float("inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            # A row that has seen no key yet: exp2(-inf - 0) = 0 instead of NaN.
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            p = tl.exp2(s - base[:, None])
            factor = tl.exp2(top - base)
            total = total * factor + tl.sum(p, 1)
            acc = acc * factor[:, None]
            if HAS_DROPOUT:
                p *= dropout_factors(seed, bh, first, start, dropout_threshold, BLOCK_M, BLOCK_N)
            v = _load_rows(v_ptr, offs_n, stride_v_row, offs_d, S, D, masked == 0, EVEN_D)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            top = new_top
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, -float("inf"), (top + tl.log2(total)) * LN2)
    rows = offs_m < T
    tl.store(lse_ptr + bh.to(tl.int64) * T + offs_m, lse, mask=rows)
    o_ptrs = o_ptr + offs_m.to(tl.int64)[:, None] * stride_o_row + offs_d[None, :]
    mask = rows[:, None] & (offs_d[None, :] < D)
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_delta_kernel(
    o_ptr,
    do_ptr,
    delta_ptr,
    stride_o_batch,
    stride_o_head,
    stride_o_row,
    stride_do_batch,
    stride_do_head,
    stride_do_row,
    H,
    T,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta_i = o_i . do_i for one block of queries of one head."""
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    o_ptr += b * stride_o_batch + h * stride_o_head
    do_ptr += b * stride_do_batch + h * stride_do_head
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    o = _load_rows(o_ptr, offs_m, stride_o_row, offs_d, T, D, False, False).to(tl.float32)
    do = _load_rows(do_ptr, offs_m, stride_do_row, offs_d, T, D, False, False).to(tl.float32)
    tl.store(delta_ptr + bh.to(tl.int64) * T + offs_m, tl.sum(o * do, 1), mask=offs_m < T)


@triton.jit
def _probabilities(
    q, k, lse2, offs_m, offs_n, T, S, scale2, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """p of a tile, (queries, keys), from the stored log-sum-exp (in base 2)."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - lse2[:, None])
    if MASKED:
        p = tl.where(offs_n[None, :] <= offs_m[:, None] + S - T, p, 0.0)
    return p


@triton.jit
def _load_lse2(lse_ptr, offs_m, T):
    """Log-sum-exp in base 2; infinite, so that p = 0, past T and where a query saw no key."""
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < T, other=float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)


@triton.jit
def attention_bwd_dkdv_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    dk_ptr,
    dv_ptr,
    stride_do_batch,
    stride_do_head,
    stride_do_row,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_batch,
    stride_k_head,
    stride_k_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_dk_batch,
    stride_dk_head,
    stride_dk_row,
    H,
    GROUP,
    T,
    S,
    D,
    scale,
    dropout_threshold,
    IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one block of keys of one key head."""
    first = tl.program_id(0) * BLOCK_N
    kv_heads = H // GROUP
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    h_kv = (tl.program_id(1) % kv_heads).to(tl.int64)
    k_ptr += b * stride_k_batch + h_kv * stride_k_head
    v_ptr += b * stride_v_batch + h_kv * stride_v_head
    dk_ptr += b * stride_dk_batch + h_kv * stride_dk_head
    dv_ptr += b * stride_dk_batch + h_kv * stride_dk_head
    offs_n = first + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k = _load_rows(k_ptr, offs_n, stride_k_row, offs_d, S, D, False, EVEN_D)
    v = _load_rows(v_ptr, offs_n, stride_v_row, offs_d, S, D, False, EVEN_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    begin = 0
    whole = 0  # queries from here on see every key of the block
    if IS_CAUSAL:
        begin = tl.minimum(T, tl.maximum(0, first - (S - T)) // BLOCK_M * BLOCK_M)
        whole = tl.cdiv(tl.maximum(0, first + BLOCK_N - 1 - (S - T)), BLOCK_M) * BLOCK_M
        whole = tl.minimum(whole, tl.cdiv(T, BLOCK_M) * BLOCK_M)
    for member in range(GROUP):
        h = h_kv * GROUP + member
        q_head = q_ptr + b * stride_q_batch + h * stride_q_head
        do_head = do_ptr + b * stride_do_batch + h * stride_do_head
        bh = b * H + h
        for masked in tl.static_range(2):
            lo = begin if masked else whole
            hi = whole if masked else T
            for start in range(lo, hi, BLOCK_M):
                offs_m = start + tl.arange(0, BLOCK_M)
                q = _load_rows(q_head, offs_m, stride_q_row, offs_d, T, D, False, EVEN_D)
                do = _load_rows(do_head, offs_m, stride_do_row, offs_d, T, D, False, EVEN_D)
                lse2 = _load_lse2(lse_ptr + bh * T, offs_m, T)
                delta = tl.load(delta_ptr + bh * T + offs_m, mask=offs_m < T, other=0.0)
                p = _probabilities(
                    q, k, lse2, offs_m, offs_n, T, S, scale * LOG2E, masked == 1, PRECISION
                )
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                pz = p
                if HAS_DROPOUT:
                    z = dropout_factors(seed, bh, start, first, dropout_threshold, BLOCK_M, BLOCK_N)
                    pz = p * z
                    dp = dp * z
                ds = p * (dp - delta[:, None])
                dv = tl.dot(tl.trans(pz.to(do.dtype)), do, dv, input_precision=PRECISION)
                dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    at = offs_n.to(tl.int64)[:, None] * stride_dk_row + offs_d[None, :]
    mask = (offs_n[:, None] < S) & (offs_d[None, :] < D)
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_bwd_dq_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    dq_ptr,
    stride_do_batch,
    stride_do_head,
    stride_do_row,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_batch,
    stride_k_head,
    stride_k_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_dq_batch,
    stride_dq_head,
    stride_dq_row,
    H,
    GROUP,
    T,
    S,
    D,
    scale,
    dropout_threshold,
    IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of one block of queries of one head."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr += b * stride_q_batch + h * stride_q_head
    do_ptr += b * stride_do_batch + h * stride_do_head
    k_ptr += b * stride_k_batch + (h // GROUP) * stride_k_head
    v_ptr += b * stride_v_batch + (h // GROUP) * stride_v_head
    dq_ptr += b * stride_dq_batch + h * stride_dq_head
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q = _load_rows(q_ptr, offs_m, stride_q_row, offs_d, T, D, False, EVEN_D)
    do = _load_rows(do_ptr, offs_m, stride_do_row, offs_d, T, D, False, EVEN_D)
    lse2 = _load_lse2(lse_ptr + bh * T, offs_m, T)
    delta = tl.load(delta_ptr + bh * T + offs_m, mask=offs_m < T, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    end = S
    whole = S
    if IS_CAUSAL:
        end = tl.minimum(S, tl.maximum(0, tl.minimum(first + BLOCK_M, T) + S - T))
        whole = tl.minimum(S, tl.maximum(0, first + 1 + S - T) // BLOCK_N * BLOCK_N)
    for masked in tl.static_range(2):
        lo = whole if masked else 0
        hi = end if masked else whole
        for start in range(lo, hi, BLOCK_N):
            # Keys past S are zero: their scores move nothing, since ds meets a row of zeros.
            offs_n = start + tl.arange(0, BLOCK_N)
            k = _load_rows(k_ptr, offs_n, stride_k_row, offs_d, S, D, False, EVEN_D)
            v = _load_rows(v_ptr, offs_n, stride_v_row, offs_d, S, D, False, EVEN_D)
            p = _probabilities(
                q, k, lse2, offs_m, offs_n, T, S, scale * LOG2E, masked == 1, PRECISION
            )
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if HAS_DROPOUT:
                dp *= dropout_factors(seed, bh, first, start, dropout_threshold, BLOCK_M, BLOCK_N)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    at = offs_m.to(tl.int64)[:, None] * stride_dq_row + offs_d[None, :]
    mask = (offs_m[:, None] < T) & (offs_d[None, :] < D)
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _constants(
    q: torch.Tensor, config: Config, causal: bool, dropout_p: float
) -> dict[str, int | bool | str]:
    D = q.shape[-1]
    block_d = max(16, triton.next_power_of_2(D))
    return {
        "IS_CAUSAL": causal,
        "HAS_DROPOUT": dropout_p > 0,
        "EVEN_D": block_d == D,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d,
        "PRECISION": _precision(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::attention_fwd`."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    B, H, T, D = q.shape
    S = k.shape[2]
    o = empty_output(q)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if q.numel():
        config = pick_config(D, q.element_size(), backward=False)
        attention_fwd_kernel[(triton.cdiv(T, config.block_m), B * H)](
            q,
            k,
            v,
            o,
            lse,
            seed,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *o.stride()[:3],
            H,
            H // k.shape[1],
            T,
            S,
            D,
            scale,
            dropout_threshold(dropout_p),
            **_constants(q, config, causal, dropout_p),
        )
    return o, lse


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::attention_bwd`."""
    do, q, k, v, o = (unit_stride(x) for x in (do, q, k, v, o))
    lse = lse.contiguous()
    B, H, T, D = q.shape
    H_kv, S = k.shape[1:3]
    empty = q.new_empty(0)
    needs_dkdv = needs[1] or needs[2]
    dq = empty_output(q) if needs[0] else empty
    dk, dv = (empty_output(k), empty_output(k)) if needs_dkdv else (empty, empty)
    config = pick_config(D, q.element_size(), backward=True)
    constants = _constants(q, config, causal, dropout_p)
    delta = torch.empty_like(lse)
    if q.numel():
        attention_delta_kernel[(triton.cdiv(T, config.block_m), B * H)](
            o,
            do,
            delta,
            *o.stride()[:3],
            *do.stride()[:3],
            H,
            T,
            D,
            BLOCK_M=config.block_m,
            BLOCK_D=constants["BLOCK_D"],
        )
    strides = [s for x in (do, q, k, v) for s in x.stride()[:3]]
    sizes = (H, H // H_kv, T, S, D, scale, dropout_threshold(dropout_p))
    if needs_dkdv and k.numel():
        attention_bwd_dkdv_kernel[(triton.cdiv(S, config.block_n), B * H_kv)](
            do, q, k, v, lse, delta, seed, dk, dv, *strides, *dk.stride()[:3], *sizes, **constants
        )
    if needs[0] and q.numel():
        attention_bwd_dq_kernel[(triton.cdiv(T, config.block_m), B * H)](
            do, q, k, v, lse, delta, seed, dq, *strides, *dq.stride()[:3], *sizes, **constants
        )
    return dq, dk if needs[1] else empty, dv if needs[2] else empty
