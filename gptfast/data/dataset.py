"""Token ids to train and to validate on, in memory or mapped from the disk, and windows of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from gptfast.data.shards import MANIFEST, Split, Tokens, dtype_for, open_split, read_manifest
from gptfast.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import os

    import torch

TokenizerName = Literal["char", "gpt2"]

PIECE_CHARS = 1 << 20  # encoded at a time, so that progress can be shown
PROGRESS_CHARS = 16 << 20  # a second or two of GPT-2 encoding


@dataclass(frozen=True, eq=False)
class Dataset:
    """Token ids to train and to validate on, and the tokenizer they come from.

    Args:
        train: (N,) uint16 or uint32.
        val: (N,) uint16 or uint32; may be empty.
        tokenizer: the tokenizer.
    """

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer

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
            tokens = np.array(tokenizer.encode(text), dtype_for(tokenizer.vocab_size))
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
            ValueError: preparation was cut short, the manifest or `tokenizer.json` is damaged, or
                a shard is missing, cut short, or another than the manifest says.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise ValueError(
                f"{folder}: preparation was cut short; the same `gptfast prepare` goes on with it"
            )
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        if tokenizer.vocab_size != manifest["vocab_size"]:
            raise ValueError(
                f"{folder / 'tokenizer.json'}: expected {manifest['vocab_size']} tokens as in "
                f"{MANIFEST}, got {tokenizer.vocab_size}"
            )
        train, val = (open_split(folder, manifest, split) for split in ("train", "val"))
        return cls(train, val, tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary, V."""
        return self.tokenizer.vocab_size

    def batch(
        self,
        split: Split,
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
            ValueError: unknown split, B or T below 1, a split of fewer than T + 1 tokens, or a
                token outside the vocabulary.
        """
        import torch

        if split not in ("train", "val"):
            raise ValueError(f"batch: expected split 'train' or 'val', got {split!r}")
        if batch_size < 1:
            raise ValueError(f"batch: expected batch_size >= 1, got {batch_size}")
        tokens = self.tokens(split, block_size)
        starts = torch.randint(len(tokens) - block_size, (batch_size,), generator=generator)
        return windows(tokens, starts.numpy(), block_size, self.vocab_size)

    def tokens(self, split: Split, block_size: int) -> Tokens:
        """The tokens of a split, if they are enough for one window and its last target.

        Raises:
            ValueError: they are not, or block_size is below 1.
        """
        if block_size < 1:
            raise ValueError(f"batch: expected block_size >= 1, got {block_size}")
        tokens = self.train if split == "train" else self.val
        if len(tokens) < block_size + 1:
            raise ValueError(
                f"batch: {split} must have at least block_size + 1 = {block_size + 1} tokens, "
                f"got {len(tokens)}"
            )
        return tokens


def windows(
    tokens: Tokens, starts: npt.NDArray[np.int64], block_size: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x[b, t] = tokens[starts[b] + t], and y[b, t] the token that follows it.

    Args:
        tokens: (N,).
        starts: (B,), each at most N - block_size - 1.
        block_size: T.
        vocab_size: V.

    Returns:
        x, y: (B, T) int64 on the CPU, contiguous.

    Raises:
        ValueError: a token is outside [0, V).
    """
    import torch

    found = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    if (largest := int(found.max())) >= vocab_size:
        place = getattr(tokens, "filename", "batch")
        raise ValueError(f"{place}: expected token ids in [0, {vocab_size}), got {largest}")
    both = torch.from_numpy(np.asarray(found))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


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
    dtype = dtype_for(tokenizer.vocab_size)
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
