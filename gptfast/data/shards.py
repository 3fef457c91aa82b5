"""Shards of tokens on the disk: `train_00001.npy`, ..., `val_00001.npy`, ..., and `manifest.json`.

A shard is one array of uint16 or uint32 in NumPy's format. It is written under a hidden name,
synchronised and renamed, and then listed in the manifest, which also says where the next shard
begins: a process that is killed leaves whole shards, and the next one goes on behind them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gptfast.tokenizer import stage

FORMAT, VERSION = "gptfast tokens", 1
MANIFEST = "manifest.json"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
FIELDS = {
    "dtype": str,
    "vocab_size": int,
    "source": dict,
    "complete": bool,
    "unit": int,
    "tokens": int,
    "shards": dict,
}

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")


class ShardedTokens:
    """The arrays of several shards, read like one.

    Args:
        shards: at least one array (N,), all of one dtype.
    """

    def __init__(self, shards: list[npt.NDArray[Any]]) -> None:
        self.shards = shards
        self.ends = np.cumsum([len(shard) for shard in shards])
        self.dtype = shards[0].dtype

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, key: int | slice | npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
        """Tokens of a slice, or of indices of 0 and above; IndexError behind the last."""
        key = np.arange(*key.indices(len(self))) if isinstance(key, slice) else np.asarray(key)
        shard = np.searchsorted(self.ends, key, side="right")
        tokens = np.empty(key.shape, self.dtype)
        for number in np.unique(shard):
            inside = shard == number
            start = self.ends[number] - len(self.shards[number])
            tokens[inside] = self.shards[number][key[inside] - start]
        return tokens


Tokens = npt.NDArray[Any] | ShardedTokens


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The narrowest dtype of a shard for token ids below `vocab_size`."""
    return DTYPES["uint16" if vocab_size < 65536 else "uint32"]


class ShardWriter:
    """Writes tokens into shards, and the manifest behind each of them.

    Args:
        folder: where they go.
        manifest: of a data set that was begun, or a new one; it is kept up to date.
        shard_tokens: tokens in a shard, but for the last of a split.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], shard_tokens: int) -> None:
        self.folder, self.manifest = folder, manifest
        self.split: Split = "train"
        self.buffer = np.empty(shard_tokens, DTYPES[manifest["dtype"]])
        self.filled = 0
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()

    def add(self, split: Split, unit: int, skipped: int, tokens: npt.NDArray[Any]) -> None:
        """Append the tokens of a unit of input, without its first `skipped`."""
        if split != self.split:
            self.flush(unit, skipped)
            self.split = split
        taken = 0
        while taken < len(tokens):
            room = min(len(self.buffer) - self.filled, len(tokens) - taken)
            self.buffer[self.filled : self.filled + room] = tokens[taken : taken + room]
            self.filled += room
            taken += room
            if self.filled == len(self.buffer):
                self.flush(unit, skipped + taken)

    def flush(self, unit: int, tokens: int) -> None:
        """Write what is there as a shard; what follows begins behind `tokens` of a unit."""
        if self.filled:
            shards = self.manifest["shards"][self.split]
            path = self.folder / f"{self.split}_{len(shards) + 1:05d}.npy"
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                with temporary.open("wb") as file:
                    np.save(file, self.buffer[: self.filled])
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            shards.append({"name": path.name, "tokens": self.filled})
            self.filled = 0
        self.manifest.update(unit=unit, tokens=tokens)
        write_manifest(self.folder, self.manifest)

    def finish(self, units: int) -> None:
        """Write the last shard, and that there is no more."""
        self.manifest["complete"] = True
        self.flush(units, 0)


def new_manifest(vocab_size: int, source: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a data set of which nothing is written yet."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype_for(vocab_size).name,
        "vocab_size": vocab_size,
        "source": source,
        "complete": False,
        "unit": 0,  # of the input, that the next shard begins in,
        "tokens": 0,  # and how many of that unit's tokens are in shards
        "shards": {split: [] for split in SPLITS},
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace a folder's manifest."""
    data = (json.dumps(manifest, indent=1) + "\n").encode("ascii")
    os.replace(stage(folder / MANIFEST, data), folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of an unknown version.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{folder}: expected a prepared dataset, got no {MANIFEST}")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}, got {manifest!r:.80}")
    if manifest.get("version") != VERSION:
        given = manifest.get("version")
        raise ValueError(f"{path}: expected version {VERSION}, got {given!r:.80}")
    for key, kind in FIELDS.items():
        if type(manifest.get(key)) is not kind:
            given = manifest.get(key)
            raise ValueError(f"{path}: expected {key} to be {kind.__name__}, got {given!r:.80}")
    if manifest["dtype"] not in DTYPES:
        given = manifest["dtype"]
        raise ValueError(f"{path}: expected dtype among {list(DTYPES)}, got {given!r:.80}")
    for split in SPLITS:
        for shard in manifest["shards"].get(split, [None]):
            if not _is_shard(shard):
                raise ValueError(
                    f"{path}: expected shards of {split} with name and tokens, got {shard!r:.80}"
                )
    return manifest


def _is_shard(shard: Any) -> bool:
    return (
        isinstance(shard, dict)
        and type(shard.get("tokens")) is int
        and shard["tokens"] > 0
        and type(shard.get("name")) is str
        and Path(shard["name"]).name == shard["name"]  # not a path out of the folder
    )


def open_split(folder: Path, manifest: dict[str, Any], split: Split) -> Tokens:
    """The tokens of a split, mapped and not read.

    Raises:
        ValueError: a shard is missing, cut short, or another than the manifest says.
    """
    dtype = DTYPES[manifest["dtype"]]
    shards = [
        _map(folder / shard["name"], dtype, shard["tokens"]) for shard in manifest["shards"][split]
    ]
    if not shards:
        return np.empty(0, dtype)
    return shards[0] if len(shards) == 1 else ShardedTokens(shards)


def _map(path: Path, dtype: np.dtype[Any], tokens: int) -> npt.NDArray[Any]:
    expected = f"{path}: expected {tokens} tokens of {dtype.name} as in {MANIFEST}, got"
    if not path.exists():
        raise ValueError(f"{expected} no such file")
    size = path.stat().st_size
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{expected} {size} bytes, cut short or damaged ({error}); "
            "delete the folder and prepare it anew"
        ) from error
    if not isinstance(array, np.memmap):  # an archive of arrays
        raise ValueError(f"{expected} something else")
    if array.dtype != dtype or array.shape != (tokens,):
        raise ValueError(f"{expected} {array.shape} of {array.dtype.name}")
    if size != (whole := array.offset + array.nbytes):
        raise ValueError(f"{expected} {size} bytes instead of {whole}")
    return array
