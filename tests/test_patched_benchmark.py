"""`benchmarks/patched`: it times what it has checked, and its tables say what its rows say."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import gptfast
from benchmarks.patched import __main__ as command
from benchmarks.patched import families, models, modules, report
from benchmarks.plain_models import PLAIN, Sizes


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(
        families, "SIZES", Sizes(vocab_size=67, n_layer=1, n_embd=32, block_size=48)
    )
    family = families.plain_family(PLAIN["script GPT"])
    monkeypatch.setitem(families.FAMILIES, "small", family)
    return family


def test_rows_and_their_table(small, tmp_path):
    rows = models.run_family("small", "float32", False, 1, 0.0, Console(quiet=True))
    assert [row.work for row in rows] == ["forward", "training step", "generation"]
    file = tmp_path / "rows.json"
    report.write(file, rows)
    given = replace(
        rows[0], unpatched=0.03, patched=0.02, ratio=1.5, low=1.25, high=1.75, again=1.01
    )
    report.write(file, [given])
    kept = json.loads(file.read_text())
    assert len(kept) == 3
    table = report.markdown(kept)
    assert "| small | float32 | forward | 5 | 30.0 | 20.0 | 1.50 (1.25 to 1.75) | 1.01 |" in table
    slow = report.markdown([asdict(replace(given, ratio=0.5, low=0.25, high=0.75))])
    assert "**0.50** (0.25 to 0.75)" in slow


def test_a_model_that_computes_something_else_is_not_timed(small):
    model = small.make()
    other = small.make()
    with torch.no_grad():
        other.lm_head.weight *= 1.1
    with pytest.raises(AssertionError, match="logits: error"):
        families.check(small, model, other)


def test_a_model_that_loses_a_gradient_is_not_timed(small):
    model, other = small.make(), small.make()
    embed = other.wpe.forward
    other.wpe.forward = lambda idx: embed(idx).detach()
    with pytest.raises(AssertionError, match=r"gradient of wpe\.weight: expected"):
        families.check(small, model, other)


def test_a_model_with_another_loss_is_not_timed(small):
    model, other = small.make(), small.make()
    forward = other.forward
    other.forward = lambda idx, targets=None: (
        (logits := forward(idx, targets))[0],
        None if targets is None else logits[1] + 1e-4,
    )
    with pytest.raises(AssertionError, match=r"loss: error 0\.0001"):
        families.check(small, model, other)


def replace_families(monkeypatch, given):
    for module in (models, command):
        monkeypatch.setattr(module, "FAMILIES", given)


def test_a_family_that_fails_does_not_end_the_run(small, tmp_path, monkeypatch):
    broken = replace(small, patch=lambda model: 1 / 0)
    replace_families(monkeypatch, {"broken": broken, "small": small})
    file = tmp_path / "rows.json"
    given = {"dtype": "float32", "compile": "no", "rounds": 1, "seconds": 0.0, "json_file": file}
    with pytest.raises(SystemExit, match="Some works failed"):
        command.main(**given)
    rows = json.loads(file.read_text())
    assert [row["failed"] for row in rows] == ["ZeroDivisionError: division by zero"] * 3 + [""] * 3
    assert "| broken | float32 | forward | 0 | failed |" in report.markdown(rows)
    replace_families(monkeypatch, {"broken": small, "small": small})
    command.main(**given, resume=True)
    good = json.loads(file.read_text())
    assert not any(row["failed"] for row in good)
    replace_families(monkeypatch, {"broken": broken})
    with pytest.raises(SystemExit, match="Some works failed"):
        command.main(**given)
    assert json.loads(file.read_text()) == good


def test_a_work_that_fails_says_whose_it_was_and_the_others_are_timed(small, monkeypatch):
    def generate(model, batch):
        raise ValueError("no\nmore")

    monkeypatch.setitem(families.FAMILIES, "small", replace(small, generate=generate))
    rows = models.run_family("small", "float32", False, 1, 0.0, Console(quiet=True))
    assert [row.failed for row in rows] == [
        "",
        "",
        "RuntimeError: unpatched model: ValueError: no",
    ]
    assert [row.ratio is None for row in rows] == [False, False, True]
    assert all(row.again for row in rows[:2])


def test_what_is_there_is_not_timed_again(small, tmp_path, capsys):
    file = tmp_path / "rows.json"
    given = {"only": "small", "dtype": "both", "compile": "no", "rounds": 6, "seconds": 0.0}
    command.main(**given, json_file=file)
    rows = json.loads(file.read_text())
    assert [row["dtype"] for row in rows] == ["float32"] * 3 + ["bfloat16"] * 3
    report.write(file, [replace(report.Row(**rows[0]), unpatched=7.0)])
    command.main(**given, json_file=file, resume=True)
    assert json.loads(file.read_text())[-1]["unpatched"] == 7.0
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]
    doc = tmp_path / "doc.md"
    doc.write_text("before\n<!-- rows.json -->\nold\n<!-- end of rows.json -->\nafter\n")
    command.main(show=file, into=doc)
    table = report.markdown(json.loads(file.read_text()))
    before, after = "before\n<!-- rows.json -->\n", "\n<!-- end of rows.json -->\nafter\n"
    assert doc.read_text() == before + table + after
    with pytest.raises(SystemExit, match="expected the marks"):
        command.main(show=file, into=file)
    report.write(file, [replace(report.Row(**rows[0]), torch_version="2.0.0")])
    with pytest.raises(SystemExit, match=r"got some of torch 2\.0\.0"):
        command.main(**given, json_file=file, resume=True)


def test_the_documented_table_is_that_of_the_rows(tmp_path):
    root = Path(__file__).resolve().parents[1]
    text = (root / "docs/patching.md").read_text()
    file = root / "benchmarks/results/patched.json"
    doc = tmp_path / "patching.md"
    doc.write_text(text)
    if file.exists():
        command.main(show=file, into=doc)
        assert doc.read_text() == text
    else:
        assert "<!-- patched.json -->\n<!-- end of patched.json -->\n" in text


def test_both_contenders_lie_in_the_same_memory(small):
    model = small.make()
    copied = models.sharing(model)
    assert copied is not model
    assert copied.h[0] is not model.h[0]
    assert all(a is b for a, b in zip(copied.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("kind", PLAIN)
def test_compiled_code_of_a_patched_model_is_what_it_was(kind, monkeypatch):
    monkeypatch.setattr(
        families, "SIZES", Sizes(vocab_size=67, n_layer=1, n_embd=32, block_size=48)
    )
    family = families.plain_family(PLAIN[kind])
    model = family.make()
    ours = models.sharing(model)
    assert gptfast.patch(ours).replaced
    operations = []

    def look(graph, inputs):
        computed = (n for n in graph.graph.nodes if n.op.startswith("call"))
        operations.append([str(n.target) for n in computed])
        return graph.forward

    for m in (model, ours):
        torch._dynamo.reset()
        family.loss(torch.compile(m, backend=look, fullgraph=True), family.batch())
    assert len(operations) == 2
    assert operations[0] == operations[1]


def test_modules():
    rows = modules.run_module("gelu tanh", "float32", False, 1, 0.0)
    assert {row.elements for row in rows} == {256 * M for M in modules.ROWS}
    assert "| gelu tanh | float32 | eager | forward |" in report.markdown_of_modules(
        [asdict(row) for row in rows]
    )
    assert isinstance(modules.MODULES["layer_norm"][0](8), nn.LayerNorm)
