"""Training data: from a text to token arrays, on disk or in memory, and random batches of them.

A prepared folder holds `train.bin` and `val.bin` (raw little-endian token ids), `tokenizer.json`
and `meta.json`, which is written last: a folder without it is not a dataset.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import os
import re
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from gptfast.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    load_tokenizer,
    stage,
    tokenizer_json,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "TINY_SHAKESPEARE_URL",
    "Dataset",
    "fetch_tiny_shakespeare",
    "prepare",
    "prepare_text",
    "read_text",
    "resolve_source",
]

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_BYTES = 1_115_394
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TokenizerName = Literal["char", "gpt2"]
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

SHARD_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
META_TYPES = {
    "dtype": str,
    "train_tokens": int,
    "val_tokens": int,
    "vocab_size": int,
    "val_fraction": float,
    "source": str,
    "text_sha256": str,
}
PIECE_CHARS = 1 << 20  # encoded at a time, so that progress can be shown
PROGRESS_CHARS = 16 << 20  # a second or two of GPT-2 encoding
CHECK_TOKENS = 1 << 24  # read at a time when a shard is checked


def resolve_source(name_or_path: str | os.PathLike[str] | None) -> Path | None:
    """The file that a source name stands for.

    Args:
        name_or_path: None or "shakespeare" for the packaged plays, "tinyshakespeare" for the
            standard file, fetched once into the user's cache, or a path. A file that bears one
            of the two names is reached as "./shakespeare".

    Returns:
        The path of the text, or None for the packaged plays.

    Raises:
        ConnectionError: "tinyshakespeare" is not in the cache and cannot be fetched.
        ValueError: what is in the cache, or was fetched, is not that file.
    """
    if name_or_path is None or name_or_path == "shakespeare":
        return None
    if name_or_path == "tinyshakespeare":
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return fetch_tiny_shakespeare(Path(cache) / "gptfast" / "tinyshakespeare.txt")
    return Path(name_or_path)


def fetch_tiny_shakespeare(dest: str | os.PathLike[str]) -> Path:
    """Fetch the standard Tiny Shakespeare file, unless `dest` already is it.

    Args:
        dest: where to write it; its folder is made.

    Returns:
        `dest` as a path.

    Raises:
        ConnectionError: no network, or the server did not deliver.
        ValueError: `dest` exists and is another file, or the server sent another file.
    """
    dest = Path(dest)
    if dest.exists():
        data, origin = dest.read_bytes(), f"{dest} (delete it to fetch it again)"
    else:
        origin = TINY_SHAKESPEARE_URL
        try:
            with urllib.request.urlopen(TINY_SHAKESPEARE_URL, timeout=30) as response:
                data = response.read(TINY_SHAKESPEARE_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"cannot fetch {TINY_SHAKESPEARE_URL}: {error}; give the path of a text file, "
                "or no file for the packaged plays"
            ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != TINY_SHAKESPEARE_SHA256:
        raise ValueError(f"{origin}: expected sha256 {TINY_SHAKESPEARE_SHA256}, got {digest}")
    if not dest.exists():
        dest.parent.mkdir(parents=True, exist_ok=True)
        _replace_all({dest: data})
    return dest


def read_text(path: str | os.PathLike[str] | None = None) -> str:
    """Read a text to train on.

    Args:
        path: a UTF-8 file, or None for the packaged plays of Shakespeare. Line ends stay as they
            are; a byte order mark is dropped.

    Returns:
        The text; at least one character.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a directory or another thing that is no regular file, empty, or binary (a NUL
            byte, or not UTF-8), with the offset of the first bad byte.
    """
    if path is None:
        packed = resources.files("gptfast") / "assets" / "shakespeare.txt.gz"
        return gzip.decompress(packed.read_bytes()).decode("ascii")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "no regular file"
        raise ValueError(f"{path}: expected a text file, got {kind}")
    data = path.read_bytes()
    nul = data.find(b"\0")
    if nul >= 0:
        raise ValueError(f"{path}: expected UTF-8 text, got a NUL byte at offset {nul}")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got byte 0x{data[error.start]:02x} "
            f"at offset {error.start} ({error.reason})"
        ) from error
    if not text:
        raise ValueError(f"{path}: expected text, got an empty file")
    return text


def prepare(
    file: str | os.PathLike[str] | None,
    out_dir: str | os.PathLike[str],
    tokenizer: TokenizerName | Tokenizer = "char",
    val_fraction: float = 0.1,
) -> Dataset:
    """Tokenize a text file into a folder that `Dataset.open` reads.

    Args:
        file: a path or a source name, see `resolve_source`.
        out_dir: the folder; it is made. A dataset that is there is replaced, or left whole if
            this fails before all files are written.
        tokenizer: "char" (the characters of this text), "gpt2", or a tokenizer to use as it is.
        val_fraction: the last part of the text goes to `val`, 0 <= val_fraction < 1.

    Returns:
        The opened dataset.

    Raises:
        FileNotFoundError, ValueError: see `read_text` and `prepare_text`.
        OSError: the folder cannot be written.
    """
    path = resolve_source(file)
    name = "shakespeare" if path is None else path.name
    return prepare_text(read_text(path), out_dir, tokenizer, val_fraction, source=name)


def prepare_text(
    text: str,
    out_dir: str | os.PathLike[str],
    tokenizer: TokenizerName | Tokenizer = "char",
    val_fraction: float = 0.1,
    source: str = "text",
) -> Dataset:
    """Tokenize a text into a folder that `Dataset.open` reads.

    Args:
        text: the text itself, at least one character.
        out_dir, tokenizer, val_fraction: as in `prepare`.
        source: what `meta.json` calls the origin of the text.

    Returns:
        The opened dataset.

    Raises:
        ValueError: empty text, `val_fraction` out of range, unknown tokenizer, or a character
            outside a given tokenizer's vocabulary.
        OSError: the folder cannot be written.
    """
    dataset = Dataset.in_memory(text, tokenizer, val_fraction)
    meta = {
        "dtype": dataset.train.dtype.name,
        "train_tokens": len(dataset.train),
        "val_tokens": len(dataset.val),
        "vocab_size": dataset.vocab_size,
        "val_fraction": float(val_fraction),
        "source": source,
        "text_sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
    }
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    _replace_all(
        {
            out_dir / "train.bin": dataset.train.data,
            out_dir / "val.bin": dataset.val.data,
            out_dir / "tokenizer.json": tokenizer_json(dataset.tokenizer),
            out_dir / "meta.json": (json.dumps(meta, indent=2) + "\n").encode("ascii"),
        }
    )
    return Dataset.open(out_dir)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Token ids to train and to validate on, and the tokenizer they come from.

    Args:
        train: (N,) uint16 or uint32.
        val: (N,) uint16 or uint32; may be empty.
        tokenizer: the tokenizer.

    Raises:
        ValueError: a token is outside the tokenizer's vocabulary.
    """

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        for split, tokens in (("train", self.train), ("val", self.val)):
            for start in range(0, len(tokens), CHECK_TOKENS):
                largest = int(tokens[start : start + CHECK_TOKENS].max())
                if largest >= self.vocab_size:
                    raise ValueError(
                        f"{getattr(tokens, 'filename', split)}: expected token ids in "
                        f"[0, {self.vocab_size}), got {largest}"
                    )

    @classmethod
    def in_memory(
        cls,
        text: str,
        tokenizer: TokenizerName | Tokenizer = "char",
        val_fraction: float = 0.1,
    ) -> Dataset:
        """Tokenize a text without writing a file.

        Args:
            text: the text itself, at least one character.
            tokenizer: "char" (the characters of this text), "gpt2", or a tokenizer.
            val_fraction: the last part of the text goes to `val`, 0 <= val_fraction < 1.

        Returns:
            The dataset.

        Raises:
            ValueError: empty text, `val_fraction` out of range, unknown tokenizer, or a
                character outside a given tokenizer's vocabulary.
        """
        if not text:
            raise ValueError("dataset: expected text, got none")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"dataset: expected 0 <= val_fraction < 1, got {val_fraction}")
        if tokenizer == "char":
            tokenizer = CharTokenizer.from_text(text)
        elif tokenizer == "gpt2":
            tokenizer = GPT2Tokenizer()
        elif isinstance(tokenizer, str):
            raise ValueError(f"dataset: expected tokenizer 'char' or 'gpt2', got {tokenizer!r}")

        cut = int(len(text) * (1 - val_fraction))
        if isinstance(tokenizer, CharTokenizer):  # as many tokens as characters: errors count right
            tokens = np.array(tokenizer.encode(text), _dtype_for(tokenizer.vocab_size))
            return cls(tokens[:cut], tokens[cut:], tokenizer)
        return cls(_encode(text[:cut], tokenizer), _encode(text[cut:], tokenizer), tokenizer)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Dataset:
        """Open a prepared folder; `train` and `val` are mapped, not read.

        Args:
            folder: what `prepare` wrote.

        Returns:
            The dataset.

        Raises:
            FileNotFoundError: no such folder, or nothing of a dataset in it.
            ValueError: preparation was cut short, `meta.json` or `tokenizer.json` is damaged, a
                shard has another size than `meta.json` says, or a token is outside the
                vocabulary.
        """
        folder = Path(folder)
        meta = _read_meta(folder)
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        if tokenizer.vocab_size != meta["vocab_size"]:
            raise ValueError(
                f"{folder / 'tokenizer.json'}: expected {meta['vocab_size']} tokens as in "
                f"meta.json, got {tokenizer.vocab_size}"
            )
        dtype = SHARD_DTYPES[meta["dtype"]]
        train = _map_shard(folder / "train.bin", dtype, meta["train_tokens"])
        val = _map_shard(folder / "val.bin", dtype, meta["val_tokens"])
        return cls(train, val, tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary, V."""
        return self.tokenizer.vocab_size

    def batch(
        self,
        split: Literal["train", "val"],
        batch_size: int,
        block_size: int,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random windows: y[b, t] = x[b, t + 1] = token that follows x[b, t].

        Args:
            split: "train" or "val".
            batch_size: B >= 1.
            block_size: T >= 1.
            generator: a CPU generator; it alone determines the batch.

        Returns:
            x, y: (B, T) int64 on the CPU, contiguous.

        Raises:
            ValueError: unknown split, B or T below 1, or a split of fewer than T + 1 tokens.
        """
        import torch

        if split not in ("train", "val"):
            raise ValueError(f"batch: expected split 'train' or 'val', got {split!r}")
        if batch_size < 1 or block_size < 1:
            raise ValueError(
                f"batch: expected batch_size >= 1 and block_size >= 1, "
                f"got {batch_size} and {block_size}"
            )
        tokens = self.train if split == "train" else self.val
        if len(tokens) < block_size + 1:
            raise ValueError(
                f"batch: {split} must have at least block_size + 1 = {block_size + 1} tokens, "
                f"got {len(tokens)}"
            )
        starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
        windows = tokens[starts.numpy() + np.arange(block_size + 1)].astype(np.int64)
        both = torch.from_numpy(np.asarray(windows))
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _dtype_for(vocab_size: int) -> np.dtype[Any]:
    return SHARD_DTYPES["uint16" if vocab_size < 65536 else "uint32"]


def _pieces(text: str) -> Iterator[str]:
    """Cut a text where no GPT-2 token can lie across: before a space that ends a word."""
    boundary = re.compile(r"(?<=\S)[ \n]")
    start = 0
    while start < len(text):
        cut = boundary.search(text, start + PIECE_CHARS)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _encode(text: str, tokenizer: Tokenizer) -> Tokens:
    dtype = _dtype_for(tokenizer.vocab_size)
    # Only GPT-2's pattern is known to allow the cuts of `_pieces`.
    if len(text) < PROGRESS_CHARS or not isinstance(tokenizer, GPT2Tokenizer):
        return np.array(tokenizer.encode(text), dtype)

    from rich.console import Console
    from rich.progress import Progress

    encoded = []
    with Progress(console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("tokenizing", total=len(text))
        for piece in _pieces(text):
            encoded.append(np.array(tokenizer.encode(piece), dtype))
            progress.advance(task, len(piece))
    return np.concatenate(encoded)


def _replace_all(contents: dict[Path, bytes | memoryview]) -> None:
    """Write all files or none; the last one marks that the others are there."""
    staged: dict[Path, Path] = {}
    marker = list(contents)[-1]
    try:
        for path, data in contents.items():
            staged[path] = stage(path, data)
        marker.unlink(missing_ok=True)
        for path, temporary in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    if not path.exists():
        if any((folder / name).exists() for name in ("train.bin", "val.bin", "tokenizer.json")):
            raise ValueError(
                f"{folder}: preparation was cut short (no meta.json); prepare it again"
            )
        raise FileNotFoundError(f"{folder}: expected a prepared dataset, got no meta.json")
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: expected an object, got {meta!r:.80}")
    for key, kind in META_TYPES.items():
        if type(meta.get(key)) is not kind:
            raise ValueError(
                f"{path}: expected {key} to be {kind.__name__}, got {meta.get(key)!r:.80}"
            )
        if kind is int and meta[key] < 0:
            raise ValueError(f"{path}: expected {key} >= 0, got {meta[key]}")
    if meta["dtype"] not in SHARD_DTYPES:
        raise ValueError(
            f"{path}: expected dtype among {list(SHARD_DTYPES)}, got {meta['dtype']!r:.80}"
        )
    return meta


def _map_shard(path: Path, dtype: np.dtype[Any], tokens: int) -> Tokens:
    if not path.exists():
        raise ValueError(f"{path}: expected a file as meta.json says, got none")
    expected, given = tokens * dtype.itemsize, path.stat().st_size
    if given != expected:
        raise ValueError(f"{path}: expected {expected} bytes as in meta.json, got {given}")
    if tokens == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r")
