"""Linear cross-entropy in Triton. The maths stands in `gptfast/ops/linear_cross_entropy.py`.

Forward: one program per (block of rows, run of vocabulary tiles). It makes a tile of logits at a
time, by a loop over C, and takes it into the running maximum and sums of its rows; four numbers a
row are all that it writes. A second kernel combines the runs of a row, in order: exact and
deterministic. Programs that share a tile of w run side by side, so w (V C) comes from memory once
and x (M C, a few MB) stays in the second-level cache.

Backward: why a chunk of dlogits, and not tiles recomputed where they are consumed? dx of a block of
rows is a sum over all of V, and wants C sums a row: 64 rows of 768 fill three quarters of a
multiprocessor's registers, 4096 never fit. A program must then own a block of columns and make
every logit again for each block: 2 M V C (C / BLOCK) operations for dx and as many for dw. With
dlogits stored it is 2 M V C each for logits, dx and dw; stored numbers are written once and read
twice. The chunk is some columns of all rows, in the input dtype:
- dw of those classes is then complete, summed over M in registers, and written once;
- dx is summed over the chunks in fp32: 8 bytes of M C a chunk. A chunk of at least C columns keeps
  that below 8 M V bytes for all: with dlogits 14 bytes of traffic a logit, and 6 C operations.
No float atomics: every element has one program, which adds in order.

Three kernels a chunk: dlogits of a tile; dx and dw are one kernel, a product that reads its left
factor as it is or transposed. Operands keep their dtype, sums are fp32.

Longer than 500 lines and 15 arguments a kernel: options of the loss, three matrices, their tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptfast.kernels.cross_entropy import (
    LOWEST,
    logit_gradient,
    loss_flags,
    row_loss,
    softcapped,
    weight_sum,
)
from gptfast.kernels.precision import fp32_precision
from gptfast.ops.cross_entropy import check_targets
from gptfast.targets import Target, target_of
from gptfast.tuning import tunable

CHUNK = 2**25  # elements of dlogits in memory, unless x has more: 64 MiB of half precision
COMBINE_ROWS = 128


@dataclass(frozen=True)
class Config:
    """Tiles of a product of (rows, K) with (K, columns), and launch options."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@tunable
def pick_config(C: int, itemsize: int, epilogue: bool, bias: bool, target: Target) -> Config:
    """Tiles of a product, by the width of x, the element size in bytes and what follows.

    Half precision: the sums of 128 x 128 are 64 registers for each of 256 threads; a plain loss
    then needs two or three tiles more. With softcap, class weights or smoothing (`epilogue`) it
    needs more than that, and 128 x 128 was seen to spill on sm_80, sm_90 and sm_100: half as wide.
    64 deep, three stages take 96 KB at most; targets with less than 160 KB go 32 deep.
    On an H100 128 x 256, with 144 KB and all but a few of a thread's 255 registers, is faster: of
    C 4096 forward took 3433 us instead of 4880, backward 13046 instead of 13679; of C 768 each 4 %
    less. The gradient of logits with a bias (`bias`) would spill there.
    Rows that are no multiple of 16 elements are loaded in small pieces, with an address for each:
    64 x 64, or registers run out.
    fp32 without TF32 is multiplied on the ordinary units of NVIDIA's cards, with operands in
    registers: 64 x 64, and 16 deep.
    """
    if itemsize == 4:
        return Config(64, 64, 16, num_warps=8, num_stages=2)
    if C % 16:
        return Config(64, 64, 32, num_warps=4, num_stages=2)
    block_n = 64 if epilogue else 256 if target.name == "sm_90" and not bias else 128
    if target.shared_memory >= 160 * 1024:
        return Config(128, block_n, 64, num_warps=8, num_stages=3)
    return Config(128, block_n, 32, num_warps=8, num_stages=2)


def vocabulary_runs(M: int, V: int, config: Config) -> int:
    """Into how many runs forward cuts the vocabulary.

    Enough for 1024 programs, several for every place on today's largest cards, so that the last
    ones do not leave half of it idle; and at most one run for 4 tiles: the combining kernel then
    reads 16 bytes where the tiles had 4 x 128 logits.
    """
    tiles = triton.cdiv(V, config.block_n)
    wanted = triton.cdiv(1024, triton.cdiv(M, config.block_m))
    return max(1, min(wanted, triton.cdiv(tiles, 4)))


def chunk_columns(M: int, V: int, C: int, config: Config) -> int:
    """Columns of a chunk of dlogits: `CHUNK` elements, or as many as x has, in whole tiles."""
    tile = max(config.block_m, config.block_n)  # dw's rows are the chunk's columns, dlogits' too
    columns = max(CHUNK // M, C) // tile * tile
    return min(max(columns, tile), triton.cdiv(V, tile) * tile)


@triton.jit
def _logits_tile(
    x_ptr,
    w_ptr,
    b_ptr,
    rows,
    cols,
    C,
    HAS_B: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x w^T + b in fp32, for rows and columns that exist."""
    offs_c = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * C + offs_c[None, :]
    w_ptrs = w_ptr + cols.to(tl.int64)[:, None] * C + offs_c[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, C, BLOCK_C):
        if EVEN_C:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask = (start + offs_c < C)[None, :]
            x = tl.load(x_ptrs, mask=mask, other=0.0)
            w = tl.load(w_ptrs, mask=mask, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        x_ptrs += BLOCK_C
        w_ptrs += BLOCK_C
    if HAS_B:
        acc += tl.load(b_ptr + cols).to(tl.float32)[None, :]
    return acc


@triton.jit
def linear_cross_entropy_fwd_kernel(
    x_ptr,
    w_ptr,
    target_ptr,
    b_ptr,
    class_weight_ptr,
    partial_ptr,
    M,
    V,
    C,
    tiles_per_run,
    softcap,
    HAS_B: tl.constexpr,
    HAS_W: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maximum, sum of exponentials, target's z and sum of w z of a block of rows and a run."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    run = tl.program_id(0) // row_blocks
    offs_m = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, M - 1)  # rows behind the last one repeat it: no mask in the loop
    t = tl.load(target_ptr + rows)
    t = tl.where((t >= 0) & (t < V), t, -1).to(tl.int32)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    z_t = tl.zeros((BLOCK_M,), tl.float32)
    wz_sum = tl.zeros((BLOCK_M,), tl.float32)
    first = run * tiles_per_run
    for tile in range(first, tl.minimum(first + tiles_per_run, tl.cdiv(V, BLOCK_V))):
        cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        existing = tl.minimum(cols, V - 1)
        logits = _logits_tile(
            x_ptr, w_ptr, b_ptr, rows, existing, C,
            HAS_B, EVEN_C, BLOCK_M, BLOCK_V, BLOCK_C, PRECISION,
        )  # fmt: skip
        z, _ = softcapped(logits, softcap, HAS_SOFTCAP)
        mask = (cols < V)[None, :]
        z = tl.where(mask, z, -float("inf"))
        z_t += tl.sum(tl.where(cols[None, :] == t[:, None], z, 0.0), 1)
        new_top = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top[:, None]), 1)
        top = new_top
        if SMOOTH:
            wz = z
            if HAS_W:
                wz *= tl.load(class_weight_ptr + existing).to(tl.float32)[None, :]
            wz_sum += tl.sum(tl.where(mask, wz, 0.0), 1)
    partial_ptr += run.to(tl.int64) * 4 * M
    mask_m = offs_m < M
    tl.store(partial_ptr + offs_m, top, mask=mask_m)
    tl.store(partial_ptr + M + offs_m, total, mask=mask_m)
    tl.store(partial_ptr + 2 * M + offs_m, z_t, mask=mask_m)
    tl.store(partial_ptr + 3 * M + offs_m, wz_sum, mask=mask_m)


@triton.jit
def linear_cross_entropy_combine_kernel(
    partial_ptr,
    target_ptr,
    class_weight_ptr,
    w_sum_ptr,
    loss_ptr,
    lse_ptr,
    M,
    V,
    runs,
    ignore_index,
    label_smoothing,
    z_loss,
    HAS_W: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """loss and lse of a block of rows, from the numbers of all runs."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = offs_m < M
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    z_t = tl.zeros((BLOCK_M,), tl.float32)
    wz_sum = tl.zeros((BLOCK_M,), tl.float32)
    for _ in range(runs):
        run_top = tl.load(partial_ptr + offs_m, mask=mask, other=0.0)
        run_total = tl.load(partial_ptr + M + offs_m, mask=mask, other=1.0)
        new_top = tl.maximum(top, run_top)
        total = total * tl.exp(top - new_top) + run_total * tl.exp(run_top - new_top)
        top = new_top
        z_t += tl.load(partial_ptr + 2 * M + offs_m, mask=mask, other=0.0)
        wz_sum += tl.load(partial_ptr + 3 * M + offs_m, mask=mask, other=0.0)
        partial_ptr += tl.cast(M, tl.int64) * 4  # M is a constant where it is 1
    t = tl.load(target_ptr + offs_m, mask=mask, other=0)
    # A target outside [0, V) makes lse NaN, and so the loss and the gradients: a look from the host
    # would wait for the card.
    known = (t >= 0) & (t < V)
    lse = tl.where(known, top + tl.log(total), float("nan"))
    w_t = tl.load(class_weight_ptr + t, mask=known, other=0.0).to(tl.float32) if HAS_W else 1.0
    w_sum = tl.load(w_sum_ptr) if HAS_W and SMOOTH else V
    loss = row_loss(lse, z_t, w_t, w_sum, wz_sum, V, label_smoothing, z_loss, HAS_W, SMOOTH)
    ignored = t == ignore_index
    tl.store(loss_ptr + offs_m, tl.where(ignored, 0.0, loss), mask=mask)
    tl.store(lse_ptr + offs_m, tl.where(ignored, 0.0, lse), mask=mask)


@triton.jit
def linear_cross_entropy_dlogits_kernel(
    dloss_ptr,
    x_ptr,
    w_ptr,
    target_ptr,
    b_ptr,
    class_weight_ptr,
    w_sum_ptr,
    lse_ptr,
    d_ptr,
    db_partial_ptr,
    stride_dloss,
    M,
    V,
    C,
    width,
    first,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    HAS_B: tl.constexpr,
    HAS_W: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of dlogits; column j of the chunk d (M, width) is class first + j."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    row_block = tl.program_id(0) % row_blocks
    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = (tl.program_id(0) // row_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows, cols = tl.minimum(offs_m, M - 1), tl.minimum(first + offs_v, V - 1)
    x = _logits_tile(
        x_ptr, w_ptr, b_ptr, rows, cols, C,
        HAS_B, EVEN_C, BLOCK_M, BLOCK_V, BLOCK_C, PRECISION,
    )  # fmt: skip
    target = tl.load(target_ptr + rows)
    known = (target >= 0) & (target < V)
    t = tl.where(known, target, -1).to(tl.int32)
    w_t, w, w_sum = 1.0, 1.0, 1.0 * V
    if HAS_W:
        w_t = tl.load(class_weight_ptr + target, mask=known, other=0.0).to(tl.float32)[:, None]
        if SMOOTH:
            w = tl.load(class_weight_ptr + cols).to(tl.float32)[None, :]
            w_sum = tl.load(w_sum_ptr)
    dloss = tl.load(dloss_ptr + rows.to(tl.int64) * stride_dloss)
    d = logit_gradient(
        x, cols[None, :] == t[:, None], dloss[:, None],
        tl.load(lse_ptr + rows)[:, None], w_t, w, w_sum, V, label_smoothing, z_loss, softcap,
        HAS_W, SMOOTH, HAS_SOFTCAP,
    )  # fmt: skip
    exists = (offs_m < M)[:, None] & (first + offs_v < V)[None, :]
    d = tl.where(exists & (target != ignore_index)[:, None], d, 0.0)
    at = offs_m.to(tl.int64)[:, None] * width + offs_v[None, :]
    tl.store(d_ptr + at, d.to(d_ptr.dtype.element_ty), mask=(offs_m < M)[:, None])
    if NEEDS_DB:
        tl.store(db_partial_ptr + row_block.to(tl.int64) * width + offs_v, tl.sum(d, 0))


@triton.jit
def linear_cross_entropy_product_kernel(
    a_ptr,
    b_ptr,
    sum_ptr,
    out_ptr,
    R,
    K,
    N,
    stride_a_row,
    TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of out (R, N) = a b, or a^T b, plus what `sum` has: a (R, K) or (K, R), b (K, N)."""
    col_blocks = tl.cdiv(N, BLOCK_N)
    offs_r = (tl.program_id(0) // col_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = (tl.program_id(0) % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(offs_r, R - 1).to(tl.int64)
    mask_n = (offs_n < N)[None, :]
    at = tl.minimum(offs_r, R - 1).to(tl.int64)[:, None] * N + offs_n[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    if ADD:
        acc = tl.load(sum_ptr + at, mask=mask_n, other=0.0)
    for start in range(0, K, BLOCK_K):
        k = (start + offs_k).to(tl.int64)
        b_ptrs = b_ptr + k[:, None] * N + offs_n[None, :]
        if EVEN_K and EVEN_N:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(b_ptrs, mask=(k < K)[:, None] & mask_n, other=0.0)
        if TRANSPOSED:
            # Not `rows`, whose last ones repeat: 128-bit loads want neighbours. a has whole tiles.
            a_ptrs = a_ptr + k[:, None] * stride_a_row + offs_r[None, :]
            a = tl.trans(_load_k(a_ptrs, (k < K)[:, None], EVEN_K))
        else:
            a_ptrs = a_ptr + rows[:, None] * stride_a_row + k[None, :]
            a = _load_k(a_ptrs, (k < K)[None, :], EVEN_K)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    mask = (offs_r < R)[:, None] & mask_n
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_k(ptrs, mask, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=mask, other=0.0)


def _tile_constants(C: int, config: Config) -> dict[str, int | bool | str]:
    return {
        "EVEN_C": C % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_V": config.block_n,
        "BLOCK_C": config.block_k,
        "PRECISION": fp32_precision(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def linear_cross_entropy_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::linear_cross_entropy_fwd`."""
    x, w, target = x.contiguous(), w.contiguous(), target.contiguous()
    class_weight = None if class_weight is None else class_weight.contiguous()
    (M, C), V = x.shape, w.shape[0]
    if x.device.type == "cpu":
        check_targets("linear_cross_entropy", target, V, ignore_index)
    loss = torch.empty(M, dtype=torch.float32, device=x.device)
    lse = torch.empty_like(loss)
    if M:
        flags = loss_flags(class_weight, label_smoothing, softcap)
        epilogue = any(flags.values())
        config = pick_config(C, x.element_size(), epilogue, False, target_of(x.device))
        tiles_per_run = triton.cdiv(triton.cdiv(V, config.block_n), vocabulary_runs(M, V, config))
        runs = triton.cdiv(triton.cdiv(V, config.block_n), tiles_per_run)
        partial = torch.empty((runs, 4, M), dtype=torch.float32, device=x.device)
        linear_cross_entropy_fwd_kernel[(triton.cdiv(M, config.block_m) * runs,)](
            x,
            w,
            target,
            None if b is None else b.contiguous(),
            class_weight,
            partial,
            M,
            V,
            C,
            tiles_per_run,
            softcap or 0.0,
            HAS_B=b is not None,
            **flags,
            **_tile_constants(C, config),
        )
        del flags["HAS_SOFTCAP"]
        linear_cross_entropy_combine_kernel[(triton.cdiv(M, COMBINE_ROWS),)](
            partial,
            target,
            class_weight,
            weight_sum(class_weight, label_smoothing),
            loss,
            lse,
            M,
            V,
            runs,
            ignore_index,
            label_smoothing,
            z_loss,
            **flags,
            BLOCK_M=COMBINE_ROWS,
            num_warps=4,
        )
    return loss, lse


def linear_cross_entropy_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `triton` backend of `gptfast::linear_cross_entropy_bwd`."""
    x, w, target = x.contiguous(), w.contiguous(), target.contiguous()
    lse = lse.contiguous()
    b = None if b is None else b.contiguous()
    class_weight = None if class_weight is None else class_weight.contiguous()
    (M, C), V = x.shape, w.shape[0]
    dx = torch.empty_like(x) if needs[0] else x.new_empty(0)
    dw = torch.empty_like(w) if needs[1] else w.new_empty(0)
    db = w.new_empty(V if needs[2] else 0)
    if not M:
        return dx, dw.zero_(), db.zero_()
    flags = loss_flags(class_weight, label_smoothing, softcap)
    card = target_of(x.device)
    config = pick_config(C, x.element_size(), any(flags.values()), b is not None, card)
    product = pick_config(C, x.element_size(), False, False, card)
    width = chunk_columns(M, V, C, product)
    row_blocks = triton.cdiv(M, config.block_m)
    d = x.new_empty((M, width))
    db_partial = d.new_empty((row_blocks, width) if needs[2] else 0, dtype=torch.float32)
    sums = dx if width >= V else torch.empty_like(dx, dtype=torch.float32)
    w_sum = weight_sum(class_weight, label_smoothing)
    for first in range(0, V, width):
        columns = min(width, V - first)
        linear_cross_entropy_dlogits_kernel[(row_blocks * triton.cdiv(columns, config.block_n),)](
            dloss,
            x,
            w,
            target,
            b,
            class_weight,
            w_sum,
            lse,
            d,
            db_partial,
            dloss.stride(0),  # 0 where it is the gradient of a mean
            M,
            V,
            C,
            width,
            first,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap or 0.0,
            HAS_B=b is not None,
            **flags,
            NEEDS_DB=needs[2],
            **_tile_constants(C, config),
        )
        if needs[0] and C:
            last = first + width >= V
            _product(d, w[first:], sums, dx if last else sums, columns, False, first > 0, product)
        if needs[1] and C:
            _product(d, x, None, dw[first : first + columns], M, True, False, product)
        if needs[2]:
            db[first : first + columns] = db_partial[:, :columns].sum(0)
    return dx, dw, db


def _product(
    d: torch.Tensor,
    b: torch.Tensor,
    sums: torch.Tensor | None,
    out: torch.Tensor,
    K: int,
    transposed: bool,
    add: bool,
    config: Config,
) -> None:
    R, N = out.shape
    grid = (triton.cdiv(R, config.block_m) * triton.cdiv(N, config.block_n),)
    linear_cross_entropy_product_kernel[grid](
        d,
        b,
        sums,
        out,
        R,
        K,
        N,
        d.stride(0),
        TRANSPOSED=transposed,
        ADD=add,
        EVEN_K=K % config.block_k == 0,
        EVEN_N=N % config.block_n == 0,
        BLOCK_R=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PRECISION=fp32_precision(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
