"""Uses of the ops that are rare, and once went wrong."""

from __future__ import annotations

import pytest
import torch
from places import at_level, implemented
from torch.autograd import forward_ad

import gptfast
from gptfast import backend, nn
from gptfast.testing import Case, make_problem, run_case


def test_a_default_device_does_not_reach_the_kernels():
    x = torch.randn(4, 8, requires_grad=True)
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3])
    h = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)  # on AMX in tiles
    w, b = torch.randn(48, 64, dtype=torch.bfloat16), torch.randn(48)
    expected = gptfast.linear_gelu(h, w, b)
    with torch.device("meta"):
        results = [
            gptfast.layer_norm(x),
            gptfast.cross_entropy(x, target),
            gptfast.attention(q, q, q),
            gptfast.linear_gelu(h, w, b),
            gptfast.linear_cross_entropy(h[:4], w, target),
        ]
        grads = [
            torch.autograd.grad(r.sum(), leaf)[0]
            for r, leaf in zip(results, (x, x, q, h, h), strict=True)
        ]
    assert all(t.device.type == "cpu" for t in (*results, *grads))
    assert torch.equal(results[3], expected)


def test_autocast_does_not_mix_in_float64_or_integers():
    q = torch.randn(1, 2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"k must be torch.float32, got torch.float64"):
            gptfast.attention(q, q.double(), q.double())
        with pytest.raises(TypeError, match=r"k must be floating point, got torch.int64"):
            gptfast.attention(q, q.long(), q.long())


def test_double_backward_through_a_parameters_gradient_refuses():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y = gptfast.layer_norm(x, w).square().sum()
    (dw,) = torch.autograd.grad(y, w, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm_bwd has no derivative"):
        torch.autograd.grad(dw.square().sum(), x)


def test_forward_mode_refuses():
    x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="gelu_fwd has no forward-mode derivative"):
        torch.func.jvp(gptfast.gelu, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="gelu_fwd has no forward-mode derivative"):
            gptfast.gelu(dual)


def test_class_weights_get_no_gradient():
    w = torch.rand(8, requires_grad=True)
    x = torch.randn(4, 8, requires_grad=True)
    gptfast.cross_entropy(x, torch.tensor([0, 1, 2, 3]), w).backward()
    assert w.grad is None
    assert x.grad is not None


def test_a_negative_view_keeps_its_sign():
    x = torch._neg_view(torch.ones(4, 8))
    assert torch.equal(gptfast.gelu(x), gptfast.gelu(-torch.ones(4, 8)))


def test_layer_norm_module_checks_its_width():
    module = nn.LayerNorm(8, elementwise_affine=False)
    with pytest.raises(ValueError, match=r"x must end in \(8,\), got \(2, 16\)"):
        module(torch.randn(2, 16))


@pytest.mark.parametrize("p", [0.15168, 0.3, 1e-6, 0.99999])
def test_backends_agree_on_how_many_scores_to_keep(p):
    q = torch.randn(1, 2, 40, 8)
    seed = torch.tensor(3)
    outputs = []
    for name in ("cpu", "torch"):
        with gptfast.use_backend(name):
            outputs.append(gptfast.attention(q, q, q, dropout_p=p, seed=seed))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


KEEP_ONE = 0.99999  # of 65536: the factor is 2^16, more than float16 can hold
SCALED = [  # so small that what is kept is in range; as many elements as keep one or two
    Case("dropout_add", (32, 4096), "tiny", options={"p": KEEP_ONE}),
    Case("add_layer_norm", (32, 4096), "tiny", options={"p": KEEP_ONE, "x_bias": None}),
    Case("add_rms_norm", (32, 4096), "tiny", options={"p": KEEP_ONE, "x_bias": None}),
]
SCORES = Case("attention", (1, 2, 2, 256, 256, 16), options={"dropout_p": KEEP_ONE})


@pytest.mark.parametrize(
    ("place", "case"),
    [(place, case) for case in SCALED for place in implemented(case.op)],
    ids=str,
)
def test_dropout_that_keeps_one_element(place, case):
    with at_level(place.isa):
        run_case(case, place.backend, torch.float16, place.device)


@pytest.mark.parametrize("place", implemented("attention"), ids=str)
def test_dropout_that_keeps_one_score(place):
    if place.backend == "cuda":
        pytest.skip("it has no dropout")
    with at_level(place.isa):
        run_case(SCORES, place.backend, torch.bfloat16, place.device)
        if place.backend != "triton":
            run_case(SCORES, place.backend, torch.float16, place.device)
            return
        problem = make_problem(SCORES, torch.float16, place.device)
        with pytest.raises(backend.RefusedError, match="float16 has no factor for a dropout_p"):
            problem.run("triton")


def test_the_reference_is_contiguous_too():
    assert gptfast.gelu(torch.randn(4, 8, dtype=torch.float64).t()).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_attention_module_takes_nothing(shape):
    assert nn.CausalSelfAttention(8, 2)(torch.randn(shape)).shape == shape


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (5, "seed must be an int64 scalar tensor, got int"),
        (torch.tensor(5.0), "seed must be an int64 scalar tensor, got torch.float32"),
    ],
)
def test_a_seed_is_an_integer_tensor(seed, message):
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(TypeError, match=message):
        gptfast.attention(q, q, q, dropout_p=0.5, seed=seed)


def test_generation_gives_every_module_its_mode_back():
    from gptfast.generate import generate
    from gptfast.models import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8))
    model.train()
    model.transformer["drop"].eval()
    generate(model, torch.zeros(1, 2, dtype=torch.long), 2)
    assert model.training
    assert not model.transformer["drop"].training
