"""What is special to rope: its tables, absent keys and gradients, errors."""

from __future__ import annotations

import math

import pytest
import torch
from places import implemented

import gptfast
from gptfast import testing

B, H, T, D = 2, 3, 5, 8
Q, K = torch.randn(B, H, T, D), torch.randn(B, 1, T, D)
COS, SIN = gptfast.rope_cache(T, D)
everywhere = pytest.mark.parametrize("place", implemented("rope"), ids=str, indirect=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gptfast.rope(Q[0], K, COS, SIN), ValueError, r"q must be \(B, H, T, D\), got"),
        (lambda: gptfast.rope(Q, K[0], COS, SIN), ValueError, r"k must be \(B, H, T, D\), got"),
        (lambda: gptfast.rope(Q, K[:1], COS, SIN), ValueError, r"k must be \(2, H_kv, 5, 8\), got"),
        (lambda: gptfast.rope(Q, K.double(), COS, SIN), TypeError, "k must be torch.float32, got"),
        (lambda: gptfast.rope(Q.int(), K, COS, SIN), TypeError, "q must be floating point"),
        (lambda: gptfast.rope(Q, K, COS.int(), SIN), TypeError, "cos must be floating point"),
        (
            lambda: gptfast.rope(Q, K, COS, None),
            TypeError,
            "sin must be a torch.Tensor, got NoneType",
        ),
        (lambda: gptfast.rope(Q, K, COS[:4], SIN), ValueError, r"cos must be \(5, R/2\) or"),
        (lambda: gptfast.rope(Q, K, COS[0, 0], SIN), ValueError, r"R/2\), got \(\)"),
        (lambda: gptfast.rope(Q, K, COS, SIN[:, :3]), ValueError, r"sin must be \(5, 4\), got"),
        (lambda: gptfast.rope(Q, K, *gptfast.rope_cache(T, 10)), ValueError, "2 to 8 dim.*got 10"),
        (lambda: gptfast.rope(Q, K, COS[:, :0], SIN[:, :0]), ValueError, "dimensions, got 0"),
        (lambda: gptfast.rope(Q, K, COS.to("meta"), SIN), RuntimeError, "cos must be on cpu"),
        (lambda: gptfast.rope_cache(4, 7), ValueError, "dim must be even and positive, got 7"),
        (lambda: gptfast.rope_cache(-1, 8), ValueError, "T must be at least 0, got -1"),
        (lambda: gptfast.rope_cache(4, 8, 0.0), ValueError, "base must be positive, got 0.0"),
    ],
)
def test_error(call, error, message):
    with pytest.raises(error, match=f"rope.*: .*{message}"):
        call()


@everywhere
def test_queries_alone(place):
    q, k, cos, sin = (x.to(place.device) for x in (Q, K, COS, SIN))
    with gptfast.use_backend(place.backend):
        alone, nothing = gptfast.rope(q, None, cos, sin)
        both, _ = gptfast.rope(q, k, cos, sin)
        leaf = q.clone().requires_grad_()
        (dq,) = torch.autograd.grad(gptfast.rope(leaf, None, cos, sin)[0], leaf, alone)
    assert nothing is None
    assert torch.equal(alone, both)
    torch.testing.assert_close(dq, q)  # turned there and back


@everywhere
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_gradients_nobody_wants_are_not_computed(place, needs, used):
    q, k = (
        x.to(place.device).clone().requires_grad_(n) for x, n in zip((Q, K), needs, strict=True)
    )
    cos, sin = COS.to(place.device), SIN.to(place.device)
    wanted = [n and i in used for i, n in enumerate(needs)]
    with gptfast.use_backend(place.backend), testing.record_calls() as recorded:
        outputs = gptfast.rope(q, k, cos, sin)
        if any(wanted):
            sum(outputs[i].sum() for i in used).backward()
    sizes = [[t.numel() for t in c.output] for c in recorded.calls if "bwd" in c.op.name()]
    expected = [x.numel() for x, w in zip((Q, K), wanted, strict=True) if w]
    assert [sorted(n for n in s if n) for s in sizes] == [sorted(expected)] * any(wanted)
    assert [x.grad is not None for x in (q, k)] == wanted


def test_scores_depend_on_the_distance_alone():
    cos, sin = gptfast.rope_cache(40, D)
    q, k = (torch.randn(D).expand(1, 1, 40, D) for _ in range(2))
    for interleaved in (False, True):
        turned_q, turned_k = gptfast.rope(q, k, cos, sin, interleaved=interleaved)
        scores = (turned_q @ turned_k.mT)[0, 0]
        for distance in (-7, 0, 3):
            diagonal = scores.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_the_tables_are_exact_at_far_positions():
    cos, sin = gptfast.rope_cache(300_001, 4, base=100.0)
    for t in (0, 1, 299_999, 300_000):
        for i, frequency in enumerate((1.0, 0.1)):
            assert cos[t, i].item() == pytest.approx(math.cos(t * frequency), abs=2**-24)
            assert sin[t, i].item() == pytest.approx(math.sin(t * frequency), abs=2**-24)
    assert cos.dtype == sin.dtype == torch.float32
