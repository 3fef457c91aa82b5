"""Residual connection with dropout: residual_out = residual + z x.

z_ij is 0 or 1 / keep, the factors of `gptfast/ops/philox.py` for head 0, row i and column j; 1
without dropout. Backward: dx = z dresidual_out, and residual's gradient is dresidual_out itself.

`add_layer_norm` and `add_rms_norm` begin with the same sum, of z (x + x_bias).
"""

from __future__ import annotations

from typing import Any

import torch

from gptfast import backend
from gptfast.ops.layer_norm import check_rows
from gptfast.ops.library import (
    check_device,
    check_floating,
    check_shape,
    define,
    pointer,
    statistics_dtype,
)
from gptfast.ops.philox import checked_seed, dropout_threshold, row_factors


def reference_fwd(
    x: torch.Tensor, residual: torch.Tensor, seed: torch.Tensor | None, dropout_p: float
) -> torch.Tensor:
    """The formula in PyTorch."""
    return residual_sum(x, residual, None, seed, dropout_p)


def residual_sum(
    x: torch.Tensor,
    residual: torch.Tensor,
    x_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """residual + z (x + x_bias), in residual's dtype."""
    dtype = statistics_dtype(x.dtype)
    branch = x.to(dtype) if x_bias is None else x.to(dtype) + x_bias
    if seed is not None:
        branch = branch * row_factors(seed, x.shape, dropout_p, dtype)
    return (residual + branch).to(residual.dtype).contiguous()


def reference_bwd(
    dresidual_out: torch.Tensor, seed: torch.Tensor, dropout_p: float, dtype: torch.dtype
) -> torch.Tensor:
    """The gradient of x in PyTorch."""
    wide = statistics_dtype(dresidual_out.dtype)
    z = row_factors(seed, dresidual_out.shape, dropout_p, wide)
    return (dresidual_out.to(wide) * z).to(dtype).contiguous()


def cpu_fwd(
    x: torch.Tensor, residual: torch.Tensor, seed: torch.Tensor | None, dropout_p: float
) -> torch.Tensor:
    """The `cpu` backend of the forward op."""
    return _cpu(x, residual, seed, dropout_p, residual.dtype)


def cpu_bwd(
    dresidual_out: torch.Tensor, seed: torch.Tensor, dropout_p: float, dtype: torch.dtype
) -> torch.Tensor:
    """The `cpu` backend of the backward op."""
    return _cpu(dresidual_out, None, seed, dropout_p, dtype)


def _cpu(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    backend.extension().dropout_add(  # type: ignore[union-attr]
        x.data_ptr(),
        pointer(residual),
        out.data_ptr(),
        x.shape[:-1].numel(),
        x.shape[-1],
        dropout_threshold(dropout_p),
        0 if seed is None else int(seed),
        backend.DTYPE_CODES[x.dtype],
        backend.DTYPE_CODES[dtype],
    )
    return out


OP = backend.Op(
    "dropout_add",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("dropout_add"),
    },
)


def _fwd(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return OP.choose(x).fwd(x, *args)


def _bwd(dresidual_out: torch.Tensor, *args: Any) -> torch.Tensor:
    return OP.choose(dresidual_out).bwd(dresidual_out, *args)


def _fake_fwd(x: torch.Tensor, residual: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


def _fake_bwd(
    dresidual_out: torch.Tensor, seed: torch.Tensor, dropout_p: float, dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty_like(dresidual_out, dtype=dtype, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, _, seed, ctx.dropout_p = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(seed)


def _backward(ctx: Any, dresidual_out: torch.Tensor) -> tuple[Any, ...]:
    (seed,) = ctx.saved_tensors
    dx = None
    if ctx.needs_input_grad[1]:
        if seed is None:
            dx = dresidual_out.to(ctx.dtype)
        else:
            dx = dropout_add_bwd(dresidual_out, seed, ctx.dropout_p, ctx.dtype)
    return None, dx, dresidual_out if ctx.needs_input_grad[2] else None, None, None


dropout_add_bwd = define(
    "dropout_add_bwd(Tensor dresidual_out, Tensor seed, float dropout_p, ScalarType dtype)"
    " -> Tensor",
    _bwd,
    _fake_bwd,
)
dropout_add_fwd = define(
    "dropout_add_fwd(Tensor x, Tensor residual, Tensor? seed, float dropout_p) -> Tensor",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
)


def check_residual(op: str, x: torch.Tensor, residual: torch.Tensor) -> None:
    """Check what a block adds to the residual stream, and the stream."""
    check_rows(op, x)
    check_floating(op, "residual", residual)
    if residual.dtype not in (x.dtype, statistics_dtype(x.dtype)):
        expected = " or ".join(sorted({str(x.dtype), str(statistics_dtype(x.dtype))}))
        raise TypeError(f"{op}: residual must be {expected}, got {residual.dtype}")
    check_shape(op, "residual", residual, tuple(x.shape))
    check_device(op, x.device, residual=residual)


def dropout_add(
    x: torch.Tensor, residual: torch.Tensor, p: float, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """residual + dropout(x): each element of x is dropped with probability p, or else scaled.

    Args:
        x: (..., N), any strides; float32, bfloat16, float16 (float64 on the torch backend).
        residual: like x, in x's dtype or float32.
        p: probability of dropping an element, in [0, 1).
        seed: int64 scalar tensor that determines the mask; None draws one from PyTorch's generator,
            so `torch.manual_seed` decides.

    Returns:
        (..., N) in residual's dtype, contiguous. The mask is drawn again in backward, not stored;
        kept elements are scaled so that the mean stays: by 2^16 over the number of the 2^16 values
        that are kept.

    Raises:
        TypeError: not floating point, or residual's dtype is another.
        ValueError: shapes differ, x has no dimension, or p is outside [0, 1).
        RuntimeError: tensors on different devices.

    Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
    2014.
    """
    check_residual("dropout_add", x, residual)
    return dropout_add_fwd(x, residual, checked_seed("dropout_add", seed, p, x.device), p)
