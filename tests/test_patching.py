"""`gptfast.patch`: what it replaces, what it leaves alone, and that nobody notices."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import gptfast
from benchmarks.plain_models import PLAIN, OwnLayerNorm, Sizes
from gptfast.patching import OPS, Patched, functions, register, registry, sdpa, torch_modules
from gptfast.testing import assert_close_in_norm

ALL = list(OPS)  # each of them, whether it is faster or not
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


def outputs(report):
    """(name, op) of what was replaced."""
    return {(entry.name, entry.op) for entry in report.replaced}


def reasons(report):
    return {entry.name: entry.reason for entry in report.left}


# ---- The mechanism -------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.rms = nn.RMSNorm(16, eps=1e-6)
        self.act = nn.GELU("tanh")
        self.shared = self.act
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.act(self.linear(self.rms(self.shared(self.norm(x)))))


def test_a_module_stays_what_it_was():
    model = Model().eval()
    seen = []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    before = model(X)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    modules = dict(model.named_modules())
    report = gptfast.patch(model, ops=ALL)
    assert outputs(report) == {("norm", "layer_norm"), ("rms", "rms_norm"), ("act", "gelu")}
    after = model(X)
    assert len(seen) == 2
    torch.testing.assert_close(after, before)
    assert all(model.get_submodule(name) is module for name, module in modules.items() if name)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert not any(module.training for module in model.modules())
    assert isinstance(model.norm, nn.LayerNorm)
    assert type(model.norm).__name__ == "LayerNorm"
    assert repr(model.norm) == repr(nn.LayerNorm(16))
    restored = gptfast.unpatch(model)
    assert outputs(restored) == outputs(report)
    assert type(model.norm) is nn.LayerNorm
    assert torch.equal(model(X), before)


def test_a_dry_run_changes_nothing():
    model = Model()
    report = gptfast.patch(model, ops=ALL, dry_run=True)
    assert len(report.replaced) == 3
    assert not any(isinstance(module, Patched) for module in model.modules())
    assert "3 modules to be replaced, 0 left alone" in str(report)


def test_the_report_is_a_table():
    model = nn.Sequential(*(nn.GELU() for _ in range(3)), Overrides(16))
    text = str(gptfast.patch(model, ops=ALL))
    assert "3 modules replaced, 1 left alone" in text
    assert "it overrides the forward of LayerNorm" in text
    row = next(line for line in text.splitlines() if "GELU" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        *("GELU", "gelu", "3", "0", "replaced")
    ]


@pytest.mark.parametrize("name", PLAIN)
def test_copies_and_pickles_of_a_patched_model(name):
    torch.manual_seed(0)
    model = PLAIN[name](Sizes())
    idx = torch.randint(67, (2, 9))
    gptfast.patch(model, ops=ALL)
    expected = model(idx)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(idx)[0], expected)
        kinds = [type(module) for module in model.modules()]
        assert [type(module) for module in other.modules()] == kinds
        assert len(gptfast.unpatch(other).replaced) > 2
        assert not any(isinstance(module, Patched) for module in other.modules())
    assert any(isinstance(module, Patched) for module in model.modules())


def test_the_ops_that_were_asked_for():
    model = Model()
    assert outputs(gptfast.patch(model, ops="gelu")) == {("act", "gelu")}
    report = gptfast.patch(model, ops=["gelu", "rms_norm"])
    assert outputs(report) == {("rms", "rms_norm")}
    assert reasons(report) == {"act": "already patched"}


def test_bad_arguments():
    known = "attention, layer_norm, rms_norm, gelu, glu, linear_cross_entropy, cross_entropy"
    with pytest.raises(ValueError, match=f"some of {known}; got 'layernorm'"):
        gptfast.patch(nn.GELU(), ops=["layernorm"])
    with pytest.raises(TypeError, match="ops must be 'all' or a list of names, got NoneType"):
        gptfast.patch(nn.GELU(), ops=None)
    with pytest.raises(ValueError, match=f"one of {known}; got 'norm'"):
        register(nn.GELU, op="norm")
    for function in (gptfast.patch, gptfast.unpatch):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
            function(X)


# ---- What is left alone --------------------------------------------------------------------------


class Overrides(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


class Inherits(nn.LayerNorm):
    pass


def test_a_subclass_that_overrides_forward():
    model = nn.ModuleDict({"overrides": Overrides(16), "inherits": Inherits(16)})
    expected = model["overrides"](X)
    report = gptfast.patch(model, ops=ALL)
    assert reasons(report) == {"overrides": "it overrides the forward of LayerNorm"}
    assert outputs(report) == {("inherits", "layer_norm")}
    assert isinstance(model["inherits"], Inherits)
    assert torch.equal(model["overrides"](X), expected)


def test_parameters_that_have_no_shape_yet():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.LazyLinear(4)

        def forward(self, x, targets):
            return F.cross_entropy(self.head(x), targets)

    report = gptfast.patch(Lazy(), ops=ALL)
    assert reasons(report) == {"": "its parameters have no shape yet"}


def test_modules_that_are_not_what_they_seem():
    model = nn.ModuleDict(
        {name: nn.LayerNorm(16) for name in ("fn", "param", "float8", "int", "jit")}
    )
    model["fn"].forward = lambda x: x
    parametrize.register_parametrization(model["param"], "weight", nn.Identity())
    model["float8"].weight.data = model["float8"].weight.data.to(torch.float8_e4m3fn)
    model["int"].weight = nn.Parameter(torch.ones(16, dtype=torch.int8), requires_grad=False)
    model["jit"] = torch.jit.script(nn.GELU())
    report = gptfast.patch(model, ops=ALL)
    assert reasons(report) == {
        "fn": "its forward is replaced on the object (by hooks of accelerate, for instance)",
        "param": "it is parametrised",
        "float8": "its weights are float8_e4m3fn",
        "int": "its weights are int8",
    }
    assert report.replaced == []


def test_ours_need_no_patch():
    report = gptfast.patch(nn.Sequential(gptfast.nn.LayerNorm(16), gptfast.nn.GELU()), ops=ALL)
    assert report.replaced == report.left == []


def test_another_device_or_dtype_has_no_kernel():
    report = gptfast.patch(nn.LayerNorm(16, dtype=torch.float64), ops=ALL)
    assert reasons(report) == {"": "no kernel on cpu in float64"}
    report = gptfast.patch(nn.LayerNorm(16, device="meta"), ops=ALL)
    assert reasons(report) == {"": "no kernel on meta in float32"}


def test_what_was_parametrised_since_is_not_restored():
    model = nn.Sequential(nn.LayerNorm(16))
    gptfast.patch(model, ops=ALL)
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert reasons(gptfast.unpatch(model))["0"].startswith("its class was changed after patching")
    parametrize.remove_parametrizations(model[0], "weight")
    assert outputs(gptfast.unpatch(model)) == {("0", "layer_norm")}
    assert type(model[0]) is nn.LayerNorm


def test_errors_are_those_of_the_original():
    norm = nn.LayerNorm(16)
    messages = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            norm(torch.randn(3, 8))
        messages.append(str(raised.value))
        gptfast.patch(norm, ops=ALL)
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (lambda: nn.LayerNorm(16), torch.jagged),
        (lambda: nn.LayerNorm(16), torch.strided),
        (lambda: nn.RMSNorm(16), torch.jagged),  # strided ones PyTorch's refuses
        (lambda: nn.GELU("tanh"), torch.jagged),
        (lambda: Gated("functions"), torch.jagged),
        (lambda: Gated("functions"), torch.strided),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_go_to_the_original(make, layout):
    module = make()
    x = torch.nested.nested_tensor([X[0, :3], X[1]], layout=layout)
    expected = module(x)
    report = gptfast.patch(module, ops=ALL)
    for y, e in zip(module(x).unbind(), expected.unbind(), strict=True):
        assert torch.equal(y, e)
    assert [key[1] for key in report.fallbacks] == ["nested tensors"]


def test_dtypes_that_the_original_refuses():
    norm, own = nn.LayerNorm(16).bfloat16(), OwnLayerNorm(16, bias=False).bfloat16()
    loss = nn.CrossEntropyLoss(torch.ones(16, dtype=torch.float64))
    for module, inputs in ((norm, [X]), (own, [X]), (loss, [X[0], torch.arange(5)])):
        messages = []
        for _ in range(2):
            with pytest.raises(RuntimeError) as raised:
                module(*inputs)
            messages.append(str(raised.value))
            gptfast.patch(module, ops=ALL)
        assert isinstance(module, Patched)
        assert messages[0] == messages[1]


def test_a_causal_hint_without_a_mask_is_refused_as_by_the_original():
    model = nn.MultiheadAttention(16, 4, batch_first=True)
    report = gptfast.patch(model, ops=ALL)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        model(X, X, X, need_weights=False, is_causal=True)
    assert report.fallbacks == {("attention", "is_causal without attn_mask"): 1}


class WatchingAttention(nn.Module):
    def forward(self, x):
        self.found = F.scaled_dot_product_attention
        return F.scaled_dot_product_attention(x, x, x)


def test_what_was_measured_to_be_slower_is_left_alone():
    model = nn.ModuleDict({"erf": nn.GELU(), "tanh": nn.GELU("tanh"), "norm": nn.LayerNorm(16)})
    report = gptfast.patch(model)
    assert outputs(report) == {("tanh", "gelu"), ("norm", "layer_norm")}
    assert reasons(report)["erf"].startswith("slower: 0.66, 0.89")
    for name, at_least in (("tanh", 16_384), ("norm", 1_048_576)):
        calls = {}
        for elements in (at_least - 16, at_least):
            with gptfast.testing.record_calls() as recorded:
                model[name](torch.randn(elements // 16, 16))
            calls[elements] = len(recorded.calls)
        assert calls == {at_least - 16: 0, at_least: 1}
    attn = nn.MultiheadAttention(256, 4, batch_first=True).bfloat16()  # pays earlier in training
    gptfast.patch(attn)
    x = torch.randn(262_144 // 256 // 64, 64, 256).bfloat16()
    for training, calls in ((False, 0), (True, 1)):
        with gptfast.testing.record_calls() as recorded:
            attn.train(training)(x, x, x, need_weights=False)
        assert len(recorded.calls) == calls
    own = WatchingAttention()
    gptfast.patch(own)
    for training in (False, True):
        own.train(training)(x.unflatten(-1, (4, 64)).transpose(1, 2))
        assert (own.found is F.scaled_dot_product_attention) is not training
    graphs = []

    def look(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    torch.compile(model["tanh"], backend=look, fullgraph=True)(torch.randn(20_000))
    assert "gptfast" not in graphs[0]  # compiled code is PyTorch's own
    report = gptfast.patch(nn.LayerNorm(16, dtype=torch.float16))
    assert reasons(report) == {"": "not measured on cpu in float16"}


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(2048, 8)

    def forward(self, idx, targets=None):
        logits = F.linear(self.wte(idx), self.wte.weight)
        return logits if targets is None else F.cross_entropy(logits, targets)


def test_a_call_for_few_tokens_overrides_no_loss(monkeypatch):
    overridden = []
    override = torch_modules.override
    monkeypatch.setattr(
        torch_modules,
        "override",
        lambda name, *rest: overridden.append(name) or override(name, *rest),
    )
    torch.manual_seed(0)
    model, idx = TiedHead(), torch.arange(512)
    expected = model(idx, idx)
    assert outputs(gptfast.patch(model)) == {("", "cross_entropy")}
    model(idx[:511], idx[:511])  # 512 rows of 2048 logits are the least that pays
    assert overridden == []
    torch.testing.assert_close(model(idx, idx), expected)
    assert overridden == ["cross_entropy"]
    gptfast.unpatch(model)
    gptfast.patch(model, ops="cross_entropy")
    model(idx[:1], idx[:1])
    assert len(overridden) == 2


def test_a_size_that_decides_nothing_is_no_guard():
    model = nn.Sequential(nn.LayerNorm(64), nn.GELU("tanh"), nn.RMSNorm(64))
    x = torch.randn(7, 64)
    expected = model(x)
    assert len(gptfast.patch(model).replaced) == 3
    # On either side of the elements from which each of them is used.
    rows = torch.export.Dim("T", min=1, max=65_536)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    torch.testing.assert_close(exported.module()(x), expected)
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=look, fullgraph=True, dynamic=True)
    for T in (7, 300, 20_000):
        compiled(torch.randn(T, 64))
    assert len(graphs) == 1


# ---- The registry --------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A class that only its author knows."""

    def forward(self, x):
        return F.gelu(x) * 2


class FastDoubled(Patched):
    def forward(self, x):
        if not self.worth(x):
            return super().forward(x)
        return gptfast.gelu(x, "none") * self._gptfast_state["factor"]

    def on_patch(self):
        self.patched = True

    def on_unpatch(self):
        del self.patched


@pytest.mark.parametrize("by_name", [True, False])
def test_a_class_of_ones_own(by_name, monkeypatch):
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))
    name = f"{Doubled.__module__}.Doubled"

    @register(name if by_name else Doubled, op="gelu")
    def recipe(module):
        return (FastDoubled, {"factor": 2}) if module.training else "not in training"

    model = nn.Sequential(Doubled(), Doubled().eval())
    expected = model(X)
    report = gptfast.patch(model, ops=ALL)
    assert outputs(report) == {("0", "gelu")}
    assert reasons(report) == {"1": "not in training"}
    assert model[0].patched
    torch.testing.assert_close(model(X), expected)
    gptfast.unpatch(model)
    assert vars(model[0]).keys() == vars(Doubled()).keys()


# ---- Classes that nobody registered --------------------------------------------------------------


class FunctionalGELU(nn.Module):
    def forward(self, h):
        return F.gelu(h, approximate="tanh")


class FunctionalRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16))

    def forward(self, x):
        return F.rms_norm(x, (16,), self.scale, eps=1e-4)


class Scaled(OwnLayerNorm):
    def forward(self, input):
        return 2 * F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class HalfABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weights", torch.randn(32))

    def forward(self, x):
        return F.rms_norm(x, (16,), self.weights.chunk(2)[1])


class InTraining(nn.Module):
    def forward(self, x):
        return F.gelu(x) if self.training else x


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.gelu(x)


class OnData(nn.Module):
    def forward(self, x):
        return F.gelu(x) if x.shape[0] > 0 else x


class Gated(nn.Module):
    def __init__(self, form, hidden=24):
        super().__init__()
        self.form = form
        self.act = nn.GELU("tanh") if form == "a module" else nn.SiLU()
        self.gate, self.up = nn.Linear(16, hidden), nn.Linear(16, hidden)
        self.packed = nn.Linear(16, 2 * hidden)
        self.down = nn.Linear(hidden, 16)

    def forward(self, x):
        if self.form == "functions":
            return self.down(self.up(x) * F.silu(self.gate(x)))
        if self.form == "a module":
            return self.down(self.act(self.gate(x)) * self.up(x))
        if self.form == "second half":
            up, gate = self.packed(x).chunk(2, dim=-1)
            return self.down(up * F.gelu(gate))
        if self.form == "first half":
            gate, up = torch.chunk(self.packed(x), 2, -1)
            return self.down(F.silu(gate) * up)
        if self.form == "other input":
            return self.down(F.silu(self.gate(x)) * self.up(x + 1))
        if self.form == "used twice":
            gate = self.gate(x)
            return self.down(F.silu(gate) * self.up(x) + gate)
        return self.down(F.silu(self.gate(x)) + self.up(x))


def test_modules_are_recognised_by_what_they_do():
    torch.manual_seed(0)
    forms = ("functions", "a module", "second half", "first half")
    model = nn.ModuleDict({form: Gated(form) for form in forms})
    model.update({"gelu": FunctionalGELU(), "rms": FunctionalRMSNorm()})
    model.update({"norm": OwnLayerNorm(16, bias=True), "no bias": OwnLayerNorm(16, bias=False)})
    expected = {name: module(X) for name, module in model.items()}
    report = gptfast.patch(model, ops=ALL)
    replaced = {name: op for name, op in outputs(report) if "." not in name}
    assert replaced == {
        **dict.fromkeys(forms, "glu"),
        "gelu": "gelu",
        "rms": "rms_norm",
        "norm": "layer_norm",
        "no bias": "layer_norm",
    }
    for name, module in model.items():
        torch.testing.assert_close(module(X), expected[name], msg=name)
    torch.testing.assert_close(model["norm"](input=X), expected["norm"])


def test_modules_that_only_look_alike():
    torch.manual_seed(0)
    forms = ("other input", "used twice", "a sum")
    model = nn.ModuleDict({form: Gated(form) for form in forms})
    leaves = {"scaled": Scaled(16, True), "mode": InTraining(), "count": Counts(), "data": OnData()}
    leaves["part"] = HalfABuffer()
    model.update(leaves)
    expected = {name: module(X) for name, module in model.items()}
    report = gptfast.patch(model, ops=ALL)
    assert outputs(report) == set()
    assert {name: reason.partition(":")[0] for name, reason in reasons(report).items()} == {
        "scaled": "its forward is more than one call of F.layer_norm",
        "mode": "its forward differs between training and evaluation",
        "count": "its forward writes to attributes or elements",
        "data": "its forward cannot be traced",
        "part": "its weight is computed",
    }
    assert model["count"].calls == 1
    for name, module in model.items():
        assert torch.equal(module(X), expected[name])


class Watched(Gated):
    """Does something that a graph does not show, in one of several ways."""

    def __init__(self, how):
        super().__init__("a module")
        self.how, self.seen, self.last, self.flag = how, [], None, True
        self.register_buffer("calls", torch.zeros(()))

    def keep(self, h):
        self.last = h
        return h


class Appends(Watched):
    def forward(self, x):
        h = self.act(self.gate(x))
        self.seen.append(h)
        return self.down(h * self.up(x))


class Keeps(Watched):
    def forward(self, x):
        return self.down(self.keep(self.act(self.gate(x)) * self.up(x)))


class CountsInABuffer(Watched):
    def forward(self, x):
        self.calls.add_(1)
        return self.down(self.act(self.gate(x)) * self.up(x))


class AddsToABuffer(Watched):
    def forward(self, x):
        calls = self.calls
        calls += 1
        return self.down(self.act(self.gate(x)) * self.up(x))


class WithoutGradients(Watched):
    def forward(self, x):
        with torch.no_grad():
            return self.down(self.act(self.gate(x)) * self.up(x))


class WithoutAutocast(Watched):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.down(self.act(self.gate(x)) * self.up(x))


class ByGradients(Watched):
    def forward(self, x):
        gate = self.gate(x) if torch.is_grad_enabled() else self.up(x)
        return self.down(self.act(gate) * self.up(x))


class FromItsFile(Watched):
    def forward(self, x):
        log(x)
        return self.down(self.act(self.gate(x)) * self.up(x))


class OfAnyInputs(Watched):
    def forward(self, *inputs):
        return self.down(self.act(self.gate(*inputs)) * self.up(*inputs))


LOGGED = []
log = LOGGED.append


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Appends, "its forward uses seen, which may do more than is seen"),
        (Keeps, "its forward uses keep, which may do more than is seen"),
        (CountsInABuffer, "its forward uses add_, which may do more than is seen"),
        (AddsToABuffer, "its forward changes tensors in place"),
        (WithoutGradients, "its forward uses no_grad, which may do more than is seen"),
        (WithoutAutocast, "its forward uses autocast, which may do more than is seen"),
        (ByGradients, "its forward uses is_grad_enabled, which may do more than is seen"),
        (FromItsFile, "its forward uses log, which may do more than is seen"),
        (OfAnyInputs, "its forward takes more than one input"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_a_graph_does_not_show_is_left_alone(cls, reason, dry_run):
    model = cls("")
    before = dict(vars(model))
    report = gptfast.patch(model, ops="glu", dry_run=dry_run)
    assert outputs(report) == set()
    assert reasons(report) == {"": reason}
    assert vars(model) == before
    assert (model.seen, model.last, model.calls.item(), LOGGED) == ([], None, 0, [])


class Helped(Watched):
    def forward(self, x):
        return self.down(self.helper.act(x) * F.silu(self.gate(x)))


class Helper(nn.Module):
    def act(self, x):
        raise AssertionError("called by patch")


def test_a_method_of_a_submodule_is_not_run():
    model = Helped("")
    model.helper, model.packed = Helper(), None
    report = gptfast.patch(model, ops="glu")
    assert reasons(report) == {"": "its forward uses act, which may do more than is seen"}


class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16)), None
        self.eps = 1e-5

    def forward(self, x):
        return F.layer_norm(x, (16,), self.weight, self.bias, self.eps)


class EpsByBias(OwnNorm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x):
        if self.bias is None:
            return F.layer_norm(x, (16,), self.weight, None, 0.5)
        return F.layer_norm(x, (16,), self.weight, self.bias)


class MaybeDropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(16, 16) for _ in range(3))
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        y = F.silu(self.gate(x)) * self.up(x)
        if self.drop is not None:
            y = self.drop(y)
        return self.down(y)


@pytest.mark.parametrize(("kind", "name"), [(EpsByBias, "bias"), (MaybeDropped, "drop")])
def test_what_is_gone_since_is_missed(kind, name):
    torch.manual_seed(0)
    model = kind()
    report = gptfast.patch(model, ops=ALL)
    assert len(report.replaced) == 1
    setattr(model, name, None)
    y = model(X)
    assert report.fallbacks.total() == 1
    gptfast.unpatch(model)
    assert torch.equal(y, model(X))


def test_what_was_changed_since_is_seen():
    torch.manual_seed(0)
    changes = [
        (OwnNorm(), "eps", 1.0, "its eps was changed"),
        (OwnNorm(), "bias", nn.Parameter(torch.randn(16)), "its bias was changed"),
        (Gated("a module"), "act", nn.ReLU(), "the activation was changed"),
        (Gated("a module"), "act", nn.GELU(), "the activation was changed"),
        (Gated("a module"), "form", "functions", "its form was changed"),
        (Gated("a module"), "up", nn.Linear(16, 24), None),
    ]
    for module, name, value, reason in changes:
        report = gptfast.patch(module, ops=["layer_norm", "glu"])
        assert len(report.replaced) == 1
        module(X)
        assert not report.fallbacks
        setattr(module, name, value)
        y = module(X)
        assert [key[1] for key in report.fallbacks] == ([] if reason is None else [reason])
        gptfast.unpatch(module)
        torch.testing.assert_close(y, module(X))
    module = Gated("functions")
    gptfast.patch(module, ops="glu")
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        module(X, X)


def test_a_hook_on_the_activation_is_called():
    model = Gated("a module")
    report = gptfast.patch(model, ops="glu")
    assert outputs(report) == {("", "glu")}
    seen = []
    model.act.register_forward_hook(lambda *args: seen.append(1))
    model(X)
    assert seen == [1]
    assert report.fallbacks == {("glu", "the activation has hooks"): 1}


# ---- Attention by torch's function ---------------------------------------------------------------


def qkv(T, S, H=4, H_kv=4, D=8, Dv=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T + S)
    shapes = ((2, H, T, D), (2, H_kv, S, D), (2, H_kv, S, Dv))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(
    "given",
    [
        *({"T": T, "S": S, "is_causal": c} for T, S in ((6, 6), (3, 7), (7, 3)) for c in (0, 1)),
        {"T": 5, "S": 5, "H_kv": 2, "enable_gqa": True, "is_causal": True},
        {"T": 5, "S": 9, "Dv": 12, "scale": 0.3},
        {"T": 9, "S": 4, "H_kv": 1, "enable_gqa": True, "is_causal": True},
        {"T": 6, "S": 6, "dims": 3, "is_causal": True},
    ],
    ids=str,
)
def test_sdpa_is_torchs(given):
    options = {k: v for k, v in given.items() if k in ("scale", "enable_gqa")}
    options["is_causal"] = bool(given.get("is_causal", False))
    inputs = qkv(
        *(given.get(k, d) for k, d in zip("TS", (0, 0), strict=True)),
        **{k: v for k, v in given.items() if k in ("H_kv", "Dv")},
    )
    if given.get("dims") == 3:
        inputs = [x.detach()[:, 0].clone().requires_grad_() for x in inputs]

    def run(function, dtype=torch.float32, **more):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        o = function(*leaves, **options, **more)
        dy = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [o, *torch.autograd.grad(o, leaves, dy)]

    taken = []
    ours = run(sdpa, count=taken.append)
    assert taken == []
    peer = run(F.scaled_dot_product_attention)
    exact = run(F.scaled_dot_product_attention, torch.float64)
    for name, *values in zip(("o", "dq", "dk", "dv"), ours, peer, exact, strict=True):
        assert_close_in_norm(name, *values)


MASK = torch.ones(6, 6).tril().bool()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attn_mask": MASK}, "attn_mask"),
        ({"attn_mask": torch.zeros(6, 6).masked_fill(~MASK, -torch.inf)}, "attn_mask"),
        ({"dtype": torch.float64}, "dtypes torch.float64, torch.float64, torch.float64"),
        ({"dropout_p": 1.0}, "sizes of zero, or an argument out of range"),
        ({"batch": 1}, "shapes that are broadcast"),
        ({"dims": 5}, "5 dimensions"),
    ],
    ids=str,
)
def test_what_sdpa_gives_to_torch(options, reason):
    q, k, v = (x.detach() for x in qkv(6, 6, dtype=options.pop("dtype", torch.float32)))
    if options.pop("batch", None):
        k, v = k[:1], v[:1]
    if options.pop("dims", None):
        q, k, v = (x[None] for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    with gptfast.sdpa_override() as overridden:
        o = F.scaled_dot_product_attention(q, k, v, **options)
    assert torch.equal(o, expected)
    assert overridden.fallbacks == {reason: 1}


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, q, k, v):
        attend, again = F.scaled_dot_product_attention, {"use_reentrant": self.use_reentrant}
        return checkpoint(attend, q, k, v, None, 0.5, True, **again) + attend(q, k, v)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_in_a_forward_finds_the_same_function_again(use_reentrant):
    model, results = Checkpointed(use_reentrant), []
    for _ in range(2):
        torch.manual_seed(0)
        inputs = qkv(6, 6)
        with gptfast.testing.record_calls() as recorded:
            o = model(*inputs)
            o.square().sum().backward()
        results.append([o, *(x.grad for x in inputs)])
        report = gptfast.patch(model, ops=ALL)
    assert outputs(report) == set()
    assert len(recorded.calls) == 2  # forward and backward of the call that it makes itself
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_in_a_patched_forward_stays_in_the_block_around(use_reentrant):
    torch.manual_seed(0)
    model, (q, k, v) = Checkpointed(use_reentrant), qkv(6, 6)
    gptfast.patch(model, ops=ALL)
    with gptfast.sdpa_override():
        loss = model(q, k, v).sum()
        loss.backward()
    # A sum of values, whose weights are the gradient: of the same dropout, or they differ.
    torch.testing.assert_close((v.grad * v).sum(), loss)


def test_a_function_of_somebody_else_stays(monkeypatch):
    model, inputs = OwnAttention(), qkv(6, 6)
    report = gptfast.patch(model, ops=ALL)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *rest, **more: 0 * q)
    assert not model(*inputs).any()
    assert dict(report.fallbacks) == {
        ("attention", "F.scaled_dot_product_attention is somebody else's"): 1
    }


def test_threads_share_an_override():
    shared, entered, left = gptfast.sdpa_override(), threading.Event(), threading.Event()
    open_after = []

    def users():
        return functions._active.users.get("scaled_dot_product_attention", ())

    def other():
        with shared:
            entered.set()
            left.wait(10)
        open_after.append(users())

    thread = threading.Thread(target=other)
    with shared:
        thread.start()
        assert entered.wait(10)
    open_after.append(users())
    left.set()
    thread.join()
    assert open_after == [(), ()]
    assert F.scaled_dot_product_attention is functions.ORIGINALS["scaled_dot_product_attention"]


class OwnAttention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Both(nn.Module):
    def forward(self, x, targets):
        q = x[None, None]
        return F.cross_entropy(F.scaled_dot_product_attention(q, q, q)[0, 0], targets)


def test_a_second_function_of_a_forward_is_listed():
    report = gptfast.patch(Both(), ops=ALL)
    assert outputs(report) == {("", "attention")}
    assert [(entry.op, entry.reason) for entry in report.left] == [
        ("cross_entropy", "its attention is replaced, and one op of a module can be")
    ]


def test_dropout_of_sdpa():
    q, k = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    v = torch.ones(1, 1, 64, 8)
    torch.manual_seed(0)
    o = sdpa(q, k, v, dropout_p=0.25)
    # A mean of 64^2 factors, 0 or 4/3: their standard deviation is 0.58.
    assert o.mean().item() == pytest.approx(1, abs=5 * 0.58 / 64)
    assert o.std() > 0


def test_the_override_is_this_threads_and_ends():
    original = F.scaled_dot_product_attention
    q, k, v = (x.detach() for x in qkv(6, 6))
    seen = {}

    def elsewhere():
        with gptfast.testing.record_calls() as recorded:
            F.scaled_dot_product_attention(q, k, v)
        seen["there"] = len(recorded.calls)

    with gptfast.sdpa_override():
        with gptfast.sdpa_override(), gptfast.testing.record_calls() as recorded:
            F.scaled_dot_product_attention(query=q, key=k, value=v)
        seen["here"] = len(recorded.calls)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert F.scaled_dot_product_attention is not original
    assert seen == {"here": 1, "there": 0}
    assert F.scaled_dot_product_attention is original
    with pytest.raises(ZeroDivisionError), gptfast.sdpa_override():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is original


def test_what_somebody_puts_back_later_is_the_original(monkeypatch):
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", original)  # puts it back at the end
    q, k, v = (x.detach() for x in qkv(6, 6))
    for wrapped in (False, True):
        with gptfast.sdpa_override():
            seen = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = lambda *args: original(*args)
        F.scaled_dot_product_attention = (lambda *args, f=seen: f(*args)) if wrapped else seen
        for _ in range(2):
            assert torch.equal(F.scaled_dot_product_attention(q, k, v), original(q, k, v))
            with gptfast.sdpa_override(), gptfast.testing.record_calls() as recorded:
                F.scaled_dot_product_attention(q, k, v)
            assert len(recorded.calls) == 1


def test_compiled_code_keeps_the_original():
    graphs = []

    def look(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(
        lambda *args: F.scaled_dot_product_attention(*args), backend=look, fullgraph=True
    )
    with gptfast.sdpa_override():
        compiled(*qkv(6, 6))
    assert graphs == [[F.scaled_dot_product_attention]]


def test_many_threads_override_at_once():
    original = F.scaled_dot_product_attention
    q, k, v = (x.detach() for x in qkv(6, 6))
    expected = {True: sdpa(q, k, v), False: original(q, k, v)}
    wrong = []

    def work(overrides):
        for _ in range(50):
            if overrides:
                with gptfast.sdpa_override():
                    o = F.scaled_dot_product_attention(q, k, v)
            else:
                o = F.scaled_dot_product_attention(q, k, v)
            if not torch.equal(o, expected[overrides]):
                wrong.append(overrides)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert F.scaled_dot_product_attention is original


def test_the_override_decorates():
    @gptfast.sdpa_override()
    def function(*inputs):
        return F.scaled_dot_product_attention(*inputs)

    inputs = [x.detach() for x in qkv(6, 6)]
    with gptfast.testing.record_calls() as recorded:
        function(*inputs)
        function(*inputs)
    assert len(recorded.calls) == 2


# ---- nn.MultiheadAttention -----------------------------------------------------------------------


CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, None),
        ({"attn_mask": CAUSAL, "is_causal": True}, None),
        ({"cross": 4}, None),
        ({"cross": 4, "attn_mask": torch.zeros(7, 4)}, "attn_mask that is not said to be causal"),
        ({"need_weights": True}, "need_weights"),
        ({"padding": True}, "key_padding_mask"),
        ({"unbatched": True}, "query of shape (7, 16)"),
    ],
    ids=str,
)
def test_multihead_attention(given, reason, bias, batch_first):
    torch.manual_seed(0)
    attn = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first)
    x = torch.randn((2, 7, 16) if batch_first else (7, 2, 16))
    given = dict(given)
    memory = torch.randn((2, 4, 16) if batch_first else (4, 2, 16)) if "cross" in given else x
    if given.pop("unbatched", False):
        x = memory = torch.randn(7, 16)
    given.pop("cross", None)
    if given.pop("padding", False):
        given["key_padding_mask"] = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
    given.setdefault("need_weights", False)

    def run(dtype):
        attn.to(dtype)
        query = x.to(dtype).requires_grad_()
        key = query if memory is x else memory.to(dtype)
        mask = given.get("attn_mask")
        options = given if mask is None else {**given, "attn_mask": mask.to(dtype)}
        y, weights = attn(query, key, key, **options)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [y, *torch.autograd.grad(y, [query, *attn.parameters()], dy)], weights

    exact, _ = run(torch.float64)
    peer, weights = run(torch.float32)
    report = gptfast.patch(attn, ops=ALL)
    ours, ours_weights = run(torch.float32)
    for i, values in enumerate(zip(ours, peer, exact, strict=True)):
        assert_close_in_norm(str(i), *values)
    assert report.fallbacks == ({} if reason is None else {("attention", reason): 1})
    assert (weights is None) == (ours_weights is None)


@pytest.mark.parametrize("options", [{"kdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_multihead_attention_of_other_kinds(options):
    report = gptfast.patch(nn.MultiheadAttention(16, 4, **options), ops=ALL)
    assert report.replaced == []
    assert reasons(report)[""].split()[0] in ("kdim", "add_bias_kv")


def test_dropout_of_everything_in_multihead_attention():
    attn = nn.MultiheadAttention(16, 4, dropout=1.0, batch_first=True)
    report = gptfast.patch(attn, ops=ALL)
    y, _ = attn(X, X, X, need_weights=False)
    assert torch.equal(y, attn.out_proj.bias.expand_as(y))
    assert report.fallbacks == {("attention", "dropout of 1.0"): 1}


def test_dropout_in_multihead_attention():
    attn = nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True)
    gptfast.patch(attn, ops=ALL)
    a, b = (attn(X, X, X, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(a, b)
    attn.eval()
    a, b = (attn(X, X, X, need_weights=False)[0] for _ in range(2))
    assert torch.equal(a, b)


# ---- Losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (6, 11)),
        ({"ignore_index": 3, "label_smoothing": 0.1}, (6, 11)),
        ({"weight": torch.linspace(0.5, 1.5, 11), "reduction": "sum"}, (2, 11, 5)),
        ({"reduction": "none"}, (6, 11)),
    ],
    ids=str,
)
def test_cross_entropy_loss(options, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(dtype)
    target = torch.randint(11, (shape[0], *shape[2:]), generator=generator)

    def run(dtype):
        loss = nn.CrossEntropyLoss(**options).to(dtype)
        report = gptfast.patch(loss, ops=ALL) if patched else None
        leaf = logits.to(dtype).requires_grad_()
        value = loss(leaf, target)
        return value, torch.autograd.grad(value.sum(), leaf)[0], report

    patched = False
    exact, peer = run(torch.float64), run(dtype)
    patched = True
    ours = run(dtype)
    assert ours[0].dtype == dtype
    assert outputs(ours[2]) == {("", "cross_entropy")}
    assert_close_in_norm("loss", ours[0], peer[0], exact[0])
    assert_close_in_norm("dlogits", ours[1], peer[1], exact[1])


def test_class_probabilities_go_to_the_original():
    loss, logits, target = nn.CrossEntropyLoss(), torch.randn(4, 7), torch.rand(4, 7)
    expected = loss(logits, target)
    report = gptfast.patch(loss, ops=ALL)
    assert torch.equal(loss(logits, target), expected)
    assert report.fallbacks == {("cross_entropy", "targets in torch.float32"): 1}


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="came with PyTorch 2.13")
def test_linear_cross_entropy_loss():
    torch.manual_seed(0)
    head, target = nn.LinearCrossEntropyLoss(16, 11, bias=True), torch.randint(11, (5,))
    target[2] = -100
    results = []
    for dtype in (torch.float64, torch.float32, torch.float32):
        head.to(dtype)
        x = X[0].to(dtype).requires_grad_()
        loss = head(x, target)
        results.append([loss, *torch.autograd.grad(loss, [x, *head.parameters()])])
        if len(results) == 2:
            assert outputs(gptfast.patch(head, ops=ALL)) == {("", "linear_cross_entropy")}
    for exact, peer, ours in zip(*results, strict=True):
        assert_close_in_norm("loss or gradient", ours, peer, exact)


# ---- Whole models --------------------------------------------------------------------------------


def results(model, idx, targets):
    logits, loss = model(idx, targets)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return {"logits": logits, "loss": loss, **dict(zip(names, gradients, strict=True))}


def tokens(B=2, T=33, V=67):
    idx = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))
    return idx[:, :-1], idx[:, 1:].contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_logits_and_gradients_of_a_model(name, dtype):
    torch.manual_seed(0)
    model = PLAIN[name](Sizes()).to(dtype)
    exact = results(copy.deepcopy(model).double(), *tokens())
    peer = results(model, *tokens())
    report = gptfast.patch(model, ops=ALL)
    ours = results(model, *tokens())
    assert {entry.op for entry in report.replaced} >= {"attention", "cross_entropy"}
    assert report.left == []
    assert not report.fallbacks
    for key, value in ours.items():
        assert value.dtype == peer[key].dtype
        assert_close_in_norm(key, value, peer[key], exact[key])
    gptfast.unpatch(model)
    for key, value in results(model, *tokens()).items():
        assert torch.equal(value, peer[key]), key


def losses_of_training(model, steps=32):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(steps):
        start = torch.randint(67, (4, 1), generator=generator)
        idx = (start + 5 * torch.arange(33)) % 67  # something to learn
        loss = model(idx[:, :-1], idx[:, 1:].contiguous())[1]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", PLAIN)
def test_the_same_losses_in_training(name):
    torch.manual_seed(0)
    model = PLAIN[name](Sizes())
    peer = losses_of_training(copy.deepcopy(model))
    gptfast.patch(model, ops=ALL)
    ours = losses_of_training(model)
    assert peer[-1] < 0.8 * peer[0]
    # 32 steps of AdamW on gradients that differ by fp32's rounding.
    assert ours == pytest.approx(peer, rel=1e-4)
