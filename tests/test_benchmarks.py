"""benchmarks/run.py on a model small enough for a test: its rows, its refusals, its timing."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections import Counter
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from benchmarks import run
from benchmarks.timing import interleave, paired_ratio, summarise
from gptfast.models import GPT, GPTConfig

TINY = GPTConfig(block_size=16, vocab_size=67, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def tiny_works(monkeypatch):
    works = [
        run.Work("train", TINY, "char", 2),
        run.Work("generate", TINY, "char", 1, new_tokens=4),
        run.Work("train, large", TINY, "char", 2, quick=False),
    ]
    monkeypatch.setattr(run, "WORKS", works)
    return works


def test_rows_and_json(tiny_works, tmp_path, capsys):
    file = tmp_path / "rows.json"
    run.main(quick=True, json_file=file, compile=False, seconds_per_turn=0.01)
    rows = json.loads(file.read_text())
    expected = {"train": [run.OURS, run.EAGER], "generate": [run.OURS, run.EAGER, *run.QUANTIZED]}
    if importlib.util.find_spec("transformers"):
        expected["generate"].append(run.TRANSFORMERS)
    assert [(r["work"], r["contender"]) for r in rows] == [
        (work, contender) for work, contenders in expected.items() for contender in contenders
    ]
    for r in rows:
        assert r["dtype"] == run.QUANTIZED.get(r["contender"], "float32")
        assert r["threads"] == torch.get_num_threads()
        assert r["tok_per_s_p20"] <= r["tok_per_s"] <= r["tok_per_s_p80"]
    by_contender = {(r["work"], r["contender"]): r for r in rows}
    for work in ("train", "generate"):
        ours = by_contender[work, "gptfast"]
        peers = [r["tok_per_s"] for r in rows if r["work"] == work and r["contender"] in run.PEERS]
        assert ours["ratio_to_best_peer"] == pytest.approx(ours["tok_per_s"] / max(peers))
    assert "torch eager" in capsys.readouterr().out


@pytest.mark.parametrize("bf16", [False, True])
def test_both_models_generate_the_same_tokens(bf16):
    torch.manual_seed(0)
    ours, stock = GPT(TINY), run.StockGPT(TINY)
    stock.load_state_dict(ours.state_dict())
    prompt = torch.randint(0, TINY.vocab_size, (2, 8))
    seen = []
    for model in (ours, stock):
        tokens = []

        def forward(idx, cache, model=model, tokens=tokens):
            tokens.append(idx)
            return model(idx, cache=cache)

        run.generation(forward, model, prompt, 8, bf16)()
        seen.append(torch.cat(tokens, 1))
    assert torch.equal(*seen)


def test_nothing_is_timed_when_the_gradients_are_wrong(tiny_works, monkeypatch):
    right = GPT.forward

    def slightly_wrong(model, idx, targets=None, cache=None):
        logits = right(model, idx)[0] * 1.01
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    monkeypatch.setattr(GPT, "forward", slightly_wrong)
    with pytest.raises(SystemExit, match=r"not timed: gptfast's gradient of .* is off"):
        run.main(quick=True, compile=False, seconds_per_turn=0.01)


def test_nothing_is_timed_when_the_tokens_are_wrong(tiny_works, monkeypatch):
    right = run.generate
    monkeypatch.setattr(run, "generate", lambda *a, **k: right(*a, **k).flip(1))
    with pytest.raises(SystemExit, match="not timed: gptfast generates other tokens"):
        run.main(only="generate", compile=False, seconds_per_turn=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "sing"}, "--only: no work has 'sing' in its name"),
        ({"dtype": "float64"}, "--dtype must be float32 or bfloat16, got 'float64'"),
        ({"threads": 0}, "--threads must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(SystemExit, match=message):
        run.main(**options)


def test_json_folder_must_exist(tmp_path):
    with pytest.raises(SystemExit, match="there is no folder"):
        run.main(json_file=tmp_path / "missing" / "rows.json")


def test_contenders_take_turns():
    order = []
    contenders = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = interleave(contenders, rounds=3, warmup=1, seconds_per_turn=0)
    assert "".join(order) == "ab" + "ab" + "ba" + "ba"
    assert set(timings) == {"a", "b"}


@pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
def test_each_contender_comes_after_itself_and_others_as_often_as_the_rest(names):
    order = []
    contenders = {name: (lambda name=name: order.append(name)) for name in names}
    interleave(contenders, rounds=2 * len(names) + 1, warmup=0, seconds_per_turn=0)
    turns = order[: 2 * len(names) ** 2 + 1]  # with the first of the next cycle
    for itself in (True, False):
        after = Counter(b for a, b in pairwise(turns) if (a == b) is itself)
        assert set(after) == set(names)
        assert len(set(after.values())) == 1


def test_timing_measures_a_known_sleep():
    timings = interleave({"s": lambda: time.sleep(0.02)}, rounds=3, warmup=0, seconds_per_turn=0.05)
    assert 0.02 <= timings["s"].median < 0.04


def test_percentiles():
    t = summarise([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (t.median, t.p20, t.p80) == (3.0, pytest.approx(1.8), pytest.approx(4.2))
    assert not math.isnan(summarise([1.0]).p80)


def test_a_paired_ratio_does_not_see_a_machine_that_slows_down():
    slower = [1.0 + i for i in range(11)]
    ratio = paired_ratio([2 * t for t in slower], slower)
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)


def test_the_interval_of_a_paired_ratio():
    ratio = paired_ratio(range(1, 32), [1.0] * 31)  # 10th and 22nd of 31: 97.1 %, the next 92.9 %
    assert (ratio.median, ratio.low, ratio.high) == (16.0, 10.0, 22.0)
    ratio = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)  # even from 1 to 5: 93.8 %
    assert (ratio.median, ratio.low, ratio.high) == (3.0, None, None)


def test_table_names_every_row(capsys):
    rows = [run.Row("train", "gptfast", "cpu", "float32", 2, 1000.0, 1.5, 900.0, 1100.0)]
    run.print_table(rows, Console(width=160))
    out = capsys.readouterr().out
    assert "gptfast" in out
    assert "1.50" in out
