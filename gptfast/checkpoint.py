"""Checkpoints: one folder per saved step, whole or absent.

    DIR/step_000500/model.safetensors   weights by the names of GPT-2's, the tied head once
                    tokenizer.json
                    training.pt         what only resuming needs: optimizer, generators, ...
                    sharded/            of a run with fsdp, instead of the optimizer's part of it
                    config.json         format version, step, validation loss, sizes, checksums

A folder is written under a hidden name beside its place, synchronised to the disk and renamed, and
is renamed again before it is deleted: a folder named `step_*` is never half there. Hidden leftovers
of killed processes are ignored, and the next `save` removes them; only one process at a time may
write to DIR.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gptfast.models import GPT, GPTConfig
from gptfast.models.config import GPT2_OPTIONS, GPT2_SIZES
from gptfast.tokenizer import Tokenizer, load_tokenizer, tokenizer_json

__all__ = [
    "Checkpoint",
    "best",
    "check_types",
    "find",
    "last_good",
    "latest",
    "load",
    "load_training",
    "read_fields",
    "save",
    "verify_sharded",
]

FORMAT = "gptfast checkpoint"
VERSION = 1
STEP_FOLDER = re.compile(r"step_(\d{6,})")
MAX_JSON_BYTES = 1 << 20
# What unpickling raises on a damaged or hostile file, with weights_only.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)

PathLike = str | os.PathLike[str]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded checkpoint; the model is in evaluation mode."""

    path: Path
    step: int
    val_loss: float | None
    model: GPT
    tokenizer: Tokenizer


def save(
    directory: PathLike,
    step: int,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    val_loss: float | None = None,
    training: dict[str, Any] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    sharded: Path | None = None,
) -> Path:
    """Write `directory/step_<step>` and remove all older checkpoints but the best.

    Args:
        directory: folder of the checkpoints of one run; it is made.
        step: training steps behind the model.
        model: the model; weights are stored in their dtype.
        tokenizer: its tokenizer.
        val_loss: decides which checkpoint is the best; None (or not finite) never is.
        training: what `load_training` is to return: containers, numbers, strings and tensors.
        weights: what to save instead of the model's parameters, by their names.
        sharded: a folder in `directory` that becomes the checkpoint's `sharded`.

    Returns:
        The new folder.

    Raises:
        ValueError: step below 0.
        FloatingPointError: a weight is infinite or NaN.
        FileExistsError: there is a checkpoint of this step.
        OSError: it cannot be written. Nothing of it stays behind; older checkpoints are as before.
    """
    if step < 0:
        raise ValueError(f"checkpoint: step must be at least 0, got {step}")
    directory = Path(directory)
    # The tied head is one parameter with wte, so it is listed once.
    weights = dict(model.named_parameters() if weights is None else weights)
    for name, parameter in weights.items():
        if not parameter.isfinite().all():
            raise FloatingPointError(
                f"{name} is not finite at step {step}, which is not saved; {last_good(directory)}"
            )
    final = directory / f"step_{step:06d}"
    if final.exists():
        raise FileExistsError(f"{final}: expected no checkpoint of this step, got one")

    temporary = _hidden(final)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        temporary.mkdir()
        (temporary / "tokenizer.json").write_bytes(tokenizer_json(tokenizer))
        save_file(
            {name: p.detach().contiguous() for name, p in weights.items()},
            temporary / "model.safetensors",
        )
        # safetensors lets nobody but the owner read it; the umask has decided for the others.
        shutil.copymode(temporary / "tokenizer.json", temporary / "model.safetensors")
        if training is not None:
            with (temporary / "training.pt").open("wb") as file:
                torch.save(training, file)
        if sharded is not None:
            sharded.rename(temporary / "sharded")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        config = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
            "model": dataclasses.asdict(model.config),
            "sha256": {str(file.relative_to(temporary)): _sha256(file) for file in files},
        }
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in (*temporary.rglob("*"), temporary):
            synchronise(path)
        temporary.rename(final)
        synchronise(directory)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OSError(
            f"cannot write {final}: {_root_cause(error)}; {last_good(directory)}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    keep = {final, best(directory)}
    for path in _steps(directory):
        if path not in keep:
            _remove(path)
    return final


def load(path: PathLike, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint's model and tokenizer.

    Args:
        path: a `step_*` folder, or a folder of them, whose best is taken.
        device: where the model goes.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ValueError: a file is damaged, of an unknown version, or disagrees with another one; names
            the file, what was expected and what was given.
    """
    path = find(path)
    header = _read_header(path)
    given = header["model"]
    if given.keys() == set(GPT2_SIZES):  # written before there were options
        given = {**GPT2_OPTIONS, **given}
    config = read_fields(GPTConfig, given, f"{path / 'config.json'}: model")
    tokenizer_file = _verified(path, "tokenizer.json", header)
    tokenizer = load_tokenizer(tokenizer_file)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{tokenizer_file}: expected at most vocab_size {config.vocab_size} tokens as in "
            f"config.json, got {tokenizer.vocab_size}"
        )
    model = _load_model(config, _verified(path, "model.safetensors", header), device)
    return Checkpoint(path, header["step"], header["val_loss"], model, tokenizer)


def load_training(path: PathLike) -> dict[str, Any]:
    """Read what `save` got as `training`, tensors on the CPU; no code in the file is run.

    Args:
        path: a `step_*` folder.

    Returns:
        The dictionary.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or holds anything but containers, numbers, strings and tensors.
    """
    path = Path(path)
    file = _verified(path, "training.pt", _read_header(path))
    try:
        training = torch.load(file, map_location="cpu", weights_only=True)
    except UNPICKLING_ERRORS as error:
        reason = unpickling_reason(error)
        raise ValueError(f"{file}: expected a training state without code: {reason}") from error
    if not isinstance(training, dict):
        raise ValueError(f"{file}: expected a dict, got {type(training).__name__}")
    return training


def unpickling_reason(error: BaseException) -> str:
    """What is wrong with a pickle; without PyTorch's advice on how to run what is in it."""
    for line in str(error).splitlines():
        reason = line.strip().removeprefix("Weights only load failed. ")
        reason = reason.removeprefix("WeightsUnpickler error: ").partition(". Please")[0]
        if reason and "weights_only" not in reason and "can still be loaded" not in reason:
            return reason
    return type(error).__name__


def verify_sharded(path: Path) -> Path | None:
    """A checkpoint's folder `sharded`, its checksums compared; None where it has none.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    header = _read_header(path)
    names = [name for name in header["sha256"] if name.startswith("sharded/")]
    for name in names:
        _verified(path, name, header)
    return path / "sharded" if names else None


def find(path: PathLike) -> Path:
    """The checkpoint that a path means: itself if it is one, else the best one in it.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        ValueError: a checkpoint in it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a checkpoint, got no such folder")
    if STEP_FOLDER.fullmatch(path.resolve().name) or (path / "config.json").exists():
        return path
    found = best(path)
    if found is None:
        raise FileNotFoundError(f"{path}: expected a checkpoint, got a folder without step_*")
    return found


def latest(directory: PathLike) -> Path | None:
    """The checkpoint of the highest step, or None where there is none."""
    return max(_steps(Path(directory)), key=_step_of, default=None)


def last_good(directory: PathLike) -> str:
    """What an error says about the checkpoints that are there."""
    path = latest(directory)
    return f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"


def best(directory: PathLike) -> Path | None:
    """The checkpoint of the lowest validation loss; the latest if none was evaluated.

    Raises:
        ValueError: a `config.json` is damaged.
    """
    losses = {path: _read_header(path)["val_loss"] for path in _steps(Path(directory))}
    evaluated = [path for path, loss in losses.items() if loss is not None]
    if not evaluated:
        return latest(directory)
    return min(evaluated, key=lambda path: (losses[path], -_step_of(path)))


def read_fields(cls: type[T], values: Any, source: str) -> T:
    """Build a dataclass from JSON, refusing unknown and missing fields and wrong types.

    Args:
        cls: a dataclass with fields of bool, int, float, str, Literal, and unions of these.
        values: the parsed JSON.
        source: what to call the origin of `values` in an error.

    Raises:
        ValueError: `values` is not an object with exactly the fields of `cls`, or the dataclass
            refuses them.
    """
    fields = typing.get_type_hints(cls).keys()
    if not isinstance(values, dict) or values.keys() != fields:
        given = sorted(values) if isinstance(values, dict) else values
        raise ValueError(f"{source}: expected the fields {sorted(fields)}, got {given!r:.300}")
    try:
        check_types(cls, values)
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def check_types(cls: type, values: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first of `values` that is not of its field's type in `cls`."""
    for name, hint in typing.get_type_hints(cls).items():
        if not _is_a(values[name], hint):
            raise ValueError(f"{name} must be {_type_name(hint)}, got {values[name]!r:.80}")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type; a float may be written without a fraction."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_is_a(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    return type(value) is hint or (hint is float and type(value) is int)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def build_model(
    config: GPTConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    source: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """A model of weights that are read one at a time, after their names and shapes are checked.

    Args:
        config: sizes.
        shapes: of every weight in `source`, by the model's names; the tied head counts once.
        read: one weight by name.
        source: what to call the file in an error.
        device: where the model goes.
        dtype: of its weights.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape than the sizes say.
    """
    layers = len({name.split(".")[2] for name in shapes if name.startswith("transformer.h.")})
    # Before the model is built: a wrong n_layer could ask for any amount of memory.
    if layers != config.n_layer:
        raise ValueError(
            f"{source}: expected n_layer {config.n_layer} layers as in config.json, got {layers}"
        )
    with torch.device("meta"):
        model = GPT(config).to(dtype)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in sorted(expected.keys() ^ shapes.keys()):
        state = "a" if name in expected else "no"
        raise ValueError(f"{source}: expected {state} tensor {name} by config.json")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{source}: expected {name} to be {shape} by config.json, got {shapes[name]}"
            )
    model.to_empty(device=device)
    if config.tied:  # which to_empty undoes
        model.lm_head.weight = model.get_parameter("transformer.wte.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name))
    return model.eval()


def _load_model(config: GPTConfig, file: Path, device: torch.device | str) -> GPT:
    with open_weights(file) as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118 - no mapping
        return build_model(config, shapes, weights.get_tensor, file, device)


@contextlib.contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """A safetensors file, whose tensors are read when asked for; ValueError if it is none."""
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(f"{file}: expected safetensors: {error}") from error


def _read_header(path: Path) -> dict[str, Any]:
    """A checkpoint's `config.json`, checked except for `model`."""
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected a checkpoint's file, got none")
    with file.open("rb") as opened:
        data = opened.read(MAX_JSON_BYTES + 1)
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got {data[:40]!r}: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT!r}, got {header!r:.80}")
    if header.get("version") != VERSION:
        raise ValueError(f"{file}: expected version {VERSION}, got {header.get('version')!r:.80}")
    hints = {"step": int, "val_loss": float | None, "model": dict, "sha256": dict}
    for name, hint in hints.items():
        if name not in header or not _is_a(header[name], hint):
            given = repr(header.get(name))
            raise ValueError(f"{file}: {name} must be {_type_name(hint)}, got {given:.80}")
    return header


def _verified(path: Path, name: str, header: dict[str, Any]) -> Path:
    """A file of a checkpoint, after comparing its checksum with `config.json`."""
    file = path / name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected a checkpoint's file, got none")
    expected, given = header["sha256"].get(name), _sha256(file)
    if given != expected:
        raise ValueError(
            f"{file}: expected sha256 {expected!r:.80} as in config.json, got {given!r} "
            f"({file.stat().st_size} bytes): the file is damaged"
        )
    return file


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _steps(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if STEP_FOLDER.fullmatch(path.name)]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove(path: Path) -> None:
    hidden = path.rename(_hidden(path))  # so that a kill leaves no half of it under its name
    shutil.rmtree(hidden)


def _remove_leftovers(directory: Path) -> None:
    for path in directory.glob(".step_*.tmp"):
        shutil.rmtree(path)


def synchronise(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _root_cause(error: BaseException) -> BaseException:
    """The OSError that torch.save hides behind an error of its own."""
    cause = error.__context__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, OSError) else error
