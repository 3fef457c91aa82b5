"""LayerNorm as a module."""

from __future__ import annotations

import torch

from gptfast.ops import layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias; replaces `torch.nn.LayerNorm`.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in `torch.nn.LayerNorm`.

    Shape: (..., *normalized_shape) to the same. Errors and limits: see `gptfast.layer_norm`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the trailing dimensions of x."""
        n = len(self.normalized_shape)
        if tuple(x.shape[-n:]) != self.normalized_shape:
            raise ValueError(
                f"LayerNorm: x must end in {tuple(self.normalized_shape)}, got {tuple(x.shape)}"
            )
        if n == 1:
            return layer_norm(x, self.weight, self.bias, self.eps)
        weight = None if self.weight is None else self.weight.flatten()
        bias = None if self.bias is None else self.bias.flatten()
        return layer_norm(x.flatten(-n), weight, bias, self.eps).view(x.shape)
