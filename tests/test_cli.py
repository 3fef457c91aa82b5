"""The command line: what it prints, where, and its exit status."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from gptfast import __version__, checkpoint, cli
from gptfast.cli import main
from gptfast.data import Dataset
from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import CharTokenizer
from gptfast.train import PRESETS, TrainConfig, read_settings

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = 20 * "From fairest creatures we desire increase,\nThat thereby beauty's rose may not die,\n"
TINY = [
    *("--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=8", "--batch-size=2"),
    *("--max-iters=4", "--eval-interval=2", "--checkpoint-interval=2", "--eval-iters=1"),
]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return "--file=text.txt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that was not trained, which makes no difference here."""
    out = tmp_path_factory.mktemp("trained")
    tokenizer = CharTokenizer.from_text(TEXT)
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8))
    checkpoint.save(out, 1, model, tokenizer)
    return f"--checkpoint={out}"


def refused(capsys, *args):
    """The one line that is left of an error."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert re.fullmatch(r"gptfast: error: [^\n]+\n", err), err
    return err.removeprefix("gptfast: error: ").rstrip("\n")


def shown(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code in (0, None)
    out, err = capsys.readouterr()
    assert err == ""
    return out


# --- help


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"gptfast {__version__}\n", "")


def test_help(capsys):
    out = shown(capsys, "--help")
    for command in ("prepare", "train", "generate", "doctor"):
        assert f"• {command} " in out
        assert f"usage: gptfast {command} [-h]" in shown(capsys, command, "--help")
    assert "--debug" in out
    assert "--version" in out


def option_help(capsys, *args):
    """Option -> its values and help, on one line."""
    found = {}
    for entry in re.split(r"\n[│ ] {1,2}(?=-{1,2}[a-z])", shown(capsys, *args))[1:]:
        words = re.sub(r"[│╭╮╰╯─]", " ", entry.split("\n╰")[0]).split()
        found[words[0].strip(",")] = " ".join(words[1:])
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_help_shows_the_values_of_the_preset(capsys, preset):
    found = option_help(capsys, "train", "--preset", preset, "--help")
    config = PRESETS[preset]
    assert f"(default: {preset})" in found["--preset"]
    for name in ("out", "max_iters", "batch_size", "learning_rate", "n_embd", "tokenizer", "bias"):
        option = f"--{name.replace('_', '-')}"
        assert f"(default: {getattr(config, name)})" in found[option], option


def test_every_option_has_help(capsys):
    for command, number in (("prepare", 8), ("train", 35), ("generate", 13), ("doctor", 2)):
        found = option_help(capsys, command, "--help")
        assert len(found) >= number
        assert found.pop("-h")
        for option, text in found.items():
            assert re.search(r"\w [a-z]+.*\((default|required|repeatable)", text), option


# --- commands


def test_prepare_train_generate(text, capsys):
    assert main(["prepare", text, "--out", "data"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith("train with: gptfast train --data data\n")
    assert "data: 1,494 tokens to train on, 166 to validate" in out
    assert len(Dataset.open("data").train) == 1494

    assert main(["train", "--data", "data", "--out", "run", *TINY]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "checkpoint: run/step_000004" in out
    last = out.splitlines()[-1]
    assert last.startswith("to generate: gptfast generate --checkpoint run")

    command = last.split()[3:]  # what it says can be run
    assert main([*command, "--prompt", "beauty", "--max-new-tokens=30", "--seed=1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("beauty")
    assert len(out) == len("beauty") + 30 + 1
    assert re.fullmatch(r"30 tokens, [\d,]+ tok/s, seed 1, run/step_00000\d\n", err)


def test_a_preset_gives_defaults_that_flags_override(text, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "train", lambda config: seen.append(config) or _Result())
    assert main(["train", "--preset", "gpt2", "--batch_size", "3", "--no-bias", text]) == 0
    assert main(["train", "--preset=demo"]) == 0
    assert main(["train"]) == 0
    changes = {"batch_size": 3, "bias": False, "file": "text.txt"}
    assert seen[0] == TrainConfig.preset("gpt2", **changes)
    assert seen[1:] == [PRESETS["demo"], PRESETS["shakespeare-char-cpu"]]


class _Result:
    interrupted = None


def test_resume_takes_the_settings_of_the_run(text, capsys, monkeypatch):
    assert main(["train", text, "--out", "run", *TINY, "--seed=5", "--bias"]) == 0
    settings = read_settings("run")
    capsys.readouterr()
    assert main(["train", "--out", "run", "--resume", "--max-iters=6"]) == 0
    out = capsys.readouterr().out
    assert "resuming  run/step_000004" in out
    assert "changed   max_iters 4 -> 6" in out
    assert out.count("changed") == 1
    os.rename("run", "moved")
    assert main(["train", "--resume", "--out=moved", "--max-iters=8"]) == 0
    with open("moved/metrics.jsonl") as file:
        assert [json.loads(line)["step"] for line in file] == [2, 4, 6, 8]
    assert read_settings("moved").seed == settings.seed == 5


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["gptfast"] == __version__


def test_an_interrupted_training_has_the_status_of_its_signal(text, monkeypatch):
    import signal

    monkeypatch.setattr(cli, "train", lambda config: _Interrupted())
    _Interrupted.interrupted = signal.SIGTERM
    assert main(["train", text]) == 143


class _Interrupted:
    interrupted = None


def test_ctrl_c(trained, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "generate_text", interrupt)
    assert main(["generate", trained]) == 130
    assert capsys.readouterr().err == "\ngptfast: interrupted\n"


# --- generate


def generated(capsys, *args):
    assert main(["generate", *args]) == 0
    return capsys.readouterr().out


def test_seeds(trained, capsys):
    texts = [generated(capsys, trained, f"--seed={seed}") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert main(["generate", trained, "--max-new-tokens=50"]) == 0
    out, err = capsys.readouterr()
    seed = re.search(r"seed (\d+)", err)[1]
    assert generated(capsys, trained, f"--seed={seed}", "--max-new-tokens=50") == out


def test_greedy(trained, capsys):
    greedy = generated(capsys, trained, "--greedy")
    assert greedy == generated(capsys, trained, "--temperature=0")
    assert greedy == generated(capsys, trained, "--top-k=1", "--seed=3")
    assert greedy == generated(capsys, trained, "--top-p=0.0001")
    assert greedy == generated(capsys, trained, "--min-p=1")
    assert greedy == generated(capsys, trained, "--greedy", "--backend=torch", "--device=cpu")


def test_quantize(trained, text, tmp_path, capsys):
    plain = generated(capsys, trained, "--seed=1")
    losses = {}
    for format in (None, "int8", "int4"):
        options = [f"--quantize={format}"] if format else []
        assert len(generated(capsys, trained, "--seed=1", *options)) == len(plain)
        file = tmp_path / "scores.json"
        assert main(["evaluate", trained, "--text=text.txt", f"--json={file}", *options]) == 0
        capsys.readouterr()
        losses[format] = json.loads(file.read_text())[0]["value"]
    assert losses[None] != losses["int8"] != losses["int4"]
    # Logits of an untrained model lie within 0.1 or so: rounding them moves the loss by far less.
    assert max(abs(loss - losses[None]) for loss in losses.values()) < 0.02


def test_stop(trained, capsys):
    whole = generated(capsys, trained, "--prompt=may", "--seed=1")
    stop = whole[40:43]
    rest = whole[3:]
    out = generated(capsys, trained, "--prompt=may", "--seed=1", "--stop", stop, "--stop=§§")
    assert out == "may" + rest[: rest.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt=Zoë"], "got 'Z' at position 0"),
        (["--top-k=0"], "top_k must be at least 1, got 0"),
        (["--top-p=2"], "top_p must be in (0, 1], got 2.0"),
        (["--min-p=-1"], "min_p must be in [0, 1], got -1.0"),
        (["--repetition-penalty=0"], "repetition_penalty must be above 0, got 0.0"),
        (["--temperature=-1"], "temperature must be at least 0, got -1.0"),
        (["--max-new-tokens=-1"], "max_new_tokens must be at least 0, got -1"),
        (["--stop="], "stop must be strings that are not empty"),
        (["--device=tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device=cuda:77"], "device 'cuda:77' is not there"),
        (["--backend=cuda"], "backend 'cuda' is forced, but"),
        (["--backend=numpy"], "'numpy'"),
        (["--seed=x"], "--seed"),
        (["--seed"], "--seed"),
    ],
)
def test_generate_refuses(trained, capsys, options, message):
    assert message in refused(capsys, "generate", trained, *options)


def test_generate_without_a_checkpoint(tmp_path, capsys):
    assert "--checkpoint" in refused(capsys, "generate")
    nowhere = f"--checkpoint={tmp_path / 'nowhere'}"
    assert "nowhere: expected a checkpoint, got no such folder" in refused(
        capsys, "generate", nowhere
    )
    assert "got a folder without step_*" in refused(capsys, "generate", f"--checkpoint={tmp_path}")


# --- errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [],
            "Expected one of {prepare, train, curve, generate, evaluate, inspect, export",
        ),
        (["tarin"], "Unrecognized options: tarin"),
        (["train", "--n-layers=3"], "Unrecognized options: --n-layers"),
        (["train", "--n-layer=three"], "--n-layer"),
        (["train", "--preset=demi"], f"unknown preset 'demi'; known: {', '.join(PRESETS)}"),
        (["train", "--backend=numpy"], "invalid choice 'numpy' for argument '--backend'"),
        (["train", "--dtype=bf16"], "invalid choice 'bf16' for argument '--dtype'"),
        (["train", "--learning-rate=0"], "learning_rate must be above 0, got 0.0"),
        (["train", "--learning-rate=-1"], "learning_rate must be above 0, got -1.0"),
        (["train", "--n-head=3"], "n_head must divide n_embd 128, got 3"),
        (["train", "--file=a", "--data=b"], "expected file or data, got both"),
        (["train", "--file=nowhere.txt"], "nowhere.txt: no such file"),
        (["train", "--data=nowhere"], "nowhere: expected a prepared dataset"),
        (["train", "--device=cuda:55"], "device 'cuda:55' is not there"),
        (["train", "--out=text.txt"], "text.txt"),
        (["train", "--out=text.txt/below"], "text.txt"),
        (["train", "--block-size=5000"], "at least block_size + 1 = 5001 tokens, got 1494"),
        (["train", "--vocab-size=7"], "vocab_size must be at least the tokenizer's"),
        (["prepare"], "--out"),
        (["prepare", "--out=text.txt"], "text.txt"),
        (["prepare", "--out=x", "--file=nowhere.txt"], "nowhere.txt: no such file"),
        (["prepare", "--out=x", "--val-fraction=1"], "expected 0 <= val_fraction < 1, got 1.0"),
        (["prepare", "--out=x", "--tokenizer=bpe"], "'bpe'"),
    ],
)
def test_errors_are_one_line(text, capsys, args, message):
    if args and args[0] == "train" and not any(a.startswith(("--file", "--data")) for a in args):
        args = [*args, text]
    assert message in refused(capsys, *args)
    assert not os.path.exists("x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the backend may well run")
def test_a_backend_that_cannot_run_leaves_the_folder_free(text, capsys):
    args = ["train", text, "--out=run", *TINY]
    assert "backend 'cuda' is forced, but" in refused(capsys, *args, "--backend=cuda")
    assert main(args) == 0
    capsys.readouterr()
    assert "run: expected a new or empty folder" in refused(capsys, *args)


def test_a_loss_that_is_no_number(text, capsys):
    args = ["train", text, "--out=run", *TINY, "--learning-rate=1e30", "--grad-clip=0"]
    assert main(args) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"gptfast: error: .* at step \d.*no checkpoint yet\n|.*000002\n", err), err


@pytest.mark.parametrize("position", [0, 1, 3])
def test_debug_shows_the_traceback(text, capsys, position):
    args = ["train", text, "--learning-rate=0"]
    args.insert(position, "--debug")
    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("\ngptfast: error: learning_rate must be above 0, got 0.0\n")


def test_errors_of_many_lines_become_one(capsys, monkeypatch):
    def fail(path, device):
        raise RuntimeError("first\n  second\n\nthird")

    monkeypatch.setattr(checkpoint, "load", fail)
    assert refused(capsys, "generate", "--checkpoint=x") == "first second third"


def test_bugs_keep_their_traceback(monkeypatch):
    def fail(path, device):
        raise KeyError("bug")

    monkeypatch.setattr(checkpoint, "load", fail)
    with pytest.raises(KeyError):
        main(["generate", "--checkpoint=x"])


# --- as a process


def test_module_and_pipes(trained):
    command = [sys.executable, "-m", "gptfast"]
    result = subprocess.run([*command, "train", "--n-layer=0"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    expected = "gptfast: error: GPTConfig: n_layer must be a positive integer, got 0\n"
    assert result.stderr == expected

    process = subprocess.Popen(
        [*command, "generate", trained, "--max-new-tokens=1000000", "--prompt=may"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.read(20).startswith("may")  # while it is still at work
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""
