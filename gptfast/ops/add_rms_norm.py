"""A block's output joins the residual stream, and the next RMSNorm: one pass over both.

r = residual + z (x + x_bias), rounded to residual's dtype,   y = rms_norm(r)

Everything else is as in `add_layer_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gptfast import backend
from gptfast.ops.add_layer_norm import fake_gradients, residual_gradients
from gptfast.ops.add_layer_norm import reference_bwd as layer_norm_bwd
from gptfast.ops.dropout_add import check_residual, residual_sum
from gptfast.ops.layer_norm import (
    Tensors4,
    check_rows,
    cpu_backward,
    cpu_forward,
    cuda_backward,
    cuda_forward,
)
from gptfast.ops.library import define, statistics_dtype
from gptfast.ops.philox import checked_seed
from gptfast.ops.rms_norm import normalise

Tensors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    w: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
) -> Tensors3:
    """The formula in PyTorch."""
    r = residual_sum(x, residual, x_bias, seed, dropout_p)
    y, rstd = normalise(r, w, eps)
    return y.to(x.dtype).contiguous(), r, rstd


def _without_bias(backward: Callable[..., Any]) -> Callable[..., Tensors4]:
    """The backward op, by one of `add_layer_norm` that needs neither mean nor bias."""

    def bwd(
        r: torch.Tensor,
        dy: torch.Tensor | None,
        dr: torch.Tensor | None,
        w: torch.Tensor | None,
        rstd: torch.Tensor,
        seed: torch.Tensor | None,
        dropout_p: float,
        x_dtype: torch.dtype,
        needs: list[bool],
    ) -> Tensors4:
        needs = [*needs[:3], False, needs[3]]
        dresidual, dx, dw, _, dx_bias = backward(
            r, dy, dr, w, None, rstd, seed, dropout_p, x_dtype, needs
        )
        return dresidual, dx, dw, dx_bias

    return bwd


def _by_rows(forward: Callable[..., Any], backward: Callable[..., Any]) -> backend.Implementation:
    """Both passes by a backend's kernels of `layer_norm`, which has a mean and a bias besides."""

    def fwd(
        x: torch.Tensor,
        residual: torch.Tensor,
        w: torch.Tensor | None,
        x_bias: torch.Tensor | None,
        seed: torch.Tensor | None,
        eps: float,
        dropout_p: float,
    ) -> Tensors3:
        y, r, _, rstd = forward(x, residual, w, None, x_bias, seed, eps, dropout_p, is_rms=True)
        return y, r, rstd

    return backend.Implementation(fwd, _without_bias(backward))


OP = backend.Op(
    "add_rms_norm",
    {
        "torch": backend.Implementation(reference_fwd, _without_bias(layer_norm_bwd)),
        "cpu": _by_rows(cpu_forward, cpu_backward),
        "triton": backend.triton_implementation("add_rms_norm", "layer_norm"),
        "cuda": _by_rows(cuda_forward, cuda_backward),
    },
)


def _fwd(x: torch.Tensor, *args: Any) -> Tensors3:
    return OP.choose(x).fwd(x, *args)


def _bwd(r: torch.Tensor, *args: Any) -> Tensors4:
    return OP.choose(r).bwd(r, *args)


def _fake_fwd(x: torch.Tensor, residual: torch.Tensor, *_: Any) -> Tensors3:
    y, r = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, residual))
    return y, r, x.new_empty(x.shape[:-1], dtype=statistics_dtype(x.dtype))


def _fake_bwd(r: torch.Tensor, *args: Any) -> Tensors4:
    return fake_gradients(r, *args[-2:])  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors3) -> None:
    x, _, w, x_bias, seed, _, ctx.dropout_p = inputs
    _, r, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(r, w, rstd, seed)
    ctx.dtypes = [x.dtype, *(None if p is None else p.dtype for p in (w, x_bias))]


def _backward(ctx: Any, dy: torch.Tensor | None, dr: torch.Tensor | None, *_: Any) -> Any:
    r, w, rstd, seed = ctx.saved_tensors
    grads = residual_gradients(
        lambda needs: add_rms_norm_bwd(
            r, dy, dr, w, rstd, seed, ctx.dropout_p, ctx.dtypes[0], needs
        ),
        ctx.needs_input_grad[1:5],
        same=seed is None and ctx.dtypes[0] == r.dtype,
        has_dy=dy is not None,
        dtypes=ctx.dtypes[1:],
    )
    return None, *grads, None, None, None


add_rms_norm_bwd = define(
    "add_rms_norm_bwd(Tensor r, Tensor? dy, Tensor? dr, Tensor? w, Tensor rstd, Tensor? seed,"
    " float dropout_p, ScalarType x_dtype, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
add_rms_norm_fwd = define(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? w, Tensor? x_bias, Tensor? seed,"
    " float eps, float dropout_p) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    x_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual_out = residual + dropout(x + x_bias), y = rms_norm(residual_out).

    Args:
        x: (..., N), what a block returns; any strides; float32, bfloat16, float16 (float64 on the
            torch backend).
        residual: like x, in x's dtype or float32.
        weight: (N,) or None for 1; any floating dtype, which may differ from x's.
        eps: added to the mean of squares; None means `torch.finfo(x.dtype).eps`.
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

    Limits: as in `rms_norm`.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    op = "add_rms_norm"
    check_residual(op, x, residual)
    check_rows(op, x, weight=weight, x_bias=x_bias)
    seed = checked_seed(op, seed, dropout_p, x.device)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return add_rms_norm_fwd(x, residual, weight, x_bias, seed, eps, dropout_p)[:2]
