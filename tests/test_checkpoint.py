"""Checkpoints: whole or absent, whatever happens while they are written; strict when read."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptfast import checkpoint
from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import CharTokenizer

CONFIG = GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=8, bias=False)
TOKENIZER = CharTokenizer("abcde")
TRAINING = {"step": 3, "generators": {"data": torch.arange(9)}, "row": {"lr": 0.1, "val": None}}


def new_model(seed: int = 0, config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(seed)
    return GPT(config)


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(
        tmp_path, 3, new_model(), TOKENIZER, val_loss=1.5, training=dict(TRAINING)
    )


def reseal(path):
    """Make the checksums right again, as someone who means harm would."""
    header = json.loads((path / "config.json").read_text())
    for name in header["sha256"]:
        header["sha256"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "config.json").write_text(json.dumps(header))


def edit_header(path, **changes):
    header = json.loads((path / "config.json").read_text())
    header.update(changes)
    (path / "config.json").write_text(json.dumps(header))


def edit_model(path, **changes):
    header = json.loads((path / "config.json").read_text())
    header["model"].update(changes)
    (path / "config.json").write_text(json.dumps(header))


# --- what comes back is what went in


@pytest.mark.parametrize("bias", [False, True])
def test_round_trip(tmp_path, bias):
    model = new_model(1, GPTConfig(8, 5, 2, 2, 8, 0.1, bias))
    path = checkpoint.save(tmp_path, 12, model, TOKENIZER, val_loss=2.0, training=TRAINING)
    assert path == tmp_path / "step_000012"
    assert sorted(os.listdir(path)) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "training.pt",
    ]
    assert len({os.stat(path / name).st_mode for name in os.listdir(path)}) == 1
    loaded = checkpoint.load(path)
    assert (loaded.path, loaded.step, loaded.val_loss) == (path, 12, 2.0)
    assert loaded.model.config == model.config
    assert loaded.tokenizer.to_dict() == TOKENIZER.to_dict()
    assert not loaded.model.training
    for (name, p), (name_2, q) in zip(
        model.named_parameters(), loaded.model.named_parameters(), strict=True
    ):
        assert name == name_2
        assert torch.equal(p, q)
        assert q.requires_grad
    assert loaded.model.lm_head.weight is loaded.model.transformer["wte"].weight
    training = checkpoint.load_training(path)
    assert torch.equal(training["generators"].pop("data"), torch.arange(9))
    assert training == {"step": 3, "generators": {}, "row": {"lr": 0.1, "val": None}}


def test_tied_head_is_stored_once(saved):
    tensors = load_file(saved / "model.safetensors")
    assert "transformer.wte.weight" in tensors
    assert "lm_head.weight" not in tensors
    assert sum(t.numel() for t in tensors.values()) == new_model().num_parameters()


def test_a_checkpoint_without_training_state_cannot_be_resumed(tmp_path):
    path = checkpoint.save(tmp_path, 1, new_model(), TOKENIZER)
    checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match=r"training\.pt: expected a checkpoint's file"):
        checkpoint.load_training(path)


# --- which are kept and found


def test_the_last_and_the_best_are_kept(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.best(tmp_path) is None
    kept = {}
    losses = [3.0, 2.0, 2.5, None, 2.0, float("nan"), 2.1]
    for step, loss in enumerate(losses, 1):
        checkpoint.save(tmp_path, step, new_model(), TOKENIZER, val_loss=loss)
        kept[step] = sorted(int(name.removeprefix("step_")) for name in os.listdir(tmp_path))
    assert kept == {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [5], 6: [5, 6], 7: [5, 7]}
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000007"
    assert checkpoint.best(tmp_path) == tmp_path / "step_000005"
    assert checkpoint.load(tmp_path).step == 5


def test_steps_are_compared_as_numbers(tmp_path):
    checkpoint.save(tmp_path, 999_999, new_model(), TOKENIZER)
    checkpoint.save(tmp_path, 1_000_000, new_model(), TOKENIZER)
    assert os.listdir(tmp_path) == ["step_1000000"]
    assert checkpoint.load(tmp_path).step == 1_000_000


def test_other_things_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_final").mkdir()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, new_model(), TOKENIZER)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step_000002", "step_final"]


def test_leftovers_of_killed_writers_are_ignored_and_removed(tmp_path):
    leftover = tmp_path / ".step_000009.123.tmp"
    leftover.mkdir()
    (leftover / "config.json").write_text("{")
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 1, new_model(), TOKENIZER)
    assert os.listdir(tmp_path) == ["step_000001"]


# --- what cannot be saved


def test_a_step_is_saved_once(tmp_path, saved):
    with pytest.raises(FileExistsError, match="step_000003: expected no checkpoint of this step"):
        checkpoint.save(tmp_path, 3, new_model(), TOKENIZER)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        checkpoint.save(tmp_path, -1, new_model(), TOKENIZER)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, saved, bad):
    model = new_model()
    with torch.no_grad():
        model.transformer["wpe"].weight[3, 3] = bad
    message = r"transformer\.wpe\.weight is not finite at step 4.*last good checkpoint is .*000003"
    with pytest.raises(FloatingPointError, match=message):
        checkpoint.save(tmp_path, 4, model, TOKENIZER)
    assert os.listdir(tmp_path) == ["step_000003"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*Not a directory.*no checkpoint yet"):
        checkpoint.save(tmp_path / "file" / "out", 1, new_model(), TOKENIZER)


def test_full_disk(small_disk):
    model = new_model(0, GPTConfig(8, 5, 1, 2, 64, 0.0, False))
    training = {"optimizer": torch.zeros(2, model.num_parameters())}
    first = checkpoint.save(small_disk, 1, model, TOKENIZER, training=training)
    # Room for less and less: the disk gets full in each of the files.
    filler = small_disk / "filler"
    statistics = os.statvfs(small_disk)
    free = statistics.f_bavail * statistics.f_frsize
    failures = 0
    for room in (0, 8, 60, 200, 212, 300, 500, 600, 620):
        filler.write_bytes(bytes(max(0, free - room * 1024)))
        try:
            path = checkpoint.save(small_disk, 2 + room, model, TOKENIZER, training=training)
        except OSError as error:
            failures += 1
            assert "No space left on device" in str(error)  # noqa: PT017
            assert f"the last good checkpoint is {first}" in str(error)  # noqa: PT017
        else:
            shutil.rmtree(path)
            break
        assert sorted(os.listdir(small_disk)) == ["filler", "step_000001"]
        filler.unlink()
    assert failures >= 4
    checkpoint.load(first)
    checkpoint.load_training(first)


KILLED = textwrap.dedent(
    """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)  # so that forked processes do not miss threads
    from gptfast import checkpoint
    from gptfast.models import GPT, GPTConfig
    from gptfast.tokenizer import CharTokenizer

    out, rounds = Path(sys.argv[1]), int(sys.argv[2])
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=32))
    tokenizer = CharTokenizer("abcde")
    random.seed(int(sys.argv[3]))

    def save_for_ever():
        step = checkpoint.load(checkpoint.latest(out)).step if checkpoint.latest(out) else 0
        while True:
            step += 1
            checkpoint.save(out, step, model, tokenizer, val_loss=1 / (1 + step % 7),
                            training={"step": step})

    leftovers = 0
    for _ in range(rounds):
        child = os.fork()
        if child == 0:
            save_for_ever()
        time.sleep(random.uniform(0.01, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        names = [path.name for path in out.iterdir()]
        leftovers += any(name.endswith(".tmp") for name in names)
        visible = [name for name in names if not name.startswith(".")]
        assert visible or names == [] or leftovers
        for name in visible:
            assert checkpoint.load(out / name).step == int(name[5:])
            assert checkpoint.load_training(out / name)["step"] == int(name[5:])
    checkpoint.save(out, 10**6, model, tokenizer)
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    print("leftovers", leftovers)
    """
)


def test_killed_while_saving(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "30", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    # Else no kill fell into a write, and nothing was tested.
    assert int(result.stdout.split()[-1]) > 5


# --- what is refused


def truncate(name, size):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])


def overwrite(name, data):
    return lambda path: (path / name).write_bytes(data)


def flip(name):
    def damage(path):
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)

    return damage


def change_weights(change):
    def damage(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")
        reseal(path)

    return damage


def sealed(damage):
    def both(path):
        damage(path)
        reseal(path)

    return both


WTE = "transformer.wte.weight"
DAMAGES = {
    # config.json
    "not JSON": (overwrite("config.json", b"{"), r"config\.json: expected JSON, got b'\{'"),
    "empty": (overwrite("config.json", b""), r"config\.json: expected JSON, got b''"),
    "binary": (overwrite("config.json", b"\xff\xfe\0"), r"config\.json: expected JSON"),
    "nested": (overwrite("config.json", b"[" * 10**5), r"config\.json: expected JSON"),
    "huge": (overwrite("config.json", b" " * (1 << 21)), r"config\.json: expected JSON"),
    "a list": (overwrite("config.json", b"[]"), r"expected format 'gptfast checkpoint', got \[\]"),
    "other format": (lambda p: edit_header(p, format="x"), "expected format 'gptfast checkpoint'"),
    "version": (lambda p: edit_header(p, version=2), "expected version 1, got 2"),
    "version text": (lambda p: edit_header(p, version="1"), "expected version 1, got '1'"),
    "step": (lambda p: edit_header(p, step="3"), "step must be int, got '3'"),
    "val_loss": (
        lambda p: edit_header(p, val_loss="x"),
        r"val_loss must be float \| None, got",
    ),
    "sha256": (lambda p: edit_header(p, sha256=[]), r"sha256 must be dict, got \[\]"),
    "model": (lambda p: edit_header(p, model=None), "model must be dict, got None"),
    "no fields": (lambda p: edit_header(p, model={}), r"model: expected the fields .*got \[\]"),
    "more fields": (lambda p: edit_model(p, n_expert=8), "model: expected the fields .*n_expert"),
    "text size": (lambda p: edit_model(p, n_layer="2"), "n_layer must be int, got '2'"),
    "true size": (lambda p: edit_model(p, n_layer=True), "n_layer must be int, got True"),
    "size 0": (lambda p: edit_model(p, n_head=0), "n_head must be a positive integer, got 0"),
    "dropout": (lambda p: edit_model(p, dropout=2), r"dropout must be in \[0, 1\), got 2"),
    "bias": (lambda p: edit_model(p, bias="no"), "bias must be bool, got 'no'"),
    # config.json against the weights
    "layers": (lambda p: edit_model(p, n_layer=3), "expected n_layer 3 layers .*got 2"),
    "many layers": (lambda p: edit_model(p, n_layer=10**9), "expected n_layer 1000000000"),
    "wide": (
        lambda p: edit_model(p, n_embd=10**6),
        rf"expected {WTE} to be \(5, 1000000\) by config\.json, got \(5, 8\)",
    ),
    "long": (lambda p: edit_model(p, block_size=9), r"expected .*wpe.weight to be \(9, 8\)"),
    "biases": (lambda p: edit_model(p, bias=True), r"expected a tensor transformer\..*bias"),
    "vocabulary": (lambda p: edit_model(p, vocab_size=6), rf"expected {WTE} to be \(6, 8\)"),
    "small vocabulary": (
        lambda p: edit_model(p, vocab_size=4),
        r"tokenizer\.json: expected at most vocab_size 4 tokens as in config\.json, got 5",
    ),
    # model.safetensors
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: expected a"),
    "weights cut": (truncate("model.safetensors", 500), r"\(500 bytes\): the file is damaged"),
    "weights flipped": (flip("model.safetensors"), "model.safetensors: expected sha256"),
    "weights cut, sealed": (sealed(truncate("model.safetensors", 500)), "expected safetensors: "),
    "weights empty, sealed": (sealed(truncate("model.safetensors", 0)), "expected safetensors: "),
    "weights garbage": (sealed(overwrite("model.safetensors", b"\xff" * 99)), "safetensors: "),
    "one missing": (change_weights(lambda t: t.pop(WTE)), f"expected a tensor {WTE}"),
    "one more": (
        change_weights(lambda t: t.update(x=torch.ones(1))),
        r"expected no tensor x by config\.json",
    ),
    "shape": (
        change_weights(lambda t: t.update({WTE: torch.ones(5, 7)})),
        rf"expected {WTE} to be \(5, 8\) by config\.json, got \(5, 7\)",
    ),
    "another model": (
        change_weights(lambda t: (t.clear(), t.update(w=torch.ones(1)))),
        "expected n_layer 2 layers as in config.json, got 0",
    ),
    # tokenizer.json
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json: expected a"),
    "tokenizer cut": (truncate("tokenizer.json", 9), "tokenizer.json: expected sha256"),
    "tokenizer cut, sealed": (sealed(truncate("tokenizer.json", 9)), "tokenizer.json: expected J"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint(saved, name):
    damage, message = DAMAGES[name]
    damage(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        checkpoint.load(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


TRAINING_DAMAGES = {
    "missing": (lambda p: (p / "training.pt").unlink(), "training.pt: expected a checkpoint's"),
    "cut": (truncate("training.pt", 900), r"expected sha256 .*\(900 bytes\)"),
    "cut, sealed": (sealed(truncate("training.pt", 900)), "expected a training state without"),
    "empty, sealed": (sealed(truncate("training.pt", 0)), "expected a training state without"),
    "text, sealed": (sealed(overwrite("training.pt", b"hello")), "expected a training state"),
    "a list": (
        sealed(lambda p: torch.save([1], p / "training.pt")),
        "training.pt: expected a dict, got list",
    ),
}


@pytest.mark.parametrize("name", TRAINING_DAMAGES)
def test_damaged_training_state(saved, name):
    damage, message = TRAINING_DAMAGES[name]
    damage(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        checkpoint.load_training(saved)
    assert "\n" not in str(caught.value)


def test_any_flipped_byte_is_found(saved):
    generator = torch.Generator().manual_seed(0)
    for name in ("model.safetensors", "tokenizer.json", "training.pt"):
        whole = (saved / name).read_bytes()
        for position in torch.randint(len(whole), (20,), generator=generator).tolist():
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            (saved / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name}: expected sha256"):
                checkpoint.load(saved) and checkpoint.load_training(saved)
        (saved / name).write_bytes(whole)
    checkpoint.load(saved)


def test_flipped_bytes_under_a_right_checksum_raise_nothing_else(saved):
    generator = torch.Generator().manual_seed(1)
    readers = {"model.safetensors": checkpoint.load, "training.pt": checkpoint.load_training}
    for name, read in readers.items():
        whole = (saved / name).read_bytes()
        refused = 0
        for position in torch.randint(len(whole), (150,), generator=generator).tolist():
            damaged = bytearray(whole)
            damaged[position] ^= 0x55
            (saved / name).write_bytes(damaged)
            reseal(saved)
            try:
                read(saved)
            except ValueError as error:
                assert name in str(error)  # noqa: PT017
                refused += 1
        assert refused > 10
        (saved / name).write_bytes(whole)
        reseal(saved)


class Hostile:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def test_code_in_a_training_state_is_not_run(saved, tmp_path):
    marker = tmp_path / "executed"
    torch.save({"step": 3, "optimizer": Hostile(marker)}, saved / "training.pt")
    reseal(saved)
    expected = r"training\.pt: expected a training state without code: .*mkdir"
    with pytest.raises(ValueError, match=expected) as caught:
        checkpoint.load_training(saved)
    assert "weights_only" not in str(caught.value)  # PyTorch's advice would run it
    assert not marker.exists()
    torch.load(saved / "training.pt", weights_only=False)  # it would have run
    assert marker.exists()


def test_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a checkpoint, got no such"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="got a folder without step_"):
        checkpoint.load(tmp_path)
    (tmp_path / "step_000001").mkdir()
    with pytest.raises(FileNotFoundError, match=r"step_000001/config\.json: expected"):
        checkpoint.load(tmp_path / "step_000001")
    with pytest.raises(FileNotFoundError, match=r"step_000001/config\.json: expected"):
        checkpoint.load(tmp_path)
