"""Gated linear units: y = act(gate) up, elementwise, the middle of Llama's and Gemma's MLP.

silu:             act(g) = g sigmoid(g)     `swiglu`
gelu, gelu_tanh:  act(g) = g Phi(g)         `geglu`, with Phi as in `gptfast/ops/gelu.py`

Backward recomputes act from gate, so only gate and up are kept:

dgate = dy up act'(gate),   dup = dy act(gate)

gate and up may lie side by side in one tensor (..., 2 N), as one linear layer makes them. The
registered ops take that tensor as `gate`, with no `up`: its gradient is then one tensor too, which
nobody has to put together from halves.
"""

from __future__ import annotations

from typing import Any

import torch

from gptfast import backend
from gptfast.ops.gelu import check_approximate, gelu_phi, gelu_slope
from gptfast.ops.layout import unit_stride
from gptfast.ops.library import (
    check_device,
    check_dtypes,
    check_floating,
    check_shape,
    define,
    pointer,
    statistics_dtype,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")  # in the order of their codes in csrc
GELU_FORMS = {"gelu": "none", "gelu_tanh": "tanh"}  # activation -> `approximate`
Tensors2 = tuple[torch.Tensor, torch.Tensor]


def reference_fwd(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    """The formula in PyTorch."""
    gate, up = halves(gate, up)
    gf = gate.to(statistics_dtype(gate.dtype))
    return (_activate(gf, activation) * up).to(gate.dtype).contiguous()


def reference_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    needs: list[bool],
) -> Tensors2:
    """The gradient formulas in PyTorch."""
    dgate, dup, *grads = empty_gradients(gate, up, needs)
    gate, up = halves(gate, up)
    dyf, gf = (x.to(statistics_dtype(gate.dtype)) for x in (dy, gate))
    if dgate is not None:
        dgate.copy_(dyf * up * _slope(gf, activation))
    if dup is not None:
        dup.copy_(dyf * _activate(gf, activation))
    return grads[0], grads[1]


def _activate(g: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return g * torch.sigmoid(g)
    return g * gelu_phi(g, GELU_FORMS[activation])


def _slope(g: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        # Beyond |g| = 200 the slope is 0 or 1; the clamp keeps infinity out of the product.
        return torch.sigmoid(g) * (1 + g.clamp(-200, 200) * torch.sigmoid(-g))
    return gelu_slope(g, GELU_FORMS[activation])


def halves(gate: torch.Tensor, up: torch.Tensor | None) -> Tensors2:
    """gate and up, as views where one tensor holds both."""
    if up is not None:
        return gate, up
    N = gate.shape[-1] // 2
    return gate[..., :N], gate[..., N:]


def empty_gradients(
    gate: torch.Tensor, up: torch.Tensor | None, needs: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Memory for the gradients: dgate and dup, None where not needed, and what backward returns."""
    empty = gate.new_empty(0)
    if up is None:
        both = torch.empty_like(gate, memory_format=torch.contiguous_format)
        return (*halves(both, None), both, empty)
    dgate, dup = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip((gate, up), needs, strict=True)
    )
    return dgate, dup, empty if dgate is None else dgate, empty if dup is None else dup


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """x as (M, N) with contiguous rows, which may lie apart: a copy only of other layouts."""
    return unit_stride(x).reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)


def matrix_shape(*matrices: torch.Tensor) -> tuple[int, int]:
    """(M, N) of some matrices; one row of all elements, where none has gaps: no vector is cut."""
    if all(x.is_contiguous() for x in matrices):
        return 1, matrices[0].numel()
    return matrices[0].shape[0], matrices[0].shape[1]


def cpu_fwd(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    """The `cpu` backend of the forward op."""
    gate, up = halves(gate, up)
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel():
        gate, up = as_matrix(gate), as_matrix(up)
        backend.extension().glu_fwd(  # type: ignore[union-attr]
            gate.data_ptr(),
            up.data_ptr(),
            y.data_ptr(),
            gate.stride(0),
            up.stride(0),
            *matrix_shape(gate, up),
            ACTIVATIONS.index(activation),
            backend.DTYPE_CODES[gate.dtype],
        )
    return y


def cpu_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    needs: list[bool],
) -> Tensors2:
    """The `cpu` backend of the backward op."""
    dgate, dup, *grads = empty_gradients(gate, up, needs)
    gate, up = halves(gate, up)
    if dy.numel() and any(needs):
        dy, gate, up = dy.contiguous(), as_matrix(gate), as_matrix(up)
        dgate, dup = (x if x is None else as_matrix(x) for x in (dgate, dup))
        written = [x for x in (dgate, dup) if x is not None]
        backend.extension().glu_bwd(  # type: ignore[union-attr]
            dy.data_ptr(),
            gate.data_ptr(),
            up.data_ptr(),
            pointer(dgate),
            pointer(dup),
            gate.stride(0),
            up.stride(0),
            written[0].stride(0),
            *matrix_shape(gate, up, *written),
            ACTIVATIONS.index(activation),
            backend.DTYPE_CODES[gate.dtype],
        )
    return grads[0], grads[1]


def cuda_fwd(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    """The `cuda` backend of the forward op."""
    gate, up = halves(gate, up)
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel():
        gate, up = as_matrix(gate), as_matrix(up)
        sizes = gate.stride(0), up.stride(0), *matrix_shape(gate, up)
        backend.launch_cuda("glu_fwd", gate, gate, up, y, *sizes, ACTIVATIONS.index(activation))
    return y


def cuda_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    needs: list[bool],
) -> Tensors2:
    """The `cuda` backend of the backward op."""
    dgate, dup, *grads = empty_gradients(gate, up, needs)
    gate, up = halves(gate, up)
    if dy.numel() and any(needs):
        dy, gate, up = dy.contiguous(), as_matrix(gate), as_matrix(up)
        dgate, dup = (x if x is None else as_matrix(x) for x in (dgate, dup))
        written = [x for x in (dgate, dup) if x is not None]
        strides = gate.stride(0), up.stride(0), written[0].stride(0)
        sizes = *strides, *matrix_shape(gate, up, *written)
        given = dy, gate, up, dgate, dup
        backend.launch_cuda("glu_bwd", gate, *given, *sizes, ACTIVATIONS.index(activation))
    return grads[0], grads[1]


OP = backend.Op(
    "glu",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("glu"),
        "cuda": backend.Implementation(cuda_fwd, cuda_bwd),
    },
)


def _fwd(gate: torch.Tensor, *args: Any) -> torch.Tensor:
    return OP.choose(gate).fwd(gate, *args)


def _bwd(dy: torch.Tensor, gate: torch.Tensor, *args: Any) -> Tensors2:
    return OP.choose(gate).bwd(dy, gate, *args)


def _fake_fwd(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    return torch.empty_like(halves(gate, up)[1], memory_format=torch.contiguous_format)


def _fake_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    needs: list[bool],
) -> Tensors2:
    return empty_gradients(gate, up, needs)[2:]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1:3])
    dgate, dup = glu_bwd(dy, gate, up, ctx.activation, needs)
    return None, dgate if needs[0] else None, dup if needs[1] else None, None


glu_bwd = define(
    "glu_bwd(Tensor dy, Tensor gate, Tensor? up, str activation, bool[2] needs)"
    " -> (Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
glu_fwd = define(
    "glu_fwd(Tensor gate, Tensor? up, str activation) -> Tensor",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
)


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """y = silu(gate) up, elementwise, with silu(g) = g sigmoid(g).

    Args:
        gate: (..., N), any strides; float32, bfloat16, float16 (float64 on the torch backend).
            Halves of one (..., 2 N) tensor are read where they lie.
        up: of gate's shape and dtype; or None, when gate is (..., 2 N) and holds gate and up side
            by side. Its gradient is then written as one tensor; autograd has to copy the gradients
            of two halves into one.

    Returns:
        (..., N) in gate's dtype, contiguous. Arithmetic is fp32, rounded once.

    Raises:
        TypeError: not floating point, or dtypes differ.
        ValueError: shapes differ; without up, gate has no last dimension of even size.
        RuntimeError: tensors on different devices.

    Limits: no double backward.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    _check("swiglu", gate, up)
    return glu_fwd(gate, up, "silu")


def geglu(
    gate: torch.Tensor, up: torch.Tensor | None = None, approximate: str = "tanh"
) -> torch.Tensor:
    """y = gelu(gate) up, elementwise.

    Args:
        gate: (..., N), any strides; float32, bfloat16, float16 (float64 on the torch backend).
            Halves of one (..., 2 N) tensor are read where they lie.
        up: of gate's shape and dtype; or None, when gate is (..., 2 N): see `swiglu`.
        approximate: "tanh" (Gemma's form) or "none" (the exact one, with erf).

    Returns:
        (..., N) in gate's dtype, contiguous. Arithmetic is fp32, rounded once.

    Raises:
        TypeError: not floating point, or dtypes differ.
        ValueError: shapes differ; without up, gate has no last dimension of even size; unknown
            `approximate`.
        RuntimeError: tensors on different devices.

    Limits: no double backward.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    _check("geglu", gate, up)
    check_approximate("geglu", approximate)
    return glu_fwd(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def _check(op: str, gate: torch.Tensor, up: torch.Tensor | None) -> None:
    check_floating(op, "gate", gate)
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(f"{op}: gate without up must be (..., 2 N), got {tuple(gate.shape)}")
        return
    check_floating(op, "up", up)
    check_dtypes(op, gate.dtype, up=up)
    check_shape(op, "up", up, tuple(gate.shape))
    check_device(op, gate.device, up=up)
