"""Dropout masks in Triton. The maths stands in `gptfast/ops/philox.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dropout_factors(
    seed, head, first_row, first_col, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """z of a tile of scores: each Philox call serves 8 keys, 16 bits each."""
    i = first_row + tl.arange(0, BLOCK_M)[:, None]
    j = first_col // 8 + tl.arange(0, BLOCK_N // 8)[None, :]
    c0 = (i + j * 0).to(tl.uint32)
    c1 = (j + i * 0).to(tl.uint32)
    c2 = tl.zeros_like(c0) + head.to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0))
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # (M, N / 8, word div 2, word mod 2)
    bits = tl.join(words & 0xFFFF, words >> 16)  # and the half
    bits = tl.reshape(bits, (BLOCK_M, BLOCK_N))
    # `cast`, not `to`: a threshold of 1 is a constant to Triton, and no tensor.
    keep = bits < tl.cast(threshold, tl.uint32)
    return tl.where(keep, 65536.0 / tl.cast(threshold, tl.float32), 0.0)
