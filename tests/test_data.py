"""Texts, prepared folders and batches: what they hold and what they refuse."""

import hashlib
import http.client
import io
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptfast.data import (
    Dataset,
    fetch_tiny_shakespeare,
    prepare,
    prepare_text,
    read_text,
    resolve_source,
)
from gptfast.data import dataset as dataset_module
from gptfast.data import text as text_module
from gptfast.tokenizer import CharTokenizer, GPT2Tokenizer

POEM = (
    "From fairest creatures we desire increase,\nThat thereby beauty's rose might never die,\n" * 9
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- texts


def test_packaged_shakespeare():
    text = read_text()
    assert text == read_text(None)
    assert text.startswith(
        "FIRST CITIZEN:\nBefore we proceed any further, hear me speak.\n\nALL:\n"
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "46deaa86713a6451983dd534ad50bb118bc31f438a625a13618219a2604ba1b8"
    assert CharTokenizer.from_text(text).vocab_size == 67


def test_read_text_keeps_line_ends_and_drops_the_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\n")
    assert read_text(path) == read_text(str(path)) == "naïve\r\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected text, got an empty file"),
        (b"\xef\xbb\xbf", "expected text, got an empty file"),
        (b"abc\0def", "got a NUL byte at offset 3"),
        (b"ab\xff\xfe", r"got byte 0xff at offset 2 \(invalid start byte\)"),
        ("é".encode()[:1], r"got byte 0xc3 at offset 0 \(unexpected end of data\)"),
    ],
)
def test_read_text_refuses(content, message, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_text(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_text_of_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.txt: no such file"):
        read_text(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="expected a text file, got a directory"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="expected a text file, got no regular file"):
        read_text("/dev/zero")


# --- sources


def test_resolve_source(tmp_path, monkeypatch):
    assert resolve_source(None) is None
    assert resolve_source("shakespeare") is None
    assert resolve_source("./shakespeare") == Path("shakespeare")
    assert resolve_source(tmp_path / "x") == tmp_path / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(text_module, "fetch_tiny_shakespeare", lambda dest: dest)
    assert resolve_source("tinyshakespeare") == tmp_path / "gptfast" / "tinyshakespeare.txt"


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route"),
        TimeoutError("no route"),
        http.client.HTTPException("no route"),
    ],
)
def test_fetch_offline(error, tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(ConnectionError, match=r"cannot fetch https.*no route.*packaged plays"):
        fetch_tiny_shakespeare(tmp_path / "sub" / "t.txt")
    assert os.listdir(tmp_path) == []


def test_fetch_checks_the_sha256(tmp_path, monkeypatch):
    served = {"body": b"tiny"}
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(served["body"]))
    dest = tmp_path / "sub" / "t.txt"
    with pytest.raises(ValueError, match=r"input.txt: expected sha256 86c4.*, got 8950"):
        fetch_tiny_shakespeare(dest)
    assert os.listdir(tmp_path) == []

    monkeypatch.setattr(text_module, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(b"tiny").hexdigest())
    assert fetch_tiny_shakespeare(dest).read_bytes() == b"tiny"
    served.clear()  # a second call does not ask the network
    assert fetch_tiny_shakespeare(dest) == dest
    assert os.listdir(dest.parent) == ["t.txt"]

    dest.write_bytes(b"mine")
    with pytest.raises(ValueError, match="delete it to fetch it again"):
        fetch_tiny_shakespeare(dest)
    assert dest.read_bytes() == b"mine"


# --- prepared folders


def test_prepare_writes_what_open_reads(tmp_path):
    (tmp_path / "poem.txt").write_text(POEM)
    dataset = prepare(tmp_path / "poem.txt", tmp_path / "out" / "poem")
    folder = tmp_path / "out" / "poem"
    assert sorted(os.listdir(folder)) == [
        *("manifest.json", "tokenizer.json", "train_00001.npy", "val_00001.npy")
    ]
    cut = int(len(POEM) * 0.9)  # by position, as nanoGPT does
    assert dataset.tokenizer.decode(dataset.train) == POEM[:cut]
    assert dataset.tokenizer.decode(dataset.val) == POEM[cut:]
    assert isinstance(dataset.train, np.memmap)
    assert dataset.train.dtype == np.uint16
    raw = np.load(folder / "train_00001.npy")
    assert raw.tolist() == CharTokenizer.from_text(POEM).encode(POEM[:cut])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["dtype"], manifest["vocab_size"]) == ("uint16", len(set(POEM)))
    assert manifest["source"]["files"] == [[str(tmp_path / "poem.txt"), len(POEM)]]
    assert manifest["shards"] == {
        "train": [{"name": "train_00001.npy", "tokens": cut}],
        "val": [{"name": "val_00001.npy", "tokens": len(POEM) - cut}],
    }


def test_default_split_has_the_sizes_of_nanogpt():
    # nanoGPT's data/shakespeare_char: 1,003,854 and 111,540 tokens of 1,115,394 characters.
    dataset = Dataset.in_memory("a" * 1_115_394)
    assert (len(dataset.train), len(dataset.val)) == (1_003_854, 111_540)


def test_prepare_packaged_text_with_gpt2(tmp_path):
    dataset = prepare("shakespeare", tmp_path, tokenizer="gpt2", val_fraction=0.02)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["source"] == {"text": "shakespeare"}
    assert dataset.vocab_size == 50257
    assert dataset.train.dtype == np.uint16
    text = read_text()
    joined = dataset.tokenizer.decode(dataset.train) + dataset.tokenizer.decode(dataset.val)
    assert joined == text


def test_vocabulary_of_65536_needs_uint32(tmp_path):
    chars = [chr(c) for c in range(0x20, 0x20 + 65536 + 2048) if not 0xD800 <= c <= 0xDFFF]
    assert len(chars) == 65536
    for size, dtype in ((65535, np.uint16), (65536, np.uint32)):
        text = "".join(chars[:size])
        dataset = prepare_text(text, tmp_path / str(size), val_fraction=0)
        assert dataset.train.dtype == dtype
        assert dataset.tokenizer.decode(dataset.train) == text
        assert len(dataset.val) == 0


def test_given_tokenizer_is_used_and_unknown_characters_are_counted_in_the_whole_text(tmp_path):
    tokenizer = CharTokenizer(["b", "a"])
    assert Dataset.in_memory("ab" * 5, tokenizer).train.tolist() == [1, 0] * 4 + [1]
    with pytest.raises(ValueError, match="got 'c' at position 9"):
        prepare_text("ababababac", tmp_path / "out", tokenizer)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_val_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="0 <= val_fraction < 1, got"):
        Dataset.in_memory("abc", val_fraction=fraction)


def test_in_memory_refuses_no_text_and_unknown_tokenizers():
    with pytest.raises(ValueError, match="expected text, got none"):
        Dataset.in_memory("")
    with pytest.raises(ValueError, match="'char' or 'gpt2', got 'bpe'"):
        Dataset.in_memory("abc", "bpe")


# A cut could show in white space: the last space of a run joins the next word, the others do not.
WHITE = "a    b  \n\n c\n\n\n\n d \t  e.   1  'll\u3000\u3000 f \x1c  \n   \U0001f600  "


@settings(max_examples=30, deadline=None)
@example(WHITE, 1)
@example(WHITE * 2, 3)
@example(WHITE * 3, 10)
@given(st.text(st.sampled_from("a1 \n\t\x1c\u3000.'é"), max_size=200), st.integers(1, 20))
def test_long_texts_are_encoded_in_pieces_without_a_trace(text, size):
    tokenizer = GPT2Tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_module, "PIECE_CHARS", size)
        patch.setattr(dataset_module, "PROGRESS_CHARS", 0)
        assert "".join(dataset_module._pieces(text)) == text
        assert dataset_module._encode(text + "x", tokenizer).tolist() == tokenizer.encode(
            text + "x"
        )


@settings(max_examples=20, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["char", "gpt2"]),
)
def test_prepared_folder_round_trip(tmp_path_factory, text, fraction, tokenizer):
    folder = tmp_path_factory.mktemp("dataset")
    prepare_text(text, folder, tokenizer, fraction)
    dataset = Dataset.open(str(folder))
    memory = Dataset.in_memory(text, tokenizer, fraction)
    assert dataset.train.tolist() == memory.train.tolist()
    assert dataset.val.tolist() == memory.val.tolist()
    decode = dataset.tokenizer.decode
    assert decode(dataset.train) + decode(dataset.val) == text


@pytest.fixture
def folder(tmp_path):
    prepare_text(POEM, tmp_path / "poem")
    return tmp_path / "poem"


SHARDS = ["train_00001.npy", "val_00001.npy"]


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("change", [-(10**9), -200, -1, 2])
def test_shard_of_another_size(folder, name, change):
    size = (folder / name).stat().st_size
    os.truncate(folder / name, max(0, size + change))
    with pytest.raises(ValueError, match=rf"{name}: expected \d+ tokens of uint16 .*, got"):
        Dataset.open(folder)


@pytest.mark.parametrize(
    "other",
    [np.zeros(3, np.uint16), np.zeros(len(POEM), np.uint32), np.array([{}]), b"text", None],
    ids=["shape", "dtype", "pickle", "text", "archive"],
)
def test_shard_that_is_something_else(folder, other):
    shard = folder / "train_00001.npy"
    if isinstance(other, bytes):
        shard.write_bytes(other)
    elif other is None:
        with shard.open("wb") as file:
            np.savez(file, a=np.zeros(3))
    else:
        np.save(shard, other, allow_pickle=True)
    with pytest.raises(ValueError, match=r"train_00001.npy: expected \d+ tokens of uint16 .*, got"):
        Dataset.open(folder)


def test_token_outside_the_vocabulary(folder):
    tokens = np.load(folder / "train_00001.npy")
    tokens[:] = 999
    np.save(folder / "train_00001.npy", tokens)
    expected = rf"train_00001.npy: expected .* in \[0, {len(set(POEM))}\), got 999"
    with pytest.raises(ValueError, match=expected):
        Dataset.open(folder).batch("train", 1, 4, seeded(0))


def test_half_prepared_folder(folder):
    edit_manifest(folder, {"complete": False})
    with pytest.raises(ValueError, match="preparation was cut short"):
        Dataset.open(folder)
    prepare_text("abc", folder)
    assert len(Dataset.open(folder).train) == 2


@pytest.mark.parametrize("name", SHARDS)
def test_missing_shard(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: expected .* got no such file"):
        Dataset.open(folder)


def test_missing_folder_and_missing_tokenizer(folder, tmp_path):
    for nothing in (tmp_path, tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match="expected a prepared dataset"):
            Dataset.open(nothing)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json"):
        Dataset.open(folder)


def test_tokenizer_of_another_dataset(folder):
    CharTokenizer.from_text("abc").save(folder / "tokenizer.json")
    with pytest.raises(
        ValueError, match=rf"expected {len(set(POEM))} tokens as in manifest\.json, got 3"
    ):
        Dataset.open(folder)


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "expected format 'gptfast tokens'"),
        ({"version": 2}, "expected version 1, got 2"),
        ({"dtype": "float64"}, "expected dtype among"),
        ({"dtype": 3}, "expected dtype to be str, got 3"),
        ({"complete": 1}, "expected complete to be bool, got 1"),
        ({"unit": True}, "expected unit to be int, got True"),
        ({"shards": []}, r"expected shards to be dict, got \[\]"),
        ({"shards": {}}, "expected shards of train with name and tokens, got None"),
        ({"shards": {"train": [3], "val": []}}, "expected shards of train .*, got 3"),
        (
            {"shards": {"train": [{"name": "../../x", "tokens": 3}], "val": []}},
            "expected shards of train",
        ),
        (
            {"shards": {"train": [{"name": "train_00001.npy", "tokens": 10**30}], "val": []}},
            "train_00001.npy: expected 10{30} tokens",
        ),
        ({"vocab_size": "x" * 10_000}, "expected vocab_size to be int"),
    ],
)
def test_hostile_manifest(folder, change, message):
    edit_manifest(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        Dataset.open(folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xff", b"[]", b"3", b"{}"])
def test_corrupt_manifest(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest.json: expected"):
        Dataset.open(folder)


# --- failures while writing


def test_unwritable_folder_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(OSError, match=r"Not a directory|File exists"):
            prepare_text(POEM, out)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("writes", range(5))
def test_full_disk_leaves_what_can_be_gone_on_with(tmp_path, monkeypatch, writes):
    (tmp_path / "poem.txt").write_text(POEM)
    left = iter(range(writes))

    def fsync(fd):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            prepare(tmp_path / "poem.txt", tmp_path / "out", shard_tokens=500)
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp")]
    with pytest.raises((ValueError, FileNotFoundError), match=r"cut short|got no manifest"):
        Dataset.open(tmp_path / "out")
    dataset = prepare(tmp_path / "poem.txt", tmp_path / "out", shard_tokens=500)
    assert dataset.tokenizer.decode(dataset.train) + dataset.tokenizer.decode(dataset.val) == POEM


def test_a_folder_with_another_dataset_is_left_alone(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="expected a new or empty folder, got a dataset"):
        prepare_text("other", folder)
    with pytest.raises(FileExistsError, match="got a dataset with files None, not"):
        prepare(folder / "train_00001.npy", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- batches


def test_batch_windows_and_targets(folder):
    dataset = Dataset.open(folder)
    x, y = dataset.batch("train", 16, 8, seeded(0))
    assert x.shape == y.shape == (16, 8)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()
    text = dataset.tokenizer.decode(dataset.train)
    for row_x, row_y in zip(x, y, strict=True):
        assert dataset.tokenizer.decode([*row_x, row_y[-1]]) in text
        assert torch.equal(row_x[1:], row_y[:-1])


def test_batch_is_determined_by_the_generator_alone(folder):
    on_disk, in_memory = Dataset.open(folder), Dataset.in_memory(POEM)
    torch.manual_seed(1)
    first = on_disk.batch("train", 4, 8, seeded(7))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = in_memory.batch("train", 4, 8, seeded(7))
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    generator = seeded(7)
    in_memory.batch("train", 4, 8, generator)
    assert not torch.equal(in_memory.batch("train", 4, 8, generator)[0], first[0])


def test_batch_reaches_every_window_and_no_further():
    dataset = Dataset.in_memory("abcdefghij", val_fraction=0)
    x, y = dataset.batch("train", 500, 4, seeded(0))
    assert sorted(set(x[:, 0].tolist())) == list(range(6))
    assert y.max() == 9
    x, _ = dataset.batch("train", 3, 9, seeded(0))  # a single window
    assert x.tolist() == [list(range(9))] * 3


def test_batch_refuses():
    dataset = Dataset.in_memory("abcdefghij")
    with pytest.raises(ValueError, match=r"train must have at least block_size \+ 1 = 10 .* got 9"):
        dataset.batch("train", 1, 9, seeded(0))
    with pytest.raises(ValueError, match=r"val must have at least block_size \+ 1 = 2 .* got 1"):
        dataset.batch("val", 1, 1, seeded(0))
    with pytest.raises(ValueError, match="'train' or 'val', got 'test'"):
        dataset.batch("test", 1, 1, seeded(0))
    for sizes in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(ValueError, match=r"expected b.*_size >= 1, got"):
            dataset.batch("train", *sizes, seeded(0))
