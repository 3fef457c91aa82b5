"""RMSNorm over the last dimension: y = x rstd w.

rstd_i = 1 / sqrt(mean_j x_ij^2 + eps),  xhat = x rstd

Backward, with wdy = dy w and c1_i = mean_j(wdy xhat):

dx = (wdy - c1 xhat) rstd,   dw_j = sum_i dy_ij xhat_ij
"""

from __future__ import annotations

from typing import Any

import torch

from gptfast import backend
from gptfast.ops.layer_norm import (
    check_rows,
    cpu_backward,
    cpu_forward,
    cuda_backward,
    cuda_forward,
    gradients,
)
from gptfast.ops.library import define, statistics_dtype

Tensors2 = tuple[torch.Tensor, torch.Tensor]


def reference_fwd(x: torch.Tensor, w: torch.Tensor | None, eps: float) -> Tensors2:
    """The formula in PyTorch."""
    y, rstd = normalise(x, w, eps)
    return y.to(x.dtype).contiguous(), rstd


def normalise(x: torch.Tensor, w: torch.Tensor | None, eps: float) -> Tensors2:
    """y and rstd in the dtype of the statistics."""
    xf = x.to(statistics_dtype(x.dtype))
    rstd = torch.rsqrt(xf.square().mean(-1) + eps)
    y = xf * rstd.unsqueeze(-1)
    return y if w is None else y * w, rstd


def reference_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    rstd: torch.Tensor,
    needs: list[bool],
) -> Tensors2:
    """The gradient formulas in PyTorch."""
    dx, dw, _ = gradients(dy, x, w, None, rstd, [*needs, False])
    return dx.to(x.dtype).contiguous(), dw


def cpu_fwd(x: torch.Tensor, w: torch.Tensor | None, eps: float) -> Tensors2:
    """The `cpu` backend of the forward op."""
    y, _, _, rstd = cpu_forward(x, None, w, None, None, None, eps, 0.0, is_rms=True)
    return y, rstd


def cpu_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    rstd: torch.Tensor,
    needs: list[bool],
) -> Tensors2:
    """The `cpu` backend of the backward op."""
    needs = [needs[0], False, needs[1], False, False]
    dx, _, dw, _, _ = cpu_backward(x, dy, None, w, None, rstd, None, 0.0, x.dtype, needs)
    return dx, dw


def cuda_fwd(x: torch.Tensor, w: torch.Tensor | None, eps: float) -> Tensors2:
    """The `cuda` backend of the forward op."""
    y, _, _, rstd = cuda_forward(x, None, w, None, None, None, eps, 0.0, is_rms=True)
    return y, rstd


def cuda_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    rstd: torch.Tensor,
    needs: list[bool],
) -> Tensors2:
    """The `cuda` backend of the backward op."""
    needs = [needs[0], False, needs[1], False, False]
    dx, _, dw, _, _ = cuda_backward(x, dy, None, w, None, rstd, None, 0.0, x.dtype, needs)
    return dx, dw


OP = backend.Op(
    "rms_norm",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("rms_norm", "layer_norm"),
        "cuda": backend.Implementation(cuda_fwd, cuda_bwd),
    },
)


def _fwd(x: torch.Tensor, w: torch.Tensor | None, eps: float) -> Tensors2:
    return OP.choose(x).fwd(x, w, eps)


def _bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    rstd: torch.Tensor,
    needs: list[bool],
) -> Tensors2:
    return OP.choose(x).bwd(dy, x, w, rstd, needs)


def _fake_fwd(x: torch.Tensor, *_: Any) -> Tensors2:
    rstd = x.new_empty(x.shape[:-1], dtype=statistics_dtype(x.dtype))
    return torch.empty_like(x, memory_format=torch.contiguous_format), rstd


def _fake_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    rstd: torch.Tensor,
    needs: list[bool],
) -> Tensors2:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else x.new_empty(0)
    return dx, x.new_empty(x.shape[-1] if needs[1] else 0, dtype=rstd.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors2) -> None:
    x, w, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, w, output[1])


def _backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    x, w, rstd = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1:3])
    dx, dw = rms_norm_bwd(dy, x, w, rstd, needs)
    return None, dx if needs[0] else None, dw.to(w.dtype) if needs[1] else None, None


rms_norm_bwd = define(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor? w, Tensor rstd, bool[2] needs) -> (Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
rms_norm_fwd = define(
    "rms_norm_fwd(Tensor x, Tensor? w, float eps) -> (Tensor, Tensor)",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: (..., N), any strides; float32, bfloat16, float16 (float64 on the torch backend).
        weight: (N,) or None for 1; any floating dtype, which may differ from x's.
        eps: added to the mean of squares; None means `torch.finfo(x.dtype).eps`.

    Returns:
        (..., N) in x's dtype, contiguous. Statistics are fp32.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: x has no dimension, or weight is not (N,).
        RuntimeError: weight is on another device than x.

    Limits: x^2 must stay below the largest fp32 number, 3.4e38, as in PyTorch.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    check_rows("rms_norm", x, weight=weight)
    return rms_norm_fwd(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)[0]
