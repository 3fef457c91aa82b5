"""A block's output joins the residual stream, and the next LayerNorm: one pass over both.

r = residual + z (x + x_bias), rounded to residual's dtype,   y = layer_norm(r)

z are the factors of dropout, as in `dropout_add`. The norm sees r as it is returned, rounded: it
is what backward finds, so xhat is the same in both directions, and y is exactly the layer_norm of
the returned stream.

Backward, with dy and dr the gradients of y and r, of which either may be missing:

dresidual = dr + (the dx of layer_norm for dy),  dx = z dresidual,  dx_bias_j = sum_i dx_ij

and dw and db as in layer_norm. Without dropout and in one dtype dx is dresidual, computed once.
"""

from __future__ import annotations

from typing import Any

import torch

from gptfast import backend
from gptfast.ops.dropout_add import check_residual, residual_sum
from gptfast.ops.layer_norm import (
    Tensors4,
    Tensors5,
    check_rows,
    cpu_backward,
    cpu_forward,
    cuda_backward,
    cuda_forward,
    gradients,
    normalise,
    sum_rows,
)
from gptfast.ops.library import define, statistics_dtype
from gptfast.ops.philox import checked_seed, row_factors


def reference_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
) -> Tensors4:
    """The formula in PyTorch."""
    r = residual_sum(x, residual, x_bias, seed, dropout_p)
    y, mean, rstd = normalise(r, w, b, eps)
    return y.to(x.dtype).contiguous(), r, mean, rstd


def reference_bwd(
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
    """The gradient formulas in PyTorch; without mean, those of `add_rms_norm`."""
    dtype = statistics_dtype(r.dtype)
    needs_dresidual, needs_dx, needs_dw, needs_db, needs_dx_bias = needs
    total = torch.zeros((), dtype=dtype, device=r.device) if dr is None else dr.to(dtype)
    dw = db = dx_bias = rstd.new_empty(0)
    if dy is not None:
        needs_total = needs_dx or needs_dresidual or needs_dx_bias
        through, dw, db = gradients(dy, r, w, mean, rstd, [needs_total, needs_dw, needs_db])
        total = total + through if needs_total else total
    branch = total
    if seed is not None and (needs_dx or needs_dx_bias):
        branch = total * row_factors(seed, r.shape, dropout_p, dtype)
    if needs_dx_bias:
        dx_bias = sum_rows(branch)
    dx = branch.to(x_dtype).contiguous() if needs_dx else r.new_empty(0, dtype=x_dtype)
    dresidual = total.to(r.dtype, copy=True).contiguous() if needs_dresidual else r.new_empty(0)
    return dresidual, dx, dw, db, dx_bias


OP = backend.Op(
    "add_layer_norm",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_forward, cpu_backward),
        "triton": backend.triton_implementation("add_layer_norm", "layer_norm"),
        "cuda": backend.Implementation(cuda_forward, cuda_backward),
    },
)


def _fwd(x: torch.Tensor, *args: Any) -> Tensors4:
    return OP.choose(x).fwd(x, *args)


def _bwd(r: torch.Tensor, *args: Any) -> Tensors5:
    return OP.choose(r).bwd(r, *args)


def _fake_fwd(x: torch.Tensor, residual: torch.Tensor, *_: Any) -> Tensors4:
    mean = x.new_empty(x.shape[:-1], dtype=statistics_dtype(x.dtype))
    y, r = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, residual))
    return y, r, mean, torch.empty_like(mean)


def _fake_bwd(r: torch.Tensor, *args: Any) -> Tensors5:
    return fake_gradients(r, *args[-2:])  # type: ignore[return-value]


def fake_gradients(
    r: torch.Tensor, x_dtype: torch.dtype, needs: list[bool]
) -> tuple[torch.Tensor, ...]:
    """Fake dresidual, dx, and as many gradients of parameters as `needs` has entries for."""
    wide = [
        torch.empty_like(r, dtype=dtype, memory_format=torch.contiguous_format)
        if need
        else r.new_empty(0, dtype=dtype)
        for need, dtype in zip(needs, (r.dtype, x_dtype), strict=False)
    ]
    N, dtype = r.shape[-1], statistics_dtype(r.dtype)
    return *wide, *(r.new_empty(N if need else 0, dtype=dtype) for need in needs[2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors4) -> None:
    x, _, w, b, x_bias, seed, _, ctx.dropout_p = inputs
    _, r, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(r, w, mean, rstd, seed)
    ctx.dtypes = [x.dtype, *(None if p is None else p.dtype for p in (w, b, x_bias))]


def _backward(ctx: Any, dy: torch.Tensor | None, dr: torch.Tensor | None, *_: Any) -> Any:
    r, w, mean, rstd, seed = ctx.saved_tensors
    grads = residual_gradients(
        lambda needs: add_layer_norm_bwd(
            r, dy, dr, w, mean, rstd, seed, ctx.dropout_p, ctx.dtypes[0], needs
        ),
        ctx.needs_input_grad[1:6],
        same=seed is None and ctx.dtypes[0] == r.dtype,
        has_dy=dy is not None,
        dtypes=ctx.dtypes[1:],
    )
    return None, *grads, None, None, None


def residual_gradients(
    bwd: Any, wanted: tuple[bool, ...], *, same: bool, has_dy: bool, dtypes: list[torch.dtype]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients that autograd wants, from the backward op `bwd(needs)`.

    Args:
        bwd: returns dresidual, dx, those of the norm's parameters, and x_bias's.
        wanted: whether it wants those of x, residual, the norm's parameters and x_bias.
        same: whether dx is dresidual; it is then computed and written once.
        has_dy: whether y was used; the norm's parameters get no gradient otherwise.
        dtypes: of the parameters.
    """
    x, residual, *norms, x_bias = wanted
    needs = [residual or (x and same), x and not same, *(n and has_dy for n in norms), x_bias]
    dresidual, dx, *parameters = bwd(needs)
    return (
        (dresidual if same else dx) if x else None,
        dresidual if residual else None,
        *(
            g.to(dtype) if need else None
            for g, dtype, need in zip(parameters, dtypes, needs[2:], strict=True)
        ),
    )


add_layer_norm_bwd = define(
    "add_layer_norm_bwd(Tensor r, Tensor? dy, Tensor? dr, Tensor? w, Tensor mean, Tensor rstd,"
    " Tensor? seed, float dropout_p, ScalarType x_dtype, bool[5] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
add_layer_norm_fwd = define(
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? w, Tensor? b, Tensor? x_bias,"
    " Tensor? seed, float eps, float dropout_p) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual_out = residual + dropout(x + x_bias), y = layer_norm(residual_out).

    Args:
        x: (..., N), what a block returns; any strides; float32, bfloat16, float16 (float64 on the
            torch backend).
        residual: like x, in x's dtype or float32: a stream in float32 loses nothing while the
            blocks compute in half precision.
        weight: (N,) or None for 1; any floating dtype, which may differ from x's.
        bias: (N,) or None for 0.
        eps: added to the variance.
        x_bias: (N,) or None for 0: the bias of the linear layer that made x.
        dropout_p: probability of dropping an element of x + x_bias, in [0, 1).
        seed: int64 scalar tensor that determines the dropout mask; None draws one from PyTorch's
            generator, so `torch.manual_seed` decides.

    Returns:
        y, in x's dtype, and residual_out, in residual's, both (..., N) and contiguous. The norm
        sees residual_out as returned, after its rounding.

    Raises:
        TypeError: a tensor is not floating point, or residual's dtype is another.
        ValueError: shapes that do not fit, or dropout_p outside [0, 1).
        RuntimeError: tensors on different devices.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    op = "add_layer_norm"
    check_residual(op, x, residual)
    check_rows(op, x, weight=weight, bias=bias, x_bias=x_bias)
    seed = checked_seed(op, seed, dropout_p, x.device)
    return add_layer_norm_fwd(x, residual, weight, bias, x_bias, seed, eps, dropout_p)[:2]
