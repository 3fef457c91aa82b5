"""GPT-2: sizes, initialisation, and the same numbers on every backend."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import gptfast
from benchmarks.stock_gpt import StockGPT
from gptfast.models import GPT, GPTConfig, gpt
from gptfast.testing import assert_close_in_norm

SMALL = GPTConfig(block_size=40, vocab_size=67, n_layer=3, n_head=4, n_embd=48)


def batch(config=SMALL, B=3):
    generator = torch.Generator().manual_seed(5)
    idx = torch.randint(0, config.vocab_size, (B, config.block_size + 1), generator=generator)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameter_counts_are_the_published_ones(preset, count):
    with torch.device("meta"):
        assert GPT(GPTConfig.preset(preset)).num_parameters() == count


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128))
    assert model.lm_head.weight is model.transformer["wte"].weight
    for name, p in model.named_parameters():
        std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 5 * std / p.numel() ** 0.5, name
        elif "ln_" in name and name.endswith("weight"):
            assert (p == 1).all()
        else:
            assert (p == 0).all()
    loss = model(*batch(model.config))[1].item()
    assert loss == pytest.approx(math.log(500), rel=0.02)


def results(model, x, y):
    logits, loss = model(x, y)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return {"logits": logits, "loss": loss, **dict(zip(names, gradients, strict=True))}


def test_logits_loss_and_gradients_on_the_cpu_backend():
    torch.manual_seed(0)
    model = GPT(SMALL)
    x, y = batch()
    stock = StockGPT(SMALL)
    stock.load_state_dict(model.state_dict())
    double = StockGPT(SMALL).double()
    double.load_state_dict(model.state_dict())
    peer, exact = results(stock, x, y), results(double, x, y)
    for backend in ("cpu", "torch"):
        with gptfast.use_backend(backend):
            got = results(model, x, y)
        for name, value in got.items():
            assert_close_in_norm(f"{name} on {backend}", value, peer[name], exact[name])


@pytest.mark.parametrize("fused", [True, False, None])
def test_the_loss_alone(fused, monkeypatch):
    torch.manual_seed(0)
    model = GPT(SMALL, fused_loss=fused)
    x, y = batch()
    y[0, :5] = -100
    double = copy.deepcopy(model).double()
    peer, exact = (results(m, x, y) for m in (copy.deepcopy(model), double))
    calls = []
    for name in ("cross_entropy", "linear_cross_entropy"):
        op = getattr(gptfast, name)

        def call(*args, name=name, op=op, **options):
            calls.append(name)
            return op(*args, **options)

        monkeypatch.setattr(gpt, name, call)
    logits, loss = model(x, y, loss_only=True)
    assert logits is None
    loss.backward()
    assert calls == ["cross_entropy" if fused is False else "linear_cross_entropy"]
    got = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    for name, value in got.items():
        assert_close_in_norm(name, value, peer[name], exact[name])
    with pytest.raises(ValueError, match="GPT: the loss needs targets, got None"):
        model(x, loss_only=True)


def test_ten_steps_give_the_same_losses():
    x, y = batch()
    losses = {}
    for backend in ("cpu", "torch"):
        torch.manual_seed(0)
        model = GPT(SMALL)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[backend] = []
        with gptfast.use_backend(backend):
            for _ in range(10):
                loss = model(x, y)[1]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[backend].append(loss.item())
    assert losses["cpu"][-1] < losses["cpu"][0] - 0.1
    # AdamW divides by the root of the squared gradient, so a step moves each weight by lr whatever
    # the gradient's size: where it is all rounding error, weights may differ by 2 lr a step. Such
    # weights hardly move the loss; 1e-5 of it is a hundred roundings.
    assert losses["cpu"] == pytest.approx(losses["torch"], rel=1e-5)


def test_a_cache_gives_the_logits_of_the_whole_sequence():
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    x, _ = batch()
    with torch.no_grad():
        whole = model(x)[0]
        cache = model.new_cache(3)
        outputs = [model(piece, cache=cache)[0] for piece in x.split([7, 1, 1, 20, 11], dim=1)]
    at = [6, 7, 8, 28, 39]
    torch.testing.assert_close(torch.cat(outputs, 1), whole[:, at], rtol=1e-4, atol=1e-5)


def test_dropout_only_in_training():
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=40, vocab_size=67, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    )
    x, _ = batch()
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_compiles_without_a_graph_break():
    torch.manual_seed(0)
    model = GPT(SMALL)
    x, y = batch()
    expected = results(model, x, y)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, loss = compiled(x, y)
    loss.backward()
    got = {"logits": logits, "loss": loss, **{n: p.grad for n, p in model.named_parameters()}}
    torch.testing.assert_close(got, expected)  # the same kernels, in the same order
    model.fused_loss = True
    torch.testing.assert_close(compiled(x, y, loss_only=True)[1], expected["loss"])


@pytest.mark.parametrize(
    ("idx", "error", "message"),
    [
        (torch.zeros(1, 41, dtype=torch.long), ValueError, "at most block_size 40 tokens, got 41"),
        (torch.zeros(5, dtype=torch.long), ValueError, r"idx must be \(B, T\) .* got \(5,\)"),
        (torch.zeros(1, 0, dtype=torch.long), ValueError, r"with tokens in it, got \(1, 0\)"),
        (torch.tensor([[1, 67]]), IndexError, r"tokens must be in \[0, 67\), got 67"),
        (torch.tensor([[-1, 6]]), IndexError, r"tokens must be in \[0, 67\), got -1"),
    ],
)
def test_bad_tokens(idx, error, message):
    with pytest.raises(error, match=message):
        GPT(SMALL)(idx)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "n_head must divide n_embd 48, got 5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"n_layer": 0}, "n_layer must be a positive integer, got 0"),
        ({"vocab_size": 1.5}, "vocab_size must be a positive integer, got 1.5"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**vars(SMALL), **changes})


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown model preset 'gpt3'; known: gpt2, gpt2-medium"):
        GPTConfig.preset("gpt3")
