"""Linear layer and GELU in one pass: y = z Phi(z), z = h + bias, h = x w^T.

x (M, C), w (N, C), bias (N,); Phi as in `gptfast/ops/gelu.py`. Backward:

dz = dy (Phi(z) + z Phi'(z)),   dx = dz w,   dw = dz^T x,   dbias_j = sum_i dz_ij

h is kept for it: to multiply again would take longer than to write it and read it. On a CPU with
tiles (AMX) the bfloat16 product is a loop of our own, in which GELU takes each piece of h while the
next one is made, so that h is never read; elsewhere it is PyTorch's product and then `bias_gelu` of
that device, which in float32 on a CPU was as fast as chunks of rows that stay in a cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from gptfast import backend
from gptfast.ops.bias_gelu import OP as BIAS_GELU
from gptfast.ops.bias_gelu import bias_gelu
from gptfast.ops.gelu import check_approximate
from gptfast.ops.library import (
    call_in_tiles,
    check_device,
    check_dtypes,
    check_floating,
    check_shape,
    define,
    fp32_parameter,
    has_tiles,
    in_tiles,
    pointer,
    statistics_dtype,
)

Tensors2 = tuple[torch.Tensor, torch.Tensor]
Tensors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# From how many rows for each thread on the tile loop beat the product and bias_gelu, of 768 columns
# to 3072, on one and two threads: with fewer, packing w takes too much of the time.
ROWS_OF_A_THREAD = 512
# Up to how many columns of x: with more, a block of w no longer fits into the second-level cache
# together with the rest, and one of 1024 columns was no faster on two threads.
MOST_COLUMNS = 768


def _composite(activation: backend.Implementation) -> backend.Implementation:
    """PyTorch's products and one backend of bias_gelu."""

    def fwd(
        x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, approximate: str, keep: bool
    ) -> Tensors2:
        h = x @ w.mT
        return activation.fwd(h, bias, approximate), h if keep else x.new_empty(0)

    def bwd(
        dy: torch.Tensor,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor,
        h: torch.Tensor,
        approximate: str,
        needs: list[bool],
    ) -> Tensors3:
        dz, db = activation.bwd(dy, h, bias, approximate, [needs[0] or needs[1], needs[2]])
        dx, dw = x.new_empty(x.shape if needs[0] else 0), w.new_empty(w.shape if needs[1] else 0)
        if needs[0]:
            torch.mm(dz, w, out=dx)
        if needs[1]:
            torch.mm(dz.mT, x, out=dw)
        return dx, dw, db

    return backend.Implementation(fwd, bwd)


COMPOSITE = _composite(BIAS_GELU.implementations["cpu"])


def cpu_fwd(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, approximate: str, keep: bool
) -> Tensors2:
    """The `cpu` backend of the forward op."""
    if not in_tiles(x):
        return COMPOSITE.fwd(x, w, bias, approximate, keep)
    x, w, b = x.contiguous(), w.contiguous(), fp32_parameter(bias)
    y = x.new_empty(len(x), len(w))
    h = torch.empty_like(y) if keep else x.new_empty(0)
    call_in_tiles(
        backend.extension().linear_gelu_fwd,  # type: ignore[union-attr]
        *map(pointer, (x, w, b, y)),
        h.data_ptr() if keep else 0,
        len(x),
        *w.shape,
        approximate == "tanh",
    )
    return y, h


OP = backend.Op(
    "linear_gelu",
    {
        "torch": _composite(BIAS_GELU.implementations["torch"]),
        "cpu": backend.Implementation(cpu_fwd, COMPOSITE.bwd),
    },
)


def is_faster(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether a model should take this op rather than a product and `bias_gelu`.

    Not where h must be written for backward: that leaves less than 5 % of both passes to be won,
    and nothing on two threads where the memory of h and y is fresh. Not in what is compiled or
    exported, where the number of rows would become a guard. Not where autocast, whose copies of
    weights `F.linear` keeps, would have to cast w again.
    """
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if torch.is_grad_enabled() or traced:
        return False
    kinds = {type(x), type(w)} <= {torch.Tensor, torch.nn.Parameter}
    if not kinds or not x.dtype is w.dtype is torch.bfloat16 or x.device.type != "cpu":
        return False
    enough = x.shape[:-1].numel() >= ROWS_OF_A_THREAD * torch.get_num_threads()
    return enough and x.shape[-1] <= MOST_COLUMNS and has_tiles()


def _fwd(x: torch.Tensor, *args: Any) -> Tensors2:
    return OP.choose(x).fwd(x, *args)


def _bwd(dy: torch.Tensor, x: torch.Tensor, *args: Any) -> Tensors3:
    return OP.choose(x).bwd(dy, x, *args)


def _fake_fwd(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, approximate: str, keep: bool
) -> Tensors2:
    y = x.new_empty(x.shape[0], w.shape[0])
    return y, torch.empty_like(y) if keep else x.new_empty(0)


def _fake_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor,
    h: torch.Tensor,
    approximate: str,
    needs: list[bool],
) -> Tensors3:
    return (
        x.new_empty(x.shape if needs[0] else 0),
        w.new_empty(w.shape if needs[1] else 0),
        x.new_empty(w.shape[0], dtype=statistics_dtype(x.dtype)) if needs[2] else x.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors2) -> None:
    x, w, bias, ctx.approximate, keep = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(x, w, bias, h if keep else None)


def _backward(ctx: Any, dy: torch.Tensor, _: Any) -> tuple[Any, ...]:
    x, w, bias, h = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1:4])
    if h is None:
        h = x @ w.mT
    dx, dw, db = linear_gelu_bwd(dy, x, w, bias, h, ctx.approximate, needs)
    return (
        None,
        dx if needs[0] else None,
        dw if needs[1] else None,
        db.to(bias.dtype) if needs[2] else None,
        None,
        None,
    )


linear_gelu_bwd = define(
    "linear_gelu_bwd(Tensor dy, Tensor x, Tensor w, Tensor bias, Tensor h, str approximate,"
    " bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
linear_gelu_fwd = define(
    "linear_gelu_fwd(Tensor x, Tensor w, Tensor bias, str approximate, bool keep)"
    " -> (Tensor, Tensor)",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
    autocast=("x", "w"),
)


def linear_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, approximate: str = "tanh"
) -> torch.Tensor:
    """y = gelu(x weight^T + bias).

    Args:
        x: (..., C), any strides; float32, bfloat16, float16 (float64 on the torch backend).
        weight: (N, C), in x's dtype.
        bias: (N,); any floating dtype, which may differ from x's.
        approximate: "tanh" (GPT-2's form) or "none" (the exact one, with erf).

    Returns:
        (..., N) in x's dtype, contiguous. The bias is added in fp32. Under autocast x and weight
        are cast to its dtype.

    Raises:
        TypeError: not floating point, or weight's dtype is not x's.
        ValueError: x has no dimension, weight is not (N, C), bias is not (N,), or `approximate` is
            unknown.
        RuntimeError: tensors on different devices.

    Limits: no double backward. Training keeps x weight^T, (..., N) in x's dtype. In tiles extra
    memory is as much as x takes, and 1536 rows of weight.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    op = "linear_gelu"
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        check_floating(op, name, tensor)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be (..., C), got a scalar")
    C = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != C:
        raise ValueError(f"{op}: weight must be (N, {C}), got {tuple(weight.shape)}")
    check_shape(op, "bias", bias, (weight.shape[0],))
    # Autocast makes one dtype of two, but leaves float64 alone, as PyTorch's own does.
    given = x.dtype, weight.dtype
    if not torch.is_autocast_enabled(x.device.type) or torch.float64 in given:
        check_dtypes(op, x.dtype, weight=weight)
    check_device(op, x.device, weight=weight, bias=bias)
    check_approximate(op, approximate)
    if x.device.type != "cpu":
        return bias_gelu(F.linear(x, weight), bias, approximate)
    shape = *x.shape[:-1], weight.shape[0]
    keep = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or bias.requires_grad
    )
    rows = x.reshape(math.prod(x.shape[:-1]), C)
    return linear_gelu_fwd(rows, weight, bias, approximate, keep)[0].view(shape)
