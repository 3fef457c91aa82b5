"""From files of any size to a folder of shards: several processes encode, one writes."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gptfast.data import documents, named
from gptfast.data.dataset import Dataset, TokenizerName
from gptfast.data.documents import Unit
from gptfast.data.shards import (
    MANIFEST,
    SPLITS,
    ShardWriter,
    new_manifest,
    read_manifest,
    write_manifest,
)
from gptfast.data.text import read_text, resolve_source
from gptfast.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    load_tokenizer,
    stage,
    tokenizer_from_dict,
    tokenizer_json,
)

SHARD_TOKENS = 100_000_000  # 200 MB, as in FineWeb's own recipes
# To start a worker, which imports PyTorch, takes as long as to encode some 10 MB.
BYTES_PER_WORKER = 16 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")
PathLike = str | os.PathLike[str]


def prepare(
    file: PathLike | Sequence[PathLike] | None,
    out_dir: PathLike,
    tokenizer: TokenizerName | Tokenizer = "char",
    val_fraction: float = 0.1,
    *,
    val_file: PathLike | Sequence[PathLike] = (),
    field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
) -> Dataset:
    """Tokenize files into a folder of shards that `Dataset.open` reads.

    A preparation that was cut short goes on where it was when it is called again, and what is
    ready is left as it is.

    Args:
        file: paths of texts, JSON lines (.jsonl, .ndjson), Parquet files and folders of them, or
            one name: a source of `resolve_source`, or a data set of `NAMED`.
        out_dir: the folder; it is made.
        tokenizer: "char" (the characters of these texts), "gpt2", or a tokenizer of these kinds.
        val_fraction: the last part of each file goes to `val`, 0 <= val_fraction < 1; none of it
            where there is a `val_file`.
        val_file: paths of what is validated on.
        field: of JSON lines and Parquet, with the text.
        shard_tokens: tokens in a shard.
        workers: processes that encode. None: one for each core, and fewer for small files.

    Returns:
        The opened dataset.

    Raises:
        FileNotFoundError: no such file.
        FileExistsError: the folder holds another dataset.
        ConnectionError: a named data set cannot be fetched.
        ImportError: Parquet or a named data set, without the libraries that they need.
        ValueError: a file is damaged (names the line, row or place in it), an argument is out of
            range, or a character is outside a given tokenizer's vocabulary.
        OSError: the folder cannot be written.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"dataset: expected 0 <= val_fraction < 1, got {val_fraction}")
    if shard_tokens < 1 or (workers is not None and workers < 1):
        raise ValueError(
            f"prepare: expected shard_tokens and workers >= 1, got {shard_tokens} and {workers}"
        )
    paths, val_paths = _paths(file), _paths(val_file)
    if paths in ([], ["shakespeare"]) and not val_paths:
        return prepare_text(read_text(), out_dir, tokenizer, val_fraction, source="shakespeare")
    if len(paths) == 1 and paths[0] in named.NAMED:
        found, val_found = named.fetch(paths[0])
        paths, val_paths = _paths(found), val_paths or _paths(val_found)
    elif len(paths) == 1:
        paths = _paths(resolve_source(paths[0]))

    files, val_files = documents.list_files(paths), documents.list_files(val_paths)
    units = documents.plan_units(files, field, 0.0 if val_files else val_fraction)
    val_units = documents.plan_units(val_files, field, 0.0)
    units += [dataclasses.replace(unit, split="val") for unit in val_units]
    size = sum(unit.size for unit in units)
    if workers is None:
        # Cores that this process may use; where the system does not say, all.
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        workers = max(1, min(cores, size // BYTES_PER_WORKER))

    source = {
        "files": [[str(path), path.stat().st_size] for path in files],
        "val_files": [[str(path), path.stat().st_size] for path in val_files],
        "tokenizer": tokenizer if isinstance(tokenizer, str) else "given",
        "val_fraction": float(val_fraction),
        "field": field,
        "shard_tokens": shard_tokens,
    }
    folder = Path(out_dir)
    try:
        with _progress(size) as progress:
            manifest, tokens = _begin(folder, source, tokenizer, units, workers, progress)
            if not manifest["complete"]:
                _encode_all(folder, manifest, tokens, units, shard_tokens, workers, progress)
    except OSError as error:
        # Of a full disk; numpy says of it that fewer bytes were written, without a number.
        full = error.errno in (None, errno.ENOSPC, errno.EDQUOT)
        if type(error) is not OSError or error.filename is not None or not full:
            raise
        raise OSError(
            f"cannot write {folder}: {error}; with more room the same command goes on where it was"
        ) from error
    return Dataset.open(folder)


def prepare_text(
    text: str,
    out_dir: PathLike,
    tokenizer: TokenizerName | Tokenizer = "char",
    val_fraction: float = 0.1,
    source: str = "text",
) -> Dataset:
    """Tokenize a text in memory into a folder that `Dataset.open` reads.

    Args:
        text: the text itself, at least one character.
        out_dir, tokenizer, val_fraction: as in `prepare`.
        source: what the manifest calls the origin of the text.

    Returns:
        The opened dataset.

    Raises:
        FileExistsError: the folder holds a dataset.
        ValueError: empty text, `val_fraction` out of range, unknown tokenizer, or a character
            outside a given tokenizer's vocabulary.
        OSError: the folder cannot be written.
    """
    dataset = Dataset.in_memory(text, tokenizer, val_fraction)
    folder = Path(out_dir)
    if (folder / MANIFEST).exists() and read_manifest(folder)["complete"]:
        raise FileExistsError(f"{folder}: expected a new or empty folder, got a dataset")
    manifest = new_manifest(dataset.vocab_size, {"text": source})
    _write_head(folder, manifest, dataset.tokenizer)
    writer = ShardWriter(folder, manifest, max(1, len(dataset.train), len(dataset.val)))
    for split, tokens in zip(SPLITS, (dataset.train, dataset.val), strict=True):
        writer.add(split, 0, 0, np.asarray(tokens))
    writer.finish(1)
    return Dataset.open(folder)


def _paths(file: PathLike | Sequence[PathLike] | None) -> list[str]:
    if file is None:
        return []
    return [os.fspath(f) for f in ([file] if isinstance(file, str | os.PathLike) else file)]


def _begin(
    folder: Path,
    source: dict[str, Any],
    tokenizer: TokenizerName | Tokenizer,
    units: list[Unit],
    workers: int,
    progress: Progress,
) -> tuple[dict[str, Any], Tokenizer]:
    """The manifest and tokenizer of a data set that was begun, or of a new one."""
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        for name, value in source.items():
            if (before := manifest["source"].get(name)) != value:
                raise FileExistsError(
                    f"{folder}: expected a new or empty folder, got a dataset with "
                    f"{name} {before!r:.200}, not {value!r:.200}"
                )
        return manifest, load_tokenizer(folder / "tokenizer.json")
    if tokenizer == "char":
        known: set[str] = set()
        task = progress.add_task("reading", total=sum(unit.size for unit in units))
        for unit, found in zip(units, _in_order(documents.characters, units, workers), strict=True):
            known |= found
            progress.advance(task, unit.size)
        tokenizer = CharTokenizer(sorted(known))
    elif tokenizer == "gpt2":
        tokenizer = GPT2Tokenizer()
    elif isinstance(tokenizer, str):
        raise ValueError(f"dataset: expected tokenizer 'char' or 'gpt2', got {tokenizer!r}")
    manifest = new_manifest(tokenizer.vocab_size, source)
    _write_head(folder, manifest, tokenizer)
    return manifest, tokenizer


def _write_head(folder: Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.json"
    os.replace(stage(file, tokenizer_json(tokenizer)), file)
    write_manifest(folder, manifest)


def _encode_all(
    folder: Path,
    manifest: dict[str, Any],
    tokenizer: Tokenizer,
    units: list[Unit],
    shard_tokens: int,
    workers: int,
    progress: Progress,
) -> None:
    """Encode the units from where the last whole shard ends."""
    start, skipped = manifest["unit"], manifest["tokens"]
    writer = ShardWriter(folder, manifest, shard_tokens)
    if start < len(units):
        writer.split = units[start].split
    task = progress.add_task("tokenizing", total=sum(unit.size for unit in units))
    progress.advance(task, sum(unit.size for unit in units[:start]))
    encoded = _in_order(partial(_encode, tokenizer.to_dict()), units[start:], workers)
    for number, tokens in enumerate(encoded, start):
        writer.add(units[number].split, number, skipped, tokens[skipped:])
        skipped = 0
        progress.advance(task, units[number].size)
    writer.finish(len(units))


def _encode(tokenizer: dict[str, Any], unit: Unit) -> Any:
    return documents.encode(unit, tokenizer_from_dict(tokenizer))


def _in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """The results of a function on items, in their order, a few of them ahead."""
    if workers == 1:
        yield from map(function, items)
        return
    # Not a fork of this process, whose threads (PyTorch's, Arrow's) a child would wait for.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[Result]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:  # so that no more results than these are in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "prepare: a worker process was killed (out of memory?); the same command goes on "
            "where it was, --workers 1 takes the least memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _progress(size: int) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        disable=size < BYTES_PER_WORKER,  # it is done in a moment
    )
