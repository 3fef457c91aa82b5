"""Linear layers with quantised weights, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gptfast.nn.hooks import is_plain
from gptfast.ops import linear_decode
from gptfast.ops.linear_decode import QuantizedWeight, dequantize_weight, quantize_weight


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W in int8 or int4: what `torch.nn.Linear` becomes for inference.

    W lies in buffers, packed as `gptfast.ops.linear_decode` describes: it is part of the
    `state_dict`, moves with `.to(device)`, and keeps its bits when the module is cast.

    Args:
        linear: the layer to round; it is not changed.
        format, zero_points: as in `gptfast.quantize_weight`.

    Shape: (..., in_features) to (..., out_features), in x's dtype. Errors and limits: see
    `gptfast.linear_decode`.
    """

    data: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, format: str, zero_points: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.format, self.training = format, linear.training
        weight = quantize_weight(linear.weight, format, zero_points)
        bias = linear.bias
        self.register_buffer("data", weight.data)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The buffers as `gptfast.linear_decode` takes them."""
        return QuantizedWeight(
            self.data, self.scale, self.zero, self.out_features, self.in_features
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The (out_features, in_features) weight that the layer multiplies with."""
        return dequantize_weight(self.quantized_weight, dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T, without the bias."""
        return linear_decode(x, self.quantized_weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b."""
        return linear_decode(x, self.quantized_weight, self.bias)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"{self.in_features}, {self.out_features}, {self.format}"
            f"{', zero_points' if self.zero is not None else ''}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # a cast, which is meant for activations
            self.scale = scale.to(self.scale.device)
        return self


def product(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x W^T of a linear layer, quantised or not; its bias is left to an op behind it: `late_bias`.

    A layer that is more than that (it has hooks, or an adapter has taken its place) is called, and
    has no late bias.
    """
    if not is_plain(layer, nn.Linear, QuantizedLinear):
        return layer(x)
    if isinstance(layer, QuantizedLinear):
        return layer.product(x)
    return F.linear(x, layer.weight)  # type: ignore[arg-type]


def late_bias(layer: nn.Module) -> torch.Tensor | None:
    """What `product` leaves out."""
    return layer.bias if is_plain(layer, nn.Linear, QuantizedLinear) else None  # type: ignore[return-value]


def quantize(model: nn.Module, format: str, zero_points: bool = False) -> nn.Module:
    """Replace every `torch.nn.Linear` in a model by a `QuantizedLinear`, for inference.

    A weight that an embedding shares, like GPT-2's head, is packed for the layer; the embedding
    keeps its own.

    Args:
        model: changed in place; it must have a linear layer. Subclasses of `torch.nn.Linear` and
            parametrised layers stay what they are.
        format: "int8", a scale for each output channel, or "int4", one for each 32 weights.
        zero_points: for int4, whether the scales have zero points.

    Returns:
        The model.

    Raises:
        ValueError: an unknown format, a weight that is not finite, or no linear layer.
    """
    found = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, QuantizedLinear(child, format, zero_points))
                found += 1
    if not found:
        raise ValueError(f"quantize: expected a model with torch.nn.Linear, got {type(model)}")
    return model
