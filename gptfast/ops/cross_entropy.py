"""Cross-entropy of logits x (M, V) with target classes t (M,), a loss per row.

lse = log sum_c exp(x_c)
loss = (1 - s) w_t (lse - x_t) + (s / V) sum_c w_c (lse - x_c)

with class weights w (1 where none are given) and label smoothing s; 0 where t is `ignore_index`.
Backward, for an incoming gradient g per row and a = (1 - s) w_t + (s / V) sum_c w_c:

dx_c = g (a exp(x_c - lse) - (1 - s) w_t [c = t] - (s / V) w_c)

Sums and means over rows are left to PyTorch: they cost M reads next to M V.
"""

from __future__ import annotations

from typing import Any

import torch

from gptfast import backend
from gptfast.ops.library import (
    check_device,
    check_floating,
    check_shape,
    define,
    fp32_parameter,
    pointer,
    statistics_dtype,
)

REDUCTIONS = ("none", "mean", "sum")
Tensors2 = tuple[torch.Tensor, torch.Tensor]


def reference_fwd(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensors2:
    """The formula in PyTorch."""
    V = x.shape[-1]
    xf = x.to(statistics_dtype(x.dtype))
    ignored = target == ignore_index
    if x.device.type == "cpu":  # elsewhere the look would wait for the device; gather asserts there
        check_targets(target, V, ignore_index)
    t = target.masked_fill(ignored, 0)
    lse = xf.new_zeros(x.shape[0])
    if V:  # not torch.logsumexp: an infinite logit is to make the loss NaN, as in PyTorch's own
        top = xf.amax(-1)
        lse = top + (xf - top[:, None]).exp().sum(-1).log()
    w = xf.new_ones(V) if weight is None else weight.to(xf.dtype)
    hit = (lse - xf.gather(1, t[:, None])[:, 0]) * w[t] if V else lse
    loss = (1 - label_smoothing) * hit
    if label_smoothing:
        loss = loss + label_smoothing / V * ((lse[:, None] - xf) * w).sum(-1)
    return loss.masked_fill(ignored, 0), lse.masked_fill(ignored, 0)


def reference_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """The gradient formulas in PyTorch."""
    M, V = x.shape
    xf = x.to(statistics_dtype(x.dtype))
    ignored = target == ignore_index
    t = target.masked_fill(ignored, 0)
    w = xf.new_ones(V) if weight is None else weight.to(xf.dtype)
    hit = (1 - label_smoothing) * (w[t] if V else xf.new_zeros(M))
    a = hit + label_smoothing / max(V, 1) * w.sum()
    dx = a[:, None] * torch.exp(xf - lse[:, None]) - label_smoothing / max(V, 1) * w
    if V:
        dx.scatter_add_(1, t[:, None], -hit[:, None])
    dx = (dx * dloss[:, None]).masked_fill(ignored[:, None], 0)
    return dx.to(x.dtype).contiguous()


def cpu_fwd(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensors2:
    """The `cpu` backend of the forward op."""
    x, target, weight = x.contiguous(), target.contiguous(), fp32_parameter(weight)
    M, V = x.shape
    loss = torch.empty(M, dtype=torch.float32, device=x.device)
    lse = torch.empty_like(loss)
    bad_row = backend.extension().cross_entropy_fwd(  # type: ignore[union-attr]
        x.data_ptr(),
        target.data_ptr(),
        pointer(weight),
        loss.data_ptr(),
        lse.data_ptr(),
        M,
        V,
        ignore_index,
        label_smoothing,
        backend.DTYPE_CODES[x.dtype],
    )
    if bad_row >= 0:
        _raise_bad_target(target, bad_row, V, ignore_index)
    return loss, lse


def cpu_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """The `cpu` backend of the backward op."""
    x, target, weight = x.contiguous(), target.contiguous(), fp32_parameter(weight)
    dloss, lse = dloss.contiguous(), lse.contiguous()
    dx = torch.empty_like(x)
    backend.extension().cross_entropy_bwd(  # type: ignore[union-attr]
        dloss.data_ptr(),
        x.data_ptr(),
        target.data_ptr(),
        pointer(weight),
        lse.data_ptr(),
        dx.data_ptr(),
        x.shape[0],
        x.shape[1],
        ignore_index,
        label_smoothing,
        backend.DTYPE_CODES[x.dtype],
    )
    return dx


def check_targets(target: torch.Tensor, V: int, ignore_index: int) -> None:
    """Raise IndexError naming the first target outside [0, V) that is not ignored (it waits)."""
    bad = ((target < 0) | (target >= V)) & (target != ignore_index)
    if bad.any():
        _raise_bad_target(target, int(bad.nonzero()[0]), V, ignore_index)


def _raise_bad_target(target: torch.Tensor, row: int, V: int, ignore_index: int) -> None:
    raise IndexError(
        f"cross_entropy: target must be in [0, {V}) or ignore_index {ignore_index}, "
        f"got {int(target[row])} at position {row}"
    )


OP = backend.Op(
    "cross_entropy",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("cross_entropy"),
    },
)


def _fwd(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensors2:
    return OP.choose(x).fwd(x, target, weight, ignore_index, label_smoothing)


def _bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    return OP.choose(x).bwd(dloss, x, target, weight, lse, ignore_index, label_smoothing)


def _fake_fwd(x: torch.Tensor, *_: Any) -> Tensors2:
    loss = x.new_empty(x.shape[0], dtype=statistics_dtype(x.dtype))
    return loss, torch.empty_like(loss)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors2) -> None:
    x, target, weight, ctx.ignore_index, ctx.label_smoothing = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(x, target, weight, lse)


def _backward(ctx: Any, dloss: torch.Tensor, _: Any) -> tuple[Any, ...]:
    x, target, weight, lse = ctx.saved_tensors
    dx = cross_entropy_bwd(dloss, x, target, weight, lse, ctx.ignore_index, ctx.label_smoothing)
    return None, dx, None, None, None, None


cross_entropy_bwd = define(
    "cross_entropy_bwd(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor lse,"
    " SymInt ignore_index, float label_smoothing) -> Tensor",
    _bwd,
    lambda dloss, x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
)
cross_entropy_fwd = define(
    "cross_entropy_fwd(Tensor x, Tensor target, Tensor? weight, SymInt ignore_index,"
    " float label_smoothing) -> (Tensor, Tensor)",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """loss = -log softmax(logits)[target], averaged over the targets that are not ignored.

    Args:
        logits: (..., V), any strides; float32, bfloat16, float16 (float64 on the torch backend).
        target: (...), int64 class indices in [0, V), or `ignore_index`.
        weight: (V,) class weights, or None for 1. They get no gradient.
        ignore_index: rows with this target contribute no loss and no gradient.
        reduction: "mean" (divides by the sum of the targets' weights), "sum" or "none".
        label_smoothing: in [0, 1], the share of the target spread evenly over all classes.

    Returns:
        Scalar, or (...) for "none"; float32 whatever the dtype of the logits (float64 for float64).
        The mean of no rows is NaN, as in PyTorch.

    Raises:
        TypeError: logits not floating point, or target not int64.
        ValueError: shapes that do not fit, unknown reduction, label_smoothing outside [0, 1].
        IndexError: a target outside [0, V), on a CPU; the first one is named. On a GPU its loss is
            NaN (torch backend: a device-side assertion).
        RuntimeError: tensors on different devices.

    Source: Szegedy et al., "Rethinking the Inception Architecture", 2015, for label smoothing.
    """
    check_floating("cross_entropy", "logits", logits)
    if logits.dim() == 0:
        raise ValueError("cross_entropy: logits must be (..., V), got a scalar")
    if not isinstance(target, torch.Tensor):
        raise TypeError(
            f"cross_entropy: target must be an int64 tensor, got {type(target).__name__}"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"cross_entropy: target must be int64 class indices, got {target.dtype}")
    check_shape("cross_entropy", "target", target, tuple(logits.shape[:-1]))
    V = logits.shape[-1]
    if weight is not None:
        weight = weight.detach()
        check_floating("cross_entropy", "weight", weight)
        check_shape("cross_entropy", "weight", weight, (V,))
    check_device("cross_entropy", logits.device, target=target, weight=weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"cross_entropy: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing must be in [0, 1], got {label_smoothing}")

    rows = target.reshape(-1)
    loss, _ = cross_entropy_fwd(
        logits.reshape(rows.shape[0], V), rows, weight, ignore_index, label_smoothing
    )
    if reduction == "none":
        return loss.reshape(target.shape)
    if reduction == "sum":
        return loss.sum()
    counted = rows != ignore_index
    if weight is None:
        return loss.sum() / counted.sum()
    return loss.sum() / (weight.to(loss.dtype)[rows.masked_fill(~counted, 0)] * counted).sum()
