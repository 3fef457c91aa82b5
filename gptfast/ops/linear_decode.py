"""Products of a few rows with a large weight, for inference, the weight quantised or not.

y = act(x W^T + b),  x (M, K), W (N, K); act is the identity or GELU (tanh)

Decoding multiplies each weight with one token, or a few: it takes as long as W takes to be read. So
W may be stored in fewer bits (weight-only quantisation; products are those of the W it stands for):

int8:  w_nk = scale_n q_nk,                q in -127 .. 127, a scale for each output channel
int4:  w_nk = scale_ng (q_nk - zero_ng),   q in 0 .. 15, g = k // 32; without zero points zero = 8

Layout, in panels of 16 output channels, so that kernels read it from one end to the other; N and K
are filled up to whole panels, and to 64 (int8) or 32 (int4):

int8:  data int8 (N / 16, K / 4, 16, 4): q_nk at [n // 16, k // 4, n % 16, k % 4]; scale fp32 (N,)
int4:  data uint8 (N / 16, K / 8, 16, 4): q_nk in the low (k % 8 < 4) or high half of the byte
       [n // 16, k // 8, n % 16, k % 4]; scale bf16 and zero uint8 (N / 16, K / 32, 16)

What lies beyond N and K may be anything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from gptfast import backend
from gptfast.ops.layout import as_rows
from gptfast.ops.library import (
    check_device,
    check_dtypes,
    check_floating,
    check_shape,
    cuda_parameter,
    define,
    fp32_parameter,
    pointer,
    statistics_dtype,
)

PANEL, GROUP = 16, 32  # output channels in a panel, weights with one int4 scale
FORMATS = ("int8", "int4")
ACTIVATIONS = (None, "gelu_tanh")  # by their codes in csrc/cpu/linear_decode.h
FORMAT_CODES = {torch.int8: 3, torch.uint8: 4, **backend.DTYPE_CODES}  # the same


class QuantizedWeight(NamedTuple):
    """A quantised (N, K) weight in the layout that this module's documentation describes."""

    data: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    out_features: int  # N
    in_features: int  # K


def packed_shape(dtype: torch.dtype, N: int, K: int) -> tuple[int, int, int, int]:
    """Shape of the data of an (N, K) weight: int8 stands for int8, uint8 for int4."""
    panels = -(-N // PANEL)
    if dtype == torch.int8:
        return panels, -(-K // 64) * 16, PANEL, 4
    return panels, -(-K // GROUP) * GROUP // 8, PANEL, 4


def quantize_weight(
    weight: torch.Tensor, format: str, zero_points: bool = False
) -> QuantizedWeight:
    """Round a weight to int8 or int4.

    int8: scale_n = max_k |w_nk| / 127. int4: the weight of a group that is largest in size becomes
    q = 0, which has one step more to its side; with zero points the 16 steps span the group's
    weights and 0. Scales are rounded to their dtype first, then q is the nearest.

    Args:
        weight: (N, K), floating point, finite.
        format: "int8" or "int4".
        zero_points: for int4, whether each group has one of its own.

    Raises:
        TypeError: weight is not floating point.
        ValueError: not (N, K), not finite, an unknown format, or zero points of int8.
    """
    op = "quantize_weight"
    check_floating(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be (N, K), got {tuple(weight.shape)}")
    if format not in FORMATS:
        raise ValueError(f"{op}: format must be one of {FORMATS}, got {format!r}")
    if zero_points and format == "int8":
        raise ValueError(f"{op}: zero points belong to int4, got format 'int8'")
    w = weight.detach().float()
    if not w.isfinite().all():
        raise ValueError(f"{op}: weight must be finite, got NaN or infinity")
    N, K = w.shape
    panels, steps, *_ = packed_shape(torch.int8 if format == "int8" else torch.uint8, N, K)
    if format == "int8":
        scale = w.abs().amax(1) / 127 if K else w.new_zeros(N)
        q = (w / _divisor(scale)[:, None]).round().clamp(-127, 127)
        q = F.pad(q, (0, 4 * steps - K, 0, PANEL * panels - N)).to(torch.int8)
        data = q.view(panels, PANEL, steps, 4).transpose(1, 2).contiguous()
        return QuantizedWeight(data, scale, None, N, K)
    # (panels, 16, groups, 32)
    w = F.pad(w, (0, 8 * steps - K, 0, PANEL * panels - N)).view(
        panels, PANEL, 8 * steps // GROUP, GROUP
    )
    low, high = (w.amin(-1), w.amax(-1)) if w.numel() else (w.new_zeros(w.shape[:3]),) * 2
    zero, offset = None, w.new_full((), 8)
    if zero_points:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / 15).bfloat16()
        zero = (-low / _divisor(scale.float())).round().clamp(0, 15)
        offset = zero[..., None]
    else:
        scale = (torch.where(-low > high, low, high) / -8).bfloat16()
    q = (w / _divisor(scale.float())[..., None] + offset).round().clamp(0, 15).to(torch.uint8)
    halves = q.view(panels, PANEL, steps, 2, 4)
    data = (halves[..., 0, :] | halves[..., 1, :] << 4).transpose(1, 2).contiguous()
    scale = scale.transpose(1, 2).contiguous()
    if zero is not None:
        zero = zero.to(torch.uint8).transpose(1, 2).contiguous()
    return QuantizedWeight(data, scale, zero, N, K)


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """scale, and 1 where it is 0: a group of zeros has q = zero."""
    return torch.where(scale == 0, 1, scale)


def dequantize_weight(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The (N, K) weight that a quantised one stands for, computed in `dtype`."""
    data, scale, zero, N, K = weight
    panels, steps = data.shape[:2]
    if data.dtype == torch.int8:
        w = data.transpose(1, 2).reshape(panels * PANEL, 4 * steps)[:N, :K]
        return w.to(dtype) * scale.to(dtype)[:, None]
    halves = torch.stack((data & 15, data >> 4), dim=-2)  # (panels, K / 8, 16, 2, 4)
    q = halves.transpose(1, 2).reshape(panels, PANEL, 8 * steps // GROUP, GROUP).to(dtype)
    offset = 8 if zero is None else zero.to(dtype).transpose(1, 2)[..., None]
    w = (q - offset) * scale.to(dtype).transpose(1, 2)[..., None]
    return w.reshape(panels * PANEL, 8 * steps)[:N, :K]


def reference_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str | None,
) -> torch.Tensor:
    """The formula in PyTorch."""
    dtype = statistics_dtype(x.dtype)
    if scale is not None:
        packed = QuantizedWeight(weight, scale, zero, out_features, x.shape[-1])
        weight = dequantize_weight(packed, dtype)
    z = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    y = z if activation is None else F.gelu(z, approximate="tanh")
    return y.to(x.dtype).contiguous()


def cpu_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str | None,
) -> torch.Tensor:
    """The `cpu` backend."""
    rows = as_rows(x)
    M, K = rows.shape
    weight, b = weight.contiguous(), fp32_parameter(bias)
    if scale is not None:
        scale = scale.contiguous()
        zero = None if zero is None else zero.contiguous()
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    backend.extension().linear_decode_fwd(  # type: ignore[union-attr]
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        pointer(scale),
        pointer(zero),
        pointer(b),
        y.data_ptr(),
        M,
        out_features,
        K,
        FORMAT_CODES[weight.dtype],
        ACTIVATIONS.index(activation),
        backend.DTYPE_CODES[x.dtype],
    )
    return y


def cuda_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str | None,
) -> torch.Tensor:
    """The `cuda` backend."""
    rows = as_rows(x)
    M, K = rows.shape
    b, b_dtype = cuda_parameter(bias)
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    backend.launch_cuda(
        "linear_decode_fwd",
        rows,
        rows,
        rows.stride(0),
        _aligned(weight),
        _aligned(scale),
        _aligned(zero),
        b,
        b_dtype,
        y,
        M,
        out_features,
        K,
        FORMAT_CODES[weight.dtype],
        ACTIVATIONS.index(activation),
    )
    return y


def _aligned(t: torch.Tensor | None) -> torch.Tensor | None:
    """t, contiguous and at an address that loads of 16 bytes take."""
    if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def why_not_kernel(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the kernels cannot take this weight, or None."""
    return None if weight.dtype in FORMAT_CODES else f"its weight is {weight.dtype}"


OP = backend.Op(
    "linear_decode",
    {
        "torch": backend.Implementation(reference_fwd),
        "cpu": backend.Implementation(cpu_fwd, why_not=why_not_kernel),
        "triton": backend.triton_implementation(
            "linear_decode", why_not=why_not_kernel, forward_only=True
        ),
        "cuda": backend.Implementation(cuda_fwd, why_not=why_not_kernel),
    },
)


def _fwd(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return OP.choose(x, weight).fwd(x, weight, *rest)


def _fake_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str | None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


linear_decode_fwd = define(
    "linear_decode_fwd(Tensor x, Tensor weight, Tensor? scale, Tensor? zero, Tensor? bias,"
    " int out_features, str? activation) -> Tensor",
    _fwd,
    _fake_fwd,
)


def linear_decode(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """y = act(x W^T + b) of a few rows, for inference: W is read once, as it is stored.

        w = gptfast.quantize_weight(linear.weight, "int4")
        y = gptfast.linear_decode(x, w, linear.bias)

    Args:
        x: (..., K), any strides; float32, bfloat16, float16 (float64 on the torch backend). Any
            number of rows gives right results; up to 16 are fast.
        weight: (N, K) in any floating dtype, which may differ from x's, or what `quantize_weight`
            returns.
        bias: (N,), any floating dtype, or None.
        activation: None or "gelu_tanh".

    Returns:
        (..., N) in x's dtype, contiguous. Products and sums are those of fp32 with the weights as
        they are stored; only y is rounded to x's dtype. Where a kernel multiplies quantised weights
        in integers, each row of x is rounded to fixed point of 24 bits first, which moves x_k by
        less than 3 u max_k |x_k|, u = 2^-24.

    Raises:
        TypeError: a tensor is not floating point, or a quantised weight has other dtypes than its
            layout.
        ValueError: shapes that do not fit, or an unknown activation.
        RuntimeError: tensors on different devices; a backend is forced that cannot run the call;
            differentiation, since this is for inference.

    Limits: the kernels are made for up to 16 rows. More are multiplied 64 at a time (CPU; 16 on a
        GPU) for each time that W is read, which with many rows is slower than a matrix library. On
        a GPU at most 2^20 - 16 rows.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022 (weights alone in few bits, for decoding); Dettmers and Zettlemoyer, "The
    case for 4-bit precision", 2022.
    """
    op = "linear_decode"
    check_floating(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    K = x.shape[-1]
    if isinstance(weight, QuantizedWeight):
        data, scale, zero, N, in_features = weight
        _check_quantized(op, weight)
        if in_features != K:
            raise ValueError(f"{op}: x must be (..., {in_features}), got {tuple(x.shape)}")
        check_device(op, x.device, weight=data, scale=scale, zero=zero, bias=bias)
    else:
        check_floating(op, "weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"{op}: weight must be (N, {K}), got {tuple(weight.shape)}")
        data, scale, zero, N = weight, None, None, weight.shape[0]
        check_shape(op, "weight", weight, (N, K))
        check_device(op, x.device, weight=weight, bias=bias)
    if bias is not None:
        check_floating(op, "bias", bias)
        check_shape(op, "bias", bias, (N,))
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    return linear_decode_fwd(x, data, scale, zero, bias, N, activation)


def _check_quantized(op: str, weight: QuantizedWeight) -> None:
    data, scale, zero, N, K = weight
    if data.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"{op}: weight.data must be int8 or uint8 (int4), got {data.dtype}")
    check_shape(op, "weight.data", data, packed_shape(data.dtype, N, K))
    if data.dtype == torch.int8:
        if zero is not None:
            raise ValueError(f"{op}: weight.zero must be None with int8, got {tuple(zero.shape)}")
        check_dtypes(op, torch.float32, **{"weight.scale": scale})
        check_shape(op, "weight.scale", scale, (N,))
        return
    check_dtypes(op, torch.bfloat16, **{"weight.scale": scale})
    check_dtypes(op, torch.uint8, **{"weight.zero": zero})
    groups = (data.shape[0], data.shape[1] * 8 // GROUP, PANEL)
    check_shape(op, "weight.scale", scale, groups)
    check_shape(op, "weight.zero", zero, groups)
