"""Dropout masks from a counter: every backend draws the same one, in backward as in forward.

Element (i, j) of matrix `head` is kept where 16 bits of Philox-4x32-10, with key `seed` and counter
(i, j div 8, head, 0), are below (1 - p) 2^16: which 16 of the 128 bits, j mod 8 says.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import math

import torch


def dropout_factors(
    seed: torch.Tensor,
    head: torch.Tensor,
    i: torch.Tensor,
    j: torch.Tensor,
    dropout_p: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The factors z, 0 or 2^16 / threshold, at (head, i, j), which broadcast against each other."""
    mask = 0xFFFFFFFF
    head, i, j = torch.broadcast_tensors(head, i, j)
    c0, c1, c2, c3 = i, j // 8, head, torch.zeros_like(i)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        # 32 x 32 bit products, assembled from 16-bit halves: int64 would overflow.
        high0, low0 = _multiply_wide(0xD2511F53, c0)
        high1, low1 = _multiply_wide(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    lane = j % 8
    word = torch.where(lane < 4, torch.where(lane < 2, c0, c1), torch.where(lane < 6, c2, c3))
    bits = torch.where(lane % 2 == 1, word >> 16, word & 0xFFFF)
    threshold = dropout_threshold(dropout_p)
    inverse_keep = 65536 / threshold if threshold else 0.0
    return (bits < threshold).to(dtype) * inverse_keep


def dropout_threshold(dropout_p: float) -> int:
    """How many of the 2^16 values are kept; the factor of a kept score is 2^16 over it."""
    return math.floor((1 - dropout_p) * 65536 + 0.5)


def _multiply_wide(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
