"""What is special to swiglu and geglu: halves of one tensor, infinite gates, errors."""

from __future__ import annotations

import pytest
import torch
from places import implemented

import gptfast
from gptfast import testing

X = torch.randn(4, 8)
everywhere = pytest.mark.parametrize("place", implemented("glu"), ids=str, indirect=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gptfast.swiglu(X.int(), X), TypeError, "swiglu: gate must be floating point"),
        (
            lambda: gptfast.swiglu(X, [1.0]),
            TypeError,
            "swiglu: up must be a torch.Tensor, got list",
        ),
        (lambda: gptfast.swiglu(X, X.double()), TypeError, "swiglu: up must be torch.float32"),
        (lambda: gptfast.geglu(X, X[:, :7]), ValueError, r"geglu: up must be \(4, 8\), got \(4, 7"),
        (lambda: gptfast.geglu(X, X[:1]), ValueError, r"geglu: up must be \(4, 8\), got \(1, 8\)"),
        (lambda: gptfast.geglu(X, X, "erf"), ValueError, "geglu: approximate must be 'none' or"),
        (lambda: gptfast.swiglu(X[:, :7]), ValueError, r"must be \(\.\.\., 2 N\), got \(4, 7\)"),
        (lambda: gptfast.swiglu(torch.tensor(1.0)), ValueError, r"2 N\), got \(\)"),
        (lambda: gptfast.swiglu(X, X.to("meta")), RuntimeError, "up must be on cpu, got meta"),
    ],
)
def test_error(call, error, message):
    with pytest.raises(error, match=message):
        call()


@everywhere
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_the_slope_at_infinity_is_the_limit(activation, place):
    gate = torch.tensor([torch.inf, -torch.inf, torch.nan], device=place.device)
    dy, up = torch.full_like(gate, 0.5), torch.full_like(gate, 3.0)
    with gptfast.use_backend(place.backend):
        dgate, _ = torch.ops.gptfast.glu_bwd(dy, gate, up, activation, [True, True])
    assert dgate[:2].tolist() == pytest.approx([1.5, 0], abs=1e-30)
    assert dgate[2].isnan()


@everywhere
@pytest.mark.parametrize("needs", [[True, False], [False, True], [False, False]])
def test_gradients_nobody_wants_are_not_computed(needs, place):
    gate, up = (X.clone().to(place.device).requires_grad_(need) for need in needs)
    with gptfast.use_backend(place.backend), testing.record_calls() as recorded:
        y = gptfast.swiglu(gate, up)
        if any(needs):
            y.sum().backward()
    backward = [call.output for call in recorded.calls if "bwd" in call.op.name()]
    assert [[t.numel() > 0 for t in output] for output in backward] == [needs] * any(needs)


@everywhere
def test_packed_is_the_halves(place):
    x = torch.randn(5, 14, device=place.device)
    with gptfast.use_backend(place.backend):
        assert torch.equal(gptfast.swiglu(x), gptfast.swiglu(*x.chunk(2, -1)))
