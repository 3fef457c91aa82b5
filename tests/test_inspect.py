"""Inspection: maps against transformers and against the kernels, the lens, words, counts, files."""

from __future__ import annotations

import base64
import copy
import dataclasses
import html.parser
import json
import string
import sys

import pytest
import torch
from test_variants import DECODERS, ENCODERS, memory_for, new_model, tokens

from gptfast import checkpoint, cli, inspect
from gptfast.cli import main
from gptfast.inspect import plot
from gptfast.integrations.huggingface import save_gpt2
from gptfast.models import GPT, GPTConfig
from gptfast.plan import forward_flops_per_token
from gptfast.tokenizer import CharTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

GPT2 = GPTConfig(block_size=24, vocab_size=67, n_layer=3, n_head=4, n_embd=32)
TOKENIZER = CharTokenizer(string.ascii_letters + string.digits + " \n!?,")
TEXT = "To be\nor not"


@pytest.fixture(scope="module")
def model():
    return new_model(GPT2)


# ---- Attention -----------------------------------------------------------------------------------


def test_maps_are_those_of_transformers(model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = save_gpt2(model, tmp_path / "model")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    idx = tokens(GPT2, 1, 24)
    with torch.no_grad():
        expected = torch.cat(theirs.eval()(idx, output_attentions=True).attentions)
    got = inspect.attention_maps(model, idx)
    assert got.shape == (3, 4, 24, 24)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["rotary", "window", "grouped queries", "nanochat", "everything", *ENCODERS]
)
def test_maps_times_values_are_what_attention_returns(name):
    config = {**DECODERS, **ENCODERS}[name]
    model, idx = new_model(config).eval(), tokens(config, 1, 20)
    memory = memory_for(config, 1)
    seen = []
    for block in model.transformer["h"]:
        block.attn.c_attn.register_forward_hook(lambda m, i, qkv: seen.append([qkv]))
    attend = type(model.transformer["h"][0].attn)._attend

    def spied(self, *args):
        y = attend(self, *args)
        seen[-1].append(y)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.transformer["h"][0].attn), "_attend", spied)
        maps = inspect.attention_maps(model, idx, memory)
    assert torch.allclose(maps.sum(-1), torch.ones(()))
    for p, (qkv, y), block in zip(maps, seen, model.transformer["h"], strict=True):
        v = block.attn.heads(qkv)[2].repeat_interleave(config.n_head // config.kv_heads, 1)
        torch.testing.assert_close(
            (p @ v[0]).transpose(0, 1).flatten(1), y[0], rtol=1e-4, atol=1e-5
        )


def test_looking_leaves_no_trace(model):
    x = tokens(GPT2, 1, 10)
    model.train()
    before = [len(m._forward_hooks) for m in model.modules()]
    inspect.attention_maps(model, x[0])
    inspect.logit_lens(model, x)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before
    assert all(m.training for m in model.modules())
    with pytest.raises(ValueError, match=r"idx must be \(T,\) or \(1, T\), got \(2, 10\)"):
        inspect.attention_maps(model, tokens(GPT2, 2, 10))


# ---- The lens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["post-norm", "nanochat", "everything", "gpt2"])
def test_the_last_layer_of_the_lens_is_the_model(name):
    config = {**DECODERS, "gpt2": GPT2}[name]
    model, idx = new_model(config).eval(), tokens(config, 1, 20)
    lens = inspect.logit_lens(model, idx, k=67)
    assert lens.tokens.shape == lens.p.shape == (config.n_layer + 1, 20, 67)
    p = torch.empty_like(lens.p).scatter(-1, lens.tokens, lens.p)
    with torch.no_grad():
        torch.testing.assert_close(p[-1], model(idx)[0][0].softmax(-1), rtol=1e-4, atol=1e-6)
        # Layer n of the lens is a model of the first n layers.
        shorter = copy.deepcopy(model)
        del shorter.transformer["h"][1:]
        torch.testing.assert_close(p[1], shorter(idx)[0][0].softmax(-1), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"k must be in \[1, 67\], got 68"):
        inspect.logit_lens(model, idx, k=68)


# ---- Words ---------------------------------------------------------------------------------------


def test_neighbours_and_analogies():
    model = GPT(dataclasses.replace(GPT2, n_embd=4, n_head=1))
    with torch.no_grad():
        wte = model.transformer["wte"].weight
        wte.normal_(generator=torch.Generator().manual_seed(0))
        wte[10] = torch.tensor([3.0, 0.0, 0.0, 0.1])  # man
        wte[11] = torch.tensor([3.0, 3.0, 0.0, 0.1])  # king
        wte[12] = torch.tensor([0.0, 0.0, 2.0, 0.1])  # woman
        wte[13] = torch.tensor([-0.1, 2.0, 2.0, 0.1])  # queen
        wte[14] = 5 * wte[13] + 0.01
    cosines = torch.nn.functional.cosine_similarity(wte[13], wte, dim=1).tolist()
    got = inspect.neighbours(model, 13, k=66)
    assert got[0][0] == 14
    expected = {t: c for t, c in enumerate(cosines) if t != 13}
    assert dict(got) == pytest.approx(expected, abs=1e-6)
    assert [t for t, _ in inspect.neighbours(model, 13, 100, vocab_size=14)].count(14) == 0
    assert {t for t, _ in inspect.analogy(model, 10, 11, 12, k=2)} == {13, 14}
    with pytest.raises(IndexError, match=r"tokens must be in \[0, 67\), got 67"):
        inspect.neighbours(model, 67)


def test_words_are_tokens():
    assert inspect.one_token(TOKENIZER, "T") == TOKENIZER.encode("T")[0]
    with pytest.raises(ValueError, match="'To' must be one token, got 2"):
        inspect.one_token(TOKENIZER, "To")


# ---- Counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*DECODERS.values(), *ENCODERS.values(), GPT2])
def test_rows_add_up(config):
    rows = inspect.parameter_rows(config)
    assert sum(r.times * r.parameters for r in rows) == GPT(config).num_parameters()
    if not config.cross_attention:  # whose memory the table does not know the length of
        flops = sum(r.times * r.flops for r in rows)
        assert flops == pytest.approx(forward_flops_per_token(config))


def test_gpt2_has_biases(capsys):
    assert main(["inspect", "--preset", "gpt2"]) == 0
    out = capsys.readouterr().out
    assert "124,439,808" in out
    assert f"{124_439_808 - 12 * 9 * 768:,}" in out  # what a table comes to that forgets them


# ---- Files ---------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a page would load, and the data in it."""

    def __init__(self) -> None:
        super().__init__()
        self.loads, self.data, self.inside, self.ids = [], "", False, set()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids.add(attributes.get("id"))
        self.loads += [v for k, v in attrs if k in ("src", "href", "action")]
        self.inside = attributes.get("id") == "data"

    def handle_data(self, data):
        self.data += data if self.inside else ""

    def handle_endtag(self, tag):
        self.inside = False


def test_the_page_holds_everything_and_loads_nothing(model, tmp_path):
    idx = torch.tensor(TOKENIZER.encode(TEXT))
    hostile = lambda ids: TOKENIZER.decode(ids).replace("T", "</script><!--<b>")  # noqa: E731
    path = inspect.write_page(model, idx, hostile, tmp_path / "a.html", title="<&> a text")
    source = path.read_text()
    page = Page()
    page.feed(source)
    assert page.loads == []
    assert "default-src 'none'" in source
    assert "<title>&lt;&amp;&gt; a text</title>" in source
    data = json.loads(page.data)
    assert data["tokens"] == [hostile([i]) for i in idx.tolist()]
    maps = inspect.attention_maps(model, idx)
    assert (data["layers"], data["heads"]) == maps.shape[:2]
    stored = torch.frombuffer(bytearray(base64.b64decode(data["attention"])), dtype=torch.uint8)
    p = (stored.view(maps.shape) / 255) ** 2
    assert ((p - maps).abs() <= maps.sqrt() / 255 + 1e-5).all()
    lens = inspect.logit_lens(model, idx)
    assert len(data["lens"]) == 4
    assert data["lens"][3][0][0] == [
        hostile([int(lens.tokens[3, 0, 0])]), round(float(lens.p[3, 0, 0]), 4),
    ]  # fmt: skip
    # The script finds the elements that it looks for.
    wanted = {part.split('"')[1] for part in source.split("byId(")[1:] if part.startswith('"')}
    assert wanted <= page.ids


def test_bold_is_the_next_token_not_one_that_looks_like_it(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: figures.append(figure) or path)
    likeliest = torch.tensor([[[11], [9], [9]]])
    lens = inspect.Lens(likeliest, torch.full((1, 3, 1), 0.5))
    piece = "\ufffd"  # what a part of a letter is decoded to
    idx = torch.tensor([10, 11, 12])
    plot.plot_lens(lens, idx, [[piece] * 3], [piece] * 3, tmp_path / "lens.png")
    weights = [text.get_fontweight() for text in figures[0].axes[0].texts]
    assert weights == ["bold", "normal", "normal"]


def test_names_over_pictures(tmp_path):
    assert cli._name("hf:gpt2", tmp_path / "snapshots" / "0123") == "hf:gpt2"
    assert cli._name("run", tmp_path / "run" / "step_1") == "run/step_1"


def test_command(model, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = checkpoint.save(tmp_path / "run", 1, model, TOKENIZER)
    out = tmp_path / "seen"
    command = ["inspect", "--checkpoint", str(path), "--out", str(out)]
    assert main([*command, "--text", TEXT, "--layer", "1", "--head", "2"]) == 0
    files = ["attention.html", "attention.png", "attention_1_2.png", "lens.png"]
    assert sorted(p.name for p in out.iterdir()) == files
    assert all((out / f).read_bytes()[:4] == b"\x89PNG" for f in files[1:])
    assert capsys.readouterr().out.split() == [
        str(out / f) for f in ("attention.html", "attention.png", "lens.png", "attention_1_2.png")
    ]
    assert main([*command, "--neighbours", "T", "--analogy", "a", "b", "c"]) == 0
    assert "a : b = c : ?" in capsys.readouterr().out
    assert main(command) == 0
    assert f"{model.num_parameters():,}" in capsys.readouterr().out
    for options, message in (
        (["--text", "é"], "got 'é' at position 0"),
        (["--text", TEXT * 3], "at most block_size 24 tokens, got 36"),
        (["--text", TEXT, "--layer", "3", "--head", "0"], "head must be below (3, 4), got (3, 0)"),
        (["--layer", "3"], "expected --layer and --head, got one of them"),
        (["--neighbours", "To"], "'To' must be one token"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["inspect", "--text", TEXT]) == 2
    assert "need a --checkpoint, got none" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*command, "--text", TEXT]) == 2
    assert "pip install 'gptfast-kernels[plot]'" in capsys.readouterr().err
