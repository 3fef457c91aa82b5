"""The shared harness of tests and benchmarks: cases, exact results, tolerances.

A test is a row of data. `CASES` names kinds of input (shape, values, memory layout, options); `OPS`
says for each op how inputs are made, how gptfast is called, which call of PyTorch is its peer and
what its rounding errors are proportional to.

    run_case(case, backend, dtype)

runs forward and every gradient in poisoned memory and judges each result by `assert_close`. A new
backend needs no new test; a new op needs an entry in `OPS` and its rows in `CASES`.

Longer than 500 lines because the rule that judges an op and the arithmetic behind its bounds are
read together, and nobody else needs a part of them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gptfast
from gptfast import backend as backends
from gptfast.ops import attention, cross_entropy, gelu, layer_norm
from gptfast.ops.attention import dropout_factors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Inputs = Mapping[str, Any]  # tensors by argument name; None: an optional one is absent
Options = Mapping[str, Any]

# ---- Tolerances ----------------------------------------------------------------------------------


class Magnitude(NamedTuple):
    """What the rounding errors of one result are proportional to, element by element, in fp64.

    terms: sum of the absolute values of what the element is the sum of.
    condition: how far those terms move, in units of u, when every intermediate they are made from
        (a mean, a score, a log-sum-exp) moves by u times its own terms.
    length: the longest sum on the way.
    """

    terms: torch.Tensor
    condition: torch.Tensor
    length: int


# exp may flush what is below 2^-126. Added to a probability among the terms, this allows u32 times
# that.
UNDERFLOW = 2.0**-102


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding: 2^-24 for float32, 2^-9 for bfloat16."""
    return torch.finfo(dtype).eps / 2


def rounding_bound(
    exact: torch.Tensor,
    magnitude: Magnitude,
    dtype: torch.dtype,
    storage: torch.dtype | None = None,
    equal_terms: bool = False,
) -> torch.Tensor:
    """How far from `exact` an honest kernel may be, element by element.

        u |exact|  +  u32 (4 + sqrt(length)) (terms + condition)  +  u_storage terms  +  underflow

    1. One rounding of the result to its own dtype: all that half precision may cost, because
       statistics and sums are fp32.
    2. A sum of n rounded terms errs by u32 sqrt(n) sum |term| with overwhelming probability (Higham
       and Mary, "A new approach to probabilistic rounding error analysis", 2019; their constant
       drops out, since kernels add in four lanes or more). 4 are the roundings inside a term:
       products, an exp, a division. `condition` passes on what intermediates lost. Proportional to
       the *terms*, the bound forgives cancellation and nothing else: an element that does not
       cancel is held to a few ulp however small it is, which no norm over the tensor can do.
    3. Only with `storage`: matrix units take operands of that dtype; attention rounds p and ds
       once.
    4. fp32 below 2^-126 may be flushed; fp16 has steps of 2^-24 there.

    The probability in 2 is that of independent errors. With `equal_terms` every addition of a sum
    rounds the same way, and the root becomes n / 4: the worst case in four lanes.
    """
    u = unit_roundoff(dtype)
    u_arithmetic = min(u, unit_roundoff(torch.float32))
    terms, condition, n = magnitude
    growth = 4 + (n / 4 if equal_terms else math.sqrt(n))
    bound = u * exact.abs() + u_arithmetic * growth * (terms + condition)
    if storage is not None:
        bound = bound + unit_roundoff(storage) * terms
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


# ---- Memory --------------------------------------------------------------------------------------


@contextlib.contextmanager
def poison_empty() -> Iterator[None]:
    """Make `torch.empty`, `torch.empty_like` and `Tensor.new_empty` return poisoned memory.

    What a kernel forgets to write is NaN (the largest integer in integer tensors), and a write past
    either end of the tensor is reported.

    Raises:
        AssertionError: on leaving, when the 64 bytes before or behind a tensor have changed.
    """
    real_empty = torch.empty
    guards: list[torch.Tensor] = []

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        if type(x) is not torch.Tensor or x.device.type == "meta":
            return x
        pad = 64 // x.element_size()
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        poison = float("nan") if x.is_floating_point() else _largest(x.dtype)
        elements = (last + 1 if x.numel() else 0) + 2 * pad
        buffer = torch.full((elements,), poison, dtype=x.dtype, device=x.device)
        guards.extend((buffer[:pad], buffer[-pad:]))
        guarded = real_empty(0, dtype=x.dtype, device=x.device)
        return guarded.set_(buffer.untyped_storage(), pad, x.shape, x.stride())

    def patched(owner: Any, name: str) -> Any:
        real = getattr(owner, name)
        return mock.patch.object(owner, name, lambda *a, **k: poisoned(real(*a, **k)))

    with patched(torch, "empty"), patched(torch, "empty_like"), patched(torch.Tensor, "new_empty"):
        yield
    for guard in guards:
        intact = guard.isnan() if guard.is_floating_point() else guard == _largest(guard.dtype)
        if not intact.all():
            raise AssertionError("a kernel wrote outside the tensor that it was given")


def _largest(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded", "scalar")


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `x` in another memory layout; what lies between them in memory is NaN.

    transposed: dimensions in reverse order. sliced: rows with a gap behind them, from an unaligned
    address on. strided: every second element of the last dimension. expanded: stride 0 along the
    last dimension but one (the values change: its first slice repeats). scalar: every stride 0, one
    value for all elements, which is what `.sum().backward()` hands on.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"lay_out: layout must be one of {LAYOUTS}, got {layout!r}")
    if x.dim() == 0 or x.numel() == 0 or layout == "contiguous":
        return x.contiguous()
    N = x.shape[-1]
    if layout == "scalar":
        return x.flatten()[:1].clone().squeeze().expand(x.shape)
    if layout == "expanded":
        dim = max(x.dim() - 2, 0)
        return x.narrow(dim, 0, 1).clone().expand(x.shape)
    if layout == "transposed":
        reverse = tuple(range(x.dim()))[::-1]
        return x.permute(reverse).contiguous().permute(reverse)
    gap = float("nan") if x.is_floating_point() else _largest(x.dtype)
    if layout == "sliced":
        memory = x.new_full((*x.shape[:-1], N + 3), gap)
        return memory[..., 1 : N + 1].copy_(x)
    memory = x.new_full((*x.shape[:-1], 2 * N), gap)
    return memory[..., ::2].copy_(x)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """All memory of x's storage."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


# ---- Cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One kind of input to one op.

    Args:
        op: key of `OPS`.
        shape: of x or of the logits; (B, H, H_kv, T, S, D) for attention.
        values: key of `VALUES`.
        layout: of every input, one of `LAYOUTS`; for attention also "packed": q, k and v are views
            of one (B, T, 3, H, D) tensor.
        grad_layout: of the incoming gradient.
        options: what `OPS[op]` understands.
    """

    op: str
    shape: tuple[int, ...]
    values: str = "normal"
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    options: Options = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.op, "x".join(map(str, self.shape)), self.values, self.layout]
        parts += [f"dy_{self.grad_layout}", *(f"{k}={v}" for k, v in self.options.items())]
        plain = ("normal", "contiguous", "dy_contiguous")
        return "-".join(part for part in parts if part not in plain)


def _spread(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    decades = 3 if dtype == torch.float16 else 15
    return x * 10 ** torch.linspace(-decades, decades, x.shape[-1])


def _first_rows(*specials: float) -> Callable[[torch.Tensor, torch.dtype], torch.Tensor]:
    def values(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = x.clone()
        for row, special in zip(x.view(-1, x.shape[-1]), specials, strict=False):
            row[x.shape[-1] // 2] = special
        return x

    return values


# (standard normal x, dtype) -> values
VALUES: Mapping[str, Callable[[torch.Tensor, torch.dtype], torch.Tensor]] = {
    "normal": lambda x, dtype: x,
    "large": lambda x, dtype: x * 8,
    "offset": lambda x, dtype: x + 1000,  # a mean far above the deviation
    "spread": _spread,  # thirty decades in each row
    "tiny": lambda x, dtype: x * (1e-6 if dtype == torch.float16 else 1e-30),
    "constant": lambda x, dtype: x[..., :1].expand(x.shape),  # rows without deviation
    "nan": _first_rows(math.nan),
    "nonfinite": _first_rows(math.nan, math.inf, -math.inf),
    "masked": lambda x, dtype: x.masked_fill(x > 0.3, -math.inf),
}


def _layer_norm_cases() -> Iterator[Case]:
    # One row and column, no rows, no columns, more dimensions, wide rows, and so many rows that dw
    # and db are summed in several blocks.
    for shape in (
        *((8, 64), (5, 37), (1, 768), (1, 1), (7,), (2, 3, 50), (0, 16), (3, 0), (0, 0), (2, 0, 5)),
        *((3, 4099), (2, 17003), (130, 24), (2100, 3)),
    ):
        yield Case("layer_norm", shape)
    for values in ("offset", "spread", "tiny", "constant", "nan", "nonfinite"):
        yield Case("layer_norm", (6, 48), values)
        yield Case("layer_norm", (3, 769), values)
    for layout in LAYOUTS[1:]:
        yield Case("layer_norm", (6, 41), layout=layout)
        yield Case("layer_norm", (2, 3, 16), layout=layout, grad_layout=layout)
        yield Case("layer_norm", (6, 41), grad_layout=layout)
    for weight in (None, "float32", "bfloat16", "float16"):
        yield Case("layer_norm", (9, 33), options={"weight": weight, "bias": weight})
    yield Case("layer_norm", (9, 33), options={"bias": None})
    yield Case("layer_norm", (9, 33), options={"weight": None, "eps": 0.1})


def _gelu_cases() -> Iterator[Case]:
    for approximate in ("tanh", "none"):
        options = {"approximate": approximate}
        for shape in ((), (1,), (4, 64), (3, 7, 11), (0,), (5, 0), (20_011,)):
            yield Case("gelu", shape, options=options)
        for values in ("large", "offset", "spread", "tiny", "nan"):
            yield Case("gelu", (4, 129), values, options=options)
        for layout in LAYOUTS[1:]:
            yield Case("gelu", (6, 41), layout=layout, options=options)
            yield Case("gelu", (6, 41), grad_layout=layout, options=options)


def _cross_entropy_cases() -> Iterator[Case]:
    # 4096 logits are one chunk of the CPU kernel.
    for shape in (
        *((8, 64), (5, 37), (1, 50), (1, 1), (6, 1), (9,), (2, 3, 17), (0, 16)),
        *((2, 4095), (2, 4096), (2, 4097), (3, 8200), (2, 50257)),
    ):
        yield Case("cross_entropy", shape)
    for reduction in ("none", "mean", "sum"):
        for smoothing in (0.0, 0.1, 1.0):
            for weight in (False, True):
                options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
                options |= {"weight": weight, "ignored": 0.3}
                yield Case("cross_entropy", (9, 37), options=options)
        yield Case("cross_entropy", (4, 9), options={"reduction": reduction, "ignored": 1.0})
        yield Case("cross_entropy", (0, 9), options={"reduction": reduction})
        # A class as ignore_index.
        yield Case("cross_entropy", (9, 3), options={"reduction": reduction, "ignore_index": 2})
        for values in ("large", "offset", "spread", "constant", "nan", "nonfinite", "masked"):
            yield Case("cross_entropy", (5, 77), values, options={"reduction": reduction})
    yield Case("cross_entropy", (4, 9000), "masked", options={"reduction": "none"})
    yield Case("cross_entropy", (5, 77), "offset", options={"label_smoothing": 0.1})
    for layout in LAYOUTS[1:]:
        for options in ({"reduction": "none"}, {"weight": True, "label_smoothing": 0.2}):
            yield Case("cross_entropy", (6, 41), layout=layout, options=options)
        yield Case("cross_entropy", (2, 3, 16), layout=layout)
        options = {"reduction": "none"}
        yield Case("cross_entropy", (6, 41), grad_layout=layout, options=options)


def _attention_cases() -> Iterator[Case]:
    # (T, S): one query block of 64 and its neighbours, decoding with up to four queries, prefill
    # behind a cache, more queries than keys (rows without any key), nothing.
    lengths = (
        *((16, 16), (64, 64), (65, 65), (63, 64), (130, 129), (1, 1), (1, 97), (2, 70), (4, 131)),
        *((5, 70), (64, 200), (80, 3), (3, 1), (131, 65), (0, 5), (5, 0), (0, 0)),
    )
    for causal in (True, False):
        for T, S in lengths:
            yield Case("attention", (1, 2, 2, T, S, 16), options={"causal": causal})
        for D in (1, 8, 40, 64, 80, 96, 111, 128, 256):
            yield Case("attention", (1, 2, 1, 67, 67, D), options={"causal": causal})
        for H_kv in (1, 2, 3):
            yield Case("attention", (2, 6, H_kv, 33, 40, 8), options={"causal": causal})
            yield Case("attention", (2, 6, H_kv, 3, 40, 8), options={"causal": causal})
        for scale in (0.0, -0.3, 2.0):
            yield Case(
                "attention", (1, 2, 2, 40, 40, 8), options={"causal": causal, "scale": scale}
            )
        for p in (0.1, 0.5, 0.999):
            for shape in ((2, 2, 1, 70, 90, 16), (1, 2, 2, 2, 40, 16)):
                yield Case("attention", shape, options={"causal": causal, "dropout_p": p})
        for values in ("large", "tiny", "constant"):
            yield Case("attention", (1, 2, 2, 70, 70, 24), values, options={"causal": causal})
        for layout in (*LAYOUTS[1:], "packed"):
            options = {"causal": causal}
            yield Case("attention", (2, 2, 2, 20, 20, 9), layout=layout, options=options)
            yield Case("attention", (2, 2, 2, 3, 3, 9), layout=layout, options=options)
        for layout in LAYOUTS[1:]:
            yield Case(
                "attention", (2, 2, 2, 20, 20, 9), grad_layout=layout, options={"causal": causal}
            )
    yield Case("attention", (0, 2, 1, 5, 5, 8))
    for T in (3, 33):
        yield Case("attention", (1, 2, 2, T, 33, 8), "nan")
    # Many keys: sums that must not lose small terms.
    yield Case("attention", (1, 1, 1, 1, 10_000, 16))
    yield Case("attention", (1, 1, 1, 6, 2_000, 16))


CASES = (*_layer_norm_cases(), *_gelu_cases(), *_cross_entropy_cases(), *_attention_cases())


def tail_case(op: str, n: int) -> Case:
    """A small case whose innermost loops run n times: n from 1 to 65 sees every vector tail."""
    if op == "attention":
        return Case(op, (1, 2, 1, n, n + 2, n), options={"causal": n % 2 == 0})
    shape = (n,) if op == "gelu" else (3, n)
    return Case(op, shape, options={"approximate": "none"} if op == "gelu" and n % 2 else {})


# ---- Ops -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpRow:
    """How one op is tested.

    Args:
        inputs: (case, dtype, draw) to tensors by name, where draw(shape, values) is random.
        call: gptfast's function on (inputs, options).
        peer: PyTorch's.
        magnitudes: of the result and of each gradient, from fp64 inputs, dy and options.
        gradients: names of the inputs that get one.
        matrix_units: whether kernels may multiply in the storage dtype. PyTorch is then run in that
            dtype; otherwise in fp32, since every backend's elementwise arithmetic is fp32.
        float32_result: whether the result is float32 whatever the inputs are.
    """

    inputs: Callable[[Case, torch.dtype, Callable[..., torch.Tensor]], dict[str, Any]]
    call: Callable[[Inputs, Options], torch.Tensor]
    peer: Callable[[Inputs, Options], torch.Tensor]
    magnitudes: Callable[[Inputs, torch.Tensor, Options], dict[str, Magnitude]]
    gradients: tuple[str, ...]
    matrix_units: bool = False
    float32_result: bool = False


# LayerNorm. Options: weight, bias (None, "same" or a dtype), eps.


def _layer_norm_inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    N = case.shape[-1]

    def parameter(name: str, mean: float) -> torch.Tensor | None:
        kind = case.options.get(name, "same")
        if kind is None:
            return None
        return (draw((N,)) + mean).to(dtype if kind == "same" else getattr(torch, kind))

    x = draw(case.shape, case.values).to(dtype)
    return {"x": x, "weight": parameter("weight", 1), "bias": parameter("bias", 0)}


def _layer_norm_magnitudes(i: Inputs, dy: torch.Tensor, options: Options) -> dict[str, Magnitude]:
    x, w, b = i["x"], i["weight"], i["bias"]
    N = x.shape[-1]
    x, dy = (t.unsqueeze(0).flatten(0, -2) for t in (x, dy))
    w = torch.ones(N).to(x) if w is None else w
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + options.get("eps", 1e-5)).rsqrt()
    xhat = (centred * rstd).abs()
    shift = rstd * x.abs().mean(-1, keepdim=True)  # how far xhat moves when the mean does, by u
    wdy = (w * dy).abs()
    c1, c1_moves = (wdy * xhat).mean(-1, keepdim=True), (wdy * shift).mean(-1, keepdim=True)
    c2 = wdy.mean(-1, keepdim=True)
    bias = torch.zeros(N).to(x) if b is None else b.abs()
    M, shape = x.shape[0], i["x"].shape
    return {
        "result": Magnitude(
            (xhat * w.abs() + bias).view(shape), (shift * w.abs()).expand(x.shape).view(shape), N
        ),
        "x": Magnitude(
            (rstd * (wdy + c1 * xhat + c2)).view(shape),
            (rstd * (c1 * shift + c1_moves * (xhat + shift))).view(shape),
            N,
        ),
        "weight": Magnitude((dy.abs() * xhat).sum(0), (dy.abs() * shift).sum(0), M + N),
        "bias": Magnitude(dy.abs().sum(0), torch.zeros(N).to(x), M),
    }


# GELU. Options: approximate.


def _gelu_magnitudes(i: Inputs, dy: torch.Tensor, options: Options) -> dict[str, Magnitude]:
    x = i["x"]
    if options.get("approximate", "tanh") == "tanh":
        c = x.clamp(-20, 20)
        z = 2 * math.sqrt(2 / math.pi) * (c + 0.044715 * c**3)
        phi, tail = torch.sigmoid(z), torch.sigmoid(-z.abs())
        slope = phi * torch.sigmoid(-z) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * c * c)
    else:
        c = x.clamp(-30, 30)
        z = c * c / 2
        phi, tail = (torch.special.erfc(v * math.sqrt(0.5)) / 2 for v in (-c, c.abs()))
        slope = torch.exp(-z) / math.sqrt(2 * math.pi)
    # PyTorch's fp64 result, 1 + tanh, has no digits below 2^-53: 2^-52 is u32 2^-28.
    phi = phi + 2.0**-28
    # exp(z (1 + u)) = exp(z) (1 + u z): an error of u in the exponent moves the tail of Phi by u z.
    moves = tail * z.abs()
    terms = phi + c.abs() * slope
    length = 16  # a polynomial of degree nine, an exp and a division
    return {
        "result": Magnitude(x.abs() * phi, x.abs() * moves, length),
        "x": Magnitude(
            dy.abs() * terms, dy.abs() * (moves + c.abs() * slope * (1 + z.abs())), length
        ),
    }


# Cross-entropy. Options: reduction, label_smoothing, weight (bool), ignored (share), ignore_index.


def _cross_entropy_inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    V, rows = case.shape[-1], case.shape[:-1]
    uniform = torch.special.ndtr(draw(rows))
    target = (uniform * V).long().clamp(max=V - 1)
    ignored = torch.special.ndtr(draw(rows)) < case.options.get("ignored", 0.0)
    return {
        "logits": draw(case.shape, case.values).to(dtype),
        "target": target.masked_fill(ignored, case.options.get("ignore_index", -100)),
        "weight": draw((V,)).abs() if case.options.get("weight") else None,
    }


def _cross_entropy_options(options: Options) -> dict[str, Any]:
    names = ("ignore_index", "reduction", "label_smoothing")
    return {name: options[name] for name in names if name in options}


def _cross_entropy_peer(i: Inputs, options: Options) -> torch.Tensor:
    logits, target, weight = i["logits"], i["target"], i["weight"]
    rows = logits.reshape(-1, logits.shape[-1]) if logits.dim() > 2 else logits
    given = target.reshape(rows.shape[:-1])
    loss = F.cross_entropy(rows, given, weight, **_cross_entropy_options(options))
    return loss.view(target.shape) if options.get("reduction") == "none" else loss


def _cross_entropy_magnitudes(
    i: Inputs, dloss: torch.Tensor, options: Options
) -> dict[str, Magnitude]:
    x, shape = i["logits"].reshape(-1, i["logits"].shape[-1]), i["target"].shape
    M, V = x.shape
    target, s = i["target"].reshape(-1), options.get("label_smoothing", 0.0)
    w = torch.ones(V).to(x) if i["weight"] is None else i["weight"]
    counted = target != options.get("ignore_index", -100)
    t = torch.where(counted, target, 0)
    lse = torch.logsumexp(x, -1, keepdim=True)
    p = torch.exp(x - lse) + UNDERFLOW
    size = torch.where(x.isfinite(), x.abs(), 0) + lse.abs()  # |x_c| + |lse|
    hit = torch.nn.functional.one_hot(t, V) * (1 - s) * w
    spread = s / V * w.expand(M, V)
    terms = ((hit + spread) * size).sum(-1) * counted
    moves = (hit + spread).sum(-1) * counted  # the log of a sum moves as the sum does, relatively
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        g = dloss.reshape(-1)
        result = Magnitude(terms.view(shape), moves.view(shape), V)
    else:
        count = (w[t] * counted).sum() if reduction == "mean" else torch.ones(()).to(x)
        g = (dloss / count).expand(M)
        result = Magnitude(terms.sum() / count, moves.sum() / count, M + V)
    g = torch.where(counted, g, 0).abs().unsqueeze(-1)
    share = (hit + spread).sum(-1, keepdim=True) * p
    dx = Magnitude(
        (g * (share + hit + spread)).view(i["logits"].shape),
        (g * share * size).view(i["logits"].shape),
        V,
    )
    return {"result": result, "logits": dx}


# Attention. Options: causal, scale, dropout_p.


def _attention_inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    B, H, H_kv, T, S, D = case.shape
    if case.layout == "packed":
        qkv = draw((B, T, 3, H, D), case.values).to(dtype).permute(2, 0, 3, 1, 4)
    else:
        shapes = ((B, H, T, D), (B, H_kv, S, D), (B, H_kv, S, D))
        qkv = [draw(shape, case.values).to(dtype) for shape in shapes]
    seed = torch.tensor(-(2**62) + 12345) if case.options.get("dropout_p") else None
    return {"q": qkv[0], "k": qkv[1], "v": qkv[2], "seed": seed}


def _attention_call(i: Inputs, options: Options) -> torch.Tensor:
    return attention(i["q"], i["k"], i["v"], seed=i["seed"], **options)


def _attention_mask(T: int, S: int, device: torch.device) -> torch.Tensor:
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def _attention_factors(i: Inputs, options: Options, dtype: torch.dtype) -> torch.Tensor:
    B, H, T, _ = i["q"].shape
    row, column, head = (torch.arange(n, device=i["q"].device) for n in (T, i["k"].shape[2], B * H))
    factors = dropout_factors(
        i["seed"], head[:, None, None], row[:, None], column, options["dropout_p"], dtype
    )
    return factors.view(B, H, T, -1)


def _attention_peer(i: Inputs, options: Options) -> torch.Tensor:
    q, k, v = i["q"], i["k"], i["v"]
    causal, scale = options.get("causal", False), options.get("scale")
    mask = _attention_mask(q.shape[2], k.shape[2], q.device) if causal else None
    if not options.get("dropout_p"):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    # PyTorch draws other masks, so its product of softmax and factors is spelled out, in fp32 at
    # least.
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q.to(dtype) @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (torch.softmax(scores, -1) * _attention_factors(i, options, dtype) @ v).to(q.dtype)


def _attention_magnitudes(i: Inputs, do: torch.Tensor, options: Options) -> dict[str, Magnitude]:
    q, do = i["q"], do.abs()
    (_, H, T, D), H_kv, S = q.shape, i["k"].shape[1], i["k"].shape[2]
    k, v = (i[name].repeat_interleave(H // H_kv, 1) for name in ("k", "v"))
    scale = options.get("scale")
    scale = 1 / math.sqrt(D) if scale is None else scale
    scores = q @ k.mT * scale
    if options.get("causal", False):
        scores = scores.masked_fill(~_attention_mask(T, S, q.device), -math.inf)
    lse = torch.logsumexp(scores, -1, keepdim=True).nan_to_num(neginf=0)
    p = torch.exp(scores - lse) + UNDERFLOW
    z = _attention_factors(i, options, q.dtype) if options.get("dropout_p") else 1.0
    q, k, v, scale = q.abs(), k.abs(), v.abs(), abs(scale)
    size = q @ k.mT * scale  # of the terms of a score
    # p moves by u times this, relatively: as s and lse move.
    moves = size + (p * size).sum(-1, keepdim=True) + lse.abs()
    pz = p * z
    o, o_moves = pz @ v, (pz * moves) @ v
    delta, delta_moves = ((do * x).sum(-1, keepdim=True) for x in (o, o_moves))
    ds = p * (z * (do @ v.mT) + delta)
    ds_moves = ds * moves + p * delta_moves

    def of_key_heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (H_kv, H // H_kv)).sum(2)

    key_length = T * H // H_kv + max(S, D)
    return {
        "result": Magnitude(o, o_moves, max(S, D)),
        "q": Magnitude(scale * ds @ k, scale * ds_moves @ k, max(S, D)),
        "k": Magnitude(
            of_key_heads(scale * ds.mT @ q), of_key_heads(scale * ds_moves.mT @ q), key_length
        ),
        "v": Magnitude(of_key_heads(pz.mT @ do), of_key_heads((pz * moves).mT @ do), key_length),
    }


OPS: Mapping[str, OpRow] = {
    "layer_norm": OpRow(
        inputs=_layer_norm_inputs,
        call=lambda i, o: layer_norm(i["x"], i["weight"], i["bias"], o.get("eps", 1e-5)),
        peer=lambda i, o: F.layer_norm(
            i["x"], i["x"].shape[-1:], i["weight"], i["bias"], o.get("eps", 1e-5)
        ),
        magnitudes=_layer_norm_magnitudes,
        gradients=("x", "weight", "bias"),
    ),
    "gelu": OpRow(
        inputs=lambda case, dtype, draw: {"x": draw(case.shape, case.values).to(dtype)},
        call=lambda i, o: gelu(i["x"], **o),
        peer=lambda i, o: F.gelu(i["x"], approximate=o.get("approximate", "tanh")),
        magnitudes=_gelu_magnitudes,
        gradients=("x",),
    ),
    "cross_entropy": OpRow(
        inputs=_cross_entropy_inputs,
        call=lambda i, o: cross_entropy(
            i["logits"], i["target"], i["weight"], **_cross_entropy_options(o)
        ),
        peer=_cross_entropy_peer,
        magnitudes=_cross_entropy_magnitudes,
        gradients=("logits",),
        float32_result=True,
    ),
    "attention": OpRow(
        inputs=_attention_inputs,
        call=_attention_call,
        peer=_attention_peer,
        magnitudes=_attention_magnitudes,
        gradients=("q", "k", "v"),
        matrix_units=True,
    ),
}


# ---- Runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A case in one dtype: its inputs, its incoming gradient, and what is right.

    exact, peer and bounds are by name: "result", and the inputs that get a gradient.
    """

    case: Case
    dtype: torch.dtype
    inputs: Inputs
    dy: torch.Tensor
    exact: Mapping[str, torch.Tensor]
    peer: Mapping[str, torch.Tensor]
    bounds: Mapping[str, torch.Tensor]

    def run(
        self,
        backend: str,
        call: Callable[[Inputs, Options], torch.Tensor] | None = None,
        poison: bool = True,
    ) -> dict[str, torch.Tensor]:
        """The result and every gradient on one backend, by name.

        Args:
            backend: forced while it runs.
            call: instead of the op's own, for example that one compiled.
            poison: whether to run in `poison_empty` (compilers do not like it).

        Raises:
            AssertionError: an input or dy was written to, or a kernel wrote outside its tensors.
        """
        row = OPS[self.case.op]
        given = [x for x in (*self.inputs.values(), self.dy) if x is not None]
        before = [_bytes(x).clone() for x in given]
        with gptfast.use_backend(backend), poison_empty() if poison else contextlib.nullcontext():
            results = _differentiate(call or row.call, self.inputs, self.case, lambda _: self.dy)
        for x, memory in zip(given, before, strict=True):
            if not torch.equal(_bytes(x), memory):
                raise AssertionError(
                    f"{self.case}: an input or dy of {tuple(x.shape)} was written to"
                )
        return results

    def judge(self, results: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """`assert_close` for each result; returns the errors in units of what is allowed."""
        ratios = {}
        for name, exact in self.exact.items():
            got, what = results[name], name if name == "result" else f"gradient of {name}"
            expected = self.result_dtype if name == "result" else self.inputs[name].dtype
            title = f"{self.case}, {backends.dtype_name(self.dtype)}, {what}"
            if got.dtype != expected:
                raise AssertionError(f"{title}: dtype must be {expected}, got {got.dtype}")
            factor = 2.0 if name == "result" else 3.0
            ratios[name] = assert_close(
                title, got, self.peer[name], exact, self.bounds[name], factor
            )
        return ratios

    @property
    def result_dtype(self) -> torch.dtype:
        """What the op's result must have."""
        return torch.float32 if OPS[self.case.op].float32_result else self.dtype


def make_problem(case: Case, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Random inputs for a case (always the same), exact results, the peer's results and bounds.

    Exact is the peer in fp64 on the inputs as rounded to `dtype`. The peer runs in `dtype` where
    kernels may multiply in it, otherwise in fp32; see `OpRow`.
    """
    row = OPS[case.op]
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def draw(shape: tuple[int, ...], values: str = "normal") -> torch.Tensor:
        normal = torch.randn(shape, generator=generator)
        return VALUES[values](normal, dtype) if normal.numel() else normal

    layout = "contiguous" if case.layout == "packed" else case.layout
    inputs = {
        name: x if x is None or case.layout == "packed" else lay_out(x, layout)
        for name, x in _on(row.inputs(case, dtype, draw), device).items()
    }

    result_dtype = torch.float32 if row.float32_result else dtype

    @functools.cache
    def dy(shape: torch.Size) -> torch.Tensor:
        return lay_out(draw(shape).to(dtype).to(device, result_dtype), case.grad_layout)

    wide = _cast(inputs, torch.float64)
    exact = _differentiate(row.peer, wide, case, dy)
    peer_inputs = _cast(inputs, dtype if row.matrix_units else torch.float32)
    peer = _differentiate(row.peer, peer_inputs, case, dy)
    given = dy(exact["result"].shape)
    magnitudes = row.magnitudes(wide, given.double(), case.options)
    bounds = {}
    for name in exact:
        own = result_dtype if name == "result" else inputs[name].dtype
        storage = dtype if row.matrix_units else None
        equal = case.values == "constant"
        bounds[name] = rounding_bound(exact[name], magnitudes[name], own, storage, equal)
    return Problem(case, dtype, inputs, given, exact, peer, bounds)


def run_case(
    case: Case, backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, float]:
    """Forward and every gradient of one case on one backend, in poisoned memory.

    Returns:
        The largest error of the result and of each gradient, in units of what is allowed.

    Raises:
        AssertionError: naming op, case, dtype, tensor, worst element, error and bound.
        RuntimeError: the backend cannot run the case.
    """
    problem = make_problem(case, dtype, device)
    return problem.judge(problem.run(backend))


def _on(inputs: Mapping[str, Any], device: str) -> dict[str, Any]:
    return {name: x if x is None else x.to(device) for name, x in inputs.items()}


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Contiguous copies, the floating-point ones in `dtype`."""
    return {
        name: x if x is None or not x.is_floating_point() else x.detach().to(dtype).contiguous()
        for name, x in inputs.items()
    }


def _differentiate(
    function: Callable[[Inputs, Options], torch.Tensor],
    inputs: Inputs,
    case: Case,
    dy: Callable[[torch.Size], torch.Tensor],
) -> dict[str, torch.Tensor]:
    names = [name for name in OPS[case.op].gradients if inputs[name] is not None]
    leaves: dict[str, Any] = {
        name: x if x is None else x.detach().requires_grad_(name in names)
        for name, x in inputs.items()
    }
    result = function(leaves, case.options)
    grads = torch.autograd.grad(
        result, [leaves[name] for name in names], dy(result.shape).to(result.dtype)
    )
    return {"result": result.detach(), **dict(zip(names, grads, strict=True))}


# ---- Registration --------------------------------------------------------------------------------


class RecordedCall(NamedTuple):
    """One call of a registered op: the op, its arguments, what it returned."""

    op: Any
    args: tuple[Any, ...]
    output: Any


class record_calls(TorchDispatchMode):  # noqa: N801 - a context manager
    """Collects the calls of `gptfast::` ops made inside the `with` block, in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the op, and remember it where it is one of ours."""
        output = func(*args, **(kwargs or {}))
        if func.namespace == "gptfast":
            self.calls.append(RecordedCall(func, args, output))
        return output


def opcheck(case: Case, dtype: torch.dtype = torch.float32) -> set[str]:
    """`torch.library.opcheck` for every registered op that a case calls, forward and backward.

    Returns:
        The names of those ops.
    """
    problem = make_problem(case, dtype)
    with record_calls() as recorded:
        problem.run("auto", poison=False)
    for op, args, _ in recorded.calls:
        differentiable = "bwd" not in op.name()
        fresh = [
            a.detach().clone().requires_grad_(differentiable and a.is_floating_point())
            if isinstance(a, torch.Tensor)
            else a
            for a in args
        ]
        torch.library.opcheck(op, tuple(fresh))
    return {call.op.name() for call in recorded.calls}


def gradcheck(case: Case) -> None:
    """`torch.autograd.gradcheck` in fp64 of the torch backend's own formulas, as registered."""
    row = OPS[case.op]
    inputs = _cast(make_problem(case, torch.float32).inputs, torch.float64)
    names = [name for name in row.gradients if inputs[name] is not None]

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        return row.call({**inputs, **dict(zip(names, leaves, strict=True))}, case.options)

    leaves = [inputs[name].clone().requires_grad_() for name in names]
    with gptfast.use_backend("torch"):
        torch.autograd.gradcheck(function, leaves)
