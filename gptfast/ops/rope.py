"""Rotary position embedding: pairs of each head's dimensions, turned by an angle per position.

y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin

for the pairs (x_i, x_{i + R/2}), or interleaved (x_2i, x_{2i+1}), of the first R dimensions; the
others pass. A rotation's gradient is the rotation back: the same with -sin.
"""

from __future__ import annotations

from typing import Any

import torch

from gptfast import backend
from gptfast.ops.layout import empty_output, heads_of, unit_stride
from gptfast.ops.library import (
    check_device,
    check_dtypes,
    check_floating,
    define,
    fp32_parameter,
    pointer,
    statistics_dtype,
)

Tensors2 = tuple[torch.Tensor, torch.Tensor]


def reference_fwd(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> Tensors2:
    """The formula in PyTorch."""
    turned = [q.new_empty(0) if x is None else _turn(x, cos, sin, interleaved) for x in (q, k)]
    return turned[0], turned[1]


def reference_bwd(
    dq: torch.Tensor,
    dk: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> Tensors2:
    """The gradient formulas in PyTorch."""
    return reference_fwd(dq, dk, cos, -sin, interleaved)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    dtype, R = statistics_dtype(x.dtype), 2 * cos.shape[-1]
    cos, sin = (t.to(dtype).unsqueeze(-3) for t in (cos, sin))
    xf = x[..., :R].to(dtype)
    x1, x2 = (xf[..., 0::2], xf[..., 1::2]) if interleaved else xf.chunk(2, -1)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
    result = empty_output(x)
    result[..., :R] = y
    result[..., R:] = x[..., R:]
    return result


def cpu_fwd(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    back: bool = False,
) -> Tensors2:
    """The `cpu` backend of the forward op; with `back` the rotation is by the opposite angles."""
    q, k = unit_stride(q), None if k is None else unit_stride(k)
    turned = [q.new_empty(0) if x is None else empty_output(x) for x in (q, k)]
    B, H, T, D = q.shape
    half = cos.shape[-1]
    tables = fp32_parameter(cos), fp32_parameter(sin)
    nowhere = (0, 0, 0, 0)
    backend.extension().rope(  # type: ignore[union-attr]
        heads_of(q),
        heads_of(turned[0]),
        nowhere if k is None else heads_of(k),
        nowhere if k is None else heads_of(turned[1]),
        *map(pointer, tables),
        (B, H, 0 if k is None else k.shape[1], T, D, half, T * half if cos.dim() == 3 else 0),
        interleaved,
        back,
        backend.DTYPE_CODES[q.dtype],
    )
    return turned[0], turned[1]


def cpu_bwd(
    dq: torch.Tensor,
    dk: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> Tensors2:
    """The `cpu` backend of the backward op."""
    return cpu_fwd(dq, dk, cos, sin, interleaved, back=True)


OP = backend.Op(
    "rope",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("rope"),
    },
)


def _fwd(q: torch.Tensor, *args: Any) -> Tensors2:
    return OP.choose(q).fwd(q, *args)


def _bwd(dq: torch.Tensor, *args: Any) -> Tensors2:
    return OP.choose(dq).bwd(dq, *args)


def _fake(q: torch.Tensor, k: torch.Tensor | None, *_: Any) -> Tensors2:
    return empty_output(q), q.new_empty(0) if k is None else empty_output(k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors2) -> None:
    _, k, cos, sin, ctx.interleaved = inputs
    if k is None:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    dq, dk = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[1:3], strict=True))
    if dq is not None:
        given = dk
        dq, dk = rope_bwd(dq, dk, cos, sin, ctx.interleaved)
        dk = None if given is None else dk
    elif dk is not None:  # keys are turned as queries are
        dk, _ = rope_bwd(dk, None, cos, sin, ctx.interleaved)
    return None, dq, dk, None, None, None


rope_bwd = define(
    "rope_bwd(Tensor dq, Tensor? dk, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    _bwd,
    _fake,
)
rope_fwd = define(
    "rope_fwd(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    _fwd,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)


def rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin, for pairs of the dimensions of q and k.

    Args:
        q: (B, H, T, D), any strides; float32, bfloat16, float16 (float64 on the torch backend).
        k: (B, H_kv, T, D) in q's dtype, or None.
        cos: (T, R/2), or (B, T, R/2) where positions differ between sequences; any floating dtype,
            fp32 from `rope_cache`. The first R <= D dimensions are turned, the others pass.
        sin: of cos's shape.
        interleaved: whether a pair is (2 i, 2 i + 1), as in GPT-J, rather than (i, i + R/2), as in
            GPT-NeoX and Llama.

    Returns:
        q and k turned, in q's dtype, laid out as (B, T, H, D); None for k where it is None.
        Arithmetic is fp32. cos and sin get no gradient.

    Raises:
        TypeError: not floating point, or q and k of different dtypes.
        ValueError: shapes that do not fit, or R > D.
        RuntimeError: tensors on different devices.

    Limits: no double backward.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    heads = {"q": q} if k is None else {"q": q, "k": k}
    for name, x in heads.items():
        check_floating("rope", name, x)
        if x.dim() != 4:
            raise ValueError(f"rope: {name} must be (B, H, T, D), got {tuple(x.shape)}")
    check_dtypes("rope", q.dtype, k=k)
    check_device("rope", q.device, k=k)
    B, _, T, D = q.shape
    if k is not None and (k.shape[0], *k.shape[2:]) != (B, T, D):
        raise ValueError(f"rope: k must be ({B}, H_kv, {T}, {D}), got {tuple(k.shape)}")
    check_tables("rope", q, cos, sin)
    turned_q, turned_k = rope_fwd(q, k, cos, sin, interleaved)
    return turned_q, None if k is None else turned_k


def check_tables(op: str, q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Raise unless cos and sin are tables for the tokens of q.

    Raises:
        TypeError: not floating point.
        ValueError: shapes that do not fit, or R > D.
        RuntimeError: on another device than q.
    """
    for name, x in (("cos", cos), ("sin", sin)):
        check_floating(op, name, x)
    check_device(op, q.device, cos=cos, sin=sin)
    B, _, T, D = q.shape
    half = cos.shape[-1] if cos.dim() else 0
    if tuple(cos.shape) not in ((T, half), (B, T, half)):
        raise ValueError(f"{op}: cos must be ({T}, R/2) or ({B}, {T}, R/2), got {tuple(cos.shape)}")
    if not 0 < 2 * half <= D:
        raise ValueError(f"{op}: cos must be for R of 2 to {D} dimensions, got {2 * half}")
    if sin.shape != cos.shape:
        raise ValueError(f"{op}: sin must be {tuple(cos.shape)}, got {tuple(sin.shape)}")


def rope_cache(
    T: int, dim: int, base: float = 10000.0, *, device: torch.device | str | None = None
) -> Tensors2:
    """cos and sin of t base^(-2 i / dim), for `rope`.

    Args:
        T: positions, from 0 on.
        dim: dimensions to turn, R: the head dim, or less where only some turn.
        base: the slowest pair turns by about 1 / base a position.
        device: of the tables.

    Returns:
        cos and sin, (T, dim / 2), float32. Angles are computed in fp64: in fp32 the angle of a
        position beyond 10^5 would be off by a hundredth.

    Raises:
        ValueError: T below 0, dim not even and positive, or base not positive.
    """
    if T < 0:
        raise ValueError(f"rope_cache: T must be at least 0, got {T}")
    if dim < 2 or dim % 2:
        raise ValueError(f"rope_cache: dim must be even and positive, got {dim}")
    if not base > 0:
        raise ValueError(f"rope_cache: base must be positive, got {base}")
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    positions = torch.arange(T, dtype=torch.float64, device=device)
    angles = torch.outer(positions, base**-exponents)
    return angles.cos().float(), angles.sin().float()
