"""From files to shards: the same tokens however the work is cut, shared and stopped."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptfast.data import Dataset, documents, named, preparation, prepare, resolve_source
from gptfast.data.shards import ShardedTokens
from gptfast.tokenizer import GPT2Tokenizer

DOCUMENTS = ["First.\n", "The second document,\nof two lines", "Ein drittes: größer als 1", "4 4 4"]
EOT = 50256


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 16)
    monkeypatch.setattr(documents, "WINDOW_BYTES", 8)


def write(path, rows, field="text"):
    """A file of documents in the format of its name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({field: row, "n": 1}) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pa.table({"n": [1] * len(rows), field: rows})
        parquet.write_table(table, path, row_group_size=2)
    else:
        path.write_text("<|endoftext|>".join(rows))
    return path


def documents_of(tokens):
    """Lists of tokens, each behind an end-of-text token; and what is before the first."""
    bounds = [0, *np.flatnonzero(tokens[:] == EOT), len(tokens)]
    return [tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]


# --- formats


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
@pytest.mark.parametrize("unit", [1, 30, 10**6])
def test_every_document_begins_with_the_end_of_text_token(tmp_path, monkeypatch, suffix, unit):
    monkeypatch.setattr(documents, "UNIT_BYTES", unit)
    file = write(tmp_path / f"data{suffix}", DOCUMENTS)
    dataset = prepare(file, tmp_path / "out", "gpt2", val_fraction=0)
    tokenizer = GPT2Tokenizer()
    expected = [[EOT, *tokenizer.encode(text)] for text in DOCUMENTS]
    if suffix == ".txt":  # one stream
        expected[0].pop(0)
    given = documents_of(dataset.train)
    assert [document for document in given if document] == expected
    assert len(dataset.val) == 0


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_characters_of_documents(tmp_path, suffix):
    file = write(tmp_path / f"data{suffix}", DOCUMENTS, field="body")
    dataset = prepare(file, tmp_path / "out", "char", val_fraction=0, field="body")
    assert dataset.tokenizer.decode(dataset.train) == "".join(f"{text}\n" for text in DOCUMENTS)


def test_folders_of_files_and_a_validation_file(tmp_path, small_units):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    write(tmp_path / "in" / "b.txt", DOCUMENTS[:2])
    write(tmp_path / "in" / "sub" / "c.jsonl", DOCUMENTS[2:])
    val = write(tmp_path / "val.txt", ["held back"])
    dataset = prepare(tmp_path / "in", tmp_path / "out", "gpt2", val_file=val)
    tokenizer = GPT2Tokenizer()
    texts = ["".join(tokenizer.decode(d[1:])) for d in documents_of(dataset.train) if d]
    assert texts == DOCUMENTS
    assert tokenizer.decode(dataset.val) == "held back"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_the_last_documents_of_each_file_validate(tmp_path, suffix):
    rows = [f"document number {n}, of ten\n" for n in range(10)]
    files = [write(tmp_path / f"{name}{suffix}", rows) for name in "ab"]
    dataset = prepare(files, tmp_path / "out", "gpt2", val_fraction=0.15)
    tokenizer = GPT2Tokenizer()
    train, val = (
        [tokenizer.decode(d[1:]) for d in documents_of(tokens) if d]
        for tokens in (dataset.train, dataset.val)
    )
    held = 10 - len(train) // 2
    assert train == rows[:-held] * 2
    assert val == rows[-held:] * 2
    assert 1 <= held <= 2


# White space of several bytes, and of ASCII that is white space to Python alone.
TRICKY = (
    "a    b  \n\n c\n\n d \t  e.   1  'll\u3000 \u3000 f \x1c  \n   \U0001f600  é é  é\u00a0 \n x"
)


@settings(max_examples=30, deadline=None)
@example(TRICKY * 3, 16)
@given(
    st.text(st.sampled_from("a1 \n\t\x1c\u3000.'é"), min_size=1, max_size=200), st.integers(1, 40)
)
def test_a_text_is_cut_without_a_trace(tmp_path_factory, text, size):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "t.txt").write_text(text, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "UNIT_BYTES", size)
        patch.setattr(documents, "WINDOW_BYTES", 8)
        dataset = prepare(folder / "t.txt", folder / "out", "gpt2", val_fraction=0)
    assert dataset.train[:].tolist() == GPT2Tokenizer().encode(text)


def test_the_same_tokens_as_in_memory(tmp_path):
    text = "na\u00efve caf\u00e9s, " * 40
    (tmp_path / "t.txt").write_text(text)
    for tokenizer in ("char", "gpt2"):
        disk = prepare(tmp_path / "t.txt", tmp_path / tokenizer, tokenizer, val_fraction=0)
        assert disk.train.tolist() == Dataset.in_memory(text, tokenizer, 0).train.tolist()


def test_shards_read_like_one_array(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "t.txt").write_text(text)
    one = prepare(tmp_path / "t.txt", tmp_path / "one")
    many = prepare(tmp_path / "t.txt", tmp_path / "many", shard_tokens=37)
    assert len([n for n in os.listdir(tmp_path / "many") if n.startswith("train_")]) == 25
    assert isinstance(many.train, ShardedTokens)
    assert len(many.train) == len(one.train) == 900
    assert many.train[:].tolist() == one.train.tolist()
    assert many.train[30:80].tolist() == one.train[30:80].tolist()
    index = np.random.default_rng(0).integers(900, size=(5, 7))
    assert many.train[index].tolist() == one.train[index].tolist()
    assert many.tokenizer.decode(many.val[:]) == text[900:]


def test_processes_share_the_work(tmp_path, small_units):
    file = write(tmp_path / "t.jsonl", DOCUMENTS * 3)
    one = prepare(file, tmp_path / "one", "gpt2", shard_tokens=20, workers=1)
    two = prepare(file, tmp_path / "two", "gpt2", shard_tokens=20, workers=2)
    assert two.train[:].tolist() == one.train[:].tolist()
    assert two.val[:].tolist() == one.val[:].tolist()


# --- stopping and going on


@pytest.mark.parametrize("stop", range(8))
def test_going_on_repeats_no_token_and_loses_none(tmp_path, monkeypatch, small_units, stop):
    file = write(tmp_path / "t.jsonl", DOCUMENTS * 4)
    options = {"tokenizer": "gpt2", "val_fraction": 0.3, "shard_tokens": 7}
    whole = prepare(file, tmp_path / "whole", **options)
    encode, left = documents.encode, iter(range(2 * stop))

    def limited(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(documents, "encode", limited)
        with pytest.raises(KeyboardInterrupt):
            prepare(file, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="cut short; the same `gptfast prepare` goes on"):
        Dataset.open(tmp_path / "out")
    (tmp_path / "out" / ".train_00009.npy.1.tmp").write_text("left by a kill")
    again = prepare(file, tmp_path / "out", **options)
    assert again.train[:].tolist() == whole.train[:].tolist()
    assert again.val[:].tolist() == whole.val[:].tolist()
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


def test_what_is_ready_is_not_done_again(tmp_path, monkeypatch):
    file = write(tmp_path / "t.txt", DOCUMENTS)
    prepare(file, tmp_path / "out")
    monkeypatch.setattr(documents, "encode", None)
    assert len(prepare(file, tmp_path / "out").train) > 0
    with pytest.raises(FileExistsError, match=r"got a dataset with val_fraction 0\.1, not 0\.2"):
        prepare(file, tmp_path / "out", val_fraction=0.2)
    write(tmp_path / "t.txt", [*DOCUMENTS, "more"])
    with pytest.raises(FileExistsError, match="got a dataset with files"):
        prepare(file, tmp_path / "out")


def test_kill_9_then_the_same_command(tmp_path):
    file = write(tmp_path / "t.txt", ["some words that repeat, " * 200_000])
    command = [sys.executable, "-m", "gptfast", "prepare", "--file", str(file), "--tokenizer=gpt2"]
    command += ["--shard-tokens=40000", f"--out={tmp_path / 'out'}", "--workers=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not (tmp_path / "out" / "train_00002.npy").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("train_*")}
    dataset = prepare(file, tmp_path / "out", "gpt2", shard_tokens=40_000, workers=1)
    assert (
        dataset.tokenizer.decode(dataset.train[:]) + dataset.tokenizer.decode(dataset.val[:])
        == file.read_text()
    )
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"]["train"]
    assert len(listed) > 2
    # Listed shards are not written again; the one after them may have been renamed already.
    kept = [n for n, t in before.items() if (tmp_path / "out" / n).stat().st_mtime_ns == t]
    assert len(kept) >= len(before) - 1


# --- what is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"line 3: Unterminated string .*; got b'\{\"text\": \"cut'"),
        ("[1]", "line 3: expected an object with a string 'text'; got"),
        ('{"body": "x"}', "line 3: expected an object with a string 'text'; got"),
        ('{"text": null}', "line 3: expected an object with a string 'text'; got"),
        ("[" * 10_000, "line 3: "),
    ],
)
def test_bad_lines_are_named(tmp_path, small_units, line, message):
    file = tmp_path / "t.jsonl"
    file.write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "good"}}\n')
    with pytest.raises(ValueError, match=rf"t\.jsonl, {message}"):
        prepare(file, tmp_path / "out", "gpt2")


def test_bad_parquet(tmp_path):
    file = write(tmp_path / "t.parquet", DOCUMENTS)
    with pytest.raises(
        ValueError, match=r"t\.parquet: expected a column 'body', got \['n', 'text'"
    ):
        prepare(file, tmp_path / "out", "gpt2", field="body")
    with pytest.raises(ValueError, match=r"t\.parquet, row 0: expected text in column 'n', got 1"):
        prepare(file, tmp_path / "out", "gpt2", field="n")
    write(tmp_path / "null.parquet", [*DOCUMENTS, None, *DOCUMENTS])
    with pytest.raises(ValueError, match=r"null\.parquet, row 4: expected text .*, got None"):
        prepare(tmp_path / "null.parquet", tmp_path / "out2", "gpt2", val_fraction=0)
    data = file.read_bytes()
    for cut in (data[:50], data[: len(data) // 2], b"hello"):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match=r"t\.parquet: expected a Parquet file"):
            prepare(file, tmp_path / "out3", "gpt2")
    file.write_bytes(data)
    column = (
        pytest.importorskip("pyarrow.parquet").ParquetFile(file).metadata.row_group(0).column(1)
    )
    damaged = bytearray(data)
    damaged[column.dictionary_page_offset : column.data_page_offset] = bytes(
        column.data_page_offset - column.dictionary_page_offset
    )
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"t\.parquet, rows 0 to 1: expected column 'text'"):
        prepare(file, tmp_path / "out3", "gpt2")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"Parquet needs pyarrow: pip install 'gptfast-kernels"):
        prepare(tmp_path / "t.parquet", tmp_path / "out", "gpt2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"some words and \0 nul bytes", "got a NUL byte at offset 15"),
        (b"some words and more \xff words", "got byte 0xff at offset 20"),
    ],
)
def test_bad_texts(tmp_path, small_units, content, message):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"t\.txt: expected UTF-8 text, {message}"):
        prepare(tmp_path / "t.txt", tmp_path / "out", "gpt2", val_fraction=0)


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such file"):
        prepare(tmp_path / "gone.jsonl", tmp_path / "out")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt: expected text, got an empty file"):
        prepare(tmp_path / "empty.txt", tmp_path / "out")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="folder: expected files, got an empty folder"):
        prepare(tmp_path / "folder", tmp_path / "out")
    with pytest.raises(ValueError, match="workers >= 1, got 100000000 and 0"):
        prepare(None, tmp_path / "out", workers=0)


def test_a_worker_that_is_killed(tmp_path, small_units, monkeypatch):
    file = write(tmp_path / "t.jsonl", DOCUMENTS)
    monkeypatch.setattr(preparation, "partial", lambda *_: _die)
    monkeypatch.setattr(preparation.multiprocessing, "get_context", _fork)
    with pytest.raises(RuntimeError, match="a worker process was killed"):
        prepare(file, tmp_path / "out", "gpt2", workers=2)


def _die(unit):
    os._exit(1)


def _fork(method):
    import multiprocessing.context

    return multiprocessing.context.ForkContext()


# --- data sets by name


def test_named_data_sets_offline(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def snapshot_download(repo, **_):
        raise hub.errors.LocalEntryNotFoundError("no route to host\nand more")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    for name in named.NAMED:
        with pytest.raises(
            ConnectionError, match=rf"cannot fetch {name} .*no route to host; give .* --file"
        ):
            prepare(name, tmp_path / "out", "gpt2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"tinystories comes from .*: pip install 'gptfast-kern"):
        prepare("tinystories", tmp_path / "out", "gpt2")


def test_a_named_data_set_is_fetched(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    cache = tmp_path / "cache"
    cache.mkdir()
    write(cache / "TinyStoriesV2-GPT4-train.txt", DOCUMENTS)
    write(cache / "TinyStoriesV2-GPT4-valid.txt", ["held back"])
    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    dataset = prepare("tinystories", tmp_path / "out", "gpt2")
    assert asked["repo"] == "roneneldan/TinyStories"
    assert asked["repo_type"] == "dataset"
    assert set(asked["allow_patterns"]) == {p.name for p in cache.iterdir()}
    assert len(documents_of(dataset.train)) == len(DOCUMENTS)
    assert dataset.tokenizer.decode(dataset.val) == "held back"
    with pytest.raises(ConnectionError, match=r"expected sample/10BT/.*parquet of .* got none"):
        prepare("fineweb-edu", tmp_path / "other", "gpt2")


def test_a_full_disk(small_disk, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(1_000_000 * "a")
    with pytest.raises(OSError, match=r"cannot write .*/data: .*; with more room the same command"):
        prepare(file, small_disk / "data")


def test_another_error_of_the_system_is_not_a_full_disk(tmp_path, monkeypatch):
    def encode(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(preparation, "_encode_all", encode)
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        prepare(tmp_path / "text.txt", tmp_path / "data")


def test_a_named_set_is_prepared_before_training():
    with pytest.raises(ValueError, match=r"first: gptfast prepare --file tinystories --out data"):
        resolve_source("tinystories")
