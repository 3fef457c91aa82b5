"""transformers' models patched: the same logits, gradients, losses and texts as before."""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import gptfast  # noqa: E402
from benchmarks.huggingface_models import CAUSAL, CONFIGS, new_batch, new_model  # noqa: E402
from gptfast.integrations import huggingface_attention as hf_attention  # noqa: E402
from gptfast.integrations.huggingface_recipes import next_token_loss  # noqa: E402
from gptfast.patching import OPS  # noqa: E402
from gptfast.testing import assert_close_in_norm, record_calls  # noqa: E402
from gptfast.testing.judge import unit_roundoff  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def patched(model):
    """A patched copy, every op forced: sizes this small are worth nothing."""
    model = copy.deepcopy(model)
    gptfast.patch(model, ops=OPS)
    return model


def logits_and_gradients(model, batch):
    """Logits in evaluation at the tokens that count, then every gradient of a training step."""
    model.eval()
    with torch.no_grad():
        logits = model(**{n: x for n, x in batch.items() if n != "labels"}).logits
    if "attention_mask" in batch:
        logits = logits[batch["attention_mask"].bool()]
    model.train()
    loss = model(**batch).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, "loss": loss.detach(), **gradients}


def to_dtype(batch, dtype):
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in batch.items()}


def assert_as_good(results, unpatched, exact):
    assert results.keys() == unpatched.keys() == exact.keys()
    # A loss may be right by luck; it moves by at most twice as much as the logits do.
    logits_move = (unpatched["logits"].double() - exact["logits"]).abs().max()
    loss, least = exact.pop("loss"), 4 * unit_roundoff(torch.float32)
    assert (results.pop("loss") - loss).abs() <= 2 * logits_move + least * loss
    for name, x in results.items():
        assert x.dtype == unpatched[name].dtype, name
        assert_close_in_norm(name, x, unpatched[name], exact[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_gradients(family, dtype):
    model, batch = new_model(family).to(dtype), to_dtype(new_batch(family), dtype)
    ours = patched(model)
    exact = copy.deepcopy(model).double()
    results = logits_and_gradients(ours, batch)
    exact_results = logits_and_gradients(exact, to_dtype(batch, torch.float64))
    assert_as_good(results, logits_and_gradients(model, batch), exact_results)
    assert not gptfast.unpatch(ours).left


@pytest.mark.parametrize("family", CONFIGS)
def test_everything_of_a_family_is_replaced(family):
    model = new_model(family)
    report = gptfast.patch(model, ops=OPS)
    ops = {entry.op for entry in report.replaced}
    norms = {"layer_norm"} if family in ("gpt2", "gpt_neox", "opt", "phi", "bert", "vit") else None
    expected = {"attention"} | (norms or {"rms_norm", "glu"})
    if family in CAUSAL:
        expected.add("linear_cross_entropy")
    if family in ("gpt2", "gpt_neox", "phi", "bert", "vit"):
        expected.add("gelu")
    assert expected <= ops
    assert model.config._attn_implementation.startswith("gptfast")
    for training in (True, False):
        output = model.train(training)(**new_batch(family))
        assert ("logits" in output) == (not (family in CAUSAL and training))
    assert not report.fallbacks, report


def losses(model, steps=32):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    family = model.config.model_type.removesuffix("_text")
    dtype = next(model.parameters()).dtype
    curve = []
    for step in range(steps):
        loss = model(**to_dtype(new_batch(family, seed=step % 4), dtype)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_same_loss_curve(family):
    """Rounding errors grow along a curve: the unpatched one shows by how much."""
    model = new_model(family)
    ours, exact = patched(model), copy.deepcopy(model).double()
    ours, theirs, exact = losses(ours), losses(model), losses(exact)
    bound = 3 * (theirs - exact).abs().max() + unit_roundoff(torch.float32) * exact.abs().max()
    assert (ours - exact).abs().max() <= bound
    assert exact[-4:].mean() < exact[:4].mean()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_text(family, cache):
    model = new_model(family).eval()
    ours = patched(model)
    ids = torch.randint(3, 67, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7) >= torch.tensor([0, 2, 4])[:, None]
    ids = ids.masked_fill(~mask, 0)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    if cache == "static":
        options["cache_implementation"] = "static"
    for rows in (slice(None), slice(1)):  # padded on the left, and not padded
        given = {"input_ids": ids[rows], "attention_mask": mask[rows].long()}
        hf_attention.FALLBACKS.clear()
        assert torch.equal(ours.generate(**given, **options), model.generate(**given, **options))
        prompt = {HIDDEN_FROM_EAGER: 2} if family == "gemma2" and len(ids[rows]) > 1 else {}
        assert dict(hf_attention.FALLBACKS) == prompt


@pytest.mark.parametrize("family", CONFIGS)
def test_unpatch_restores_every_bit(family):
    model, batch = new_model(family).eval(), new_batch(family)
    before, keys = model(**batch).logits, list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    implementation = model.config._attn_implementation
    gptfast.patch(model, ops=OPS)
    model(**batch)
    assert list(model.state_dict()) == keys
    assert pickle.loads(pickle.dumps(model))(**batch).logits.equal(model(**batch).logits)
    gptfast.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**batch).logits, before)
    assert "gptfast" not in "".join(k for m in model.modules() for k in vars(m))


def test_a_patched_model_is_saved_as_the_original(tmp_path):
    model = new_model("llama").eval()
    gptfast.patch(model, ops=OPS)
    model.save_pretrained(tmp_path)
    assert "gptfast" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    gptfast.unpatch(model)
    batch = new_batch("llama")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


# ---- Which modules run ours: the choice of attention is a config's -------------------------------


def attention_calls(model, family="llama"):
    """How many layers of a model, of which only attention is patched, run ours."""
    with torch.no_grad(), record_calls() as recorded:
        model(**new_batch(family, padded=False))
    return len(recorded.calls)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_two_models_with_one_config(family):
    first = new_model(family).eval()
    before, config = first.config._attn_implementation, first.config
    second = transformers.AutoModelForCausalLM.from_config(config).eval()
    batch = new_batch("llama")  # padded
    expected = second(**batch).logits
    gptfast.patch(first, ops="attention")
    assert [attention_calls(m, family) for m in (first, second)] == [2, 0]
    assert torch.equal(second(**batch).logits, expected)
    third = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    assert attention_calls(third, family) == 0
    gptfast.patch(second, ops="attention")
    gptfast.unpatch(first)
    assert [attention_calls(m, family) for m in (first, second)] == [0, 2]
    gptfast.unpatch(second)
    assert config._attn_implementation == before


def test_one_layer_alone():
    model = new_model("llama").eval()
    layers = model.model.layers
    gptfast.patch(layers[0], ops="attention")
    assert attention_calls(model) == 1
    copied = copy.deepcopy(model)
    gptfast.unpatch(model)
    assert [attention_calls(m) for m in (model, copied)] == [0, 1]
    gptfast.patch(copied.model.layers[1], ops="attention")
    gptfast.unpatch(copied.model.layers[0])
    assert attention_calls(copied) == 1
    layers[1].self_attn.forward = layers[1].self_attn.forward
    report = gptfast.patch(model, ops="attention")
    assert [entry.name for entry in report.left] == ["model.layers.1.self_attn"]
    assert attention_calls(model) == 1


def test_what_the_user_chooses_after_the_patch_stays():
    model = new_model("llama")
    gptfast.patch(model, ops="attention")
    model.set_attn_implementation("eager")
    gptfast.unpatch(model)
    assert model.config._attn_implementation == "eager"


def test_a_pickled_model_makes_ours_known_to_transformers(monkeypatch):
    model = patched(new_model("llama")).eval()
    pickled, expected = pickle.dumps(model), model(**new_batch("llama")).logits
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        theirs = {name: f for name, f in interface._global_mapping.items() if "gptfast" not in name}
        monkeypatch.setattr(interface, "_global_mapping", theirs)
    assert torch.equal(pickle.loads(pickled)(**new_batch("llama")).logits, expected)


@pytest.mark.slow  # 8 s: it imports torch and transformers again
def test_a_pickled_model_runs_in_a_fresh_process(tmp_path):
    model = patched(new_model("llama")).eval()
    batch = new_batch("llama")
    torch.save((model, batch, model(**batch).logits), tmp_path / "model.pt")
    script = """
import sys, torch
torch.set_num_threads(1)
model, batch, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(**batch).logits, expected)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True)


# ---- The loss head -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_logits_in_training_are_made_when_they_are_read(family):
    model, batch = new_model(family), new_batch(family)
    expected = model(**batch)
    gptfast.patch(model, ops="linear_cross_entropy")
    out = model(**batch)
    assert out["loss"] is out[0] is out.loss
    assert "logits" not in out  # nobody has read them
    assert isinstance(out, type(expected))
    torch.testing.assert_close(out.logits, expected.logits)
    assert list(out) == list(expected)
    assert out[1] is out["logits"] is out.logits
    torch.testing.assert_close(model(**batch)[:2], expected[:2])
    copied = pickle.loads(pickle.dumps(model(**batch)))
    assert type(copied) is type(expected)
    torch.testing.assert_close(copied.logits, expected.logits)
    assert isinstance(model(**batch, return_dict=False), tuple)
    model.eval()
    assert model(**batch).keys() == expected.keys()


def test_logits_of_weights_that_have_changed_since_are_refused():
    model, batch = patched(new_model("llama")), new_batch("llama")
    out, early = model(**batch), model(**batch)
    logits = early.logits
    out.loss.backward()
    torch.optim.AdamW(model.parameters()).step()
    with pytest.raises(RuntimeError, match="before the head's weights are written to"):
        _ = out.logits
    assert early.logits is logits


def test_logits_are_made_in_the_autocast_of_the_forward():
    model, batch = new_model("llama"), new_batch("llama")
    gptfast.patch(model, ops="linear_cross_entropy")
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    assert out.logits.dtype == torch.bfloat16


def test_logits_have_the_grad_mode_of_the_forward():
    model, batch = new_model("llama"), new_batch("llama")
    ours = copy.deepcopy(model)
    gptfast.patch(ours, ops="linear_cross_entropy")
    gradients = []
    for m in (ours, model):
        out = m(**batch)
        with torch.no_grad():
            out.logits.argmax(-1)
        (out.loss + out.logits.square().mean()).backward()
        gradients.append([p.grad for p in m.parameters()])
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        out = ours(**batch)
    assert not out.logits.requires_grad
    with torch.inference_mode():
        out = ours(**batch)
    assert out.logits.is_inference()
    out = ours(**batch)
    with torch.inference_mode():
        assert not out.logits.is_inference()
    with torch.inference_mode():
        loaded = copy.deepcopy(ours).requires_grad_(False)
    out = loaded(**batch)
    torch.testing.assert_close(out.logits, model(**batch).logits.detach())


@pytest.mark.parametrize("write", ["parameter", "data"])
def test_logits_of_weights_that_were_replaced_are_refused(write):
    model, batch = patched(new_model("llama")), new_batch("llama")
    out = model(**batch)
    if write == "parameter":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    else:
        model.lm_head.weight.data = model.lm_head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="before the head's weights are written to"):
        _ = out.logits
    assert repr(out).startswith("CausalLMOutputWithPast(loss=")


def test_logits_as_any_other_value_of_the_output():
    model, batch = patched(new_model("gpt2")), new_batch("gpt2")
    out = model(**batch)
    assert "logits" not in repr(out)
    assert out.get("nothing", 3) == 3
    assert out.get("loss") is out.loss
    assert out.get("logits") is out["logits"] is out.logits
    assert "logits=tensor" in repr(out)
    out, given = model(**batch), torch.zeros(3)
    out.logits = given
    assert out[1] is out.logits is given
    assert list(out)[:2] == ["loss", "logits"]


def test_a_patched_head_keeps_the_signature():
    model = new_model("gpt2")
    original = inspect.signature(model.forward)
    gptfast.patch(model, ops="linear_cross_entropy")
    assert inspect.signature(model.forward) == original
    assert inspect.signature(type(model).forward).parameters["self"]


def test_a_head_of_its_own_is_left_to_the_original():
    model, batch = new_model("llama"), new_batch("llama")
    report = gptfast.patch(model, ops="linear_cross_entropy")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert model(**batch).logits is not None
    assert sum(report.fallbacks.values()) == 1


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(11)], ids=["mean", "int", "tensor"])
def test_next_token_loss(num_items, softcap):
    from transformers.loss.loss_utils import ForCausalLMLoss

    hidden, weight = torch.randn(2, 9, 16), torch.randn(31, 16)
    labels = torch.randint(31, (2, 9))
    labels[0, 4:] = -100
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    options = {"num_items_in_batch": num_items}
    expected = ForCausalLMLoss(logits, labels, 31, **options)
    torch.testing.assert_close(
        next_token_loss(hidden, weight, labels, softcap=softcap, **options), expected
    )
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    given = next_token_loss(hidden, weight, None, softcap=softcap, shift_labels=shifted, **options)
    torch.testing.assert_close(given, expected)


# ---- With Trainer, PEFT, accelerate, checkpoints -------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Rows whose numbers of labels differ, so that accumulated means are not means."""

    def __init__(self):
        self.rows = [
            {n: x[i] for n, x in new_batch("gpt2", B=4, seed=seed).items()}
            for seed in range(4)
            for i in range(4)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def trained(model, folder, **changes):
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
        **changes,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    curve = torch.tensor([x["loss"] for x in trainer.state.log_history if "loss" in x])
    return trainer, curve


def assert_same_curve(ours, theirs):
    # Four steps, logged with four digits after the point.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = new_model("gpt2")
    ours = patched(model)
    trainer, curve = trained(ours, tmp_path)
    assert_same_curve(curve, trained(model, tmp_path)[1])
    assert trainer.evaluate()["eval_loss"] > 0
    predictions = trainer.predict(Rows()).predictions
    assert predictions.shape == (16, 12, 67)


def test_trainer_with_gradient_checkpointing(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = new_model("llama")
    options = {"gradient_checkpointing": True}
    curve = trained(patched(model), tmp_path, **options)[1]
    assert_same_curve(curve, trained(model, tmp_path)[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    """Also with dropout: what is computed again must drop the same."""
    model = patched(new_model("gpt2", attn_pdrop=0.3))
    batch = new_batch("gpt2")
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(2)
        hf_attention.FALLBACKS.clear()
        model(**batch).loss.backward()
        assert not hf_attention.FALLBACKS
        gradients.append([p.grad.clone() for p in model.parameters()])
    for kept, computed_again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, computed_again)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peft_lora(family):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    target = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "gate_proj", "down_proj"]}[family]
    config = peft.LoraConfig(
        r=4, target_modules=target, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"
    )

    def with_adapters(model):
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config).train()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        return model

    batch = new_batch(family)
    original = new_model(family)
    first = with_adapters(patched(original))  # patched, then adapted
    second = with_adapters(copy.deepcopy(original))
    gptfast.patch(second, ops=OPS)  # adapted, then patched
    exact = with_adapters(copy.deepcopy(original)).double()
    exact = logits_and_gradients(exact, batch)
    theirs = logits_and_gradients(with_adapters(original), batch)
    for model in (first, second):
        assert "logits" not in model(**batch)
        assert_as_good(logits_and_gradients(model, batch), theirs, exact.copy())


def test_accelerate_with_mixed_precision():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = new_model("llama")
    ours, exact = patched(model), copy.deepcopy(model).double()
    batch = new_batch("llama")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # Trainer has set it
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    output = accelerator.prepare(ours)(**batch)  # a copy, in float32
    assert output[0] is output.loss
    for read in (lambda: output.logits, lambda: output["logits"], lambda: output[1]):
        with pytest.raises(AttributeError, match="patch without linear_cross_entropy"):
            read()
    results = [logits_and_gradients(accelerator.prepare(m), batch) for m in (ours, model)]
    assert_as_good(*results, logits_and_gradients(exact, batch))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_compiles_without_a_break(family):
    model = new_model(family)
    ours = patched(model)
    batch = new_batch(family, padded=False)  # a mask's values cannot be read while compiling
    exact = logits_and_gradients(copy.deepcopy(model).double(), batch)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    results = {
        name.removeprefix("_orig_mod."): x
        for name, x in logits_and_gradients(compiled, batch).items()
    }
    assert_as_good(results, logits_and_gradients(model, batch), exact)


# ---- Attention -----------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """What transformers' attention functions read of a layer."""

    def __init__(self, groups=2, is_causal=True):
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = is_causal


def masks(kind, **sizes):
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        sdpa_mask,
        sliding_window_causal_mask_function,
    )

    functions = {
        "causal": causal_mask_function,
        "window": sliding_window_causal_mask_function(5),
        "bidirectional": bidirectional_mask_function,
    }
    sizes = {
        "mask_function": functions[kind],
        "batch_size": 3,
        "allow_is_causal_skip": False,
    } | sizes
    return hf_attention.prepare_mask(**sizes), sdpa_mask(**sizes)


PADDED_ON_THE_RIGHT = "padding on the right, with causality or a window"
HIDDEN_FROM_EAGER = "queries on padding, which eager attention lets see every key alike"


def padding(S, starts=(0, 0, 0), ends=None):
    j = torch.arange(S)
    ends = (S,) * 3 if ends is None else ends
    return (j >= torch.tensor(starts)[:, None]) & (j < torch.tensor(ends)[:, None])


CALLS = {
    "causal": ("causal", {"q_length": 20, "kv_length": 20}),
    "window": ("window", {"q_length": 20, "kv_length": 20}),
    "left": (
        "causal",
        {"q_length": 20, "kv_length": 20, "attention_mask": padding(20, (0, 3, 20))},
    ),
    "left, window": (
        "window",
        {"q_length": 20, "kv_length": 20, "attention_mask": padding(20, (0, 3, 11))},
    ),
    "decode": ("causal", {"q_length": 1, "q_offset": 22, "kv_length": 23}),
    "decode, window": ("window", {"q_length": 1, "q_offset": 22, "kv_length": 23}),
    "decode, left": (
        "causal",
        {
            "q_length": 1,
            "q_offset": 22,
            "kv_length": 23,
            "attention_mask": padding(23, (0, 4, 22)),
        },
    ),
    "chunk": ("causal", {"q_length": 18, "q_offset": 5, "kv_length": 23}),
    "chunk, left": (
        "causal",
        {
            "q_length": 18,
            "q_offset": 5,
            "kv_length": 23,
            "attention_mask": padding(23, (0, 4, 9)),
        },
    ),
    "sliding cache": ("window", {"q_length": 2, "q_offset": 30, "kv_length": 6, "kv_offset": 26}),
    "static prefill": ("causal", {"q_length": 20, "kv_length": 32}),
    "static": ("causal", {"q_length": 1, "q_offset": torch.tensor(22), "kv_length": 32}),
    "static, left": (
        "causal",
        {
            "q_length": 3,
            "q_offset": torch.tensor(20),
            "kv_length": 32,
            "attention_mask": padding(23, (0, 4, 9)),
        },
    ),
    "bidirectional": (
        "bidirectional",
        {"q_length": 20, "kv_length": 20, "attention_mask": padding(20, (0, 3, 0), (20, 20, 14))},
    ),
    "cross": (
        "bidirectional",
        {"q_length": 7, "kv_length": 20, "attention_mask": padding(20, (0, 3, 0), (20, 20, 14))},
    ),
}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", CALLS)
def test_attention_takes_what_a_mask_says(name, softcap):
    kind, sizes = CALLS[name]
    mask, dense = masks(kind, **sizes)
    plan = hf_attention.plan_of(mask)
    assert isinstance(plan, hf_attention.Plan), plan
    torch.manual_seed(0)
    T, S = sizes["q_length"], sizes["kv_length"]
    q = torch.randn(3, T, 4, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(3, 2, S, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    # Queries in padding may attend to anything; so may those that see nothing.
    real = dense.any(-1)[:, 0]
    if "attention_mask" in sizes and kind != "bidirectional":
        start = int(sizes.get("q_offset", 0)) - sizes.get("kv_offset", 0)
        real &= sizes["attention_mask"][:, start : start + T]
    dy = torch.randn(3, T, 4, 8, dtype=torch.float64) * real[..., None, None]
    hf_attention.FALLBACKS.clear()
    given = {"scaling": 0.3, "softcap": softcap}
    y, weights = hf_attention.attention_forward(Layer(), q, k, v, mask, **given)
    assert weights is None
    assert not hf_attention.FALLBACKS
    gradients = torch.autograd.grad(y, (q, k, v), dy)
    scores = torch.einsum("bhgtd,bhsd->bhgts", q.unflatten(1, (2, 2)), k) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~dense[:, None], torch.finfo(torch.float64).min)
    expected = torch.einsum("bhgts,bhsd->bthgd", scores.softmax(-1), v).flatten(2, 3)
    torch.testing.assert_close(y[real], expected[real])
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (q, k, v), dy), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(mask, dense)


def test_what_attention_leaves_to_transformers():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import (
        causal_mask_function,
        chunked_causal_mask_function,
        or_masks,
        sliding_window_overlay,
    )

    torch.manual_seed(0)
    q, k, v = (torch.randn(3, h, 20, 8) for h in (4, 2, 2))
    holes = padding(20)
    holes[1, 5] = False
    chunked = chunked_causal_mask_function(4, torch.zeros(3, dtype=int))
    union = or_masks(sliding_window_overlay(4), causal_mask_function)
    own = torch.rand(3, 1, 20, 20) < 0.9
    both_sides = padding(20, (0, 2, 5), (20, 14, 9))
    sizes = {"q_length": 20, "kv_length": 20}
    other_kind = "the mask is of another kind than causal, window or padding"
    for mask, reason in (
        (masks("causal", **sizes, attention_mask=holes)[0], "the padding mask has holes"),
        (masks("causal", **sizes, mask_function=chunked)[0], other_kind),
        (masks("causal", **sizes, mask_function=union)[0], other_kind),
        (masks("causal", **sizes, attention_mask=both_sides)[0], PADDED_ON_THE_RIGHT),
        (own, "a mask of the caller's"),
    ):
        hf_attention.FALLBACKS.clear()
        y, _ = hf_attention.attention_forward(Layer(), q, k, v, mask)
        assert torch.equal(y, sdpa_attention_forward(Layer(), q, k, v, mask)[0])
        assert dict(hf_attention.FALLBACKS) == {reason: 1}
    hf_attention.FALLBACKS.clear()
    y, _ = hf_attention.attention_forward(Layer(), q, k, v, None, dropout=1.0)
    assert y.eq(0).all()
    assert dict(hf_attention.FALLBACKS) == {"a dropout probability of 1": 1}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_somebody_reads(family, side):
    """Where labels are not masked on padding, a text goes on from it, or its logits are read."""
    model, batch = new_model(family), new_batch("llama")
    if side == "right":
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    batch["labels"] = batch["input_ids"]
    results = []
    for m in (patched(model), model):
        hf_attention.FALLBACKS.clear()
        loss = m(**batch).loss
        gradients = torch.autograd.grad(loss, list(m.parameters()))
        with torch.no_grad():
            results.append((loss, gradients, m.eval()(**batch).logits))
        if m is not model:
            counted = dict(hf_attention.FALLBACKS)
    torch.testing.assert_close(*results)
    reason = PADDED_ON_THE_RIGHT if side == "right" else HIDDEN_FROM_EAGER
    layers = len(model.model.layers)
    left = side == "right" or family == "gemma2"  # in both forwards
    assert counted == ({reason: 2 * layers} if left else {})


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_in_a_reentrant_checkpoint(side):
    """Its first pass has no gradients: what is computed again must take the same attention."""
    model, batch = patched(new_model("llama", attention_dropout=0.5)), new_batch("llama")
    if side == "right":
        batch = {name: x.flip(1) for name, x in batch.items()}
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()

    def loss_of(x):
        return model(inputs_embeds=x, **batch).loss

    results = []
    for run in (loss_of, lambda x: checkpoint(loss_of, x, use_reentrant=True)):
        torch.manual_seed(2)
        embeddings.grad = None
        loss = run(embeddings)
        loss.backward()
        results.append((loss.detach(), embeddings.grad))
    torch.testing.assert_close(*results)


def test_a_plan_is_of_its_mask_alone():
    mask, _ = masks("causal", q_length=4, kv_length=6, q_offset=2)
    plan, unknown = hf_attention.plan_of(mask), "a mask of the caller's"
    assert isinstance(plan, hf_attention.Plan)
    assert hf_attention.plan_of(mask.detach()) is plan
    for other in (mask.clone(), mask[:1], mask[..., :5], mask.mT):
        assert hf_attention.plan_of(other) == unknown
    mask[0].logical_not_()
    assert hf_attention.plan_of(mask) == unknown
    with torch.inference_mode():
        inferred, _ = masks("causal", q_length=4, kv_length=6, q_offset=2)
        assert isinstance(hf_attention.plan_of(inferred), hf_attention.Plan)
        inferred[0].logical_not_()
        assert hf_attention.plan_of(inferred) == unknown
    places = {mask.data_ptr(), inferred.data_ptr()}
    assert places <= hf_attention._PLANS.keys()
    del mask, other, inferred
    assert not places & hf_attention._PLANS.keys()


def test_without_a_mask_the_module_says_what_is_causal():
    torch.manual_seed(0)
    k, v = (torch.randn(3, 2, 20, 8) for _ in "kv")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for T, causal in ((20, True), (20, False), (1, True), (7, True), (7, False)):
        q = torch.randn(3, 4, T, 8)
        layer = Layer(is_causal=causal)
        y, _ = hf_attention.attention_forward(layer, q, k, v, None)
        torch.testing.assert_close(y, sdpa_attention_forward(layer, q, k, v, None)[0])


def test_attn_implementation_without_patch():
    """The name alone is enough, also for a model that is made from a config."""
    hf_attention.register()
    model = new_model("llama").eval()
    batch = new_batch("llama")
    expected = model(**batch).logits
    model.set_attn_implementation("gptfast")
    hf_attention.FALLBACKS.clear()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], expected[real])
    assert not hf_attention.FALLBACKS


def test_eager_attention_that_was_asked_for_stays():
    model = new_model("llama", _attn_implementation="eager")
    report = gptfast.patch(model, ops="attention")
    assert not report.replaced
    assert {entry.reason for entry in report.left} == {
        'its attn_implementation is "eager", which can return the attention weights'
    }


def test_gemma2_still_returns_attention_weights():
    model = new_model("gemma2").eval()
    batch = new_batch("gemma2")
    expected = model(**batch, output_attentions=True)
    ours = patched(model)(**batch, output_attentions=True)
    assert len(ours.attentions) == 2
    for a, b in zip(ours.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a, b)


def test_decoding_on_a_gpu_takes_the_decode_op(monkeypatch):
    """Its reference, on the CPU, behind the same dispatch."""
    monkeypatch.setattr(hf_attention, "_decodes", lambda query, *caches: query.shape[2] == 1)
    for name in ("decode", "decode, window", "static"):
        kind, sizes = CALLS[name]
        mask, dense = masks(kind, **sizes)
        q = torch.randn(3, 4, 1, 8)
        k, v = (torch.randn(3, 2, sizes["kv_length"], 8) for _ in "kv")
        y, _ = hf_attention.attention_forward(Layer(), q, k, v, mask)
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
        torch.testing.assert_close(y, expected.transpose(1, 2))
