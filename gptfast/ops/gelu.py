"""GELU: y = x Phi(x).

tanh:  Phi(x) ~ sigmoid(2 u),  u = sqrt(2/pi) (x + 0.044715 x^3)
none:  Phi(x) = (1 + erf(x / sqrt 2)) / 2

Backward recomputes Phi from x: saving it would move as many bytes as it spares.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from gptfast import backend
from gptfast.ops.library import check_floating, define, statistics_dtype

APPROXIMATIONS = ("none", "tanh")


def reference_fwd(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """The formula in PyTorch."""
    xf = x.to(statistics_dtype(x.dtype))
    return (xf * gelu_phi(xf, approximate)).to(x.dtype).contiguous()


def reference_bwd(dy: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    """The gradient formulas in PyTorch."""
    slope = gelu_slope(x.to(statistics_dtype(x.dtype)), approximate)
    return (dy * slope).to(x.dtype).contiguous()


def gelu_phi(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """Phi(x)."""
    if approximate == "tanh":
        return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return 0.5 * torch.special.erfc(-x * math.sqrt(0.5))


def gelu_slope(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """Phi(x) + x Phi'(x), the derivative of x Phi(x)."""
    phi = gelu_phi(x, approximate)
    if approximate == "tanh":
        # Beyond |x| = 10 the slope is 0 or 1; the clamp keeps x^2 from overflowing.
        c = x.clamp(-10, 10)
        two_du = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * c * c)
        # 1 - Phi as a sigmoid: a subtraction would lose digits that the large factors bring back.
        return phi + c * phi * gelu_phi(-c, "tanh") * two_du
    return phi + x.clamp(-15, 15) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def cpu_fwd(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """The `cpu` backend of the forward op."""
    x = x.contiguous()
    y = torch.empty_like(x)
    code = backend.DTYPE_CODES[x.dtype]
    backend.extension().gelu_fwd(  # type: ignore[union-attr]
        x.data_ptr(), y.data_ptr(), x.numel(), approximate == "tanh", code
    )
    return y


def cpu_bwd(dy: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    """The `cpu` backend of the backward op."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    code = backend.DTYPE_CODES[x.dtype]
    backend.extension().gelu_bwd(  # type: ignore[union-attr]
        dy.data_ptr(), x.data_ptr(), dx.data_ptr(), x.numel(), approximate == "tanh", code
    )
    return dx


def cuda_fwd(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """The `cuda` backend of the forward op."""
    x = x.contiguous()
    y = torch.empty_like(x)
    backend.launch_cuda("gelu_fwd", x, x, y, x.numel(), approximate == "tanh")
    return y


def cuda_bwd(dy: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    """The `cuda` backend of the backward op."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    backend.launch_cuda("gelu_bwd", x, dy, x, dx, x.numel(), approximate == "tanh")
    return dx


OP = backend.Op(
    "gelu",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("gelu"),
        "cuda": backend.Implementation(cuda_fwd, cuda_bwd),
    },
)


def _fwd(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return OP.choose(x).fwd(x, approximate)


def _bwd(dy: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    return OP.choose(x).bwd(dy, x, approximate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return None, gelu_bwd(dy, x, ctx.approximate), None


def _fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


gelu_bwd = define(
    "gelu_bwd(Tensor dy, Tensor x, str approximate) -> Tensor",
    _bwd,
    lambda dy, x, approximate: _fake(x),
)
gelu_fwd = define(
    "gelu_fwd(Tensor x, str approximate) -> Tensor",
    _fwd,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)


def check_approximate(op: str, approximate: str) -> None:
    """Raise ValueError unless `approximate` names a form of Phi."""
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"{op}: approximate must be 'none' or 'tanh', got {approximate!r}")


def gelu(x: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    """y = x Phi(x), elementwise.

    Args:
        x: any shape and strides; float32, bfloat16, float16 (float64 on the torch backend).
        approximate: "tanh" (GPT-2's form) or "none" (the exact one, with erf).

    Returns:
        Tensor of x's shape and dtype, contiguous. Arithmetic is fp32.

    Raises:
        TypeError: x is not floating point.
        ValueError: unknown `approximate`.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    check_floating("gelu", "x", x)
    check_approximate("gelu", approximate)
    return gelu_fwd(x, approximate)
