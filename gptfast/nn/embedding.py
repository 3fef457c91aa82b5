"""Embedding as a module."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gptfast.ops import embedding


class Embedding(torch.nn.Embedding):
    """y = weight[idx]; replaces `torch.nn.Embedding`.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as in `torch.nn.Embedding`.
        max_norm, scale_grad_by_freq, sparse: must keep their defaults; see Raises.

    Shape: tokens (*) to (*, embedding_dim). Errors and limits: see `gptfast.embedding`.

    Raises:
        ValueError: an option that only torch's own has.
    """

    @functools.wraps(torch.nn.Embedding.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name, default in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
            if getattr(self, name) != default:
                raise ValueError(
                    f"Embedding: {name} must be {default}, got {getattr(self, name)}; "
                    "use torch.nn.Embedding for it"
                )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """One row of the weight for each token."""
        return embedding(input, self.weight, self.padding_idx)
