"""Dropout masks from a counter: every backend draws the same one, in backward as in forward.

Element (i, j) of matrix `head` is kept where 16 bits of Philox-4x32-10, with key `seed` and counter
(i, j div 8, head, 0), are below (1 - p) 2^16: which 16 of the 128 bits, j mod 8 says.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import math

import torch

from gptfast.ops.library import check_device, check_shape


def dropout_factors(
    seed: torch.Tensor,
    head: torch.Tensor,
    i: torch.Tensor,
    j: torch.Tensor,
    dropout_p: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The factors z, 0 or 2^16 / threshold, at (head, i, j), which broadcast against each other."""
    head, i, j = torch.broadcast_tensors(head, i, j)
    bits = random_bits(seed, (i, j // 8, head, torch.zeros_like(i)), j % 8)
    threshold = dropout_threshold(dropout_p)
    inverse_keep = 65536 / threshold if threshold else 0.0
    return (bits < threshold).to(dtype) * inverse_keep


def random_bits(
    seed: torch.Tensor, counter: tuple[torch.Tensor, ...], lane: torch.Tensor
) -> torch.Tensor:
    """16 of Philox's 128 bits at a counter of four words: the ones that `lane`, 0 to 7, says."""
    c0, c1, c2, c3 = philox(seed, counter)
    word = torch.where(lane < 4, torch.where(lane < 2, c0, c1), torch.where(lane < 6, c2, c3))
    return torch.where(lane % 2 == 1, word >> 16, word & 0xFFFF)


def philox(
    seed: torch.Tensor | int, counter: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four words of 32 random bits, in int64, at a counter of four words."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        # 32 x 32 bit products, assembled from 16-bit halves: int64 would overflow.
        high0, low0 = _multiply_wide(0xD2511F53, c0)
        high1, low1 = _multiply_wide(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """How many of the 2^16 values are kept; the factor of a kept score is 2^16 over it."""
    return math.floor((1 - dropout_p) * 65536 + 0.5)


def _multiply_wide(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def row_factors(
    seed: torch.Tensor, shape: torch.Size, dropout_p: float, dtype: torch.dtype
) -> torch.Tensor:
    """The factors of a tensor of this shape, whose rows are one matrix: head 0."""
    N = shape[-1]
    i = torch.arange(shape[:-1].numel(), device=seed.device)[:, None]
    j = torch.arange(N, device=seed.device)
    return dropout_factors(seed, torch.zeros_like(j), i, j, dropout_p, dtype).view(shape)


def checked_seed(
    op: str, seed: torch.Tensor | None, dropout_p: float, device: torch.device
) -> torch.Tensor | None:
    """The seed of a call, drawn from PyTorch's generator if it is None; None without dropout.

    Raises:
        TypeError: seed is no int64 tensor.
        ValueError: seed is no scalar, or dropout_p is outside [0, 1).
        RuntimeError: seed is on another device.
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    if seed is not None:
        if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64:
            given = seed.dtype if isinstance(seed, torch.Tensor) else type(seed).__name__
            raise TypeError(f"{op}: seed must be an int64 scalar tensor, got {given}")
        check_shape(op, "seed", seed, ())
        check_device(op, device, seed=seed)
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    return seed
