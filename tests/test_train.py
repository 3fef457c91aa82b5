"""Training runs at tiny sizes: what they learn, leave behind, survive and refuse.

Longer than 500 lines: a table of what may be damaged or refused, beside the tests that read it.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import gptfast.train_setup
from gptfast import backend, checkpoint, train_log
from gptfast.data import Dataset, prepare_text
from gptfast.models import GPT, GPTConfig
from gptfast.optim import AdamW
from gptfast.train import (
    PRESETS,
    TrainConfig,
    Trainer,
    read_settings,
    train,
    validation_loss,
)
from gptfast.train_setup import _optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = 20 * "From fairest creatures we desire increase,\nThat thereby beauty's rose may not die,\n"
KEYS = {"step", "train_loss", "val_loss", "tok_per_s", "lr", "elapsed"}


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return TrainConfig(
        out=str(tmp_path / "out"),
        file=str(text),
        n_layer=1,
        n_head=2,
        n_embd=16,
        block_size=16,
        batch_size=4,
        max_iters=20,
        learning_rate=1e-2,
        warmup_iters=3,
        log_interval=1,
        eval_interval=5,
        eval_iters=2,
        checkpoint_interval=5,
    )


def change(config, **changes):
    return dataclasses.replace(config, **changes)


def rows(config):
    with open(os.path.join(config.out, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def losses(config):
    return [(row["step"], row["train_loss"], row["val_loss"]) for row in rows(config)]


def weights(path):
    return dict(checkpoint.load(path).model.named_parameters())


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names(config):
    return sorted(os.listdir(config.out))


def stop_at(monkeypatch, call, signals=(signal.SIGTERM,)):
    """Send this process signals while it draws its `call`-th batch to train on."""
    draw, calls = Dataset.batch, 0

    def batch(self, split, *args):
        nonlocal calls
        calls += split == "train"
        if split == "train" and calls == call:
            for number in signals:
                os.kill(os.getpid(), number)
        return draw(self, split, *args)

    monkeypatch.setattr(Dataset, "batch", batch)


# --- what a run does


def test_the_loss_falls_and_the_folder_is_complete(config):
    config = change(
        config, max_iters=120, log_interval=10, eval_interval=50, checkpoint_interval=60
    )
    result = train(config, quiet=True)
    table = rows(config)
    assert [row["step"] for row in table] == [*range(10, 121, 10)]
    assert all(row.keys() == KEYS for row in table)
    assert [row["step"] for row in table if row["val_loss"] is not None] == [50, 100, 120]
    assert all(type(row["train_loss"]) is float and row["tok_per_s"] > 0 for row in table)
    assert [row["elapsed"] for row in table] == sorted(row["elapsed"] for row in table)
    assert [row["lr"] for row in table] == [config.lr(row["step"] - 1) for row in table]
    assert table[0]["train_loss"] > 2
    assert table[-1]["train_loss"] < 0.75 * table[0]["train_loss"]
    assert table[-1]["val_loss"] < 0.9 * table[0]["train_loss"]
    assert result.step == 120
    assert result.train_loss == table[-1]["train_loss"]
    assert result.val_loss == table[-1]["val_loss"]
    assert result.interrupted is None
    assert result.checkpoint == checkpoint.latest(config.out)
    assert result.checkpoint.name == "step_000120"
    assert read_settings(config.out) == config
    loaded = checkpoint.load(result.checkpoint)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("beauty")) == "beauty"
    assert loaded.model.config == config.model_config(loaded.tokenizer.vocab_size)


@pytest.fixture
def our_adamw(monkeypatch, request):
    """Whether runs take `gptfast.optim.AdamW` (on the reference), as where it has a kernel."""
    monkeypatch.setattr(backend.Op, "has_kernel", lambda op, x: request.param)
    kinds = []
    monkeypatch.setattr(
        gptfast.train_setup,
        "_optimizer",
        lambda *args: kinds.append(_optimizer(*args)) or kinds[-1],
    )
    yield request.param
    assert {isinstance(kind, AdamW) for kind in kinds} == {request.param}


@pytest.mark.parametrize("our_adamw", [False, True], indirect=True)
def test_a_run_is_the_plain_loop(config, our_adamw):
    config = change(config, max_iters=8, gradient_accumulation=2, bias=True, grad_clip=0.5)
    result = train(config, quiet=True)

    dataset = Dataset.in_memory(TEXT)
    torch.manual_seed(config.seed)
    model = GPT(config.model_config(dataset.vocab_size))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0}],
        betas=(0.9, 0.99),
        weight_decay=0.1,
        fused=False,
    )
    generator = torch.Generator().manual_seed(config.seed)
    expected = []
    for step in range(8):
        lr = 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 3) / 5)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 4 if step < 3 else lr
        batches = [dataset.batch("train", 4, 16, generator) for _ in range(2)]
        loss = sum(model(x, y)[1] for x, y in batches) / 2
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1, 0.5 / norm)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert [row["train_loss"] for row in rows(config)] == pytest.approx(expected, rel=1e-5)
    for name, given in weights(result.checkpoint).items():
        torch.testing.assert_close(given, model.get_parameter(name), rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_run(config, tmp_path):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = change(config, out=str(tmp_path / name), seed=seed, dropout=0.2)
        torch.manual_seed(len(runs))  # the caller's random numbers do not matter
        before = torch.get_rng_state()
        train(run, quiet=True)
        assert torch.equal(torch.get_rng_state(), before)  # and are left alone
        runs.append(losses(run))
    assert runs[0] == runs[1]
    assert all(a[1] != c[1] for a, c in zip(runs[0], runs[2], strict=True))


def test_final_validation_counts_every_token_once(config):
    result = train(change(config, max_iters=3), quiet=True)
    model = checkpoint.load(result.checkpoint).model
    val = Dataset.in_memory(TEXT).val.astype(np.int64)
    total, count, T = 0.0, 0, config.block_size
    for start in range(0, len(val) - 1, T):
        window = torch.from_numpy(val[start : start + T + 1])
        with torch.no_grad():
            logits = model(window[None, :-1])[0].double()
        loss = torch.nn.functional.cross_entropy(logits[0], window[1:], reduction="sum")
        total, count = total + float(loss), count + len(window) - 1
    assert count == len(val) - 1
    assert result.val_loss == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("length", [2, 5, 16, 17, 18, 33, 64, 65, 66, 100])
def test_validation_windows(length):
    tokens = np.random.default_rng(0).permutation(length).astype(np.uint16)
    seen = []

    def model(x, y):
        assert x.shape == y.shape
        assert x.shape[0] <= 3
        assert x.shape[1] <= 16
        seen.extend(zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
        return None, y.float().mean()

    told = []
    loss = validation_loss(
        model, tokens, batch_size=3, block_size=16, on_done=lambda *of: told.append(of)
    )
    assert told[0] == (0, length - 1)
    assert told[-1] == (length - 1, length - 1)
    ids = tokens.tolist()
    assert seen == list(itertools.pairwise(ids))
    assert loss == pytest.approx(float(np.mean(ids[1:])), rel=1e-6)


def test_validation_of_nothing():
    with pytest.raises(ValueError, match="expected at least 2 tokens, got 1"):
        validation_loss(lambda x, y: (None, y), np.zeros(1, np.uint16), 1, 1)


@pytest.mark.parametrize("val_fraction", [0.0, 0.001, 0.008])
def test_small_validation_splits(config, val_fraction):
    config = change(config, val_fraction=val_fraction, max_iters=6)
    result = train(config, quiet=True)
    assert (result.val_loss is None) == (val_fraction < 0.001)
    assert [row["val_loss"] is None for row in rows(config)][-2:] == [result.val_loss is None] * 2


def test_accumulated_batches_are_one_large_batch(config, tmp_path):
    whole = change(config, out=str(tmp_path / "whole"), batch_size=12)
    parts = change(config, out=str(tmp_path / "parts"), batch_size=3, gradient_accumulation=4)
    train(whole, quiet=True)
    train(parts, quiet=True)
    # The generator draws the same windows; the sums are rounded in another order.
    for a, b in zip(losses(whole), losses(parts), strict=True):
        assert a[1] == pytest.approx(b[1], rel=1e-4)
        assert [a[0], a[2] is None] == [b[0], b[2] is None]
    assert rows(parts)[-1]["val_loss"] == pytest.approx(rows(whole)[-1]["val_loss"], rel=1e-4)


MASTER_WEIGHTS = {"dtype": "bfloat16", "master_weights": True}


@pytest.mark.parametrize(
    "options", [{"backend": "torch"}, {"dtype": "bfloat16"}, MASTER_WEIGHTS], ids=str
)
def test_other_ways_of_computing_learn_the_same(config, tmp_path, options):
    train(config, quiet=True)
    other = change(config, out=str(tmp_path / "other"), **options)
    train(other, quiet=True)
    # bfloat16 has 8 bits: a hundredth of the loss, after 20 steps.
    tolerance = 3e-2 if "dtype" in options else 1e-4
    assert rows(other)[0]["train_loss"] == pytest.approx(rows(config)[0]["train_loss"], tolerance)
    assert rows(other)[-1]["val_loss"] == pytest.approx(rows(config)[-1]["val_loss"], 3e-2)
    assert {p.dtype for p in weights(other.out).values()} == {torch.float32}  # as loaded


def test_master_weights_are_what_learns(config):
    train(change(config, **MASTER_WEIGHTS), quiet=True)
    path = checkpoint.latest(config.out)
    masters = [s["master"] for s in checkpoint.load_training(path)["optimizer"]["state"].values()]
    model = checkpoint.load(path).model
    assert {m.dtype for m in masters} == {torch.float32}
    by_group = [p for p in model.parameters() if p.dim() >= 2]
    by_group += [p for p in model.parameters() if p.dim() < 2]
    for parameter, master in zip(by_group, masters, strict=True):
        assert torch.equal(parameter, master.bfloat16().float())
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters)


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_master_weights_of_another_dtype(config, dtype):
    with pytest.raises(ValueError, match="master_weights: dtype must be bfloat16, got float"):
        train(change(config, dtype=dtype, master_weights=True), quiet=True)
    assert checkpoint.latest(config.out) is None


def test_float16_scales_its_loss(config):
    config = change(config, dtype="float16", max_iters=40)
    train(change(config, max_iters=20), quiet=True)
    state = checkpoint.load_training(checkpoint.latest(config.out))
    assert state["scaler"]["scale"] > 1
    train(change(config, resume=True), quiet=True)
    assert rows(config)[-1]["train_loss"] < 0.9 * rows(config)[0]["train_loss"]
    # To another dtype and back.
    train(change(config, resume=True, dtype="float32", max_iters=41), quiet=True)
    assert train(change(config, resume=True, max_iters=42), quiet=True).step == 42


def test_a_prepared_folder(config, tmp_path):
    prepare_text(TEXT, tmp_path / "data")
    prepared = change(config, file=None, data=str(tmp_path / "data"), out=str(tmp_path / "b"))
    train(config, quiet=True)
    train(prepared, quiet=True)
    assert losses(prepared) == losses(config)


def test_gpt2_tokens_in_a_padded_vocabulary(config):
    config = change(config, tokenizer="gpt2", vocab_size=50304, max_iters=2)
    result = train(config, quiet=True)
    loaded = checkpoint.load(result.checkpoint)
    assert (loaded.model.config.vocab_size, loaded.tokenizer.vocab_size) == (50304, 50257)


def test_only_matrices_decay():
    model = GPT(GPTConfig(8, 5, n_layer=2, n_head=1, n_embd=4, bias=True))
    decayed, other = _optimizer(
        list(model.parameters()), TrainConfig(weight_decay=0.3)
    ).param_groups
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.3, 0)
    names_of = {id(p): name for name, p in model.named_parameters()}
    assert all(names_of[id(p)].endswith("weight") and p.dim() == 2 for p in decayed["params"])
    assert all("ln_" in names_of[id(p)] or "bias" in names_of[id(p)] for p in other["params"])
    assert len(decayed["params"]) + len(other["params"]) == len(names_of)


def test_learning_rates():
    config = TrainConfig(learning_rate=1.0, warmup_iters=9, max_iters=109)
    assert config.lr(0) == pytest.approx(0.1)
    assert config.lr(8) == pytest.approx(0.9)
    assert config.lr(9) == pytest.approx(1.0)
    assert config.lr(59) == pytest.approx(0.55)
    assert config.lr(109) == config.lr(10**6) == pytest.approx(0.1)
    short = change(config, max_iters=5, min_lr=0.0)  # all of it warm-up
    assert [short.lr(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 0.0, 0.0])
    assert change(config, warmup_iters=0, min_lr=0.5, lr_decay_iters=10).lr(5) == 0.75


# --- what it prints


def test_lines(config, capsys, monkeypatch):
    monkeypatch.setattr(train_log, "LINE_SECONDS", 0.0)
    result = train(config)
    out, err = capsys.readouterr()
    assert err == ""
    assert "device    cpu, float32 (auto: the safe choice on a CPU), backend auto" in out
    lines = [line for line in out.splitlines() if line.startswith("step")]
    assert len(lines) == 20
    assert [line.split()[1] for line in lines if " val " in line] == [
        "5/20",
        "10/20",
        "15/20",
        "20/20",
    ]
    assert f"validation loss over the whole split: {result.val_loss:.4f}" in out
    assert f"checkpoint: {result.checkpoint}" in out
    assert out.endswith(f"to generate: gptfast generate --checkpoint {config.out}\n")
    assert "\x1b" not in out


def test_a_progress_bar_on_a_terminal(config, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    train(config)
    shown = terminal.getvalue()
    assert "20/20" in shown
    assert "tok/s" in shown
    assert "validation loss over the whole split" in shown


def test_quiet(config, capsys):
    train(config, quiet=True)
    assert capsys.readouterr() == ("", "")


# --- stopping and going on


@pytest.mark.parametrize(
    ("options", "number", "our_adamw"),
    [
        *[
            (options, number, ours)
            for options in ({}, {"dropout": 0.2, "gradient_accumulation": 2})
            for number, ours in ((signal.SIGTERM, False), (signal.SIGINT, True))
        ],
        (MASTER_WEIGHTS, signal.SIGTERM, True),
    ],
    ids=str,
    indirect=["our_adamw"],
)
def test_stop_and_resume_is_bit_identical(
    config, tmp_path, monkeypatch, capsys, options, number, our_adamw
):
    config = change(config, **options, log_interval=2)
    whole = change(config, out=str(tmp_path / "whole"))
    train(whole, quiet=True)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_at(patch, 13, [number])
        result = train(config)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    step = 13 if config.gradient_accumulation == 1 else 7
    assert (result.interrupted, result.step, result.val_loss) == (number, step, None)
    assert result.checkpoint.name == f"step_{step:06d}"
    out = capsys.readouterr().out
    assert f"stopped by {number.name} after step {step}; to go on: gptfast train --out " in out

    resumed = train(change(config, resume=True), quiet=True)
    assert losses(config) == losses(whole)
    assert same_weights(resumed.checkpoint, checkpoint.latest(whole.out))
    assert all(row["elapsed"] > 0 for row in rows(config))


def test_stopped_before_the_first_row(config, monkeypatch):
    config = change(config, log_interval=10, eval_interval=10, checkpoint_interval=10)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        train(config, quiet=True)
    assert rows(config) == []
    ended = train(change(config, resume=True, max_iters=3), quiet=True)
    assert [(row["step"], row["val_loss"]) for row in rows(config)] == [(3, ended.val_loss)]


def test_a_second_signal_stops_at_once(config, monkeypatch):
    stop_at(monkeypatch, 8, [signal.SIGINT, signal.SIGINT])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test worker ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, quiet=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint.latest(config.out).name == "step_000005"


def test_training_in_a_thread_sets_no_handlers(config):
    import threading

    results = []
    thread = threading.Thread(target=lambda: results.append(train(config, quiet=True)))
    thread.start()
    thread.join()
    assert results[0].step == 20


def test_resume_after_a_kill_drops_what_came_after_the_checkpoint(config, tmp_path, monkeypatch):
    whole = change(config, out=str(tmp_path / "whole"))
    train(whole, quiet=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        train(config, quiet=True)
    # As if it had got to step 15, and had been killed while writing row 16.
    with open(os.path.join(config.out, "metrics.jsonl"), "a") as file:
        file.write('{"step": 14, "train_loss": 9.0}\n{"step": 15, "train_loss": 9.0}\n{"step": 1')
    train(change(config, resume=True), quiet=True)
    assert losses(config) == losses(whole)


def test_resume_after_the_end(config):
    train(config, quiet=True)
    table = rows(config)
    again = change(config, resume=True)
    result = train(again, quiet=True)
    assert result.step == 20
    assert result.val_loss == table[-1]["val_loss"]
    assert result.train_loss == table[-1]["train_loss"]
    assert rows(config) == table

    # Killed between the last checkpoint and the last row.
    with open(os.path.join(config.out, "metrics.jsonl"), "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in table[:-1])
    train(again, quiet=True)
    assert rows(config) == table

    assert train(change(again, max_iters=7), quiet=True).step == 20  # the settings say less
    assert rows(config) == table

    longer = train(change(again, max_iters=25), quiet=True)
    assert longer.step == 25
    assert [row["step"] for row in rows(config)] == list(range(1, 26))


def test_resume_of_nothing_starts(config, capsys):
    result = train(change(config, resume=True))
    assert result.step == 20
    assert "resuming  nothing: no checkpoint in" in capsys.readouterr().out
    shutil.rmtree(result.checkpoint)  # killed before the first checkpoint: rows without one
    before = losses(config)
    train(change(config, resume=True), quiet=True)
    assert losses(config) == before


def test_changed_settings_are_used_and_named(config, capsys):
    train(change(config, max_iters=10), quiet=True)
    train(change(config, resume=True, weight_decay=0.3, beta1=0.8))
    out = capsys.readouterr().out
    assert "changed   max_iters 10 -> 20" in out
    assert "changed   weight_decay 0.1 -> 0.3" in out
    group = checkpoint.load_training(checkpoint.latest(config.out))["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["betas"]) == (0.3, (0.8, 0.99))


def run_process(config, *more):
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in dataclasses.asdict(config).items()
        if value is not None and not isinstance(value, bool)
    ]
    command = [sys.executable, "-m", "gptfast", "train", *options, *more]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, process):
    until = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


def test_kill_9_at_a_random_moment_then_resume(config, tmp_path):
    # A checkpoint at every step: the kill falls into a write more often than not. min_lr is said,
    # since the command's preset has its own, which moves the loss's last digit from step 29 on.
    config = change(config, max_iters=100_000, checkpoint_interval=1, eval_interval=3, min_lr=1e-3)
    process = run_process(config)
    wait_for(lambda: checkpoint.latest(config.out), process)
    time.sleep(random.uniform(0, 0.5))
    process.kill()
    process.communicate()

    visible = [name for name in names(config) if name.startswith("step_")]
    assert visible
    for name in visible:
        checkpoint.load(os.path.join(config.out, name))
        checkpoint.load_training(os.path.join(config.out, name))
    # The learning rate depends on max_iters: stop, where a shorter run would end.
    reached = checkpoint.load(checkpoint.latest(config.out)).step
    whole = change(config, out=str(tmp_path / "whole"), checkpoint_interval=100_000)
    for run in (change(config, resume=True), whole):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, reached + 5 - (reached if run.resume else 0))
            assert train(run, quiet=True).step == reached + 5
    assert losses(config) == losses(whole)
    assert same_weights(checkpoint.latest(config.out), checkpoint.latest(whole.out))
    assert not [name for name in names(config) if name.endswith(".tmp")]


def test_sigterm_to_a_process(config):
    config = change(config, max_iters=100_000, checkpoint_interval=100_000)
    process = run_process(config)
    wait_for(lambda: os.path.exists(os.path.join(config.out, "metrics.jsonl")), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == ""
    assert "stopped by SIGTERM after step" in out
    step = checkpoint.load(config.out).step
    assert f"after step {step};" in out
    assert checkpoint.load_training(checkpoint.latest(config.out))["row"]["step"] == step


# --- what it refuses


def test_a_folder_that_is_not_empty(config):
    os.makedirs(config.out)
    train(change(config, max_iters=1), quiet=True)  # an empty one is fine
    table = losses(config)
    with pytest.raises(FileExistsError, match=r"new or empty folder.*add --resume"):
        train(config, quiet=True)
    assert losses(config) == table
    other = os.path.join(config.out, "other")
    os.makedirs(other)
    with open(os.path.join(other, "thesis.txt"), "w") as file:
        file.write("mine")
    with pytest.raises(FileExistsError, match=r"other: expected a new or empty folder"):
        train(change(config, out=other), quiet=True)
    assert os.listdir(other) == ["thesis.txt"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_cannot_be_made(config, tmp_path, resume):
    for out in (tmp_path / "text.txt", tmp_path / "text.txt" / "below"):
        with pytest.raises(OSError, match=r"text\.txt"):
            train(change(config, out=str(out), resume=resume), quiet=True)
    assert (tmp_path / "text.txt").read_text() == TEXT


def test_what_cannot_run_leaves_no_files(config):
    for options, error in [
        ({"backend": "cuda"}, RuntimeError),
        ({"device": "cuda:99"}, RuntimeError),
        ({"file": "/nowhere.txt"}, FileNotFoundError),
        ({"block_size": 10**4}, ValueError),
        ({"vocab_size": 5}, ValueError),
    ]:
        with pytest.raises(error):
            train(change(config, **options), quiet=True)
        assert not os.path.exists(config.out) or os.listdir(config.out) == []
    train(config, quiet=True)


@pytest.mark.parametrize("log_interval", [1, 7])
def test_a_loss_that_is_no_number(config, log_interval):
    train(change(config, max_iters=10), quiet=True)
    bad = change(config, resume=True, learning_rate=1e30, grad_clip=0.0, log_interval=log_interval)
    message = r"loss is (nan|inf) at step 1\d, so training stops .*last good checkpoint is .*000010"
    with pytest.raises(FloatingPointError, match=message):
        train(bad, quiet=True)
    assert checkpoint.latest(config.out).name == "step_000010"
    assert all(math.isfinite(row["train_loss"]) for row in rows(config))
    assert train(change(config, resume=True), quiet=True).step == 20


def test_weights_that_are_no_numbers_are_not_saved(config, monkeypatch):
    config = change(config, checkpoint_interval=1, max_iters=3)
    update = Trainer._update

    def poison(trainer):
        loss = update(trainer)
        if trainer.step == 1:
            trainer.parameters[0].detach().fill_(math.nan)
        return loss

    monkeypatch.setattr(Trainer, "_update", poison)
    with pytest.raises(FloatingPointError, match=r"is not finite at step 2.*000001"):
        train(config, quiet=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0, got -1.0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0, got nan"),
        ({"learning_rate": math.inf}, "learning_rate must be above 0, got inf"),
        ({"learning_rate": "1"}, "learning_rate must be float, got '1'"),
        ({"min_lr": 1.0}, r"min_lr must be in \[0, learning_rate 0\.001\], got 1\.0"),
        ({"max_iters": 0}, "max_iters must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be int, got 1.5"),
        ({"gradient_accumulation": 0}, "gradient_accumulation must be at least 1, got 0"),
        ({"log_interval": 0}, "log_interval must be at least 1, got 0"),
        ({"eval_interval": 0}, "eval_interval must be at least 1, got 0"),
        ({"eval_iters": 0}, "eval_iters must be at least 1, got 0"),
        ({"checkpoint_interval": 0}, "checkpoint_interval must be at least 1, got 0"),
        ({"warmup_iters": -1}, "warmup_iters must be at least 0, got -1"),
        ({"lr_decay_iters": 0}, "lr_decay_iters must be at least 1, got 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"grad_clip": math.nan}, "grad_clip must be at least 0, got nan"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1\.0"),
        ({"beta2": -0.1}, r"beta2 must be in \[0, 1\), got -0\.1"),
        ({"seed": -1}, r"seed must be in \[0, 2\^63\), got -1"),
        ({"dtype": "bf16"}, "dtype must be one of auto, fastest, float32, bfloat16, float16, got"),
        ({"backend": "numpy"}, "backend must be one of auto, torch, cpu, .*, got 'numpy'"),
        ({"tokenizer": "bpe"}, "tokenizer must be one of char, gpt2, got 'bpe'"),
        ({"n_head": 3}, "n_head must divide n_embd 128, got 3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
        ({"vocab_size": 0}, "vocab_size must be at least the tokenizer's 1, got 0"),
        ({"file": "a", "data": "b"}, "expected file or data, got both: 'a' and 'b'"),
    ],
)
def test_settings(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_presets():
    # nanoGPT's recipe (4 layers, 4 heads, 128 channels, ...) is the default, but for these two.
    assert PRESETS["shakespeare-char-cpu"] == TrainConfig(learning_rate=2e-3, min_lr=1e-4)
    assert TrainConfig.preset("demo", max_iters=5) == change(PRESETS["demo"], max_iters=5)
    with pytest.raises(ValueError, match="unknown preset 'demi'; known: shakespeare-char-cpu, "):
        TrainConfig.preset("demi")
    sizes = {"shakespeare-char-cpu": 65, "shakespeare-char": 65, "gpt2": 50257, "demo": 67}
    with torch.device("meta"):
        counts = {
            name: GPT(PRESETS[name].model_config(V)).num_parameters() for name, V in sizes.items()
        }
    assert counts["gpt2"] == 124_439_808
    # nanoGPT prints them without the position embeddings.
    assert counts["shakespeare-char"] - 256 * 384 == 10_646_784
    assert counts["shakespeare-char-cpu"] - 64 * 128 == 795_904


def test_data_of_more_tokens_than_the_model(config):
    with pytest.raises(ValueError, match=r"vocab_size must be at least the tokenizer's 2\d, got 9"):
        train(change(config, vocab_size=9), quiet=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layer": 2}, r"config\.json: expected n_layer 2 by the settings, got 1"),
        ({"bias": True}, r"config\.json: expected bias True by the settings, got False"),
        ({"tokenizer": "gpt2"}, r"config\.json: expected vocab_size 50257 by the settings, got"),
        (MASTER_WEIGHTS, r"training\.pt: expected master_weights True by the settings, got False"),
        ({"val_fraction": 0.2}, r"training\.pt: expected to go on with its \d+ training tokens"),
    ],
)
def test_resume_with_what_does_not_fit(config, options, message):
    train(config, quiet=True)
    with pytest.raises(ValueError, match=message):
        train(change(config, resume=True, **options), quiet=True)


def test_resume_on_another_text(config, tmp_path):
    train(config, quiet=True)
    (tmp_path / "text.txt").write_text(TEXT.replace("F", "Z"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected the tokenizer of the data"):
        train(change(config, resume=True), quiet=True)


def edit_training(path, edit):
    import hashlib

    file = path / "training.pt"
    state = torch.load(file, weights_only=True)
    edit(state)
    torch.save(state, file)
    header = json.loads((path / "config.json").read_text())
    header["sha256"]["training.pt"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (path / "config.json").write_text(json.dumps(header))


def moments(state):
    return state["optimizer"]["state"][0]


@pytest.mark.parametrize(
    "edit",
    [
        lambda s: s.clear(),
        lambda s: s["row"].update(step="x"),
        lambda s: s.update(row=3),
        lambda s: s.update(optimizer=None),
        lambda s: s["optimizer"]["param_groups"].pop(),
        lambda s: s["optimizer"].update(state={0: {}}),
        lambda s: moments(s).update(exp_avg=torch.zeros(2)),
        lambda s: moments(s).update(exp_avg_sq=3),
        lambda s: moments(s).pop("step"),
        lambda s: s["generators"].update(data=torch.zeros(3)),
        lambda s: s["generators"].update(torch=torch.zeros(3, dtype=torch.uint8)),
        lambda s: s["generators"].pop("data"),
    ],
)
def test_training_states_that_make_no_sense(config, edit):
    path = train(change(config, max_iters=5), quiet=True).checkpoint
    edit_training(path, edit)
    with pytest.raises(ValueError, match=r"training\.pt: expected"):
        train(change(config, resume=True), quiet=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", "{", r"train\.json: expected JSON"),
        ("train.json", "{}", r"train\.json: expected the fields"),
        (
            "metrics.jsonl",
            "hello\n",
            r"metrics\.jsonl, line 1: expected .* got b'hello'",
        ),
        ("metrics.jsonl", '{"step": 1}\n[]\n', r"metrics\.jsonl, line 2: expected .* got b'\[\]'"),
        ("metrics.jsonl", '{"step": "1"}\n', r"metrics\.jsonl, line 1: expected a JSON object"),
    ],
)
def test_damaged_files_of_a_run(config, name, content, message):
    train(config, quiet=True)
    with open(os.path.join(config.out, name), "w") as file:
        file.write(content)
    with pytest.raises(ValueError, match=message):
        train(change(config, resume=True, max_iters=30))


def test_full_disk(config, small_disk):
    config = change(config, out=str(small_disk / "run"), n_embd=64, checkpoint_interval=1)
    with pytest.raises(OSError, match=r"No space left on device; the last good .*step_000001"):
        train(config, quiet=True)
    assert names(config) == ["metrics.jsonl", "step_000001", "train.json"]
    checkpoint.load(config.out)
    with contextlib.suppress(OSError), (small_disk / "fill").open("wb") as fill:
        fill.write(bytes(1 << 20))
    with pytest.raises(OSError, match=r"cannot write .*: .*No space left.*; the last.*step_000001"):
        train(change(config, resume=True), quiet=True)
    checkpoint.load(config.out)
