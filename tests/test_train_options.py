"""What a run may do besides the plain loop: schedules, orders, averages, Muon, scores, pictures."""

import dataclasses
import itertools
import math
import os
import random
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from test_train import TEXT, change, losses, rows, run_process, same_weights, wait_for
from test_train import config as config  # a fixture

from gptfast import checkpoint, train_log
from gptfast.data import prepare_text
from gptfast.models import GPT
from gptfast.trackers import draw_curves
from gptfast.train import TrainConfig, Trainer, train
from gptfast.train_setup import pick_dtype

pytestmark = pytest.mark.usefixtures("one_thread")


def stopped_and_resumed(config, monkeypatch, step):
    """Train to a step, by a signal, and go on."""
    update = Trainer._update

    def stopped(trainer):
        if trainer.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", stopped)
        assert train(config, quiet=True).step == step
    train(change(config, resume=True), quiet=True)


# --- schedules and steps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "linear"}, [1.0, 0.775, 0.55, 0.325, 0.1, 0.1]),
        ({"schedule": "constant"}, [1.0] * 6),
        ({"schedule": "wsd", "decay_fraction": 0.2}, [1.0, 1.0, 1.0, 1.0, 0.1, 0.1]),
        ({"schedule": "wsd", "decay_fraction": 0.5, "min_lr": 0.0}, [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]),
        ({"schedule": "cosine", "min_lr": 0.0}, [1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0]),
    ],
    ids=str,
)
def test_schedules(options, expected):
    config = TrainConfig(learning_rate=1.0, warmup_iters=0, max_iters=100, **options)
    assert [config.lr(s) for s in (0, 25, 50, 75, 100, 500)] == pytest.approx(expected, abs=1e-5)
    warm = change(config, warmup_iters=9)
    assert [warm.lr(s) for s in (0, 8)] == pytest.approx([0.1, 0.9])
    assert warm.lr(9) == pytest.approx(1.0)
    assert all(0 <= warm.lr(s) <= 1 for s in range(120))
    for n, s in itertools.product((0, 1, 2), (0, 1, 2)):
        assert 0 <= change(warm, max_iters=2, warmup_iters=n).lr(s) <= 1


def test_wsd_falls_in_a_line():
    config = TrainConfig(
        learning_rate=1.0, warmup_iters=0, max_iters=100, schedule="wsd", decay_fraction=0.4
    )
    falls = [config.lr(s) for s in range(60, 101)]
    steps = [b - a for a, b in itertools.pairwise(falls)]
    assert steps == pytest.approx([-0.9 / 40] * 40)


def test_tokens_in_a_step(config, tmp_path):
    budget = change(config, tokens_per_step=4 * 16 * 3)
    assert (budget.accumulation, budget.step_tokens) == (3, 192)
    counted = change(config, out=str(tmp_path / "counted"), gradient_accumulation=3)
    train(budget, quiet=True)
    train(counted, quiet=True)
    assert losses(budget) == losses(counted)


# --- orders


def test_epochs_see_everything_once_and_resume_mid_shard(config, tmp_path, monkeypatch):
    prepare_text(TEXT, tmp_path / "data")
    config = change(config, file=None, data=str(tmp_path / "data"), sampling="epochs")
    whole = change(config, out=str(tmp_path / "whole"))
    seen = []
    read = Trainer._train_batch
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_batch", lambda t: seen.append(read(t)) or seen[-1])
        train(whole, quiet=True)
    epoch = [tuple(row.tolist()) for x, _ in seen for row in x]
    windows = (1494 - 16) // 16
    assert len(epoch) == 80 < windows  # 20 steps of 4, within the first epoch
    stopped_and_resumed(config, monkeypatch, 13)
    assert losses(config) == losses(whole)
    assert same_weights(config.out, whole.out)


def test_documents_that_do_not_see_each_other(config, tmp_path, monkeypatch):
    text = "<|endoftext|>".join(["First things first.", "Then others, and more of them."] * 30)
    (tmp_path / "t.txt").write_text(text)
    from gptfast.data import prepare

    prepare(tmp_path / "t.txt", tmp_path / "data", "gpt2")
    config = change(
        config, file=None, data=str(tmp_path / "data"), max_iters=4, separate_documents=True
    )
    bounds = []
    forward = GPT.forward

    def watched(self, idx, *args, documents=None, **options):
        bounds.append((idx, documents))
        return forward(self, idx, *args, documents=documents, **options)

    monkeypatch.setattr(GPT, "forward", watched)
    train(config, quiet=True)
    for idx, documents in bounds[:4]:
        begins = {0} | {i for i, token in enumerate(idx.flatten().tolist()) if token == 50256}
        begins |= set(range(0, idx.numel(), 16))
        assert documents.tolist() == [*sorted(begins), idx.numel()]


# --- arithmetic


def test_recomputing_changes_nothing(config, tmp_path):
    config = change(config, dropout=0.2, n_layer=2, max_iters=8)
    again = change(config, out=str(tmp_path / "again"), recompute=True)
    train(config, quiet=True)
    train(again, quiet=True)
    assert losses(again) == losses(config)
    assert same_weights(again.out, config.out)


@pytest.mark.parametrize("dtype", ["auto", "fastest", "bfloat16"])
def test_the_dtype_has_a_reason(dtype, monkeypatch):
    class Amx:
        def cpu_isas(self):
            return ["baseline", "amx"]

    given, reason = pick_dtype(dtype, torch.device("cpu"))
    expected = {
        "auto": (torch.float32, "auto: the safe choice on a CPU"),
        "bfloat16": (torch.bfloat16, "as asked"),
    }
    if dtype in expected:
        assert (given, reason) == expected[dtype]
        return
    monkeypatch.setattr("gptfast.train_setup.extension", Amx)
    assert pick_dtype(dtype, torch.device("cpu"))[0] == torch.bfloat16
    monkeypatch.setattr("gptfast.train_setup.extension", lambda: None)
    given, reason = pick_dtype(dtype, torch.device("cpu"))
    assert given == torch.float32
    assert "no AMX" in reason


@pytest.mark.parametrize("architecture", ["llama", "nanochat"])
def test_other_architectures_learn_and_resume(config, tmp_path, monkeypatch, architecture):
    config = change(config, architecture=architecture, n_layer=2, max_iters=30)
    whole = change(config, out=str(tmp_path / "whole"), recompute=True)
    train(whole, quiet=True)
    stopped_and_resumed(config, monkeypatch, 13)
    assert losses(config) == losses(whole)
    assert rows(config)[-1]["train_loss"] < 0.85 * rows(config)[0]["train_loss"]
    assert checkpoint.load(config.out).model.config.norm == "rms"


# --- averages and Muon


def test_the_average_of_weights(config, tmp_path, monkeypatch):
    config = change(config, ema=0.8, max_iters=12, checkpoint_interval=12)
    raw, update = [], Trainer._update

    def watched(trainer):
        if not raw:
            raw.append([p.detach().clone() for p in trainer.parameters])
        loss = update(trainer)
        raw.append([p.detach().clone() for p in trainer.parameters])
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", watched)
        result = train(config, quiet=True)
    expected = raw[0]
    for step in raw[1:]:
        expected = [0.8 * e + 0.2 * p for e, p in zip(expected, step, strict=True)]
    saved = checkpoint.load(result.checkpoint).model
    for given, e, last in zip(saved.parameters(), expected, raw[-1], strict=True):
        torch.testing.assert_close(given, e, rtol=1e-5, atol=1e-6)
        assert not torch.equal(given, last)
    # The average is what is evaluated; training does not see it.
    plain = change(config, out=str(tmp_path / "plain"), ema=0.0)
    train(plain, quiet=True)
    assert [r["train_loss"] for r in rows(plain)] == [r["train_loss"] for r in rows(config)]
    assert rows(plain)[-1]["val_loss"] != rows(config)[-1]["val_loss"]


@pytest.mark.parametrize(
    "options", [{"ema": 0.9, "dropout": 0.1}, {"optimizer": "muon"}], ids=["ema", "muon"]
)
def test_options_resume_bit_by_bit(config, tmp_path, monkeypatch, options):
    config = change(config, **options)
    whole = change(config, out=str(tmp_path / "whole"))
    train(whole, quiet=True)
    stopped_and_resumed(config, monkeypatch, 13)
    assert losses(config) == losses(whole)
    assert same_weights(config.out, whole.out)


def test_muon_learns_and_has_the_matrices_of_the_blocks(config, monkeypatch):
    config = change(config, optimizer="muon", bias=True, max_iters=60)
    kept = []
    monkeypatch.setattr(Trainer, "finish", lambda self, report: kept.append(self))
    train(config, quiet=True)
    trainer = kept[0]
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    adamw, muon = trainer.optimizers
    assert isinstance(muon, torch.optim.Muon)
    of_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    of_adamw = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert of_muon == {
        f"transformer.h.0.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert of_muon | of_adamw == set(names.values())
    assert not of_muon & of_adamw
    assert {g["lr"] for o in trainer.optimizers for g in o.param_groups} == {config.lr(59)}
    assert rows(config)[-1]["train_loss"] < 0.75 * rows(config)[0]["train_loss"]


# --- scores, samples and trackers


def hellaswag_file(tmp_path):
    item = ["From a rose", "2", "we", "no", "it", "die"]
    (tmp_path / "hellaswag.txt").write_text(("\n".join(item) + "\n") * 3)
    return str(tmp_path / "hellaswag.txt")


def test_samples_and_hellaswag_at_estimates(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_log, "LINE_SECONDS", 0.0)
    config = change(
        config, sample_interval=10, hellaswag=hellaswag_file(tmp_path), hellaswag_items=2
    )
    train(config)
    out = capsys.readouterr().out
    assert out.count("sample after step") == 2
    assert "sample after step 10:\n" in out
    scored = {row["step"]: row["hellaswag"] for row in rows(config) if "hellaswag" in row}
    assert sorted(scored) == [5, 10, 15, 20]
    assert all(0 <= score <= 1 for score in scored.values())
    plain = change(config, out=str(tmp_path / "plain"), sample_interval=None, hellaswag=None)
    train(plain, quiet=True)
    assert losses(plain) == losses(config)  # neither touches the training


def test_tensorboard(config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(change(config, tensorboard=True), quiet=True)
    events = EventAccumulator(os.path.join(config.out, "tensorboard"))
    events.Reload()
    given = [(e.step, e.value) for e in events.Scalars("train_loss")]
    expected = [(row["step"], pytest.approx(row["train_loss"])) for row in rows(config)]
    assert given == expected
    assert len(events.Scalars("val_loss")) == 4


def test_weights_and_biases(config, monkeypatch):
    logged = []

    class Run:
        def log(self, numbers, step):
            logged.append((step, numbers["train_loss"]))

        def finish(self):
            logged.append("finished")

    def init(**options):
        assert options["project"] == "mine"
        assert options["config"]["n_layer"] == 1
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    train(change(config, wandb="mine"), quiet=True)
    assert logged == [*((r["step"], r["train_loss"]) for r in rows(config)), "finished"]


def test_curves(config, tmp_path):
    pytest.importorskip("matplotlib")
    train(change(config, plot=True), quiet=True)
    picture = Path(config.out, "curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    draw_curves([Path(config.out)] * 2, tmp_path / "both.svg")
    assert b"<svg" in (tmp_path / "both.svg").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"gone/metrics\.jsonl: expected the metrics"):
        draw_curves([tmp_path / "gone"], tmp_path / "x.png")
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        draw_curves([Path(config.out)], tmp_path / "x.xyz")
    assert not (tmp_path / "x.xyz").exists()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", "pip install tensorboard"),
        ({"wandb": "mine"}, "wandb", "pip install wandb"),
        ({"plot": True}, "matplotlib.figure", r"pip install 'gptfast-kernels\[plot\]'"),
    ],
)
def test_trackers_that_are_not_installed(config, monkeypatch, options, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        train(change(config, **options), quiet=True)
    assert not os.path.exists(config.out)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_step": 1000}, "tokens_per_step must be a multiple of .* = 64, got 1000"),
        ({"tokens_per_step": 0}, "tokens_per_step must be at least 1, got 0"),
        ({"sample_interval": 3}, "sample_interval must be a multiple of eval_interval 5, got 3"),
        ({"hellaswag_items": 0}, "hellaswag_items must be at least 1, got 0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1\.0"),
        ({"decay_fraction": 0.0}, r"decay_fraction must be in \(0, 1\], got 0\.0"),
        ({"rank_timeout": 0.0}, "rank_timeout must be above 0, got 0"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, wsd, constant, got 'step'"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon, got 'sgd'"),
        ({"sampling": "x"}, "sampling must be one of random, epochs, got 'x'"),
        ({"strategy": "x"}, "strategy must be one of ddp, fsdp, got 'x'"),
        ({"separate_documents": True}, "separate_documents needs a tokenizer with an end-of-text"),
        (
            {"dtype": "bfloat16", "master_weights": True, "ema": 0.9},
            "master_weights does not go with ema or muon",
        ),
        ({"sampling": "epochs", "block_size": 2000}, r"train must have at least block_size \+ 1"),
    ],
)
def test_settings(config, options, message):
    with pytest.raises(ValueError, match=message):
        train(change(config, **options), quiet=True)


def test_hellaswag_that_is_not_there(config):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        train(change(config, hellaswag="gone.jsonl"), quiet=True)


# --- twenty kills


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"sampling": "epochs", "ema": 0.9, "dropout": 0.1}])
def test_twenty_kills_leave_no_trace(config, tmp_path, options):
    config = change(
        config, **options, max_iters=3000, checkpoint_interval=7, eval_interval=9, min_lr=1e-3
    )
    whole = change(config, out=str(tmp_path / "whole"))
    train(whole, quiet=True)
    for _ in range(20):
        before = checkpoint.latest(config.out)
        process = run_process(config, "--resume")
        wait_for(lambda before=before: checkpoint.latest(config.out) != before, process)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.communicate()
    reached = checkpoint.load_training(checkpoint.latest(config.out))["row"]["step"]
    assert reached < 3000  # else the last kills hit nothing
    train(change(config, resume=True), quiet=True)
    assert losses(config) == losses(whole)
    assert same_weights(config.out, whole.out)


def test_the_budget_of_gpt2():
    config = TrainConfig.preset("gpt2", batch_size=16, tokens_per_step=524_288)
    assert config.accumulation == 32
    assert math.isclose(config.lr(config.max_iters), config.learning_rate / 10)
    assert dataclasses.asdict(config)["tokens_per_step"] == 2**19
