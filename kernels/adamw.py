"""AdamW in Triton. The maths stands in `gptfast/ops/adamw.py`, as does the table of tensors.

Every tensor is cut into chunks. Three launches make a step, whatever the number of tensors: the sum
of squares of each chunk of the gradients (only when they are clipped); one program that adds those
sums up in order, counts the steps and works out each tensor's scalars; the update, a program for
each chunk.

Bytes of an element, in fp32: p, g, m and v are read and p, m and v written, 28; clipping reads g
once more. With a master copy the update reads that instead of p, and writes both.

Addresses come from the table, so the compiler knows nothing of their alignment. Where all of a
tensor's are multiples of 16 bytes its whole blocks are read in vectors, as `multiple_of` promises;
its last block, and tensors that begin anywhere, element by element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gptfast.ops import adamw as op

P, G, M, V, MASTER, STEP, LR, NUMEL, GROUP, P_CODE, G_CODE, ALIGNED = (
    tl.constexpr(i) for i in range(len(op.COLUMNS))
)
COLUMNS = tl.constexpr(len(op.COLUMNS))
CLIP_EPS = tl.constexpr(op.CLIP_EPS)
HYPER = tl.constexpr(8)  # columns of the table of groups
SCALARS = tl.constexpr(8)  # a tensor's, from the prepare kernel for the update
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Config:
    """How a launch is cut up."""

    chunk: int  # elements a program handles, a multiple of block
    block: int  # elements it holds at a time, a power of two
    num_warps: int


def pick_config(elements: int) -> Config:
    """Launch sizes for so many elements in all tensors; not tunable, as it decides a sum's order.

    A block gives each of 128 threads 8 elements: two loads of 128 bits from each fp32 tensor. The
    chunk is a function of the size alone, since the norm must not depend on the card. Its aim is
    4096 programs, two waves of the 2112 that fit on 132 multiprocessors; it ends at 65536 elements,
    by when the tables are a thousandth of the traffic, and 8e9 parameters still leave only 122,000
    partial sums to the one program that adds them up.
    """
    block = 1024
    chunk = min(max(triton.next_power_of_2(elements // 4096 + 1) // 2, block), 65536)
    return Config(chunk, block, num_warps=4)


@triton.jit
def _pointer(address, dtype: tl.constexpr, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(address, dtype: tl.constexpr, offs, mask, WHOLE: tl.constexpr):
    at = _pointer(address, dtype, WHOLE) + offs
    if WHOLE:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _load_coded(address, code, DTYPE: tl.constexpr, offs, mask, WHOLE: tl.constexpr):
    """Elements of a dtype that only the table knows, unless DTYPE is that of all tensors."""
    if DTYPE is not None:
        x = _load(address, DTYPE, offs, mask, WHOLE)
    elif code == 0:
        x = _load(address, tl.float32, offs, mask, WHOLE)
    elif code == 1:
        x = _load(address, tl.bfloat16, offs, mask, WHOLE)
    else:
        x = _load(address, tl.float16, offs, mask, WHOLE)
    return x


@triton.jit
def _store(address, dtype: tl.constexpr, x, offs, mask, WHOLE: tl.constexpr):
    at = _pointer(address, dtype, WHOLE) + offs
    if WHOLE:
        tl.store(at, x.to(dtype))
    else:
        tl.store(at, x.to(dtype), mask=mask)


@triton.jit
def _store_coded(address, code, DTYPE: tl.constexpr, x, offs, mask, WHOLE: tl.constexpr):
    if DTYPE is not None:
        _store(address, DTYPE, x, offs, mask, WHOLE)
    elif code == 0:
        _store(address, tl.float32, x, offs, mask, WHOLE)
    elif code == 1:
        _store(address, tl.bfloat16, x, offs, mask, WHOLE)
    else:
        _store(address, tl.float16, x, offs, mask, WHOLE)


@triton.jit
def _chunk(tensors_ptr, chunks_ptr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tensor, its row, and its elements: first, end of the whole blocks, end."""
    chunks_ptr += tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(chunks_ptr)
    start = tl.load(chunks_ptr + 1) * CHUNK
    row_ptr = tensors_ptr + tensor * COLUMNS
    end = tl.minimum(start + CHUNK, tl.load(row_ptr + NUMEL))
    whole = tl.where(tl.load(row_ptr + ALIGNED) != 0, (end - start) // BLOCK * BLOCK, 0)
    return tensor, row_ptr, start, start + whole, end


@triton.jit
def adamw_norm_kernel(
    tensors_ptr,
    chunks_ptr,
    partial_ptr,
    G_DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares of one chunk of a gradient per program."""
    _, row_ptr, start, middle, end = _chunk(tensors_ptr, chunks_ptr, CHUNK, BLOCK)
    g_address, g_code = tl.load(row_ptr + G), tl.load(row_ptr + G_CODE)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(start, middle, BLOCK):
        g = _load_coded(g_address, g_code, G_DTYPE, at + offs, None, True)
        total += g * g
    for at in range(middle, end, BLOCK):
        g = _load_coded(g_address, g_code, G_DTYPE, at + offs, at + offs < end, False)
        total += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def adamw_prepare_kernel(
    tensors_ptr,
    hyper_ptr,
    partial_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    norm_ptr,
    scalars_ptr,
    tensors,
    chunks,
    max_norm,
    HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the norm, then t + 1 and the scalars of every tensor, in fp64 where 1 - beta^t
    would cancel in fp32."""
    offs = tl.arange(0, BLOCK)
    factor = 1.0
    if HAS_SCALE:
        factor = 1.0 / tl.load(grad_scale_ptr)
    if HAS_NORM:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, chunks, BLOCK):
            total += tl.load(partial_ptr + start + offs, mask=start + offs < chunks, other=0.0)
        norm = tl.sqrt_rn(tl.sum(total, 0)) * factor
        tl.store(norm_ptr, norm)
        clip = max_norm / (norm + CLIP_EPS)
        factor *= tl.where(clip > 1, 1.0, clip)  # and not a minimum, which may drop a NaN
    counts = 1.0
    if HAS_FOUND_INF:
        counts = tl.where(tl.load(found_inf_ptr) == 0, 1.0, 0.0)
    for start in range(0, tensors, BLOCK):
        tensor = (start + offs).to(tl.int64)
        mask = tensor < tensors
        row_ptr = tensors_ptr + tensor * COLUMNS
        step_ptr = tl.load(row_ptr + STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr, mask=mask, other=1.0) + counts
        tl.store(step_ptr, step, mask=mask)
        h_ptr = hyper_ptr + tl.load(row_ptr + GROUP, mask=mask, other=0) * HYPER
        lr_address = tl.load(row_ptr + LR, mask=mask, other=0)
        lr_ptr = lr_address.to(tl.pointer_type(tl.float32))
        given = tl.load(lr_ptr, mask=mask & (lr_address != 0), other=0.0)
        lr = tl.where(lr_address != 0, given.to(tl.float64), tl.load(h_ptr))
        beta1, beta2 = tl.load(h_ptr + 1), tl.load(h_ptr + 2)
        power1 = tl.exp(step.to(tl.float64) * tl.load(h_ptr + 3))
        power2 = tl.exp(step.to(tl.float64) * tl.load(h_ptr + 4))
        s_ptr = scalars_ptr + tensor * SCALARS
        tl.store(s_ptr, (factor * tl.load(h_ptr + 7)).to(tl.float32), mask=mask)
        tl.store(s_ptr + 1, (1 - beta1).to(tl.float32), mask=mask)
        tl.store(s_ptr + 2, beta2.to(tl.float32), mask=mask)
        tl.store(s_ptr + 3, (1 - beta2).to(tl.float32), mask=mask)
        tl.store(s_ptr + 4, (lr * tl.load(h_ptr + 6)).to(tl.float32), mask=mask)
        tl.store(s_ptr + 5, (lr / (1 - power1)).to(tl.float32), mask=mask)
        tl.store(s_ptr + 6, (1 / tl.sqrt(1 - power2)).to(tl.float32), mask=mask)
        tl.store(s_ptr + 7, tl.load(h_ptr + 5).to(tl.float32), mask=mask)


@triton.jit
def adamw_update_kernel(
    tensors_ptr,
    chunks_ptr,
    scalars_ptr,
    found_inf_ptr,
    HAS_FOUND_INF: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """m, v and w of one chunk of a tensor per program."""
    tensor, row_ptr, start, middle, end = _chunk(tensors_ptr, chunks_ptr, CHUNK, BLOCK)
    if HAS_FOUND_INF:
        runs = tl.load(found_inf_ptr) == 0
        middle, end = tl.where(runs, middle, start), tl.where(runs, end, start)
    s_ptr = scalars_ptr + tensor * SCALARS
    offs = tl.arange(0, BLOCK)
    for at in range(start, middle, BLOCK):
        _update(row_ptr, s_ptr, at + offs, None, HAS_MASTERS, P_DTYPE, G_DTYPE, True)
    for at in range(middle, end, BLOCK):
        mask = at + offs < end
        _update(row_ptr, s_ptr, at + offs, mask, HAS_MASTERS, P_DTYPE, G_DTYPE, False)


@triton.jit
def _update(
    row_ptr,
    s_ptr,
    offs,
    mask,
    HAS_MASTERS: tl.constexpr,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    # Row and scalars are read again for every block: they are in the cache, and a block of 1024
    # elements moves 28 KB.
    p_address, p_code = tl.load(row_ptr + P), tl.load(row_ptr + P_CODE)
    m_address, v_address = tl.load(row_ptr + M), tl.load(row_ptr + V)
    master = tl.load(row_ptr + MASTER)
    g = _load_coded(tl.load(row_ptr + G), tl.load(row_ptr + G_CODE), G_DTYPE, offs, mask, WHOLE)
    m = _load(m_address, tl.float32, offs, mask, WHOLE)
    v = _load(v_address, tl.float32, offs, mask, WHOLE)
    if HAS_MASTERS:
        if master != 0:
            w = _load(master, tl.float32, offs, mask, WHOLE)
        else:
            w = _load_coded(p_address, p_code, P_DTYPE, offs, mask, WHOLE)
    else:
        w = _load_coded(p_address, p_code, P_DTYPE, offs, mask, WHOLE)
    g *= tl.load(s_ptr)
    m += tl.load(s_ptr + 1) * (g - m)
    v = tl.load(s_ptr + 2) * v + tl.load(s_ptr + 3) * g * g
    # sqrt_rn, not sqrt: the fast one flushes small v to zero, which eps = 0 would divide by.
    denominator = tl.sqrt_rn(v) * tl.load(s_ptr + 6) + tl.load(s_ptr + 7)
    w = w - tl.load(s_ptr + 4) * w - tl.load(s_ptr + 5) * m / denominator
    _store(m_address, tl.float32, m, offs, mask, WHOLE)
    _store(v_address, tl.float32, v, offs, mask, WHOLE)
    if HAS_MASTERS and master != 0:
        _store(master, tl.float32, w, offs, mask, WHOLE)
    _store_coded(p_address, p_code, P_DTYPE, w, offs, mask, WHOLE)


def adamw_fwd(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    steps: list[torch.Tensor],
    masters: list[torch.Tensor],
    groups: list[int],
    hyper: list[float],
    lrs: list[torch.Tensor],
    max_norm: float | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> torch.Tensor:
    """The `triton` backend of `gptfast::adamw_fwd`."""
    config = pick_config(sum(p.numel() for p in params))
    grads = op.laid_out_alike(params, grads)
    tables = op.make_tables(
        params, grads, exp_avgs, exp_avg_sqs, steps, masters, groups, hyper, lrs, config.chunk
    )
    chunks, warps = len(tables.chunks), config.num_warps
    device = params[0].device
    has_masters = any(master.numel() for master in masters)
    p_dtype, g_dtype = (x and DTYPES[x] for x in (tables.p_dtype, tables.g_dtype))
    partial = torch.empty(0 if max_norm is None else chunks, dtype=torch.float32, device=device)
    norm = torch.empty((0,) if max_norm is None else (), dtype=torch.float32, device=device)
    scalars = torch.empty(len(params), SCALARS.value, dtype=torch.float32, device=device)
    if chunks and max_norm is not None:
        adamw_norm_kernel[(chunks,)](
            tables.tensors, tables.chunks, partial,
            G_DTYPE=g_dtype, CHUNK=config.chunk, BLOCK=config.block, num_warps=warps,
        )  # fmt: skip
    adamw_prepare_kernel[(1,)](
        tables.tensors,
        tables.hyper,
        partial,
        grad_scale,
        found_inf,
        norm,
        scalars,
        len(params),
        chunks,
        0.0 if max_norm is None else max_norm,
        HAS_NORM=max_norm is not None,
        HAS_SCALE=grad_scale is not None,
        HAS_FOUND_INF=found_inf is not None,
        BLOCK=config.block,
        num_warps=warps,
    )
    if chunks:
        adamw_update_kernel[(chunks,)](
            tables.tensors, tables.chunks, scalars, found_inf,
            HAS_FOUND_INF=found_inf is not None, HAS_MASTERS=has_masters, P_DTYPE=p_dtype,
            G_DTYPE=g_dtype, CHUNK=config.chunk, BLOCK=config.block, num_warps=warps,
        )  # fmt: skip
    return norm
