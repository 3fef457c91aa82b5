"""Documents of text, JSON lines and Parquet files, in units that processes can share.

A unit is a part of one file that is read and encoded by itself. Where units end is decided before
anything is read: a text is cut where no token of GPT-2's can lie across (before a space or line
end that ends a word), JSON lines between lines, Parquet between rows. So the tokens do not depend
on who reads which unit.

Documents begin with the end-of-text token where the tokenizer has one. In a text they are what
"<|endoftext|>" separates, and the first has no such token unless there are more files than one:
a book is one stream.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from gptfast.data.shards import Split, dtype_for
from gptfast.tokenizer import END_OF_TEXT, CharTokenizer, GPT2Tokenizer, Tokenizer

UNIT_BYTES = 8 << 20  # a few seconds of encoding
WINDOW_BYTES = 1 << 16  # read at a time when a place to cut is sought
BOM = b"\xef\xbb\xbf"
WORD_END = re.compile(rb"[!-~\x80-\xff](?=[ \n])")

Format = Literal["text", "jsonl", "parquet"]
SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Unit:
    """A part of a file: bytes, or rows of a Parquet file, from `start` to before `end`."""

    file: str
    format: Format
    split: Split
    start: int
    end: int
    size: int  # in bytes, roughly for a Parquet file
    field: str  # of JSON lines and Parquet, with the text
    begins: bool = False  # with a document, though it is text


def list_files(paths: list[str]) -> list[Path]:
    """The files of paths, those of a folder in order of their names.

    Raises:
        FileNotFoundError: no such file, or a folder with none.
        ValueError: something that is neither file nor folder, or an empty file.
    """
    files = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(f"{path}: expected files, got an empty folder")
        files += inside
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file")
        if not file.is_file():
            raise ValueError(f"{file}: expected a file, got no regular file")
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: expected text, got an empty file")
    return files


def plan_units(files: list[Path], field: str, val_fraction: float) -> list[Unit]:
    """All units, those to train on first; the last `val_fraction` of each file is to validate.

    Raises:
        ValueError: a Parquet file is damaged or has no such column.
        ImportError: a Parquet file, and pyarrow is not installed.
    """
    units = []
    for file in files:
        found = _plan(file, field, val_fraction)
        if found and found[0].format == "text":
            found[0] = replace(found[0], begins=len(files) > 1)
        units += found
    return sorted(units, key=lambda unit: unit.split)  # "train" < "val"; the sort is stable


def _plan(file: Path, field: str, val_fraction: float) -> list[Unit]:
    format_ = SUFFIXES.get(file.suffix, "text")
    bytes_ = file.stat().st_size
    if format_ == "parquet":
        groups = _row_groups(file, field)
        length = sum(groups)
        val = int(length * (1 - val_fraction)) if val_fraction else length
        cuts = _add_up(groups, max(1, length * UNIT_BYTES // bytes_))
    else:
        length = bytes_
        with file.open("rb") as opened:
            nominal = int(length * (1 - val_fraction)) if val_fraction else length
            find = _line_start if format_ == "jsonl" else _word_end
            val = (_line_start if format_ == "jsonl" else _document_start)(opened, nominal)
            cuts = [find(opened, at) for at in range(UNIT_BYTES, length, UNIT_BYTES)]
    bounds = sorted({0, length, val, *(cut for cut in cuts if cut < length)})
    return [
        Unit(
            str(file),
            format_,
            "train" if start < val else "val",
            start,
            end,
            bytes_ * (end - start) // length,
            field,
        )
        for start, end in itertools.pairwise(bounds)
    ]


def _add_up(groups: list[int], rows: int) -> list[int]:
    """Ends of row groups, so that there are about `rows` rows between two of them."""
    cuts, last, end = [], 0, 0
    for group in groups:
        end += group
        if end - last >= rows:
            cuts.append(end)
            last = end
    return cuts


def _line_start(file: BinaryIO, at: int) -> int:
    """The first start of a line at or behind a place."""
    file.seek(max(0, at - 1))
    if at > 0:
        file.readline()
    return file.tell()


def _word_end(file: BinaryIO, at: int) -> int:
    """The first place at or behind `at` where a word ends before a space or line end."""
    while True:
        file.seek(at)
        window = file.read(WINDOW_BYTES)
        for match in WORD_END.finditer(window):
            # A character of several bytes may be a space as well, which belongs to what follows.
            before = window[max(0, match.end() - 4) : match.end()].decode("utf-8", "ignore")
            if before and not before[-1].isspace():
                return at + match.end()
        if len(window) < WINDOW_BYTES:
            return at + len(window)
        at += WINDOW_BYTES - 4


def _document_start(file: BinaryIO, at: int) -> int:
    """The start of the next document, if one is near; else that of the next character."""
    file.seek(at)
    window = file.read(UNIT_BYTES)
    separator = window.find(END_OF_TEXT.encode())
    if separator >= 0:
        return at + separator
    while window and 0x80 <= window[0] < 0xC0:  # inside a character
        window, at = window[1:5], at + 1
    return at


# --- reading


def read_documents(unit: Unit) -> list[str]:
    """The documents of a unit; of a text, the first may have begun in the unit before.

    Raises:
        ValueError: damaged; names the file and the line, row, or place in it.
        OSError: it cannot be read.
    """
    if unit.format == "parquet":
        return _read_rows(unit)
    with open(unit.file, "rb") as file:
        file.seek(unit.start)
        data = file.read(unit.end - unit.start)
    if unit.format == "jsonl":
        return list(_read_lines(unit, data))
    if unit.start == 0:
        data = data.removeprefix(BOM)
    nul = data.find(b"\0")
    if nul >= 0:
        raise ValueError(
            f"{unit.file}: expected UTF-8 text, got a NUL byte at offset {unit.start + nul}"
        )
    try:
        return data.decode("utf-8").split(END_OF_TEXT)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{unit.file}: expected UTF-8 text, got byte 0x{data[error.start]:02x} "
            f"at offset {unit.start + error.start} ({error.reason})"
        ) from error


def _read_lines(unit: Unit, data: bytes) -> Iterator[str]:
    at = 0
    for line in data.split(b"\n"):
        if line.strip():
            try:
                yield _text_of(json.loads(line), unit.field)
            except (ValueError, RecursionError) as error:
                number = _line_number(unit.file, unit.start + at)
                raise ValueError(f"{unit.file}, line {number}: {error}; got {line!r:.80}") from None
        at += len(line) + 1


def _text_of(value: Any, field: str) -> str:
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"expected an object with a string {field!r}")
    return text


def _line_number(path: str, offset: int) -> int:
    number = 1
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(offset, 1 << 20))):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return number


def _parquet(file: str | Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{file}: Parquet needs pyarrow: pip install 'gptfast-kernels[data]'"
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(file, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: expected a Parquet file: {error}") from error


def _row_groups(file: Path, field: str) -> list[int]:
    """Rows in each row group."""
    with _parquet(file) as parquet:
        if field not in parquet.schema_arrow.names:
            names = parquet.schema_arrow.names
            raise ValueError(f"{file}: expected a column {field!r}, got {names!r:.200}")
        metadata = parquet.metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def _read_rows(unit: Unit) -> list[str]:
    import pyarrow

    documents: list[str] = []
    first = 0  # row of the row group
    with _parquet(unit.file) as parquet:
        for number in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(number).num_rows
            start, end = max(unit.start, first), min(unit.end, first + rows)
            if start < end:
                try:
                    table = parquet.read_row_group(number, columns=[unit.field])
                    column = table.column(0)[start - first : end - first].to_pylist()
                except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                    raise ValueError(
                        f"{unit.file}, rows {first} to {first + rows - 1}: "
                        f"expected column {unit.field!r} of a Parquet file: {error}"
                    ) from error
                for row, text in enumerate(column, start):
                    if not isinstance(text, str):
                        raise ValueError(
                            f"{unit.file}, row {row}: expected text in column {unit.field!r}, "
                            f"got {text!r:.80}"
                        )
                documents += column
            first += rows
    return documents


# --- what worker processes do with a unit


def characters(unit: Unit) -> set[str]:
    """The characters of a unit's text, for a tokenizer of them."""
    return set().union(*_char_texts(unit))


def _char_texts(unit: Unit) -> list[str]:
    """What a tokenizer of characters gets: it has no end-of-text token, so lines end a document."""
    if unit.format == "text":
        return [END_OF_TEXT.join(read_documents(unit))]
    return [f"{document}\n" for document in read_documents(unit)]


def encode(unit: Unit, tokenizer: Tokenizer) -> npt.NDArray[Any]:
    """The tokens of a unit.

    Raises:
        ValueError: see `read_documents`; or a character is not in the vocabulary.
    """
    dtype = dtype_for(tokenizer.vocab_size)
    if isinstance(tokenizer, CharTokenizer):
        return np.array(tokenizer.encode("".join(_char_texts(unit))), dtype)
    if not isinstance(tokenizer, GPT2Tokenizer):
        raise TypeError(f"prepare: expected a tokenizer char or gpt2, got {type(tokenizer)}")
    ids: list[int] = []
    for number, document in enumerate(read_documents(unit)):
        if unit.format == "text":
            begins = number > 0 or unit.begins
        elif not (begins := bool(document.strip())):
            continue
        ids += begins * [tokenizer.end_of_text]
        ids += tokenizer.encode(document)
    return np.array(ids, dtype)
