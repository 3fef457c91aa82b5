"""Two real processes, with gloo: the same training as one, stopped, resumed, and broken off."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gptfast import checkpoint
from gptfast.distributed import Ranks, processes
from gptfast.train import TrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = 20 * "From fairest creatures we desire increase,\nThat thereby beauty's rose may not die,\n"
DROPPED = {"dropout": 0.2, "max_iters": 20, "ema": 0.9, "sampling": "epochs"}
RUNS = {
    "ddp": {},
    "fsdp": {"strategy": "fsdp"},
    "fsdp-options": {"strategy": "fsdp", "recompute": True, "sample_interval": 25},
    "fsdp-nanochat": {"strategy": "fsdp", "architecture": "nanochat", "max_iters": 3},
    "ddp-whole": DROPPED,
    "ddp-stopped": DROPPED,
    "fsdp-whole": {**DROPPED, "strategy": "fsdp"},
    "fsdp-stopped": {**DROPPED, "strategy": "fsdp"},
}


def tiny(folder):
    (folder / "text.txt").write_text(TEXT)
    return TrainConfig(
        out=str(folder / "one"),
        file=str(folder / "text.txt"),
        n_layer=2,
        n_head=2,
        n_embd=16,
        block_size=16,
        batch_size=4,
        bias=True,
        gradient_accumulation=4,
        max_iters=50,
        learning_rate=1e-2,
        warmup_iters=3,
        log_interval=1,
        eval_interval=25,
        eval_iters=3,
        checkpoint_interval=25,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with all of RUNS, made by two processes, and `one`, made by this one."""
    folder = tmp_path_factory.mktemp("runs")
    base = tiny(folder)
    (folder / "base.json").write_text(json.dumps(dataclasses.asdict(base)))
    (folder / "runs.json").write_text(json.dumps(RUNS))
    script = str(Path(__file__).with_name("distributed_runs.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    result = subprocess.run(
        [*command, script, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (folder / "stdout").write_text(result.stdout)
    train(base, quiet=True)
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder, name="train_loss"):
    return np.array([row[name] for row in rows(folder) if row[name] is not None])


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp-options"])
def test_two_processes_train_like_one(runs, name):
    one, two = losses(runs / "one"), losses(runs / name)
    assert len(one) == len(two) == 50
    assert one[-1] < 0.8 * one[0]
    assert np.abs(one - two).max() < 1e-5
    val = losses(runs / "one", "val_loss"), losses(runs / name, "val_loss")
    assert np.abs(val[0] - val[1]).max() < 1e-5
    ours, theirs = (dict(checkpoint.load(runs / n).model.named_parameters()) for n in ("one", name))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        given = theirs[key]
        if key.endswith("c_attn.bias"):
            # A bias of all keys does not change softmax: its gradient is nothing but rounding
            # errors, which Adam makes as large as any.
            value, given = (torch.cat([x[:16], x[32:]]) for x in (value, given))
        torch.testing.assert_close(given, value, rtol=1e-3, atol=1e-4)


def test_only_rank_0_prints(runs):
    printed = (runs / "stdout").read_text()
    assert printed.count("model     ") == len(RUNS)
    assert "processes 2, ddp: 2 of a step's 4 batches each" in printed
    assert "processes 2, fsdp: 2 of a step's 4 batches each" in printed
    assert printed.count("sample after step 25:") == 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_all_and_resuming_is_exact(runs, strategy):
    whole, stopped = runs / f"{strategy}-whole", runs / f"{strategy}-stopped"
    assert losses(whole).tolist() == losses(stopped).tolist()
    assert losses(whole, "val_loss").tolist() == losses(stopped, "val_loss").tolist()
    ours, theirs = (dict(checkpoint.load(f).model.named_parameters()) for f in (whole, stopped))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_in_the_checkpoints(runs):
    path = checkpoint.latest(runs / "fsdp")
    assert {p.name for p in path.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "training.pt", "sharded")
    }
    assert len(list((path / "sharded").glob("*.distcp"))) == 2
    assert checkpoint.verify_sharded(path) == path / "sharded"
    assert "optimizer" not in checkpoint.load_training(path)
    assert checkpoint.verify_sharded(checkpoint.latest(runs / "ddp")) is None
    assert not list(runs.rglob("*.tmp"))
    shard = next((path / "sharded").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"sharded/.*distcp: expected sha256"):
        checkpoint.verify_sharded(path)


def test_one_process_goes_on_with_what_two_began(runs):
    config = dataclasses.replace(tiny(runs), out=str(runs / "ddp"), resume=True, max_iters=52)
    assert train(config, quiet=True).step == 52
    config = dataclasses.replace(config, out=str(runs / "fsdp"))
    with pytest.raises(ValueError, match=r"training\.pt: expected the training state of this"):
        train(config, quiet=True)


def start_two(config):
    """The command line in two processes, as torchrun would start them."""
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in dataclasses.asdict(config).items()
        if value is not None and not isinstance(value, bool)
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "gptfast", "train", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in "01"
    ]


# A kill is noticed at once; the other limit leaves room for a slow start on a busy machine.
@pytest.mark.parametrize(
    ("number", "timeout"),
    [(signal.SIGKILL, 600.0), pytest.param(signal.SIGSTOP, 15.0, marks=pytest.mark.slow)],
    ids=["killed", "hangs"],
)
def test_a_lost_process_stops_the_others(tmp_path, number, timeout):
    config = dataclasses.replace(
        tiny(tmp_path), max_iters=100_000, checkpoint_interval=10, rank_timeout=timeout
    )
    first, second = start_two(config)
    try:
        until = time.monotonic() + 90
        while checkpoint.latest(config.out) is None:
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < until
            time.sleep(0.01)
        second.send_signal(number)
        out, err = first.communicate(timeout=90)
    finally:
        for process in (first, second):
            process.kill()
    assert first.returncode == 2, (out, err)
    last = err.strip().splitlines()[-1]
    assert "gptfast: error: rank 0 of 2: another process was lost, or did not answer" in last
    assert f"the last good checkpoint is {checkpoint.latest(config.out)}" in last


# --- without other processes


def test_alone():
    ranks = Ranks()
    assert ranks.first
    assert ranks.on_first(lambda: 3) == 3
    assert (ranks.total(2.5), ranks.largest(7)) == (2.5, 7)
    assert ranks.gathered(torch.arange(3)).tolist() == [[0, 1, 2]]


def test_torchruns_variables(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with (
        pytest.raises(ValueError, match="WORLD_SIZE is 2: expected LOCAL_RANK in the environment"),
        processes(1.0),
    ):
        pass
