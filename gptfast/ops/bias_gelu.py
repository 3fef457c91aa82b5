"""Bias and GELU in one pass: y = z Phi(z), z = x + bias, with Phi as in `gptfast/ops/gelu.py`.

What stands between the two linear layers of an MLP, when the first one leaves its bias out.
Backward recomputes z and Phi, so only x and bias are kept:

dx = dy (Phi(z) + z Phi'(z)),   dbias_j = sum_i dx_ij
"""

from __future__ import annotations

from typing import Any

import torch

from gptfast import backend
from gptfast.ops.gelu import check_approximate, gelu_phi, gelu_slope
from gptfast.ops.library import (
    check_device,
    check_floating,
    check_shape,
    cuda_parameter,
    define,
    fp32_parameter,
    pointer,
    statistics_dtype,
)

Tensors2 = tuple[torch.Tensor, torch.Tensor]


def reference_fwd(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    """The formula in PyTorch."""
    z = x.to(statistics_dtype(x.dtype)) + bias
    return (z * gelu_phi(z, approximate)).to(x.dtype).contiguous()


def reference_bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, approximate: str, needs: list[bool]
) -> Tensors2:
    """The gradient formulas in PyTorch."""
    dtype = statistics_dtype(x.dtype)
    dz = dy * gelu_slope(x.to(dtype) + bias, approximate)
    dx = db = x.new_empty(0)
    if needs[0]:
        dx = dz.to(x.dtype).contiguous()
    if needs[1]:
        db = dz.unsqueeze(0).flatten(0, -2).sum(0).to(dtype)
    return dx, db


def cpu_fwd(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    """The `cpu` backend of the forward op."""
    x, b = x.contiguous(), fp32_parameter(bias)
    y = torch.empty_like(x)
    N = bias.numel()
    backend.extension().bias_gelu_fwd(  # type: ignore[union-attr]
        x.data_ptr(),
        pointer(b),
        y.data_ptr(),
        x.numel() // max(N, 1),
        N,
        approximate == "tanh",
        backend.DTYPE_CODES[x.dtype],
    )
    return y


def cpu_bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, approximate: str, needs: list[bool]
) -> Tensors2:
    """The `cpu` backend of the backward op."""
    dy, x, b = dy.contiguous(), x.contiguous(), fp32_parameter(bias)
    N = bias.numel()
    M = x.numel() // max(N, 1)
    empty = x.new_empty(0)
    dx = torch.empty_like(x) if needs[0] else empty
    db = torch.empty(N, dtype=torch.float32, device=x.device) if needs[1] else empty
    # A function of M alone, so that the result does not depend on the number of threads.
    blocks = min(max(M // 32, 1), 64)
    shape = (blocks, N) if needs[1] else (0,)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    backend.extension().bias_gelu_bwd(  # type: ignore[union-attr]
        dy.data_ptr(),
        x.data_ptr(),
        pointer(b),
        dx.data_ptr() if needs[0] else 0,
        db.data_ptr() if needs[1] else 0,
        partial.data_ptr(),
        blocks,
        M,
        N,
        approximate == "tanh",
        backend.DTYPE_CODES[x.dtype],
    )
    return dx, db


def cuda_fwd(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    """The `cuda` backend of the forward op."""
    x = x.contiguous()
    y = torch.empty_like(x)
    N = bias.numel()
    sizes = x.numel() // max(N, 1), N, approximate == "tanh"
    backend.launch_cuda("bias_gelu_fwd", x, x, *cuda_parameter(bias), y, *sizes)
    return y


def cuda_bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, approximate: str, needs: list[bool]
) -> Tensors2:
    """The `cuda` backend of the backward op."""
    dy, x = dy.contiguous(), x.contiguous()
    N = bias.numel()
    M = x.numel() // max(N, 1)
    dx = torch.empty_like(x) if needs[0] else None
    # 32 rows a program keep what it writes and reads again, 8 N bytes, within a twentieth of the
    # 192 N that they move in bfloat16; 256 programs of N / 256 blocks keep today's cards busy.
    programs = max(1, min(-(-M // 32), 256))
    db = partial = None
    if needs[1]:
        # Zeros where no row is: the kernels are not launched then.
        db = (torch.empty if M else torch.zeros)(N, dtype=torch.float32, device=x.device)
        partial = torch.empty(programs, N, dtype=torch.float32, device=x.device)
    given = dy, x, *cuda_parameter(bias)
    sizes = programs, M, N, approximate == "tanh"
    backend.launch_cuda("bias_gelu_bwd", x, *given, dx, db, partial, *sizes)
    empty = x.new_empty(0)
    return empty if dx is None else dx, empty if db is None else db


OP = backend.Op(
    "bias_gelu",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("bias_gelu", "gelu"),
        "cuda": backend.Implementation(cuda_fwd, cuda_bwd),
    },
)


def _fwd(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    return OP.choose(x).fwd(x, bias, approximate)


def _bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, approximate: str, needs: list[bool]
) -> Tensors2:
    return OP.choose(x).bwd(dy, x, bias, approximate, needs)


def _fake_fwd(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, approximate: str, needs: list[bool]
) -> Tensors2:
    dx = _fake_fwd(x) if needs[0] else x.new_empty(0)
    db = x.new_empty(x.shape[-1] if needs[1] else 0, dtype=statistics_dtype(x.dtype))
    return dx, db if needs[1] else x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    x, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1:3])
    dx, db = bias_gelu_bwd(dy, x, bias, ctx.approximate, needs)
    return None, dx if needs[0] else None, db.to(bias.dtype) if needs[1] else None, None


bias_gelu_bwd = define(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias, str approximate, bool[2] needs)"
    " -> (Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
bias_gelu_fwd = define(
    "bias_gelu_fwd(Tensor x, Tensor bias, str approximate) -> Tensor",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    """y = gelu(x + bias), elementwise; the bias runs along the last dimension.

    Args:
        x: (..., N), any strides; float32, bfloat16, float16 (float64 on the torch backend).
        bias: (N,); any floating dtype, which may differ from x's.
        approximate: "tanh" (GPT-2's form) or "none" (the exact one, with erf).

    Returns:
        (..., N) in x's dtype, contiguous. Arithmetic is fp32: x + bias is not rounded to x's dtype.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: x has no dimension, bias is not (N,), or `approximate` is unknown.
        RuntimeError: bias is on another device than x.

    Limits: no double backward.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    check_floating("bias_gelu", "x", x)
    check_floating("bias_gelu", "bias", bias)
    if x.dim() == 0:
        raise ValueError("bias_gelu: x must have at least one dimension, got a scalar")
    check_shape("bias_gelu", "bias", bias, (x.shape[-1],))
    check_device("bias_gelu", x.device, bias=bias)
    check_approximate("bias_gelu", approximate)
    return bias_gelu_fwd(x, bias, approximate)
