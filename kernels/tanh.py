"""The hyperbolic tangent in Triton: neither the interpreter nor every target has one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh_and_slope(y):
    """tanh(y) and 1 / cosh(y)^2, each accurate to a few units in the last place.

    With e = exp(-2 |y|): (1 - e) / (1 + e), and below 1/2, where 1 - e cancels, the polynomial
    y + y^3 q(y^2), fitted for the least relative error (2^-26).
    """
    e = tl.exp(tl.abs(y) * -2.0)
    r = 1 / (1 + e)
    square = y * y
    q = square * 1.724154688e-2 - 5.304551870e-2
    q = q * square + 1.332587898e-1
    q = q * square - 3.333314359e-1
    large = tl.where(y < 0, e - 1, 1 - e) * r
    return tl.where(tl.abs(y) < 0.5, y * square * q + y, large), 4 * e * r * r
