"""The examples, each run as it stands with --quick and fewer steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from gptfast.data import read_text

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


def run(name: str, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--quick", *arguments])


def test_all_of_them_are_tested():
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tests


def test_quickstart(capsys):
    run("quickstart", "--tokens", "5")
    out = capsys.readouterr().out
    assert "parameters" in out
    assert "log V = 10.825" in out


def test_train_tiny_stories(tmp_path, capsys):
    out = tmp_path / "run"
    text = tmp_path / "stories.txt"
    text.write_text(read_text()[:40_000])
    run("train_tiny_stories", "--steps", "6", "--out", str(out), "--file", str(text))
    assert "perplexity" in capsys.readouterr().out
    assert list(out.glob("step_*"))


def test_generate_text(tmp_path, capsys):
    run("generate_text", "--steps", "5", "--tokens", "20", "--out", str(tmp_path / "run"))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("--- ") for line in lines) == 5


def test_analyze_attention(tmp_path, capsys):
    run("analyze_attention", "--steps", "5", "--out", str(tmp_path / "seen"))
    assert "token before" in capsys.readouterr().out
    assert (tmp_path / "seen" / "attention.html").exists()


def test_train_shakespeare_char(tmp_path, capsys):
    run("train_shakespeare_char", "--steps", "10", "--out", str(tmp_path / "run"))
    assert "validation loss of the bigram" in capsys.readouterr().out


def test_finetune_gpt2(tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = tmp_path / "tuned"
    run("finetune_gpt2", "--steps", "12", "--block-size", "32", "--out", str(out))
    said = capsys.readouterr().out
    before, after = (
        float(said.split(f"{word}: perplexity ")[1].split()[0].replace(",", ""))
        for word in ("before", "after")
    )
    assert after < 0.9 * before
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
