"""How tensors lie in memory: what kernels ask of their inputs, and give to their results."""

from __future__ import annotations

import torch


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x with a contiguous last dimension, the only one whose stride kernels do not take."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., K) as a matrix with a contiguous last dimension, also where K is 0."""
    return unit_stride(x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1]))


def empty_output(x: torch.Tensor, D: int | None = None) -> torch.Tensor:
    """As x, (B, H, T, D), lying in memory as (B, T, H, D): merging the heads then copies nothing.

    D: if not that of x.
    """
    B, H, T, _ = x.shape
    return x.new_empty(B, T, H, x.shape[-1] if D is None else D).transpose(1, 2)


def heads_of(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Address and strides of (B, H, T, D), or of packed sequences (N, H, D)."""
    if x.dim() == 4:
        return (x.data_ptr(), *x.stride()[:3])  # type: ignore[return-value]
    return x.data_ptr(), 0, x.stride(1), x.stride(0)
