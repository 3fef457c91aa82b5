"""Tokenizers: text to token ids and back.

`CharTokenizer` has one token per character of a training text; `GPT2Tokenizer` is the published
byte-pair encoding of GPT-2, from ranks inside the package, so it needs no network. Both follow
the `Tokenizer` protocol; `StreamDecoder` turns a growing sequence of ids into text piece by piece.
"""

from __future__ import annotations

import base64
import codecs
import functools
import gzip
import json
import operator
import os
from collections.abc import Collection, Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import tiktoken

__all__ = [
    "CharTokenizer",
    "GPT2Tokenizer",
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
    "tokenizer_from_dict",
]

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
# The pattern of GPT-2 as tiktoken writes it: possessive, so that it never backtracks far.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Every Unicode character, escaped, is below this; anything larger is not a tokenizer.json.
MAX_TOKENIZER_BYTES = 32 * 1024 * 1024


class Tokenizer(Protocol):
    """What every tokenizer offers; ids are 0 <= id < vocab_size."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, V."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one token stands for; a part of a character at times."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What `tokenizer.json` holds."""
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json`, atomically."""
        ...


class CharTokenizer:
    """One token per character; id = position of the character in `chars`.

    Args:
        chars: the characters, each once, in the order of their ids.

    Raises:
        ValueError: no characters, one twice, an entry that is not a single character, or a
            surrogate (which has no UTF-8 form).
    """

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = tuple(chars)
        if not self.chars:
            raise ValueError("CharTokenizer: expected at least one character, got none")
        for char in self.chars:
            if not isinstance(char, str) or len(char) != 1:
                raise ValueError(f"CharTokenizer: expected single characters, got {char!r:.80}")
            if "\ud800" <= char <= "\udfff":
                raise ValueError(f"CharTokenizer: expected no surrogates, got {char!r}")
        self._ids = {char: i for i, char in enumerate(self.chars)}
        if len(self._ids) != len(self.chars):
            twice = next(c for i, c in enumerate(self.chars) if self._ids[c] != i)
            raise ValueError(f"CharTokenizer: expected each character once, got {twice!r} twice")

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The tokenizer of all characters of a text, sorted.

        Raises:
            ValueError: the text is empty or holds a surrogate.
        """
        return cls(sorted(set(text)))

    @property
    def vocab_size(self) -> int:
        """Number of characters, V."""
        return len(self.chars)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, one per character.

        Raises:
            ValueError: a character is not in the vocabulary; names the first one.
        """
        unknown = set(text).difference(self._ids)
        if unknown:
            position = min(map(text.index, unknown))
            raise ValueError(
                f"CharTokenizer: expected one of its {self.vocab_size} characters, "
                f"got {text[position]!r} at position {position}"
            )
        return [self._ids[char] for char in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return "".join([self.chars[i] for i in _checked_ids(ids, self.vocab_size)])

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token.

        Raises:
            ValueError: the id is outside the vocabulary.
        """
        return self.decode([token]).encode()

    def to_dict(self) -> dict[str, Any]:
        """What `tokenizer.json` holds."""
        return {"type": "char", "chars": list(self.chars)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json`, atomically.

        Raises:
            OSError: the file cannot be written; nothing is left behind.
        """
        _save(self, path)


class GPT2Tokenizer:
    """The byte-pair encoding of GPT-2: 50257 tokens, the last one `<|endoftext|>`.

    Equal to `tiktoken.get_encoding("gpt2")`, without its download.

    Raises:
        ModuleNotFoundError: tiktoken is not installed.
    """

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, V = 50257."""
        return GPT2_VOCAB_SIZE

    @property
    def end_of_text(self) -> int:
        """The id of `<|endoftext|>`, 50256."""
        return GPT2_VOCAB_SIZE - 1

    def encode(
        self, text: str, allowed_special: Literal["all"] | Collection[str] = ()
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; a surrogate is replaced by U+FFFD, as tiktoken does.
            allowed_special: special tokens whose spelling in the text becomes their id, or
                "all". By default "<|endoftext|>" is plain text like any other.

        Returns:
            The ids.

        Raises:
            ValueError: `allowed_special` names something that is no special token.
        """
        special = {END_OF_TEXT} if allowed_special == "all" else set(allowed_special)
        if special - {END_OF_TEXT}:
            raise ValueError(
                f"GPT2Tokenizer: allowed_special must be 'all' or among {[END_OF_TEXT]}, "
                f"got {allowed_special!r}"
            )
        if not special:
            return self._encoding.encode_ordinary(text)
        return self._encoding.encode(text, allowed_special=special, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return self._encoding.decode(_checked_ids(ids, self.vocab_size), errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; a part of a UTF-8 character at times.

        Raises:
            ValueError: the id is outside the vocabulary.
        """
        return self._encoding.decode_single_token_bytes(*_checked_ids([token], self.vocab_size))

    def to_dict(self) -> dict[str, Any]:
        """What `tokenizer.json` holds."""
        return {"type": "gpt2"}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json`, atomically.

        Raises:
            OSError: the file cannot be written; nothing is left behind.
        """
        _save(self, path)


class StreamDecoder:
    """Decodes one token at a time and never cuts a character in two.

    The pieces of `push` and the last one of `flush`, joined, equal `tokenizer.decode` of all ids.

    Args:
        tokenizer: any `Tokenizer`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that is complete with this token; empty inside a character.

        Raises:
            ValueError: the id is outside the vocabulary.
        """
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The rest: U+FFFD if the ids end inside a character, else empty. Starts afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def tokenizer_from_dict(state: Any, source: str = "tokenizer") -> Tokenizer:
    """Build the tokenizer that `to_dict` described.

    Args:
        state: `{"type": "char", "chars": [...]}` or `{"type": "gpt2"}`.
        source: what to call the origin of `state` in an error.

    Returns:
        The tokenizer.

    Raises:
        ValueError: `state` describes no tokenizer; names `source`, what was expected and given.
        ModuleNotFoundError: type "gpt2" and tiktoken is not installed.
    """
    kind = state.get("type") if isinstance(state, dict) else None
    if kind == "gpt2" and state.keys() == {"type"}:
        return GPT2Tokenizer()
    if kind == "char" and state.keys() == {"type", "chars"} and isinstance(state["chars"], list):
        try:
            return CharTokenizer(state["chars"])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    raise ValueError(
        f'{source}: expected {{"type": "char", "chars": [...]}} or {{"type": "gpt2"}}, '
        f"got {state!r:.80}"
    )


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a `tokenizer.json`.

    Args:
        path: the file.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or JSON that describes no tokenizer; names the file, what was
            expected and what was given.
        ModuleNotFoundError: type "gpt2" and tiktoken is not installed.
    """
    path = Path(path)
    with path.open("rb") as file:
        data = file.read(MAX_TOKENIZER_BYTES + 1)
    if len(data) > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_TOKENIZER_BYTES} bytes, got more")
    try:
        state = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {data[:40]!r}: {error}") from error
    return tokenizer_from_dict(state, str(path))


def stage(path: Path, data: bytes | memoryview) -> Path:
    """Write data to a temporary file beside `path`, ready for `os.replace`.

    Args:
        path: the file to be.
        data: its content.

    Returns:
        The temporary file, synchronised to the disk.

    Raises:
        OSError: it cannot be written; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if temporary.is_file():
            temporary.unlink()
        raise
    return temporary


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The content of `tokenizer.json`, ASCII."""
    return (json.dumps(tokenizer.to_dict()) + "\n").encode("ascii")


def _save(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    temporary = stage(path, tokenizer_json(tokenizer))
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    checked = [operator.index(i) for i in ids]
    if checked and not (min(checked) >= 0 and max(checked) < vocab_size):
        position, bad = next((p, i) for p, i in enumerate(checked) if not 0 <= i < vocab_size)
        raise ValueError(
            f"decode: expected token ids in [0, {vocab_size}), got {bad} at position {position}"
        )
    return checked


@functools.lru_cache(maxsize=1)
def _gpt2_encoding() -> tiktoken.Encoding:
    try:
        import tiktoken
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("GPT2Tokenizer needs tiktoken: pip install tiktoken") from error
    packed = (resources.files("gptfast") / "assets" / "gpt2.tiktoken.gz").read_bytes()
    lines = (line.split() for line in gzip.decompress(packed).splitlines())
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens={END_OF_TEXT: GPT2_VOCAB_SIZE - 1},
        explicit_n_vocab=GPT2_VOCAB_SIZE,
    )
