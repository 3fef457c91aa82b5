"""Decoding in one call a token: the logits of the modules, at every SIMD level; and when not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gptfast
from gptfast import decoder
from gptfast.decoder import Decoder, why_not
from gptfast.generate import generate
from gptfast.models import GPT, GPTConfig
from gptfast.nn import CausalSelfAttention, KVCache, QuantizedLinear, quantize
from gptfast.testing import assert_close_in_norm

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = {
    "plain": GPTConfig(20, 67, n_layer=2, n_head=4, n_embd=128, bias=False),
    "odd": GPTConfig(19, 51, n_layer=3, n_head=3, n_embd=39),
    "one of each": GPTConfig(20, 1, n_layer=1, n_head=1, n_embd=1),
    "one head": GPTConfig(20, 33, n_layer=1, n_head=1, n_embd=80, dropout=0.5),
}
WEIGHTS = ("float32", "bfloat16", "float16", "int8", "int4")


def new_model(config: GPTConfig, weights: str = "float32") -> GPT:
    """Random parameters of every kind, biases and norms too."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn_like(p) + ("ln" in name and "weight" in name))
            else:
                p.mul_(8)
    if weights in ("int8", "int4"):
        quantize(model, weights)
    elif weights != "float32":
        model.to(getattr(torch, weights))
    return model


def exact_model(model: GPT) -> GPT:
    """The same model in fp64, weights as they are stored."""
    wide = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight.data = module.dequantize(torch.float64)
            if module.bias is not None:
                linear.bias.data = module.bias
            wide.set_submodule(name, linear)
    return wide.double()


@torch.no_grad()
def steps(model: GPT, idx: torch.Tensor, cache: KVCache, through: Decoder | None) -> torch.Tensor:
    """(B, T, V) logits of the tokens of idx, one after another."""
    logits = []
    for t in range(idx.shape[1]):
        new = idx[:, t : t + 1]
        logits.append(through(new) if through else model(new, cache=cache)[0])
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_the_modules(config, weights, isa):
    model = new_model(config, weights)
    wide = exact_model(model)
    for B in (1, 2, 5, 16):
        assert why_not(model, B) is None
        idx = torch.randint(config.vocab_size, (B, config.block_size))
        caches = [m.new_cache(B) for m in (model, model, wide)]
        got = steps(model, idx, caches[0], Decoder(model, caches[0]))
        peer = steps(model, idx, caches[1], None)
        exact = steps(wide, idx, caches[2], None)
        assert got.dtype == torch.float32
        assert_close_in_norm(f"logits, B={B}", got, peer, exact)
        assert caches[0].length == config.block_size
        # In steps of several tokens, too: as many as fit.
        cache, T = model.new_cache(B), 16 // B
        through = Decoder(model, cache)
        several = torch.cat([through(part) for part in idx.split(T, 1)], 1)
        at = [min(t, config.block_size) - 1 for t in range(T, config.block_size + T, T)]
        assert_close_in_norm(f"logits, B={B}, T={T}", several, peer[:, at], exact[:, at])
        # Keys and values, too: the modules could go on with this cache.
        for mine, theirs, right in zip(*(c.data.unbind(0) for c in caches), strict=True):
            assert_close_in_norm(f"cache, B={B}", mine, theirs, right)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bits_do_not_depend_on_threads(weights, monkeypatch):
    monkeypatch.setattr(decoder, "BYTES_PER_THREAD", 1)
    model = new_model(CONFIGS["odd"], weights)
    for B in (1, 3):
        idx = torch.randint(51, (B, 4))
        results = []
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                cache = model.new_cache(B)
                results.append(steps(model, idx, cache, Decoder(model, cache)))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_fewer_heads_of_keys():
    model = new_model(CONFIGS["plain"])
    for block in model.transformer["h"]:
        block.attn = CausalSelfAttention(128, 4, n_kv_head=2, bias=False).eval()
    wide = exact_model(model)
    idx = torch.randint(67, (2, 20))
    results = []
    for m in (model, model, wide):
        cache = KVCache(2, 2, 2, 20, 32, dtype=m.lm_head.weight.dtype)
        through = None if results else Decoder(m, cache)
        results.append(steps(m, idx, cache, through))
    assert_close_in_norm("logits", *results)


def test_autocast_rounds_the_weights_once():
    model = new_model(CONFIGS["plain"])
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.bfloat16().float())
    idx = torch.randint(67, (2, 20))
    cache = model.new_cache(2)
    with torch.autocast("cpu", torch.bfloat16):
        through = Decoder(model, cache)
    got = steps(model, idx, cache, through)
    cache = rounded.new_cache(2)
    # The tied embedding is not rounded by autocast: take it from the model.
    rounded.transformer["wte"] = model.transformer["wte"]
    torch.testing.assert_close(got, steps(rounded, idx, cache, None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_generate_goes_through_it_and_draws_the_same(weights, monkeypatch):
    model = new_model(CONFIGS["plain"], weights)
    idx = torch.randint(67, (3, 5))
    assert Decoder(model, model.new_cache(3)).takes(5)
    calls = []
    step = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda d, x: calls.append(1) or step(d, x))
    got = generate(model, idx, 50, temperature=0)
    # The prompt of 5 tokens fits into a step; the restarts, with 3 x 10, go through the modules.
    restarts = sum(n >= 20 and (n - 20) % 10 == 0 for n in range(5, 55))
    assert len(calls) == 50 - restarts
    with gptfast.use_backend("torch"):
        assert torch.equal(got, generate(model, idx, 50, temperature=0))


class Own(GPT):
    pass


def test_what_it_does_not_take_goes_through_the_modules():
    config = CONFIGS["plain"]
    model = new_model(config)
    assert why_not(model, 16) is None
    assert why_not(model, 17) == "at most 16 sequences, got 17"
    assert why_not(Own(config).eval(), 1) == "the model is a Own, not a GPT"
    assert why_not(torch.nn.Linear(1, 1), 1) == "the model is a Linear, not a GPT"
    for backend in ("torch", "triton"):
        with gptfast.use_backend(backend):
            assert why_not(model, 1) == f"backend '{backend}' is forced"
    with gptfast.use_backend("cpu"):
        assert why_not(model, 1) is None
    assert "training mode" in why_not(GPT(config), 1)
    assert why_not(copy.deepcopy(model).double(), 1) == "transformer.wte.weight is torch.float64"
    assert "is on meta" in why_not(copy.deepcopy(model).to("meta"), 1)

    def changed(change):
        other = copy.deepcopy(model)
        change(other)
        return why_not(other.eval(), 1)

    block = "transformer.h.0"
    assert changed(lambda m: m.get_submodule(f"{block}.mlp").register_forward_hook(print)) == (
        f"{block}.mlp has hooks"
    )
    linear = f"{block}.mlp.c_fc"
    own = type("Adapted", (nn.Linear,), {})(128, 512, bias=False)
    assert f"{linear} is a Adapted" in changed(lambda m: m.set_submodule(linear, own))
    assert f"{linear} is a Parametrized" in changed(
        lambda m: nn.utils.parametrizations.weight_norm(m.get_submodule(linear))
    )

    def own_forward(m):
        m.get_submodule(linear).forward = lambda x: x

    assert "forward of its own" in changed(own_forward)
    narrow = CausalSelfAttention(128, 2, bias=False)
    assert changed(lambda m: m.set_submodule(f"{block}.attn", narrow)) == (
        "its blocks differ in their sizes"
    )
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert why_not(model, 1) == "modules have global hooks"
    handle.remove()
    with torch.autograd.profiler.profile():
        assert why_not(model, 1) == "ops are being watched"

    seen = []
    model.get_submodule(linear).register_forward_hook(lambda *_: seen.append(1))
    model.get_submodule(f"{block}.attn.c_attn").register_forward_hook(lambda *_: seen.append(1))
    generate(model, torch.zeros(1, 3, dtype=torch.int64), 4)
    assert len(seen) == 8


def test_errors():
    model = new_model(CONFIGS["odd"])
    cache = model.new_cache(2, max_length=3)
    step = Decoder(model, cache)
    idx = torch.zeros(2, 1, dtype=torch.int64)
    for shape in ((1, 1), (2,), (2, 9), (2, 0)):
        expected = r"Decoder: idx must be \(2, T\), T from 1 to 8, got"
        with pytest.raises(ValueError, match=expected):
            step(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="KVCache: room for 3 tokens, got 4"):
        step(torch.zeros(2, 4, dtype=torch.int64))
    for token in (51, -1, 2**40):
        with pytest.raises(IndexError, match=rf"tokens must be in \[0, 51\), got {token}"):
            step(torch.tensor([[0], [token]]))
    with pytest.raises(TypeError, match=r"Decoder: idx must be torch.int64, got torch.int32"):
        step(idx.int())
    assert cache.length == 0
    for _ in range(3):
        step(idx)
    with pytest.raises(ValueError, match="KVCache: room for 3 tokens, got 4"):
        step(idx)
