"""AdamW over any number of tensors in one step, with the gradients' norm clipped on the way.

For gradient g, parameter w (its fp32 master copy, where it has one) and step t = 1, 2, ...:

norm = |all g| / scale,  c = min(1, max_norm / (norm + 1e-6)),  g <- +-c g / scale
m <- m + (1 - beta1) (g - m),  v <- beta2 v + (1 - beta2) g^2
w <- w - lr lambda w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

lambda is the weight decay, the sign is minus for `maximize`, and scale is that of a `GradScaler`.
Where its found_inf is not 0, nothing changes, t included.

With a rounding_seed, a bfloat16 parameter without a master copy gets w rounded up or down at
random, so that the mean is w: a step that is less than half of bfloat16's is not lost. Philox
draws 16 bits for the seed, the parameter's number, t, and the element's place in memory; they are
added to w's fp32 bits, and the lower 16 of the sum are dropped.

The op writes to its arguments and has no derivative. Kernels see the tensors through a table of
addresses, so that a step takes the same few launches however many tensors there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gptfast import backend
from gptfast.ops.library import define, pointer, statistics_dtype
from gptfast.ops.philox import random_bits

Tensors = list[torch.Tensor]
CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_


class Settings(NamedTuple):
    """What the parameters of one group have in common."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: float  # 0.0 or 1.0: `hyper` is a list of floats


def settings_of(hyper: Sequence[float]) -> list[Settings]:
    """The groups in the op's flat list."""
    n = len(Settings._fields)
    return [Settings(*hyper[at : at + n]) for at in range(0, len(hyper), n)]


def reference_fwd(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    masters: Tensors,
    groups: list[int],
    hyper: list[float],
    lrs: Tensors,
    max_norm: float | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    rounding_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula in PyTorch, a tensor at a time."""
    inverse = 1.0 if grad_scale is None else 1 / grad_scale
    norm = params[0].new_empty(0, dtype=torch.float32)
    clip: float | torch.Tensor = 1.0
    if max_norm is not None:
        squares = [
            torch.linalg.vector_norm(g, dtype=statistics_dtype(g.dtype)).square() for g in grads
        ]
        norm = torch.stack(squares).sum().sqrt() * inverse
        clip = (max_norm / (norm + CLIP_EPS)).clamp(max=1)
    keeps = None if found_inf is None else found_inf == 0  # on the device: no sync
    for i, step in enumerate(steps):
        step += 1 if keeps is None else keeps.to(step.dtype)
        s = settings_of(hyper)[groups[i]]
        p, m, v = params[i], exp_avgs[i], exp_avg_sqs[i]
        lr = lrs[groups[i]] if lrs and lrs[groups[i]].numel() else s.lr
        factor = (-1 if s.maximize else 1) * clip * inverse
        g = grads[i].to(m.dtype) * factor
        w = masters[i] if masters and masters[i].numel() == p.numel() else p
        t = step.double()
        # On one line each, so that w, m and v are read before any of them is written.
        new_m = m.lerp(g, 1 - s.beta1)
        new_v = v * s.beta2 + (1 - s.beta2) * g * g
        size, root = lr / (1 - s.beta1**t), (1 - s.beta2**t).sqrt()
        wide = w.to(m.dtype)
        new_w = wide - lr * s.weight_decay * wide - size * new_m / (new_v.sqrt() / root + s.eps)
        stored = new_w
        if rounding_seed is not None and w is p and p.dtype == torch.bfloat16:
            stored = round_at_random(new_w, p, rounding_seed, i, step)
        for old, new in ((m, new_m), (v, new_v), (w, stored), (p, stored)):
            old.copy_(new if keeps is None else torch.where(keeps, new, old.to(new.dtype)))
    return norm.to(torch.float32)


def round_at_random(
    w: torch.Tensor, p: torch.Tensor, seed: torch.Tensor, number: int, step: torch.Tensor
) -> torch.Tensor:
    """One of the two bfloat16 numbers around each w, in fp32; p says how it lies in memory."""
    place = torch.arange(p.numel(), device=p.device)
    dense = p.is_contiguous() or p.stride() == torch.empty_like(p, device="meta").stride()
    place = place.as_strided(p.shape, p.stride()) if dense else place.view(p.shape)
    mask = 0xFFFFFFFF
    words = (place // 8 & mask, place // 8 >> 32, torch.full_like(place, number), step.long())
    bits = random_bits(seed, torch.broadcast_tensors(*words), place % 8)
    rounded = (w.contiguous().view(torch.int32) + bits.contiguous()) & ~0xFFFF
    return torch.where(w.isfinite(), rounded.to(torch.int32).view(torch.float32), w)


# A tensor's row of the table: addresses (0: there is none), then numbers. Kernels know the order.
ADDRESSES = ("p", "g", "m", "v", "master", "step", "lr")
COLUMNS = (*ADDRESSES, "numel", "group", "p_code", "g_code", "aligned")
VECTOR_BYTES = 16  # "aligned": every address is a multiple of this


class Tables(NamedTuple):
    """What a kernel is told of the tensors of a step; all on their device.

    tensors: (n, len(COLUMNS)) int64.
    chunks: (number of chunks, 2) int64: tensor, and which of its chunks.
    hyper: (groups, 8) float64: lr, beta1, beta2, log beta1, log beta2, eps, weight decay, sign.
    p_dtype, g_dtype: the one of all parameters, of all gradients; None where they differ.
    """

    tensors: torch.Tensor
    chunks: torch.Tensor
    hyper: torch.Tensor
    p_dtype: torch.dtype | None
    g_dtype: torch.dtype | None


def make_tables(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    masters: Tensors,
    groups: list[int],
    hyper: list[float],
    lrs: Tensors,
    chunk: int,
) -> Tables:
    """The tables of a step, from the cache where nothing moved since one of the last steps.

    A table that is made anew is copied to the device with no sync. A CUDA graph, which may run
    long after this, gets tables of its own and makes them at every replay (`_by_value`). `grads`
    must lie in memory as `params` do, and live until the kernels are launched.
    """
    rows: list[int] = []
    codes = backend.DTYPE_CODES
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        group = groups[i]
        rows += (
            p.data_ptr(),
            g.data_ptr(),
            exp_avgs[i].data_ptr(),
            exp_avg_sqs[i].data_ptr(),
            masters[i].data_ptr() if masters else 0,  # of an empty tensor it is 0
            steps[i].data_ptr(),
            lrs[group].data_ptr() if lrs else 0,
            p.numel(),
            group,
            codes[p.dtype],
            codes[g.dtype],
        )
    device = params[0].device
    sizes = tuple(p.numel() for p in params)
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    if is_capturing(device):
        tables = (
            _by_value(_tensor_rows(rows), device),
            _chunks_by_value(sizes, chunk, device),
            _by_value(_hyper_rows(hyper), device),
        )
    else:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        tables = (
            _tensor_table(tuple(rows), device, stream),
            _chunk_table(sizes, chunk, device, stream),
            _hyper_table(tuple(hyper), device, stream),
        )
    p_dtypes, g_dtypes = {p.dtype for p in params}, {g.dtype for g in grads}
    return Tables(
        *tables,
        p_dtypes.pop() if len(p_dtypes) == 1 else None,
        g_dtypes.pop() if len(g_dtypes) == 1 else None,
    )


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _tensor_rows(rows: Sequence[int]) -> npt.NDArray[np.int64]:
    given = np.array(rows, np.int64).reshape(-1, len(COLUMNS) - 1)
    aligned = (given[:, : COLUMNS.index("step")] % VECTOR_BYTES == 0).all(1, keepdims=True)
    return np.concatenate((given, aligned), 1)


def _hyper_rows(hyper: Sequence[float]) -> npt.NDArray[np.float64]:
    def log(beta: float) -> float:
        return math.log(beta) if beta > 0 else -math.inf

    rows = [
        (s.lr, s.beta1, s.beta2, log(s.beta1), log(s.beta2), s.eps, s.weight_decay, sign)
        for s in settings_of(hyper)
        for sign in (-1.0 if s.maximize else 1.0,)
    ]
    return np.array(rows, np.float64)


def _chunk_counts(sizes: Sequence[int], chunk: int) -> npt.NDArray[np.int64]:
    return -(-np.array(sizes, np.int64) // chunk)


# The stream is part of the keys: on another one the copy might not have arrived.


@lru_cache(maxsize=8)
def _tensor_table(rows: tuple[int, ...], device: torch.device, stream: int) -> torch.Tensor:
    return _to_device(_tensor_rows(rows), device)


@lru_cache(maxsize=8)
def _chunk_table(
    sizes: tuple[int, ...], chunk: int, device: torch.device, stream: int
) -> torch.Tensor:
    counts = _chunk_counts(sizes, chunk)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    first = np.cumsum(counts) - counts
    return _to_device(np.stack((tensor, np.arange(len(tensor)) - first[tensor]), 1), device)


@lru_cache(maxsize=8)
def _hyper_table(hyper: tuple[float, ...], device: torch.device, stream: int) -> torch.Tensor:
    return _to_device(_hyper_rows(hyper), device)


def _to_device(table: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    on_host = torch.from_numpy(table)
    if device.type == "cpu":
        return on_host
    return on_host.pin_memory().to(device, non_blocking=True)


def _by_value(table: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The table, from numbers that are arguments of kernels.

    So a CUDA graph holds them itself: a copy would be made again at every replay, from host memory
    that nobody knows when to give back. 96 numbers a launch.
    """
    dtype = torch.from_numpy(table[:0]).dtype
    out = torch.zeros(table.size, dtype=dtype, device=device)
    torch._foreach_add_(list(out.unbind()), table.ravel().tolist())
    return out.view(table.shape)


def _chunks_by_value(sizes: Sequence[int], chunk: int, device: torch.device) -> torch.Tensor:
    """`_chunk_table`, which may be long, made on the device from the tensors' numbers of chunks."""
    on_host = _chunk_counts(sizes, chunk)
    counts = _by_value(on_host, device)
    tensor = torch.repeat_interleave(counts, output_size=int(on_host.sum()))
    first = counts.cumsum(0) - counts
    return torch.stack((tensor, torch.arange(len(tensor), device=device) - first[tensor]), 1)


def laid_out_alike(params: Tensors, grads: Tensors) -> Tensors:
    """The gradients in their parameters' order in memory: copies of those that came in another."""
    return [
        g if _same_order(p, g) else torch.empty_like(p, dtype=g.dtype).copy_(g)
        for p, g in zip(params, grads, strict=True)
    ]


def _same_order(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _why_not(
    x: torch.Tensor,
    params: Tensors,
    grads: Tensors,
    states: tuple[Tensors, ...],
    rounding_seed: torch.Tensor | None,
) -> str | None:
    """Kernels walk over memory: no gaps, no element twice, and every tensor in the same order."""
    for i, p in enumerate(params):
        for what, t in (("parameter", p), ("gradient", grads[i])):
            if t.dtype not in backend.DTYPE_CODES:
                name = backend.dtype_name(t.dtype)
                return f"{what} {i} must be float32, bfloat16 or float16, got {name}"
        dense = p.is_contiguous() or p.stride() == torch.empty_like(p, device="meta").stride()
        if not dense:
            return f"parameter {i} must fill its memory without gaps, got strides {p.stride()}"
        for state in states:
            if state and state[i].numel() and not _same_order(p, state[i]):
                given = state[i].stride()
                return f"the state of parameter {i} must have strides {p.stride()}, got {given}"
    return None


def _why_not_at_random(x: torch.Tensor, *args: Any) -> str | None:
    """Of the kernels that round to nearest."""
    if args[-1] is not None:
        return "rounding at random takes the cuda backend"
    return _why_not(x, *args)


# Elements of a chunk on a CPU: large enough for its reads to run ahead, small enough to share out.
CPU_CHUNK = 65536


def cpu_fwd(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    masters: Tensors,
    groups: list[int],
    hyper: list[float],
    lrs: Tensors,
    max_norm: float | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    rounding_seed: None = None,
) -> torch.Tensor:
    """The `cpu` backend of the op."""
    grads = laid_out_alike(params, grads)
    tables = make_tables(
        params, grads, exp_avgs, exp_avg_sqs, steps, masters, groups, hyper, lrs, CPU_CHUNK
    )
    norm = torch.empty((0,) if max_norm is None else (), dtype=torch.float32)
    partial = torch.empty(0 if max_norm is None else len(tables.chunks), dtype=torch.float32)
    scalars = torch.empty(len(params), 8, dtype=torch.float32)
    backend.extension().adamw(  # type: ignore[union-attr]
        tables.tensors.data_ptr(),
        tables.chunks.data_ptr(),
        tables.hyper.data_ptr(),
        len(params),
        len(tables.chunks),
        CPU_CHUNK,
        -1.0 if max_norm is None else max_norm,
        pointer(grad_scale),
        pointer(found_inf),
        norm.data_ptr(),
        partial.data_ptr(),
        scalars.data_ptr(),
    )
    return norm


def cuda_chunk(elements: int) -> int:
    """Elements that a block of the CUDA kernels updates, of so many in all tensors.

    At least a pack of 8 for each of its 256 threads. The aim is 4096 blocks, several for every
    place on today's largest cards; it ends at 65536 elements, by when the tables are a thousandth
    of the traffic. A function of the size alone, since the norm must not depend on the card.
    """
    power = 1 << max((elements // 4096).bit_length() - 1, 0)
    return min(max(power, 2048), 65536)


def cuda_fwd(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    masters: Tensors,
    groups: list[int],
    hyper: list[float],
    lrs: Tensors,
    max_norm: float | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    rounding_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The `cuda` backend of the op."""
    chunk = cuda_chunk(sum(p.numel() for p in params))
    grads = laid_out_alike(params, grads)
    tables = make_tables(
        params, grads, exp_avgs, exp_avg_sqs, steps, masters, groups, hyper, lrs, chunk
    )
    chunks = len(tables.chunks)
    # 1024 sums at most, 4 KB, as every block of the update reads them all.
    programs = max(1, min(chunks, 1024))
    new = params[0].new_empty
    norm = new((0,) if max_norm is None else (), dtype=torch.float32)
    partial = None if max_norm is None else new(programs, dtype=torch.float32)
    scalars = new(len(params), 8, dtype=torch.float32)
    backend.launch_cuda_on(
        params[0].device,
        "adamw",
        tables.tensors,
        tables.chunks,
        tables.hyper,
        len(params),
        chunks,
        chunk,
        -1.0 if max_norm is None else max_norm,
        grad_scale,
        found_inf,
        rounding_seed,
        norm,
        partial,
        programs,
        scalars,
    )
    return norm


OP = backend.Op(
    "adamw",
    {
        "torch": backend.Implementation(reference_fwd),
        "cpu": backend.Implementation(cpu_fwd, why_not=_why_not_at_random),
        "triton": backend.triton_implementation(
            "adamw", why_not=_why_not_at_random, forward_only=True
        ),
        "cuda": backend.Implementation(cuda_fwd, why_not=_why_not),
    },
    listed=False,  # it writes to lists of tensors: tests/test_adamw.py
)


def _fwd(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    masters: Tensors,
    groups: list[int],
    hyper: list[float],
    lrs: Tensors,
    max_norm: float | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    rounding_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    states = (exp_avgs, exp_avg_sqs, masters)
    implementation = OP.choose(params[0], params, grads, states, rounding_seed)
    tensors = params, grads, *states[:2], steps, masters
    seed = () if rounding_seed is None else (rounding_seed,)
    rest = groups, hyper, lrs, max_norm, grad_scale, found_inf, *seed
    result = implementation.fwd(*tensors, *rest)
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *steps, *masters])
    return result


def _fake_fwd(params: Tensors, *rest: Any) -> torch.Tensor:
    max_norm = rest[8]
    shape = (0,) if max_norm is None else ()
    return params[0].new_empty(shape, dtype=torch.float32)


adamw_fwd = define(
    "adamw_fwd(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] masters, int[] groups,"
    " float[] hyper, Tensor[] lrs, float? max_norm, Tensor? grad_scale, Tensor? found_inf,"
    " Tensor? rounding_seed=None)"
    " -> Tensor",
    _fwd,
    _fake_fwd,
)
