"""LayerNorm as a module."""

from __future__ import annotations

from typing import Any

import torch

from gptfast.ops.layer_norm import layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias; replaces `torch.nn.LayerNorm`.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in `torch.nn.LayerNorm`.

    Shape: (..., *normalized_shape) to the same. Errors and limits: see `gptfast.layer_norm`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the trailing dimensions of x."""
        flat, weight, bias = over_trailing_dimensions(
            "LayerNorm", x, self.normalized_shape, self.weight, self.bias
        )
        y = layer_norm(flat, weight, bias, self.eps)
        return y if flat is x else y.view(x.shape)


def over_trailing_dimensions(
    module: str, x: torch.Tensor, shape: tuple[int, ...], *parameters: torch.Tensor | None
) -> tuple[Any, ...]:
    """x and the parameters of a norm with the dimensions of `shape` as one, which ops normalise.

    Raises:
        ValueError: x does not end in `shape`.
    """
    n = len(shape)
    if tuple(x.shape[-n:]) != shape:
        raise ValueError(f"{module}: x must end in {tuple(shape)}, got {tuple(x.shape)}")
    if n == 1:
        return x, *parameters
    return x.flatten(-n), *(None if p is None else p.flatten() for p in parameters)
