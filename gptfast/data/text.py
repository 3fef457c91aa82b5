"""Texts that are read whole: a file, the packaged plays, Tiny Shakespeare."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import urllib.request
from importlib import resources
from pathlib import Path

from gptfast.data.named import NAMED
from gptfast.tokenizer import stage

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_BYTES = 1_115_394
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


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
        ValueError: a data set that has to be prepared; or what is in the cache, or was fetched, is
            not that file.
    """
    if name_or_path is None or name_or_path == "shakespeare":
        return None
    if name_or_path == "tinyshakespeare":
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return fetch_tiny_shakespeare(Path(cache) / "gptfast" / "tinyshakespeare.txt")
    if name_or_path in NAMED and not Path(name_or_path).exists():
        raise ValueError(
            f"{name_or_path} is too large to be read at once; first: "
            f"gptfast prepare --file {name_or_path} --out data/{name_or_path} --tokenizer gpt2"
        )
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
        os.replace(stage(dest, data), dest)
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
