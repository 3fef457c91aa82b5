"""The modules: torch's constructors and state, torch's results."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gptfast.nn
from gptfast.testing import assert_close_in_norm

PAIRS = [
    (gptfast.nn.LayerNorm, nn.LayerNorm, {"normalized_shape": 24}),
    (gptfast.nn.LayerNorm, nn.LayerNorm, {"normalized_shape": (4, 6), "eps": 1e-3}),
    (gptfast.nn.LayerNorm, nn.LayerNorm, {"normalized_shape": 24, "bias": False}),
    (gptfast.nn.LayerNorm, nn.LayerNorm, {"normalized_shape": 24, "elementwise_affine": False}),
    (gptfast.nn.RMSNorm, nn.RMSNorm, {"normalized_shape": 24}),
    (gptfast.nn.RMSNorm, nn.RMSNorm, {"normalized_shape": (4, 6), "eps": 1e-3}),
    (gptfast.nn.RMSNorm, nn.RMSNorm, {"normalized_shape": 24, "elementwise_affine": False}),
    (gptfast.nn.GELU, nn.GELU, {}),
    (gptfast.nn.GELU, nn.GELU, {"approximate": "tanh"}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_elementwise_modules_replace_torchs(ours, theirs, options):
    torch.manual_seed(0)
    a, b = ours(**options), theirs(**options)
    for p in b.parameters():
        nn.init.normal_(p)
    a.load_state_dict(b.state_dict())
    b.load_state_dict(a.state_dict())
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (a, b)]
    assert shapes[0] == shapes[1]
    shape = (5, 4, 6) if options.get("normalized_shape") == (4, 6) else (5, 24)
    dy = torch.randn(shape)
    results = []
    for module, dtype in (
        (a, torch.float32),
        (b, torch.float32),
        (copy.deepcopy(b).double(), torch.float64),
    ):
        torch.manual_seed(1)
        x = torch.randn(shape).to(dtype).requires_grad_()
        y = module(x)
        leaves = [x, *module.parameters()]
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(dtype))])
    for got, peer, exact in zip(*results, strict=True):
        assert_close_in_norm(ours.__name__, got, peer, exact)


@pytest.mark.parametrize("name", ["LayerNorm", "GELU", "CrossEntropyLoss", "Embedding"])
def test_constructors_are_torchs(name):
    ours, theirs = getattr(gptfast.nn, name), getattr(nn, name)
    given, wanted = (list(inspect.signature(m).parameters.values()) for m in (ours, theirs))
    assert [(p.name, p.default) for p in given[: len(wanted)]] == [
        (p.name, p.default) for p in wanted
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in given[len(wanted) :])  # ours alone
    assert issubclass(ours, theirs)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 7, 3), (2, 7, 3, 4)])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}])
def test_cross_entropy_takes_torchs_layouts(shape, options):
    torch.manual_seed(0)
    weight = torch.rand(7)
    target = torch.randint(0, 7, (*shape[:1], *shape[2:]) if len(shape) > 1 else ())
    x, dloss = torch.randn(shape), torch.randn(target.shape if "reduction" in options else ())
    results = []
    for module, dtype in (
        (gptfast.nn.CrossEntropyLoss, torch.float32),
        (nn.CrossEntropyLoss, torch.float32),
        (nn.CrossEntropyLoss, torch.float64),
    ):
        leaf = x.to(dtype).requires_grad_()
        loss = module(weight.to(dtype), **options)(leaf, target)
        results.append([loss, torch.autograd.grad(loss, leaf, dloss.to(dtype))[0]])
    for got, peer, exact in zip(*results, strict=True):
        assert_close_in_norm("CrossEntropyLoss", got, peer, exact)


def test_class_probabilities_are_refused():
    with pytest.raises(TypeError, match=r"must be int64 class indices, got class probabilities"):
        gptfast.nn.CrossEntropyLoss()(torch.randn(2, 3), torch.rand(2, 3))


@pytest.mark.parametrize("module", [gptfast.nn.LayerNorm, gptfast.nn.RMSNorm])
def test_a_norm_names_a_wrong_shape(module):
    with pytest.raises(ValueError, match=r"Norm: x must end in \(4, 6\), got \(5, 24\)"):
        module((4, 6))(torch.randn(5, 24))


def plain_attention(module, x):
    """The same computation with a T x T matrix."""
    B, T, C = x.shape
    D = module.head_dim
    q, k, v = module.c_attn(x).split(
        [D * n for n in (module.n_head, module.n_kv_head, module.n_kv_head)], dim=2
    )
    q, k, v = (y.view(B, T, -1, D).transpose(1, 2) for y in (q, k, v))
    k, v = (y.repeat_interleave(module.n_head // module.n_kv_head, 1) for y in (k, v))
    scores = (q @ k.transpose(-1, -2) / D**0.5).masked_fill(~torch.ones(T, T).tril().bool(), -1e30)
    return module.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
def test_causal_self_attention(n_kv_head):
    torch.manual_seed(0)
    module = gptfast.nn.CausalSelfAttention(24, 4, n_kv_head)
    x, dy = torch.randn(2, 70, 24), torch.randn(2, 70, 24)
    double = gptfast.nn.CausalSelfAttention(24, 4, n_kv_head).double()
    double.load_state_dict(module.state_dict())

    def results(function, module, dtype):
        y = function(module, x.to(dtype))
        return [y, *torch.autograd.grad(y, list(module.parameters()), dy.to(dtype))]

    got = results(lambda m, x: m(x), module, torch.float32)
    peer = results(plain_attention, module, torch.float32)
    exact = results(plain_attention, double, torch.float64)
    for name, *three in zip(["y", *dict(module.named_parameters())], got, peer, exact, strict=True):
        assert_close_in_norm(name, *three)


@pytest.mark.parametrize("pieces", [(70,), (1,) * 9, (30, 1, 1, 5, 33)])
def test_a_cache_gives_what_the_whole_sequence_gives(pieces):
    torch.manual_seed(0)
    module = gptfast.nn.CausalSelfAttention(24, 4, 2).eval()
    x = torch.randn(2, sum(pieces), 24)
    cache = gptfast.nn.KVCache(1, 2, 2, sum(pieces), 6)
    outputs = []
    for piece in x.split(list(pieces), dim=1):
        outputs.append(module(piece, cache))
        cache.advance(piece.shape[1])
    # The same sums in another order: tiles of the full pass against single queries.
    torch.testing.assert_close(torch.cat(outputs, 1), module(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=f"room for {x.shape[1]} tokens, got {x.shape[1] + 1}"):
        module(x[:, :1], cache)


def test_attention_dropout_only_in_training():
    torch.manual_seed(0)
    module = gptfast.nn.CausalSelfAttention(24, 4, dropout=0.5)
    x = torch.randn(1, 30, 24)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((24, 5), "n_head must divide n_embd 24, got 5"),
        ((24, 4, 3), "n_kv_head must divide n_head 4"),
    ],
)
def test_sizes_that_do_not_divide(sizes, message):
    with pytest.raises(ValueError, match=message):
        gptfast.nn.CausalSelfAttention(*sizes)


def test_gelu_equals_the_function():
    x = torch.randn(9)
    assert torch.equal(gptfast.nn.GELU("tanh")(x), gptfast.gelu(x))
    torch.testing.assert_close(gptfast.nn.GELU()(x), F.gelu(x))
