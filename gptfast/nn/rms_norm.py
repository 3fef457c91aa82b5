"""RMSNorm as a module."""

from __future__ import annotations

import torch

from gptfast.nn.layer_norm import over_trailing_dimensions
from gptfast.ops import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight; replaces `torch.nn.RMSNorm`.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in `torch.nn.RMSNorm`.

    Shape: (..., *normalized_shape) to the same. Errors and limits: see `gptfast.rms_norm`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the trailing dimensions of x."""
        flat, weight = over_trailing_dimensions("RMSNorm", x, self.normalized_shape, self.weight)
        y = rms_norm(flat, weight, self.eps)
        return y if flat is x else y.view(x.shape)
