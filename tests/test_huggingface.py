"""GPT-2 to and from Hugging Face's format, against transformers itself."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptfast import checkpoint
from gptfast.cli import main
from gptfast.decoder import Decoder
from gptfast.generate import stream
from gptfast.integrations.huggingface import (
    is_gpt2_folder,
    load_gpt2,
    save_gpt2,
    stored_equally,
)
from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import CharTokenizer, GPT2Tokenizer
from gptfast.validate import validate

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = GPTConfig(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=48)


def new_model(config=SIZES):
    """Random weights and biases, so large that a wrong one is seen."""
    torch.manual_seed(3)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same(model, other):
    assert model.config == other.config
    for (name, a), (other_name, b) in zip(
        weights(model).items(), weights(other).items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(a, b), name


@pytest.fixture
def folder(tmp_path):
    return save_gpt2(new_model(), tmp_path / "folder")


def their_model(config=SIZES, **changes):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_positions=config.block_size,
            vocab_size=config.vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            **changes,
        )
    ).eval()


# ---- Both ways -----------------------------------------------------------------------------------


def test_a_round_trip_is_bit_exact(folder, tmp_path):
    model, tokenizer = load_gpt2(folder)
    assert tokenizer is None
    assert_same(model, new_model())
    again = save_gpt2(model, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_transformers_reads_what_we_write(folder):
    idx = torch.randint(SIZES.vocab_size, (2, 20))
    ours, theirs = new_model(), transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert isinstance(theirs, transformers.GPT2LMHeadModel)
    with torch.inference_mode():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)


def test_we_read_what_transformers_writes(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    ours, _ = load_gpt2(tmp_path)
    idx = torch.randint(SIZES.vocab_size, (2, 20))
    with torch.inference_mode():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)


def test_a_model_without_biases_gets_zeros(tmp_path):
    model = new_model(GPTConfig(16, 31, 2, 2, 24, bias=False))
    loaded, _ = load_gpt2(save_gpt2(model, tmp_path / "folder"))
    assert loaded.config.bias
    idx = torch.randint(31, (2, 9))
    assert torch.equal(loaded(idx)[0], model(idx)[0])


def test_half_precision_weights_stay_what_they_are(tmp_path):
    model = new_model().bfloat16()
    path = save_gpt2(model, tmp_path / "folder")
    stored = load_file(path / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}
    assert_same(load_gpt2(path)[0].bfloat16(), model)


def test_shards(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours, _ = load_gpt2(tmp_path)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)


def old_style(folder, tmp_path, **more):
    """As files of 2019 are: no prefix, the masks as buffers, a pickle."""
    stored = load_file(folder / "model.safetensors")
    state = {name.removeprefix("transformer."): x for name, x in stored.items()}
    for layer in range(SIZES.n_layer):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({**state, **more}, old / "pytorch_model.bin")
    return old


def test_old_pickles_with_masks(folder, tmp_path):
    assert_same(load_gpt2(old_style(folder, tmp_path))[0], new_model())


def test_a_tied_head_may_be_stored_twice(folder, tmp_path):
    head = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    assert_same(load_gpt2(old_style(folder, tmp_path, **{"lm_head.weight": head}))[0], new_model())


# ---- Tokenizers ----------------------------------------------------------------------------------

TEXT = (
    "Hello world's 1234 h\u00e9llo\n\n  \u00fcmlaut \u6f22\u5b57 \U0001f642 don't  x\t\u00a0!<|end"
)


def test_transformers_reads_the_tokenizer(tmp_path):
    config = GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=1, n_embd=8)
    path = save_gpt2(GPT(config), tmp_path / "folder", GPT2Tokenizer())
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert theirs(TEXT)["input_ids"] == GPT2Tokenizer().encode(TEXT)
    assert theirs.eos_token_id == 50256
    assert theirs.model_max_length == 16
    assert isinstance(load_gpt2(path)[1], GPT2Tokenizer)
    (path / "vocab.json").write_text('{"a": 0}')
    assert load_gpt2(path)[1] is None


def test_other_tokenizers_are_kept(tmp_path):
    path = save_gpt2(new_model(), tmp_path / "folder", CharTokenizer("abc"))
    tokenizer = load_gpt2(path)[1]
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.chars == ("a", "b", "c")
    (path / "gptfast_tokenizer.json").write_text(
        json.dumps({"type": "char", "chars": [chr(200 + i) for i in range(102)]})
    )
    with pytest.raises(ValueError, match="expected at most vocab_size 101 tokens"):
        load_gpt2(path)


# ---- Bad input -----------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


def test_code_in_a_pickle_does_not_run(folder, tmp_path, capsys):
    old = old_style(folder, tmp_path)
    (old / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": Bomb()}))
    with pytest.raises(ValueError, match="expected tensors without code"):
        load_gpt2(old)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [("no network\nand much more", "no network"), ("", "ConnectionError")],
)
def test_without_a_network(monkeypatch, capsys, text, reason):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    def snapshot_download(name, **_):
        raise ConnectionError(text)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert main(["generate", "--checkpoint", "hf:openai-community/gpt2"]) == 2
    assert capsys.readouterr().err == (
        f"gptfast: error: cannot fetch 'openai-community/gpt2' from the hub: {reason}; give a "
        "folder on the disk, or set HF_HOME to a cache that has it\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'gpt2', got 'llama'"),
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new' or"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon must be 1e-05, got 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "must be False, got True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False"),
        ({"n_inner": 7}, "n_inner must be 192 or null, got 7"),
        ({"n_layer": 4}, "expected n_layer 4 layers as in config.json, got 3"),
        ({"n_layer": 10**9}, "expected n_layer 1000000000 layers"),
        ({"n_layer": "3"}, "n_layer must be an integer, got '3'"),
        ({"n_head": 5}, "n_head must divide n_embd 48, got 5"),
        ({"n_embd": 96}, r"to be \(101, 96\) by config.json, got \(101, 48\)"),
        ({"vocab_size": 100}, r"to be \(100, 48\) by config.json, got \(101, 48\)"),
        ({"n_positions": 0}, "block_size must be a positive integer, got 0"),
    ],
)
def test_a_config_that_does_not_fit(folder, changes, message):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        load_gpt2(folder)


def test_files_that_are_no_checkpoint(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder with config"):
        load_gpt2(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="expected a model's sizes"):
        load_gpt2(tmp_path)
    (folder / "model.safetensors").rename(folder / "x")
    with pytest.raises(FileNotFoundError, match="got none of them"):
        load_gpt2(folder)
    data = (folder / "x").read_bytes()
    for damaged in (data[:1000], b"", data[:-10], b"\xff" * 64):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="expected safetensors"):
            load_gpt2(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        load_gpt2(folder)


@pytest.mark.parametrize("shard", ["../folder/model.safetensors", "/etc/passwd", "none", 7])
def test_an_index_names_files_beside_it_only(folder, shard):
    (folder / "model.safetensors").rename(folder / "x")
    index = {"weight_map": {"transformer.wte.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected a (file beside it|weight_map)"):
        load_gpt2(folder)


def test_missing_unknown_and_untied_weights(folder):
    file = folder / "model.safetensors"
    stored = load_file(file)
    name = "transformer.h.1.mlp.c_fc.bias"
    save_file({n: x for n, x in stored.items() if n != name}, file)
    with pytest.raises(ValueError, match=f"expected a tensor {name}"):
        load_gpt2(folder)
    save_file({**stored, "transformer.h.0.extra": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"expected no tensor transformer.h.0.extra"):
        load_gpt2(folder)
    save_file({**stored, "lm_head.weight": torch.ones(101, 48)}, file)
    with pytest.raises(ValueError, match=r"expected lm_head.weight to be wte.weight"):
        load_gpt2(folder)
    save_file({"a": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"expected a tensor wte.weight, got none"):
        load_gpt2(folder)


def test_nothing_is_overwritten(folder, small_disk):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="expected no such file or folder"):
        save_gpt2(new_model(), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    with pytest.raises(OSError, match="No space left"):
        save_gpt2(new_model(GPTConfig(8, 5000, 1, 2, 64)), small_disk / "folder")
    assert list(small_disk.iterdir()) == []


# ---- Validation and the command line -------------------------------------------------------------


SMALL = GPTConfig(64, 50257, 2, 2, 32)


def test_validation_with_random_weights():
    seen = []
    result = validate(SMALL, new_tokens=30, batch=(2, 16), on_progress=lambda *of: seen.append(of))
    assert result.passed
    assert result.logits_error < 1e-5
    assert result.loss == pytest.approx(result.their_loss, rel=1e-6)
    assert result.text == result.their_text
    assert len(result.tokens) == 30
    assert len(set(result.tokens)) > 5
    assert {("transformers", 30, 30), ("gptfast", 30, 30)} <= set(seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_validation_in_half_precision(dtype):
    result = validate(SMALL, new_tokens=30, batch=(2, 16), dtype=dtype)
    assert result.passed
    half = result.half
    assert 0 < half.text.rms < half.text.largest < 0.1
    assert half.agreeing >= result.same_tokens


def test_validation_leaves_a_model_as_it_is(folder):
    model = new_model()
    assert validate(model, new_tokens=5, dtype=torch.bfloat16).passed
    assert_same(model, new_model())


def test_validation_of_nothing(tmp_path):
    for new_tokens, batch in ((0, (2, 64)), (5, (0, 64)), (5, (2, 1))):
        with pytest.raises(ValueError, match="expected at least one new token, and a text of two"):
            validate(SMALL, new_tokens=new_tokens, batch=batch)
    with pytest.raises(ValueError, match="expected a block_size of at least 2, got 1"):
        validate(GPTConfig(1, 31, 1, 2, 24))
    result = validate(GPTConfig(2, 31, 1, 2, 24))
    assert result.passed
    assert len(result.tokens) == 1


def test_validation_decides_how_text_is_made(folder):
    expected = validate(folder, new_tokens=12)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 5.0, "max_length": 3}')
    assert validate(folder, new_tokens=12) == expected


def test_validation_of_another_architecture():
    with pytest.raises(ValueError, match="validate: expected the architecture of GPT-2, got pos"):
        validate(GPTConfig.preset("llama-135m"))


def wrong_forward(monkeypatch, by):
    right = GPT.forward

    def wrong(self, *args, **kwargs):
        logits, loss = right(self, *args, **kwargs)
        return logits + by, loss

    monkeypatch.setattr(GPT, "forward", wrong)


def test_validation_finds_a_wrong_model(folder, monkeypatch):
    assert validate(folder, new_tokens=5).passed
    wrong_forward(monkeypatch, 2e-4)
    assert not validate(folder, new_tokens=5).passed


def test_validation_in_half_precision_finds_a_wrong_model(monkeypatch):
    def found():
        return validate(SMALL, new_tokens=5, batch=(2, 16), dtype=torch.bfloat16)

    with monkeypatch.context() as patch:
        wrong_forward(patch, 0.02)
        result = found()
        assert not result.passed
        assert not result.half.text.passed
    right = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, idx: right(self, idx).roll(1, -1))
    result = found()
    assert not result.passed
    assert result.half.text.passed
    assert result.half.agreeing < 5


def test_validation_in_half_precision_finds_a_wrong_text(monkeypatch):
    def wrong(*args, **kwargs):
        for n, token in enumerate(stream(*args, **kwargs)):
            yield token + (n == 3)

    monkeypatch.setattr("gptfast.validate.stream", wrong)
    result = validate(SMALL, new_tokens=5, batch=(2, 16), dtype=torch.bfloat16)
    assert not result.half.greedy
    assert result.half.text.passed
    assert result.half.decoding.passed
    assert not result.passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "gigabytes"),
    [
        ("gpt2", torch.float32, 3),
        ("gpt2-medium", torch.float32, 6),
        ("gpt2-large", torch.bfloat16, 8),
        ("gpt2-xl", torch.bfloat16, 14),
    ],
)
def test_validation_at_every_size(name, dtype, gigabytes):
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < gigabytes * 2**30:
        pytest.skip(f"{name} needs {gigabytes} GiB of memory, {free / 2**30:.0f} are free")
    result = validate(GPTConfig.preset(name), dtype=dtype)
    assert result.passed
    assert len(result.tokens) == 200


def test_folders_with_the_same_weights(folder, tmp_path):
    old = old_style(folder, tmp_path)
    assert stored_equally(folder, old, torch.float32)
    state = torch.load(old / "pytorch_model.bin")
    state["h.2.mlp.c_fc.bias"][7] += 1e-6
    torch.save(state, old / "pytorch_model.bin")
    assert not stored_equally(folder, old, torch.float32)
    (folder / "model.safetensors").unlink()
    for number, other, equal in ((0.0, -0.0, False), (torch.nan, torch.nan, True)):
        for path, value in ((folder, number), (old, other)):
            state["h.2.mlp.c_fc.bias"][7] = value
            torch.save(state, path / "pytorch_model.bin")
        assert stored_equally(folder, old, torch.bfloat16) is equal
    del state["h.2.mlp.c_fc.bias"]
    torch.save(state, old / "pytorch_model.bin")
    assert not stored_equally(folder, old, torch.float32)


def test_commands(tmp_path, capsys):
    config = GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=8)
    checkpoint.save(tmp_path / "run", 7, new_model(config), GPT2Tokenizer())
    out = tmp_path / "hf"
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert is_gpt2_folder(out)
    assert main(["validate", "--checkpoint", str(out), "--new-tokens", "5"]) == 0
    assert "equal" in capsys.readouterr().out
    texts = []
    for source in (tmp_path / "run", out):
        command = ["generate", "--checkpoint", str(source), "--greedy", "--max-new-tokens", "5"]
        assert main([*command, "--prompt", "To be"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--out", str(out)]) == 2
    assert "expected no such file or folder" in capsys.readouterr().err
    assert main(["validate", "--checkpoint", str(tmp_path / "run"), "--new-tokens", "5"]) == 0
    assert main(["validate", "--checkpoint", str(tmp_path)]) == 2
    assert "expected a checkpoint, got a folder without step_*" in capsys.readouterr().err
