"""A GPT whose parts have hooks, or were replaced, calls them; all others go the fused way."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gptfast
from gptfast.models import GPT, GPTConfig
from gptfast.ops.library import has_tiles
from gptfast.ops.linear_gelu import ROWS_OF_A_THREAD
from gptfast.testing import record_calls

SIZES = {"block_size": 12, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 16}
VARIANTS = {
    "gpt2": {},
    "post-norm": {"pre_norm": False, "mlp": "relu"},
    "llama": {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "bias": False},
}
IDX = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
# A container's forward is never called; scores have their dropout in the op.
UNCALLED = ("", "transformer", "transformer.h")


def new_model(variant, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **VARIANTS[variant], **changes}))
    with torch.no_grad():
        for p in model.parameters():  # biases of zero would hide one that is added twice
            p.add_(0.1 * torch.randn_like(p))
    return model


def fused(model):
    with record_calls() as recorded:
        model(IDX, IDX, loss_only=True)
    return {call.op.name().removeprefix("gptfast::") for call in recorded.calls}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_hook_is_called(variant):
    model = new_model(variant)
    expected = model(IDX)[0]
    names = [name for name, _ in model.named_modules() if name not in UNCALLED]
    for name in names:
        seen = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda *args, seen=seen: seen.append(1)
        )
        torch.testing.assert_close(model(IDX)[0], expected)
        handle.remove()
        if not name.endswith(("tables", "wpe")):  # read, not called
            assert seen == [1], name
    assert torch.equal(model(IDX)[0], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_hook_returns_counts(variant):
    for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_2", "attn", "mlp"):
        model = new_model(variant)
        before = model(IDX)[0]
        model.get_submodule(f"transformer.h.1.{name}").register_forward_hook(
            lambda module, args, output: 2 * output
        )
        assert not torch.allclose(model(IDX)[0], before), name


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, as PEFT makes it; it has no bias of its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_do_what_a_changed_weight_does(variant):
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        model, changed = new_model(variant), new_model(variant)
        parent, _, last = f"transformer.h.0.{name}".rpartition(".")
        adapted = Adapted(model.get_submodule(parent).get_submodule(last))
        setattr(model.get_submodule(parent), last, adapted)
        with torch.no_grad():
            weight = changed.get_submodule(f"{parent}.{last}").weight
            weight += adapted.up.weight @ adapted.down.weight
        for ours, theirs in zip(model(IDX, IDX), changed(IDX, IDX), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_norm_of_torch_in_its_place():
    model = new_model("gpt2", dropout=0.1)
    expected = model.eval()(IDX)[0]
    for block in model.transformer["h"]:
        norm = nn.LayerNorm(16)
        norm.load_state_dict(block.ln_2.state_dict())
        block.ln_2 = norm
    torch.testing.assert_close(model(IDX)[0], expected)
    assert "add_layer_norm_fwd" in fused(model)  # the others
    model.train()(IDX)


def test_without_hooks_it_is_fused():
    assert fused(new_model("gpt2")) >= {"add_layer_norm_fwd", "bias_gelu_fwd"}
    assert fused(new_model("llama")) >= {"add_rms_norm_fwd", "glu_fwd"}
    model = new_model("gpt2")
    for block in model.transformer["h"]:
        block.mlp.c_fc.register_forward_hook(lambda *args: None)
    assert "bias_gelu_fwd" not in fused(model)


@pytest.fixture
def mlp():
    return new_model("gpt2").transformer["h"][0].mlp.bfloat16()


def took_linear_gelu(mlp, x):
    with record_calls() as recorded:
        y = mlp(x)
    return y, any("linear_gelu" in call.op.name() for call in recorded.calls)


@pytest.mark.skipif(not has_tiles(), reason="linear_gelu is for processors with AMX")
@torch.no_grad()
def test_the_mlp_takes_linear_gelu_in_tiles(mlp):
    rows = ROWS_OF_A_THREAD * torch.get_num_threads()
    x = torch.randn(2, rows // 2, mlp.c_fc.in_features, dtype=torch.bfloat16)
    y, taken = took_linear_gelu(mlp, x)
    assert taken
    wide = F.gelu(F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias).float(), approximate="tanh")
    expected = mlp.c_proj(wide.bfloat16())
    # h and what GELU makes of it are rounded once more or less than there, each to 2^-8 of itself.
    assert (y - expected).norm() <= 2 * 2.0**-8 * expected.norm()
    assert not took_linear_gelu(mlp, x[:, 1:])[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert not took_linear_gelu(mlp.float(), x.float())[1]
    mlp.bfloat16().c_fc.register_forward_hook(lambda module, args, output: 0 * output)
    y, taken = took_linear_gelu(mlp, x)
    assert not taken
    torch.testing.assert_close(y, mlp.c_proj.bias.expand_as(y))


@torch.no_grad()
def test_the_mlp_exports_for_any_number_of_tokens(mlp):
    tokens = torch.export.Dim("T", min=2, max=4096)
    example = torch.randn(1, 600, mlp.c_fc.in_features, dtype=torch.bfloat16)
    exported = torch.export.export(mlp, (example,), dynamic_shapes={"x": {1: tokens}}).module()
    for T in (100, 700):
        x = torch.randn(1, T, mlp.c_fc.in_features, dtype=torch.bfloat16)
        torch.testing.assert_close(exported(x), mlp(x), rtol=2.0**-6, atol=2.0**-6)


def test_linear_gelu_exports_for_any_number_of_tokens():
    class Layer(nn.Linear):
        def forward(self, x):
            return gptfast.linear_gelu(x, self.weight, self.bias)

    layer, tokens = Layer(16, 24), torch.export.Dim("T", min=2, max=4096)
    example = torch.randn(1, 20, 16)
    exported = torch.export.export(layer, (example,), dynamic_shapes={"x": {1: tokens}}).module()
    x = torch.randn(1, 33, 16)
    torch.testing.assert_close(exported(x), layer(x))


def test_a_head_with_a_hook_makes_logits():
    model = new_model("gpt2")
    seen = []
    model.lm_head.register_forward_hook(lambda *args, seen=seen: seen.append(1))
    for choice in (True, False):
        model.fused_loss = choice
        model(IDX, IDX, loss_only=True)
    assert seen == [1, 1]
