"""Every op under torch.func's transforms and autocast, and patched models in compile and export.

`torch.compile` and `torch.export` of every op are tested in `test_ops.py`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gptfast
from benchmarks.plain_models import PLAIN, Sizes
from gptfast import testing
from gptfast.ops.kv_cache_append import kv_cache_append_fwd
from gptfast.patching import OPS

EXAMPLES = {op: row.examples[0] for op, row in testing.OPS.items()}
DIFFERENTIABLE = [op for op, row in testing.OPS.items() if row.gradients]
SEED = torch.tensor(7)


def problem(op):
    """Inputs by name, those that may be batched among them, and the op's function of inputs."""
    case, row = EXAMPLES[op], testing.OPS[op]
    inputs = dict(testing.make_problem(case, torch.float32).inputs)
    floating = [n for n, x in inputs.items() if x is not None and x.is_floating_point()]

    def call(changed):
        i = {**inputs, **changed}
        result = row.call(i, case.options)
        return result if isinstance(result, tuple) else (result,)

    return inputs, floating, call


@pytest.fixture(autouse=True)
def batched_copies(monkeypatch):
    # Ops that write get copies with the strides of the case; vmap batches a plain clone alone.
    monkeypatch.setattr("gptfast.testing.kv_cache_append.copy", torch.clone)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def stacked(inputs, names):
    """Two different values of some inputs: a batch."""
    return {n: torch.stack((inputs[n], 0.5 * inputs[n] + 0.25)) for n in names}


# ---- vmap and grad -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", testing.OPS)
def test_vmap(op):
    inputs, names, call = problem(op)
    batch = stacked(inputs, names)
    expected = [call({n: batch[n][i] for n in names}) for i in range(2)]
    got = torch.vmap(call)(batch)
    for r, values in zip(got, zip(*expected, strict=True), strict=True):
        assert_same(r, torch.stack(values))
    # Along the last dimension; and one input alone.
    last = {n: x.movedim(0, -1) for n, x in batch.items()}
    for r, expected in zip(torch.vmap(call, in_dims=-1)(last), got, strict=True):
        assert_same(r, expected)
    if op in ("kv_cache_append", "attention_decode_append"):  # they write to the caches
        return
    name = names[0]
    moved = torch.vmap(lambda x: call({name: x}))(batch[name])
    for i in range(2):
        for r, value in zip(moved, call({name: batch[name][i]}), strict=True):
            assert_same(r[i], value)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_grad_and_gradients_of_each_element(op):
    inputs, _, call = problem(op)
    names = [n for n in testing.OPS[op].gradients if inputs[n] is not None]
    generator = torch.Generator().manual_seed(1)
    dys = [torch.randn(result.shape, generator=generator) for result in call({})]

    def scalar(changed):
        return sum((r * dy).sum() for r, dy in zip(call(changed), dys, strict=True))

    def by_autograd(changed):
        leaves = {n: x.clone().requires_grad_() for n, x in changed.items()}
        return dict(zip(names, torch.autograd.grad(scalar(leaves), leaves.values()), strict=True))

    given = {n: inputs[n] for n in names}
    for name, g in torch.func.grad(scalar)(given).items():
        assert torch.equal(g, by_autograd(given)[name]), name
    batch = stacked(inputs, names)
    each = torch.vmap(torch.func.grad(scalar))(batch)
    for i in range(2):
        for name, g in by_autograd({n: batch[n][i] for n in names}).items():
            assert torch.equal(each[name][i], g), name


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_gradient_through_vmap(op):
    inputs, _, call = problem(op)
    names = [n for n in testing.OPS[op].gradients if inputs[n] is not None]
    batch = {n: x.requires_grad_() for n, x in stacked(inputs, names).items()}
    generator = torch.Generator().manual_seed(1)
    dys = [torch.randn(2, *result.shape, generator=generator) for result in call({})]
    together = torch.vmap(call)(batch)
    each = [call({n: x[i] for n, x in batch.items()}) for i in range(2)]
    each = [torch.stack(results) for results in zip(*each, strict=True)]
    got, expected = (torch.autograd.grad(r, batch.values(), dys) for r in (together, each))
    for name, g, e in zip(batch, got, expected, strict=True):
        assert torch.equal(g, e), name


def test_per_sample_gradients_of_a_module():
    torch.manual_seed(0)
    model = nn.Sequential(gptfast.nn.LayerNorm(8), nn.Linear(8, 8), gptfast.nn.GELU())
    x = torch.randn(3, 5, 8)
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = torch.autograd.grad(loss(parameters, x[i]), parameters.values())
        for g, e in zip(got.values(), expected, strict=True):
            torch.testing.assert_close(g[i], e)


def test_dropout_in_vmap_asks_for_its_randomness():
    q = torch.randn(2, 1, 2, 5, 4)

    def function(q):
        return gptfast.attention(q, q, q, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function)(q)
    torch.vmap(function, randomness="different")(q)
    given = torch.vmap(lambda q: gptfast.attention(q, q, q, dropout_p=0.5, seed=SEED))(q)
    assert torch.equal(given[1], gptfast.attention(q[1], q[1], q[1], dropout_p=0.5, seed=SEED))


def test_vmap_refuses_what_it_cannot_mean():
    with pytest.raises(RuntimeError, match="vmap of gelu_fwd needs at least one element, got 0"):
        torch.vmap(gptfast.gelu)(torch.randn(0, 3))
    k = torch.randn(2, 1, 1, 1, 4)
    cache = torch.zeros(1, 3, 1, 4)

    def append(k):
        kv_cache_append_fwd(k, k, cache, cache.clone(), torch.tensor([1], dtype=torch.int32), None)
        return k

    with pytest.raises(RuntimeError, match="would write to a tensor that is not batched"):
        torch.vmap(append)(k)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_forward_mode_refuses(op):
    inputs, _, call = problem(op)
    name = testing.OPS[op].gradients[0]
    with pytest.raises((RuntimeError, NotImplementedError), match=r"forward|jvp|dual"):
        torch.func.jvp(lambda x: call({name: x})[0], (inputs[name],), (inputs[name],))


# ---- Autocast ------------------------------------------------------------------------------------

CAST = ("attention", "attention_qkv", "attention_varlen", "linear_cross_entropy", "linear_gelu")


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_autocast(op):
    inputs, _, call = problem(op)
    names = [n for n in testing.OPS[op].gradients if inputs[n] is not None]
    leaves = {n: inputs[n].clone().requires_grad_() for n in names}
    with torch.autocast("cpu", torch.bfloat16):
        results = call(leaves)
    result = results[0]
    halved = op in CAST and op != "linear_cross_entropy"  # a loss is float32
    assert result.dtype == (torch.bfloat16 if halved else torch.float32)
    for name, g in zip(
        names,
        torch.autograd.grad(sum(r.float().sum() for r in results), leaves.values()),
        strict=True,
    ):
        assert g.dtype == torch.float32, name
        assert g.isfinite().all(), name
    # Rounded to bfloat16 where it is cast, and nowhere else.
    expected = call({n: x.bfloat16().float() if op in CAST else x for n, x in leaves.items()})[0]
    rtol, atol = (0.02, 0.02) if op in CAST else (0, 0)
    torch.testing.assert_close(result.float(), expected.float(), rtol=rtol, atol=atol)


# ---- Patched models ------------------------------------------------------------------------------


def tokens(T=17):
    idx = torch.randint(67, (2, T), generator=torch.Generator().manual_seed(2))
    return idx[:, :-1], idx[:, 1:].contiguous()


@pytest.fixture(params=PLAIN)
def model(request):
    torch.manual_seed(0)
    model = PLAIN[request.param](Sizes())
    gptfast.patch(model, ops=list(OPS))
    return model


def test_a_patched_model_compiles_without_a_graph_break(model):
    expected = model(*tokens())
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(*tokens())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(*tokens())
    torch.testing.assert_close(got, expected)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (got[1], expected[1]))
    torch.testing.assert_close(ours, theirs)


def test_a_patched_model_exports(model):
    model.eval()
    idx, targets = tokens()
    with torch.no_grad():
        exported = torch.export.export(model, (idx, targets)).module()
        torch.testing.assert_close(exported(idx, targets), model(idx, targets))


def test_a_patched_model_in_autocast(model):
    plain = copy.deepcopy(model)
    gptfast.unpatch(plain)
    results = []
    for m in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            logits, loss = m(*tokens())
        loss.backward()
        results.append((logits, loss))
    (ours, our_loss), (theirs, their_loss) = results
    assert (ours.dtype, our_loss.dtype) == (theirs.dtype, their_loss.dtype)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        error = (p.grad - q.grad).norm() / q.grad.norm().clamp(min=1e-6)
        assert error < 0.1, name


def test_sdpa_compiles():
    q = torch.randn(2, 4, 6, 8)
    torch._dynamo.reset()
    function = gptfast.patching.sdpa
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for S, causal in ((6, True), (4, True), (9, True), (9, False)):
        k = torch.randn(2, 4, S, 8)
        expected = F.scaled_dot_product_attention(q, k, k, is_causal=causal)
        torch.testing.assert_close(compiled(q, k, k, is_causal=causal), expected)
