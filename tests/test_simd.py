"""The vector functions themselves, on every SIMD level, against fp64 and PyTorch's conversions."""

from __future__ import annotations

import math

import pytest
import torch

from gptfast import backend

C = backend.extension()
BF16, F16, F32 = (backend.DTYPE_CODES[d] for d in (torch.bfloat16, torch.float16, torch.float32))


def apply(function, x):
    y = torch.full_like(x, math.nan)
    function(x.data_ptr(), y.data_ptr(), x.numel())
    return y


def convert(x, to):
    y = torch.empty(x.numel(), dtype=to)
    codes = backend.DTYPE_CODES
    C.simd_convert(x.data_ptr(), codes[x.dtype], y.data_ptr(), codes[to], x.numel())
    return y


def every_exponent(mantissas):
    """fp32 numbers of both signs with all 256 exponents, `mantissas` random ones each."""
    generator = torch.Generator().manual_seed(0)
    fraction = torch.randint(0, 2**23, (2, 256, mantissas), generator=generator)
    fraction[..., 0] = 0
    fraction[..., 1] = 2**23 - 1
    bits = torch.arange(256)[:, None] * 2**23 + fraction
    bits[1] -= 2**31
    return bits.to(torch.int32).flatten().view(torch.float32)


def ulps(got, exact):
    """|got - exact| in units of the last place of exact as a normal fp32 number."""
    spacing = 2.0 ** (torch.frexp(exact)[1].double() - 24).clamp(min=-149)
    return (got.double() - exact).abs() / spacing


def test_exp_is_accurate_to_two_ulp(isa):
    x = torch.cat([every_exponent(64), torch.linspace(-90, 90, 200_001)])
    got, exact = apply(C.simd_exp, x), x.double().exp()
    normal = (exact >= 2.0**-126) & (exact <= torch.finfo(torch.float32).max)
    assert ulps(got[normal], exact[normal]).max() <= 2
    assert (got[exact < 2.0**-126] <= 2.0**-126).all()  # flushed to zero, or the smallest normal
    assert (got[exact > 3.4028236e38] == math.inf).all()
    assert got[x.isnan()].isnan().all()
    assert (got[x.isneginf()] == 0).all()


def test_exp_of_a_short_range_is_accurate_to_two_ulp(isa):
    x = torch.cat([torch.linspace(-87, 87, 200_001), torch.tensor([0.0, -0.0, 1e-40, math.nan])])
    got, exact = apply(C.simd_exp_to_87, x), x.double().exp()
    assert ulps(got[:-1], exact[:-1]).max() <= 2
    assert got[-1].isnan()


def test_exp2_is_accurate_to_three_ulp(isa):
    x = torch.cat([every_exponent(64), torch.linspace(-130, 127, 200_001)])
    x = x[(x < 127.5) | x.isnan()]
    got, exact = apply(C.simd_exp2, x), x.double().exp2()
    normal = exact >= 2.0**-126
    assert ulps(got[normal], exact[normal]).max() <= 3
    assert (got[exact < 2.0**-126] <= 2.0**-126).all()
    assert got[x.isnan()].isnan().all()
    assert (got[x.isneginf()] == 0).all()
    assert (got[x == 0] == 1).all()


def test_tanh_and_its_slope_are_accurate_however_small(isa):
    x = torch.cat([every_exponent(64), torch.linspace(-12, 12, 200_001)])
    finite = ~x.isnan()
    tanh = apply(C.simd_tanh, x)
    assert ulps(tanh[finite], x[finite].double().tanh()).max() <= 3
    assert tanh[~finite].isnan().all()
    # exp(-2 |x|) passes on the rounding of its argument in units of the result; beyond 43.5 it is
    # taken for 0.
    near = finite & (x.abs() < 43)
    slope, exact = apply(C.simd_tanh_slope, x)[near], x[near].double().cosh().pow(-2)
    assert ((slope - exact).abs() <= 2.0**-24 * 8 * exact).all()
    assert (apply(C.simd_tanh_slope, x)[finite & (x.abs() > 43.5)] == 0).all()
    assert apply(C.simd_tanh_slope, x)[~finite].isnan().all()


def test_erfc(isa):
    # Relative error: exp(-z^2) passes on the rounding of z^2, which is u z^2; the polynomial,
    # its reciprocal and the products add a few.
    z = torch.linspace(0, 9, 90_001)
    got, exact = apply(C.simd_erfc, z), torch.special.erfc(z.double())
    error = (got.double() - exact).abs() / exact
    assert (error <= 2.0**-24 * (8 + z.double() ** 2)).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_widens_exactly(isa, half):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(half)
    got, expected = convert(x, torch.float32), x.float()
    nan = expected.isnan()
    assert torch.equal(got[~nan].view(torch.int32), expected[~nan].view(torch.int32))
    assert got[nan].isnan().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_narrowing_rounds_to_nearest_even(isa, half):
    exact = torch.arange(-(2**15), 2**15).to(torch.int16).view(half).float()
    exact = exact[exact.isfinite()]
    ties = (exact.double() + exact.nextafter(torch.tensor(math.inf)).double()) / 2
    neighbours = torch.cat([exact, exact * (1 + 2**-9), exact * (1 + 2**-12), ties.float()])
    x = torch.cat([every_exponent(64), neighbours, neighbours.nextafter(torch.tensor(math.inf))])
    if half == torch.bfloat16 and isa == "amx":
        # vcvtneps2bf16 takes fp32 subnormals, below 2^-126, as zeros.
        x = x[(x.abs() >= 2.0**-126) | (x == 0) | x.isnan()]
    got, expected = convert(x, half), x.to(half)
    nan = expected.isnan()
    assert torch.equal(got[~nan].view(torch.int16), expected[~nan].view(torch.int16))
    assert got[nan].isnan().all()


@pytest.mark.parametrize("n", range(1, 70))
def test_tails_touch_nothing_behind(isa, n):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(n).to(dtype)
        y = torch.full((n + 64,), 7.0, dtype=dtype)
        code = backend.DTYPE_CODES[dtype]
        C.simd_convert(x.data_ptr(), code, y.data_ptr(), code, n)
        assert torch.equal(y[:n], x)
        assert (y[n:] == 7).all()
