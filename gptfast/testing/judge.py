"""How a result is judged: its error against fp64, and the bound derived from the arithmetic."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Magnitude(NamedTuple):
    """What the rounding errors of one result are proportional to, element by element, in fp64.

    terms: sum of the absolute values of what the element is the sum of.
    condition: how far those terms move, in units of u, when every intermediate they are made from
        (a mean, a score, a log-sum-exp) moves by u times its own terms.
    length: the longest sum on the way.
    stored: how far the element moves, in units of the storage dtype's u, when an intermediate that
        the op returns, too, is rounded to that dtype; None where there is no such thing.
    factors: sum of the absolute values of what operands of that dtype are multiplied by, where
        those may be too small for it; None where they are not.
    """

    terms: torch.Tensor
    condition: torch.Tensor
    length: int
    stored: torch.Tensor | None = None
    factors: torch.Tensor | None = None


# exp may flush what is below 2^-126. Added to a probability among the terms, this allows u32 times
# that.
UNDERFLOW = 2.0**-102


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding: 2^-24 for float32, 2^-8 for bfloat16."""
    return torch.finfo(dtype).eps / 2


def rounding_bound(
    exact: torch.Tensor,
    magnitude: Magnitude,
    dtype: torch.dtype,
    storage: torch.dtype | None = None,
    equal_terms: bool = False,
) -> torch.Tensor:
    """How far from `exact` an honest kernel may be, element by element.

        u |exact|  +  u32 (4 + sqrt(length)) (terms + condition)  +  u_storage stored  +  underflow

    where underflow is the smallest step of the result, and that of operands times their factors.

    1. One rounding of the result to its own dtype: all that half precision may cost, because
       statistics and sums are fp32.
    2. A sum of n rounded terms errs by u32 sqrt(n) sum |term| with overwhelming probability (Higham
       and Mary, "A new approach to probabilistic rounding error analysis", 2019; their constant
       drops out, since kernels add in four lanes or more). 4 are the roundings inside a term:
       products, an exp, a division. `condition` passes on what intermediates lost. Proportional to
       the *terms*, the bound forgives cancellation and nothing else: an element that does not
       cancel is held to a few ulp however small it is, which no norm over the tensor can do.
    3. Only with `storage`: matrix units take operands of that dtype (attention rounds p and ds
       once), so stored is terms; or the magnitude says itself what is stored.
    4. fp32 below 2^-126 may be flushed; fp16 has steps of 2^-24 there, which an operand that is
       rounded to fp16, as p and ds are, errs by half of, however small it is.

    The probability in 2 is that of independent errors. With `equal_terms` every addition of a sum
    rounds the same way, and the root becomes n / 4: the worst case in four lanes.
    """
    u = unit_roundoff(dtype)
    u_arithmetic = min(u, unit_roundoff(torch.float32))
    terms, condition, n, stored, factors = magnitude
    growth = 4 + (n / 4 if equal_terms else math.sqrt(n))
    bound = u * exact.abs() + u_arithmetic * growth * (terms + condition)
    if storage is not None:
        bound = bound + unit_roundoff(storage) * (terms if stored is None else stored)
        if factors is not None:
            bound = bound + unit_roundoff(storage) * torch.finfo(storage).tiny * factors
    return bound + (2.0**-25 if dtype == torch.float16 else 2.0**-126)


def assert_close(
    name: str,
    got: torch.Tensor,
    peer: torch.Tensor,
    exact: torch.Tensor,
    bound: torch.Tensor,
    factor: float = 2.0,
) -> float:
    """Judge `got` by error(got) <= factor * error(peer) + bound, element by element.

    error(peer) must not excuse one element by another. It counts only where the peer itself exceeds
    the bound, as the smaller of two norms: its largest excess, and its largest excess in units of
    the bound, times the element's bound. The first keeps a peer that is poor on small elements
    (GELU's tail as 1 + tanh) from excusing them, the second one that is poor on large elements.
    This is stricter than the plain rule with either norm.

    Args:
        name: what is judged, for the message.
        got: the result.
        peer: PyTorch's result; it is rounded to got's dtype first.
        exact: the fp64 result. got must be NaN exactly where it is, and infinite exactly where it
            is infinite in got's dtype.
        bound: from `rounding_bound`.
        factor: 2 for results, 3 for gradients.

    Returns:
        The largest error in units of what was allowed.

    Raises:
        AssertionError: naming the worst element.
    """
    if got.shape != exact.shape:
        raise AssertionError(f"{name}: shape must be {tuple(exact.shape)}, got {tuple(got.shape)}")
    if exact.numel() == 0:
        return 0.0
    given, exact = got.detach().double(), exact.detach().double()
    rounded, theirs = exact.to(got.dtype).double(), peer.detach().to(got.dtype).double()
    finite = rounded.isfinite()
    wrong = ~torch.where(
        finite, given.isfinite(), (given == rounded) | (given.isnan() & rounded.isnan())
    )
    if wrong.any():
        at = wrong.flatten().nonzero()[0, 0]
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ in being NaN or "
            f"infinite; first at {_position(at, got.shape)}: got {given.flatten()[at]:g}, "
            f"exact {exact.flatten()[at]:g}"
        )
    error = torch.where(finite, (given - exact).abs(), 0)
    excess = torch.where(finite & theirs.isfinite(), (theirs - exact).abs() - bound, 0).clamp(min=0)
    weighted = torch.where(finite, excess / bound, 0).max()
    allowed = bound + factor * torch.minimum(weighted * bound, excess.max())
    allowed = torch.where(finite, allowed, 1)
    ratio = (error / allowed).flatten()
    worst = int(ratio.argmax())  # NaN counts as the largest
    if not ratio[worst] <= 1:
        bad = int((~(ratio <= 1)).sum())
        raise AssertionError(
            f"{name}: {bad} of {ratio.numel()} elements are wrong; worst at "
            f"{_position(worst, got.shape)}: got {given.flatten()[worst]:.9g}, "
            f"exact {exact.flatten()[worst]:.9g}, error {error.flatten()[worst]:.3g}, "
            f"allowed {allowed.flatten()[worst]:.3g} (bound {bound.flatten()[worst]:.3g}, "
            f"torch's error there {abs(theirs - exact).flatten()[worst]:.3g})"
        )
    return float(ratio[worst])


def assert_close_in_norm(
    name: str, got: torch.Tensor, peer: torch.Tensor, exact: torch.Tensor
) -> None:
    """Judge what many ops made: error(got) <= 3 error(peer) + 4 u |exact|.

    Errors and |exact| are root mean squares over the tensor, u is the rounding of got's dtype.
    `got` and `peer` do the same sums in other orders, so their errors have the same size; 4 u are a
    few roundings, for where the peer happens to be exact.

    Raises:
        AssertionError: naming the tensor, its error and the peer's.
    """
    error, theirs = ((x.detach().double() - exact).norm() for x in (got, peer))
    allowed = 3 * theirs + 4 * unit_roundoff(got.dtype) * exact.norm()
    if not error <= allowed:
        raise AssertionError(
            f"{name}: error {error:.3g}, allowed {allowed:.3g}, torch's {theirs:.3g}"
        )


def _position(flat: int | torch.Tensor, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.as_tensor(int(flat)), shape))
