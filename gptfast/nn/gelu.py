"""GELU as a module."""

from __future__ import annotations

import torch

from gptfast.ops import gelu


class GELU(torch.nn.GELU):
    """y = x Phi(x); replaces `torch.nn.GELU`.

    Args:
        approximate: "none" (default, as in torch) or "tanh" (what GPT-2 uses).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply GELU elementwise."""
        return gelu(x, self.approximate)
