"""What is special to the norms behind the sum of the residual stream, and to RMSNorm's default."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import gptfast
from gptfast import testing
from gptfast.testing.dropout_add import factors

OPS = {"add_layer_norm": gptfast.add_layer_norm, "add_rms_norm": gptfast.add_rms_norm}
SEED = torch.tensor(7)
X, W = torch.randn(4, 8), torch.ones(8)


def leaves(residual_dtype=torch.float32):
    torch.manual_seed(0)
    x, residual = torch.randn(5, 12), torch.randn(5, 12).to(residual_dtype)
    w, x_bias = torch.randn(12), torch.randn(12)
    return [t.requires_grad_() for t in (x, residual, w, x_bias)]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("name", OPS)
def test_either_result_may_go_unused(name, p, place):
    if place.backend not in gptfast.backend.OPS[name].implementations:
        pytest.skip("not implemented there")
    inputs = [t.detach().to(place.device).requires_grad_() for t in leaves()]
    x, residual, w, x_bias = inputs
    seed, z = SEED.to(place.device), torch.ones(5, 12, device=place.device)
    if p:
        z = factors({"x": x, "seed": seed}, p)
    stream = residual + z * (x + x_bias)
    norm = F.layer_norm if name == "add_layer_norm" else F.rms_norm
    expected = (norm(stream, (12,), w, eps=1e-5), stream)
    with gptfast.use_backend(place.backend):
        got = OPS[name](x, residual, w, eps=1e-5, x_bias=x_bias, dropout_p=p, seed=seed)
        for unused in (0, 1):
            dy = torch.randn(5, 12, device=place.device)
            grads = [
                torch.autograd.grad(results[1 - unused], inputs, dy, True, allow_unused=True)
                for results in (got, expected)
            ]
            # The sums are short: a few ulp of terms of order one.
            for ours, theirs in zip(*grads, strict=True):
                if theirs is None:
                    assert ours is None
                else:
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_without_dropout_both_gradients_are_one_tensor():
    x, residual, w, _ = leaves()
    with testing.record_calls() as recorded:
        y, r = gptfast.add_layer_norm(x, residual, w.detach())
        dx, dresidual = torch.autograd.grad([y, r], [x, residual], [torch.randn(5, 12)] * 2)
    assert torch.equal(dx, dresidual)
    assert [t.numel() for t in recorded.calls[-1].output] == [60, 0, 0, 0, 0]


def test_gradients_nobody_wants_are_not_computed():
    x, residual, w, x_bias = leaves()
    with testing.record_calls() as recorded:
        y, _ = gptfast.add_rms_norm(x.detach(), residual.detach(), w.detach(), x_bias=x_bias)
        torch.autograd.grad(y, x_bias, torch.randn(5, 12))
    assert [t.numel() for t in recorded.calls[-1].output] == [0, 0, 0, 12]


@pytest.mark.parametrize("name", OPS)
def test_the_norm_sees_the_stream_that_is_returned(name):
    x, residual = torch.randn(6, 32).bfloat16(), torch.randn(6, 32).bfloat16()
    y, r = OPS[name](x, residual)
    alone = gptfast.layer_norm(r) if name == "add_layer_norm" else gptfast.rms_norm(r)
    assert torch.equal(y, alone)


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_rms_norms_default_eps_is_that_of_the_dtype(dtype):
    x = torch.full((1, 4), 1e-3).to(dtype)
    expected = F.rms_norm(x.float(), (4,), eps=torch.finfo(dtype).eps).to(dtype)
    torch.testing.assert_close(gptfast.rms_norm(x), expected, rtol=2.0**-22, atol=0)
    y, _ = gptfast.add_rms_norm(x, torch.zeros_like(x))
    torch.testing.assert_close(y, expected, rtol=2.0**-22, atol=0)


def test_rms_norm_of_infinity_is_torchs():
    x = torch.randn(3, 8)
    x[0, 2], x[1, 3] = torch.inf, -torch.inf
    expected = F.rms_norm(x, (8,), eps=1e-5)
    torch.testing.assert_close(gptfast.rms_norm(x, eps=1e-5), expected, equal_nan=True)


def test_dropout_follows_manual_seed():
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(gptfast.add_layer_norm(X, X, dropout_p=0.5)[1])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_all_three_drop_the_same_elements():
    streams = [OPS[name](X, X, dropout_p=0.5, seed=SEED)[1] for name in OPS]
    streams.append(gptfast.dropout_add(X, X, 0.5, SEED))
    assert torch.equal(streams[0], streams[1])
    assert torch.equal(streams[0], streams[2])


ERRORS = [
    (lambda: gptfast.rms_norm(X, W[:7]), ValueError, "rms_norm: weight must be (8,), got (7,)"),
    (lambda: gptfast.rms_norm(X.int()), TypeError, "rms_norm: x must be floating point"),
    (lambda: gptfast.rms_norm(X[0, 0]), ValueError, "rms_norm: x must have at least one dimension"),
    (
        lambda: gptfast.add_layer_norm(X, X[:3]),
        ValueError,
        "add_layer_norm: residual must be (4, 8), got (3, 8)",
    ),
    (
        lambda: gptfast.add_layer_norm(X.bfloat16(), X.half()),
        TypeError,
        "add_layer_norm: residual must be torch.bfloat16 or torch.float32, got torch.float16",
    ),
    (
        lambda: gptfast.add_rms_norm(X, X.double()),
        TypeError,
        "add_rms_norm: residual must be torch.float32, got torch.float64",
    ),
    (
        lambda: gptfast.add_layer_norm(X, X, x_bias=torch.ones(4, 8)),
        ValueError,
        "add_layer_norm: x_bias must be (8,), got (4, 8)",
    ),
    (
        lambda: gptfast.add_rms_norm(X, X, torch.ones(8, device="meta")),
        RuntimeError,
        "add_rms_norm: weight must be on cpu, got meta",
    ),
    (
        lambda: gptfast.dropout_add(X, X.to("meta"), 0.1),
        RuntimeError,
        "dropout_add: residual must be on cpu, got meta",
    ),
    (
        lambda: gptfast.dropout_add(X, X, 1.0),
        ValueError,
        "dropout_add: dropout_p must be in [0, 1), got 1.0",
    ),
    (
        lambda: gptfast.dropout_add(X, X, 0.1, 3),
        TypeError,
        "dropout_add: seed must be an int64 scalar tensor, got int",
    ),
    (
        lambda: gptfast.add_layer_norm(X, X, dropout_p=0.1, seed=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        "add_layer_norm: seed must be (), got (2,)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_error(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize("N", [1, 7, 8, 9, 33, 200])
def test_dropout_mask_is_the_same_on_every_backend(N, isa):
    x, zero, seed = torch.ones(5, N), torch.zeros(5, N), torch.tensor(-(2**61) - 99)
    with gptfast.use_backend("cpu"):
        kept = gptfast.dropout_add(x, zero, 0.37, seed)
        _, stream = gptfast.add_rms_norm(x, zero, dropout_p=0.37, seed=seed)
    assert torch.equal(kept, factors({"x": x, "seed": seed}, 0.37))
    assert torch.equal(kept, stream)
