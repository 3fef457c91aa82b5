"""A training step of a whole GPT on the triton backend; `test_triton.py` runs it interpreted."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from places import PLACES

import gptfast
from gptfast.models import GPT, GPTConfig
from gptfast.nn import CausalSelfAttention
from gptfast.optim import AdamW
from gptfast.testing import assert_close_in_norm, unit_roundoff

HERE = [p for p in PLACES if p.backend == "triton"]
pytestmark = [
    pytest.mark.skipif(not HERE, reason="needs a GPU or TRITON_INTERPRET=1"),
    pytest.mark.parametrize("place", HERE, ids=str, indirect=True),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str),
]


def train_step(model, x, y, backend):
    """Losses of the tokens, gradients, and parameters after one step, by name.

    The mean loss and the norm are single numbers, which a peer may hit by luck: they are held
    against the losses and gradients that they are made of.
    """
    with gptfast.use_backend(backend), torch.no_grad():
        logits = model(x)[0]
        losses = gptfast.cross_entropy(logits, y, reduction="none")
    # The first step of AdamW is lr g / (|g| + eps): with its usual eps, weights whose gradient is
    # all rounding error would move by lr either way.
    optimizer = AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1, max_norm=1.0)
    with gptfast.use_backend(backend):
        loss = model(x, y, loss_only=True)[1]
        loss.backward()
        optimizer.step()
    # The fused loss does not round its logits: those of half precision move by u.
    moves = 2 * unit_roundoff(logits.dtype) * logits.abs().max().item()
    mean = losses.double().sum() / (y != -100).sum()
    torch.testing.assert_close(loss.detach().double(), mean, rtol=2.0**-20, atol=moves)
    grads = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    rtol = 2.0**-24 * (4 + grads.numel() ** 0.5)  # see rounding_bound
    torch.testing.assert_close(optimizer.total_norm.double(), grads.norm(), rtol=rtol, atol=0)
    results = {"losses": losses}
    for name, p in model.named_parameters():
        results[f"gradient of {name}"] = p.grad
        results[name] = p.detach()
    return results


SIZES = GPTConfig(block_size=20, vocab_size=37, n_layer=2, n_head=2, n_embd=32)
CONFIGS = {
    "gpt2": (SIZES, True),
    "no biases": (dataclasses.replace(SIZES, bias=False), False),
    "modern": (
        dataclasses.replace(
            SIZES, n_layer=1, positions="rotary", norm="rms", mlp="swiglu", n_inner=48, n_kv_head=1,
            qk_norm=True, window=7, logit_softcap=3.0, tied=False, bias=False,
        ),
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "fused_loss"), CONFIGS.values(), ids=CONFIGS)
def test_a_training_step_is_the_torch_backends(place, dtype, config, fused_loss):
    torch.manual_seed(0)
    model = GPT(config, fused_loss).to(place.device, dtype)
    x, y = torch.randint(37, (2, 2, 18), device=place.device)
    y[0, :3] = -100
    with torch.no_grad():  # fresh weights are too tame: scores of 1e-2, biases of zero
        for p in model.parameters():
            p += torch.randn_like(p) / 8
    exact = train_step(copy.deepcopy(model).double(), x, y, "torch")
    peer = train_step(copy.deepcopy(model), x, y, "torch")
    ours = train_step(model, x, y, "triton")
    for name, expected in exact.items():
        assert_close_in_norm(name, ours[name], peer[name], expected.double())


def test_attention_with_fewer_key_heads(place, dtype):
    torch.manual_seed(0)
    attend = CausalSelfAttention(32, 4, n_kv_head=2).to(place.device, dtype)
    x = torch.randn(2, 17, 32, device=place.device, dtype=dtype)
    dy = torch.randn_like(x)

    def run(module, x, backend):
        with gptfast.use_backend(backend):
            y = module(x)
            y.backward(dy.to(y))
        return {"y": y.detach(), **{name: p.grad for name, p in module.named_parameters()}}

    exact = run(copy.deepcopy(attend).double(), x.double(), "torch")
    peer = run(copy.deepcopy(attend), x, "torch")
    ours = run(attend, x, "triton")
    for name, expected in exact.items():
        assert_close_in_norm(name, ours[name], peer[name], expected)
