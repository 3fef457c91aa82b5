"""LayerNorm over the last dimension: y = (x - mean) rstd w + b.

mean_i = mean_j x_ij,  rstd_i = 1 / sqrt(mean_j (x_ij - mean_i)^2 + eps),  xhat = (x - mean) rstd

Backward, with wdy = dy w, c1_i = mean_j(wdy xhat) and c2_i = mean_j(wdy):

dx = (wdy - c1 xhat - c2) rstd,   dw_j = sum_i dy_ij xhat_ij,   db_j = sum_i dy_ij
"""

from __future__ import annotations

from typing import Any

import torch

from gptfast import backend
from gptfast.ops.library import (
    check_device,
    check_floating,
    check_shape,
    cuda_parameter,
    cuda_room,
    define,
    fp32_parameter,
    pointer,
    statistics_dtype,
)
from gptfast.ops.philox import dropout_threshold

Tensors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Tensors4 = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Tensors5 = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def reference_fwd(
    x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None, eps: float
) -> Tensors3:
    """The formula in PyTorch."""
    y, mean, rstd = normalise(x, w, b, eps)
    return y.to(x.dtype).contiguous(), mean, rstd


def normalise(
    x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None, eps: float
) -> Tensors3:
    """y, mean and rstd in the dtype of the statistics."""
    xf = x.to(statistics_dtype(x.dtype))
    mean = xf.mean(-1)
    centred = xf - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd.unsqueeze(-1)
    if w is not None:
        y = y * w
    if b is not None:
        y = y + b
    return y, mean, rstd


def reference_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> Tensors3:
    """The gradient formulas in PyTorch."""
    dx, dw, db = gradients(dy, x, w, mean, rstd, needs)
    return dx.to(x.dtype).contiguous(), dw, db


def gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    needs: list[bool],
) -> Tensors3:
    """dx, dw and db in the dtype of the statistics; without mean, RMSNorm's."""
    dtype = statistics_dtype(x.dtype)
    dyf = dy.to(dtype)
    rs = rstd.unsqueeze(-1)
    xf = x.to(dtype)
    xhat = (xf if mean is None else xf - mean.unsqueeze(-1)) * rs
    dx = dw = db = dyf.new_empty(0)
    if needs[0]:
        wdy = dyf if w is None else dyf * w
        dx = wdy - (wdy * xhat).mean(-1, keepdim=True) * xhat
        if mean is not None:
            dx = dx - wdy.mean(-1, keepdim=True)
        dx = dx * rs
    if needs[1]:
        dw = sum_rows(dyf * xhat)
    if needs[2]:
        db = sum_rows(dyf)
    return dx, dw, db


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """sum_i x_ij over all dimensions but the last, in fresh memory."""
    return x.flatten(0, -2).sum(0) if x.dim() > 1 else x.clone()


def cpu_fwd(
    x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None, eps: float
) -> Tensors3:
    """The `cpu` backend of the forward op."""
    y, _, mean, rstd = cpu_forward(x, None, w, b, None, None, eps, 0.0)
    return y, mean, rstd


def cpu_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> Tensors3:
    """The `cpu` backend of the backward op."""
    needs = [needs[0], False, *needs[1:], False]
    dx, _, dw, db, _ = cpu_backward(x, dy, None, w, mean, rstd, None, 0.0, x.dtype, needs)
    return dx, dw, db


def cpu_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    is_rms: bool = False,
) -> Tensors4:
    """y, r, mean and rstd of a norm behind the sum of the residual stream, as `add_layer_norm`.

    Without a residual r is x; with `is_rms` the norm is RMSNorm, and mean is empty.
    """
    x, w, b, x_bias = x.contiguous(), fp32_parameter(w), fp32_parameter(b), fp32_parameter(x_bias)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = rstd.new_empty(0) if is_rms else torch.empty_like(rstd)
    y = torch.empty_like(x)
    r = x
    if residual is not None:
        residual = residual.contiguous()
        r = torch.empty_like(residual)
    backend.extension().norm_fwd(  # type: ignore[union-attr]
        x.data_ptr(),
        pointer(residual),
        pointer(x_bias),
        pointer(w),
        pointer(b),
        y.data_ptr(),
        0 if residual is None else r.data_ptr(),
        0 if is_rms else mean.data_ptr(),
        rstd.data_ptr(),
        rstd.numel(),
        x.shape[-1],
        eps,
        dropout_threshold(dropout_p),
        0 if seed is None else int(seed),
        backend.DTYPE_CODES[x.dtype],
        backend.DTYPE_CODES[r.dtype],
    )
    return y, r, mean, rstd


def cpu_backward(
    r: torch.Tensor,
    dy: torch.Tensor | None,
    dr: torch.Tensor | None,
    w: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    needs: list[bool],
) -> Tensors5:
    """The gradients of `cpu_forward`: dresidual, dx, dw, db, dx_bias, as `needs` says."""
    r, rstd, w = r.contiguous(), rstd.contiguous(), fp32_parameter(w)
    dy, dr, mean = (None if t is None else t.contiguous() for t in (dy, dr, mean))
    M, N = rstd.numel(), r.shape[-1]
    empty = r.new_empty(0)
    dresidual = torch.empty_like(r) if needs[0] else empty
    dx = torch.empty_like(r, dtype=x_dtype) if needs[1] else r.new_empty(0, dtype=x_dtype)
    sums = [rstd.new_empty(N if need else 0) for need in needs[2:]]
    # A function of M alone, so that the result does not depend on the number of threads.
    blocks = min(max(M // 32, 1), 64)
    partial = rstd.new_empty((blocks, 3, N) if any(needs[2:]) else 0)
    backend.extension().norm_bwd(  # type: ignore[union-attr]
        r.data_ptr(),
        pointer(dy),
        pointer(dr),
        pointer(w),
        pointer(mean),
        rstd.data_ptr(),
        dresidual.data_ptr() if needs[0] else 0,
        dx.data_ptr() if needs[1] else 0,
        *(g.data_ptr() if need else 0 for g, need in zip(sums, needs[2:], strict=True)),
        partial.data_ptr(),
        blocks,
        M,
        N,
        dropout_threshold(dropout_p),
        0 if seed is None else int(seed),
        backend.DTYPE_CODES[x_dtype],
        backend.DTYPE_CODES[r.dtype],
    )
    return dresidual, dx, *sums  # type: ignore[return-value]


def cuda_fwd(
    x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None, eps: float
) -> Tensors3:
    """The `cuda` backend of the forward op."""
    y, _, mean, rstd = cuda_forward(x, None, w, b, None, None, eps, 0.0)
    return y, mean, rstd


def cuda_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> Tensors3:
    """The `cuda` backend of the backward op."""
    needs = [needs[0], False, *needs[1:], False]
    dx, _, dw, db, _ = cuda_backward(x, dy, None, w, mean, rstd, None, 0.0, x.dtype, needs)
    return dx, dw, db


def cuda_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    is_rms: bool = False,
) -> Tensors4:
    """What `cpu_forward` returns, by the CUDA kernels."""
    x = x.contiguous()
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = None if is_rms else torch.empty_like(rstd)
    y = torch.empty_like(x)
    r = x
    if residual is not None:
        residual = residual.contiguous()
        r = torch.empty_like(residual)
    parameters = *cuda_parameter(x_bias), *cuda_parameter(w), *cuda_parameter(b)
    results = y, None if residual is None else r, mean, rstd
    sizes = rstd.numel(), x.shape[-1], eps, cuda_room(x)
    mask = seed, dropout_threshold(dropout_p)
    codes = (backend.DTYPE_CODES[r.dtype],)
    backend.launch_cuda(
        "layer_norm_fwd", x, x, residual, *parameters, *mask, *results, *sizes, *codes
    )
    return y, r, rstd.new_empty(0) if mean is None else mean, rstd


def cuda_backward(
    r: torch.Tensor,
    dy: torch.Tensor | None,
    dr: torch.Tensor | None,
    w: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    needs: list[bool],
) -> Tensors5:
    """What `cpu_backward` returns, by the CUDA kernels."""
    r, rstd = r.contiguous(), rstd.contiguous()
    dy, dr, mean = (None if t is None else t.contiguous() for t in (dy, dr, mean))
    M, N = rstd.numel(), r.shape[-1]
    dresidual = torch.empty_like(r) if needs[0] else None
    dx = torch.empty_like(r, dtype=x_dtype) if needs[1] else None
    # Zeros where no row is: the kernels are not launched then.
    new = rstd.new_empty if M else rstd.new_zeros
    sums = [new(N) if need else None for need in needs[2:]]
    programs = cuda_programs(M)
    partial = c1_c2 = None
    if any(needs[2:]):
        partial = rstd.new_empty(programs, 3 if needs[4] else 2 if needs[3] else 1, N)
        c1_c2 = rstd.new_empty(M, 2) if needs[4] else None
    given = r, dy, dr, *cuda_parameter(w), mean, rstd, seed, dropout_threshold(dropout_p)
    sizes = programs, M, N, cuda_room(r), backend.DTYPE_CODES[x_dtype]
    backend.launch_cuda("layer_norm_bwd", r, *given, dresidual, dx, *sums, partial, c1_c2, *sizes)
    empty = r.new_empty(0)
    dx = r.new_empty(0, dtype=x_dtype) if dx is None else dx
    first = empty if dresidual is None else dresidual
    return first, dx, *(rstd.new_empty(0) if g is None else g for g in sums)  # type: ignore[return-value]


def cuda_programs(M: int) -> int:
    """In how many parts the CUDA backward sums dw and db: a function of M alone, not of the card.

    M / 24 keep what they write and read again, 16 N bytes each where there are two sums, within a
    ninth of the 6 M N bytes that bfloat16 moves; 24 N of three sums within an eighth of the 8 M N
    beside the residual stream. 1024 keep today's large cards busy.
    """
    return max(1, min(M // 24, 1024))


OP = backend.Op(
    "layer_norm",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("layer_norm"),
        "cuda": backend.Implementation(cuda_fwd, cuda_bwd),
    },
)


def _fwd(x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None, eps: float) -> Tensors3:
    return OP.choose(x).fwd(x, w, b, eps)


def _bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> Tensors3:
    return OP.choose(x).bwd(dy, x, w, mean, rstd, needs)


def _fake_fwd(x: torch.Tensor, *_: Any) -> Tensors3:
    mean = x.new_empty(x.shape[:-1], dtype=statistics_dtype(x.dtype))
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        mean,
        torch.empty_like(mean),
    )


def _fake_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> Tensors3:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else x.new_empty(0)
    dw, db = (
        x.new_empty(x.shape[-1], dtype=mean.dtype) if need else x.new_empty(0) for need in needs[1:]
    )
    return dx, dw, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors3) -> None:
    x, w, b, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, w, mean, rstd)
    ctx.bias_dtype = None if b is None else b.dtype


def _backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    x, w, mean, rstd = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1:4])
    dx, dw, db = layer_norm_bwd(dy, x, w, mean, rstd, needs)
    return (
        None,
        dx if needs[0] else None,
        dw.to(w.dtype) if needs[1] else None,
        db.to(ctx.bias_dtype) if needs[2] else None,
        None,
    )


layer_norm_bwd = define(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? w, Tensor mean, Tensor rstd, bool[3] needs)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
layer_norm_fwd = define(
    "layer_norm_fwd(Tensor x, Tensor? w, Tensor? b, float eps) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
)


def check_rows(op: str, x: torch.Tensor, **parameters: torch.Tensor | None) -> None:
    """Check x (..., N) and parameters (N,), which may be absent."""
    check_floating(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    for name, parameter in parameters.items():
        if parameter is not None:
            check_floating(op, name, parameter)
            check_shape(op, name, parameter, (x.shape[-1],))
    check_device(op, x.device, **parameters)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    Args:
        x: (..., N), any strides; float32, bfloat16, float16 (float64 on the torch backend).
        weight: (N,) or None for 1; any floating dtype, which may differ from x's.
        bias: (N,) or None for 0.
        eps: added to the variance.

    Returns:
        (..., N) in x's dtype, contiguous. Statistics are fp32 and two-pass.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: x has no dimension, or weight or bias is not (N,).
        RuntimeError: weight or bias is on another device than x.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    check_rows("layer_norm", x, weight=weight, bias=bias)
    return layer_norm_fwd(x, weight, bias, eps)[0]
