"""What only linear_decode and quantised weights do; values are in `test_ops.py`."""

from __future__ import annotations

import copy

import pytest
import torch
from places import implemented
from torch import nn
from torch.nn import functional as F

import gptfast
from gptfast.models import GPT, GPTConfig
from gptfast.nn import QuantizedLinear, quantize
from gptfast.testing import assert_close_in_norm

X, W = torch.randn(3, 40), torch.randn(24, 40)
INT8 = gptfast.quantize_weight(W, "int8")
INT4 = gptfast.quantize_weight(W, "int4", zero_points=True)
FORMATS = [("int8", False), ("int4", False), ("int4", True)]

ERRORS = [
    (lambda: gptfast.linear_decode(X.int(), W), TypeError, "x must be floating point"),
    (lambda: gptfast.linear_decode(X, W.int()), TypeError, "weight must be floating point"),
    (
        lambda: gptfast.linear_decode(X, W[:, 1:]),
        ValueError,
        "weight must be (24, 40), got (24, 39",
    ),
    (lambda: gptfast.linear_decode(X, W[0]), ValueError, "weight must be (N, 40), got (40,)"),
    (lambda: gptfast.linear_decode(X, W, W[0]), ValueError, "bias must be (24,), got (40,)"),
    (lambda: gptfast.linear_decode(X[0, 0], W), ValueError, "at least one dimension, got a scalar"),
    (
        lambda: gptfast.linear_decode(X, W, activation="relu"),
        ValueError,
        "activation must be one of (None, 'gelu_tanh'), got 'relu'",
    ),
    (
        lambda: gptfast.linear_decode(X, W, torch.ones(24, device="meta")),
        RuntimeError,
        "bias must be on cpu, got meta",
    ),
    (lambda: gptfast.linear_decode(X[:, 1:], INT8), ValueError, "x must be (..., 40), got (3, 39)"),
    (
        lambda: gptfast.linear_decode(X, INT8._replace(scale=INT8.scale.double())),
        TypeError,
        "weight.scale must be torch.float32, got torch.float64",
    ),
    (
        lambda: gptfast.linear_decode(X, INT8._replace(data=INT8.data.int())),
        TypeError,
        "weight.data must be int8 or uint8 (int4), got torch.int32",
    ),
    (
        lambda: gptfast.linear_decode(X, INT8._replace(zero=INT4.zero)),
        ValueError,
        "weight.zero must be None with int8",
    ),
    (
        lambda: gptfast.linear_decode(X, INT4._replace(data=INT4.data[:1])),
        ValueError,
        "weight.data must be (2, 8, 16, 4), got (1, 8, 16, 4)",
    ),
    (
        lambda: gptfast.linear_decode(X, INT4._replace(zero=INT4.zero[:, :1])),
        ValueError,
        "weight.zero must be (2, 2, 16), got (2, 1, 16)",
    ),
    (
        lambda: gptfast.quantize_weight(W, "int2"),
        ValueError,
        "format must be one of ('int8', 'int4'",
    ),
    (lambda: gptfast.quantize_weight(W[0], "int8"), ValueError, "weight must be (N, K), got (40,)"),
    (lambda: gptfast.quantize_weight(W, "int8", True), ValueError, "zero points belong to int4"),
    (lambda: gptfast.quantize_weight(W / 0, "int8"), ValueError, "weight must be finite"),
    (lambda: quantize(nn.GELU(), "int8"), ValueError, "expected a model with torch.nn.Linear"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_error(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def test_forward_only():
    y = gptfast.linear_decode(X, W.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="linear_decode_fwd has no derivative"):
        y.sum().backward()


@pytest.mark.parametrize(("format", "zero_points"), FORMATS)
@pytest.mark.parametrize("shape", [(24, 40), (16, 64), (1, 1), (33, 100), (3, 0), (0, 5)])
def test_each_weight_is_rounded_to_the_nearest(format, zero_points, shape):
    w = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    q = gptfast.quantize_weight(w, format, zero_points)
    got = gptfast.dequantize_weight(q, torch.float64)
    assert got.shape == shape
    if not w.numel():
        return
    N, K = shape
    if format == "int8":
        step = q.scale.double()[:, None].expand(shape)
    else:
        step = q.scale.double().abs().transpose(1, 2).reshape(-1, q.scale.shape[1])[:N]
        step = step.repeat_interleave(32, 1)[:, :K]
    # Half a step. The largest weights may lie beyond the last one, by what rounding the scale took
    # from 15 steps (bf16: 2^-8 of it) or, without zero points, where the other end is as far out:
    # 8 steps to one side, 7 to the other.
    beyond = 1 if format == "int4" and not zero_points else 15 * 2**-8
    error = (got - w).abs() / step
    assert (error <= 0.5 + beyond).all()
    assert (error <= 0.5 + 1e-4).double().mean() > 0.9


def test_zeros_and_constants_are_kept():
    for format, zero_points in FORMATS:
        for w in (torch.zeros(5, 70), torch.full((5, 70), 0.5), torch.full((5, 70), -3.0)):
            q = gptfast.quantize_weight(w, format, zero_points)
            exact = format == "int4"  # powers of two, and -3: their scales are exact in bf16
            tolerance = 2.0**-8 if zero_points else 0 if exact else 2.0**-23
            torch.testing.assert_close(gptfast.dequantize_weight(q), w, rtol=tolerance, atol=0)


def test_long_rows_do_not_overflow(isa):
    # Every product has one sign: the digits' sums would leave 31 bits.
    K = 70_000
    x, w = torch.full((2, K), 1.0), torch.full((3, K), 1.0)
    for format, zero_points in FORMATS:
        q = gptfast.quantize_weight(w, format, zero_points)
        exact = gptfast.dequantize_weight(q, torch.float64).sum(1).expand(2, 3)
        y = gptfast.linear_decode(x, q).double()
        # Equal terms: K / 4 roundings of one sign.
        torch.testing.assert_close(y, exact, rtol=K / 4 * 2**-24, atol=0)


def test_rows_that_fixed_point_cannot_hold(isa):
    x = torch.randn(4, 96)
    x[1, 5], x[2] = torch.inf, x[2] * 1e-36
    for format, zero_points in FORMATS:
        q = gptfast.quantize_weight(torch.randn(20, 96), format, zero_points)
        exact = F.linear(x.double(), gptfast.dequantize_weight(q, torch.float64))
        y = gptfast.linear_decode(x, q).double()
        for row, wanted in zip(y[[0, 2, 3]], exact[[0, 2, 3]], strict=True):
            torch.testing.assert_close(row, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        torch.testing.assert_close(y[1], exact[1], equal_nan=True)


# ---- Modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "zero_points"), FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_module(format, zero_points, bias):
    linear = nn.Linear(70, 33, bias=bias)
    layer = QuantizedLinear(linear, format, zero_points)
    assert not list(layer.parameters())
    x = torch.randn(2, 3, 70)
    exact = F.linear(x.double(), layer.dequantize(torch.float64))
    for got, wanted in (
        (layer.product(x), exact),
        (layer(x), exact + linear.bias.double() if bias else exact),
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    text = f"QuantizedLinear(70, 33, {format}{', zero_points' if zero_points else ''}, bias={bias})"
    assert repr(layer) == text

    other = QuantizedLinear(nn.Linear(70, 33, bias=bias), format, zero_points)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize(("format", "zero_points"), FORMATS)
def test_casts_keep_the_weight(format, zero_points):
    layer = QuantizedLinear(nn.Linear(70, 33), format, zero_points)
    before = layer.dequantize(torch.float64)
    for cast in (nn.Module.bfloat16, nn.Module.half, nn.Module.double, nn.Module.float):
        cast(layer)
        assert torch.equal(layer.dequantize(torch.float64), before)
        layer(torch.randn(1, 70, dtype=layer.bias.dtype))
    assert layer.to("meta").data.device.type == "meta"


def test_quantize_replaces_linear_layers_in_place():
    class Own(nn.Linear):
        pass

    shared = nn.Embedding(10, 8)
    model = nn.Sequential(shared, nn.Sequential(nn.Linear(8, 6), nn.GELU()), Own(6, 4))
    tied = nn.Linear(8, 10, bias=False)
    tied.weight = shared.weight
    model.append(nn.ModuleList([tied]))
    before = shared.weight.detach().clone()
    assert quantize(model, "int8") is model
    kinds = [type(m) for m in (model[1][0], model[2], model[3][0])]
    assert kinds == [QuantizedLinear, Own, QuantizedLinear]
    assert torch.equal(shared.weight, before)


@pytest.mark.parametrize(("format", "zero_points"), FORMATS)
def test_a_quantised_gpt_is_the_gpt_with_rounded_weights(format, zero_points):
    torch.manual_seed(0)
    config = GPTConfig(16, 30, n_layer=2, n_head=2, n_embd=32)
    model = quantize(GPT(config), format, zero_points).eval()
    rounded = GPT(config).eval()
    rounded.lm_head = nn.Linear(32, 30, bias=False)  # no longer the embedding's
    rounded.load_state_dict(model.state_dict(), strict=False)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            linear = rounded.get_submodule(name)
            linear.weight.data = module.dequantize()
            linear.bias = None if module.bias is None else nn.Parameter(module.bias)
    idx = torch.randint(30, (2, 16))
    with torch.no_grad():
        exact = rounded.double()(idx)[0]
        assert_close_in_norm("logits", model(idx)[0], rounded.float()(idx)[0], exact)


@pytest.mark.parametrize("place", implemented("linear_decode"), ids=str)
def test_no_columns_and_more_dimensions(place):
    x, w, b = (torch.randn(s, device=place.device) for s in ((2, 3, 0), (4, 0), (4,)))
    with gptfast.use_backend(place.backend):
        y = gptfast.linear_decode(x, w, b)
    assert torch.equal(y, b.expand(2, 3, 4))
