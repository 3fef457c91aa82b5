"""Tokenizers: published GPT-2 ids, round trips, streaming, and bad `tokenizer.json` files."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    StreamDecoder,
    load_tokenizer,
    tokenizer_from_dict,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
GPT2_IDS = st.lists(st.integers(0, 50256), max_size=30)
PYTHONPATH = os.pathsep.join(sys.path)
few = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    return GPT2Tokenizer()


# From tiktoken's README and tests/test_encoding.py, and the GPT-2 examples of Hugging Face.
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("Hello world", [15496, 995]),
        ("hello world", [31373, 995]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("0", [15]),
        ("000", [830]),
        ("00000", [20483]),
        ("0000000", [24598]),
        ("000000000", [10535, 830]),
        ("00000000000", [8269, 830]),
        ("000000000000000", [8269, 24598]),
        ("0000000000000000", [25645]),
        ("00000000000000000", [8269, 10535, 830]),
        ("\U0001f600", [47249, 222]),
    ],
)
def test_gpt2_ids_are_the_published_ones(gpt2, text, ids):
    assert gpt2.encode(text) == ids
    assert gpt2.decode(ids) == text


def test_gpt2_vocabulary(gpt2):
    assert gpt2.vocab_size == 50257
    assert gpt2.end_of_text == 50256
    assert gpt2.token_bytes(50256) == b"<|endoftext|>"
    assert gpt2.token_bytes(0) == b"!"
    assert len({gpt2.token_bytes(i) for i in range(50257)}) == 50257


def test_gpt2_special_tokens_only_when_asked(gpt2):
    text = "a<|endoftext|>b"
    plain = gpt2.encode(text)
    assert 50256 not in plain
    assert gpt2.decode(plain) == text
    assert gpt2.encode(text, allowed_special={"<|endoftext|>"}) == [64, 50256, 65]
    assert gpt2.encode(text, allowed_special="all") == [64, 50256, 65]
    for wrong in ({"<|im_start|>"}, "<|endoftext|>"):
        with pytest.raises(ValueError, match="allowed_special must be 'all' or among"):
            gpt2.encode(text, allowed_special=wrong)


def test_gpt2_long_runs_do_not_blow_up(gpt2):
    for text in (" " * 100_000, "a" * 100_000, "\n" * 100_000 + "x", "\ud800 lone"):
        ids = gpt2.encode(text)
        assert gpt2.decode(ids) == text.replace("\ud800", "\ufffd")


def test_gpt2_needs_no_network_and_no_cache(tmp_path):
    # A fresh process in which no connection can be made and tiktoken's cache is empty.
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise OSError('network used')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "from gptfast.tokenizer import GPT2Tokenizer\n"
        "print(GPT2Tokenizer().encode('Hello world'))\n"
    )
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "[15496, 995]\n", done.stderr


def test_import_of_the_char_level_needs_no_tiktoken_and_no_torch():
    code = (
        "import importlib.util, sys\n"
        "sys.modules['tiktoken'] = None\n"
        "import gptfast\n"
        "before = 'torch' in sys.modules\n"
        "from gptfast.tokenizer import CharTokenizer, GPT2Tokenizer\n"
        "assert before == ('torch' in sys.modules)\n"
        "assert CharTokenizer.from_text('ab').encode('ba') == [1, 0]\n"
        "try: GPT2Tokenizer()\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "GPT2Tokenizer needs tiktoken: pip install tiktoken\n", done.stderr


def test_char_ids_are_positions_in_the_sorted_characters():
    tokenizer = CharTokenizer.from_text("hello\n")
    assert tokenizer.chars == ("\n", "e", "h", "l", "o")
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("hole") == [2, 4, 3, 1]
    assert tokenizer.decode(np.array([2, 4, 3, 1], np.uint16)) == "hole"


def test_char_unknown_character_is_named_with_its_position():
    with pytest.raises(ValueError, match="expected one of its 2 characters, got 'é' at position 2"):
        CharTokenizer.from_text("ab").encode("abé?é")


@pytest.mark.parametrize(
    ("chars", "message"),
    [
        ([], "at least one character, got none"),
        (["a", "bc"], "single characters, got 'bc'"),
        (["a", ""], "single characters, got ''"),
        (["a", 1], "single characters, got 1"),
        (["a", None], "single characters, got None"),
        (["a", "b", "a"], "each character once, got 'a' twice"),
        (["\ud800"], "no surrogates"),
    ],
)
def test_char_rejects_bad_vocabularies(chars, message):
    with pytest.raises(ValueError, match=message):
        CharTokenizer(chars)


@few
@given(TEXT.filter(bool))
def test_char_round_trip(text):
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@few
@given(TEXT)
def test_gpt2_round_trip(text):
    tokenizer = GPT2Tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [CharTokenizer.from_text("abc"), GPT2Tokenizer()])
@pytest.mark.parametrize("bad", [-1, 50257, 1 << 70])
def test_ids_outside_the_vocabulary(tokenizer, bad):
    message = rf"token ids in \[0, {tokenizer.vocab_size}\), got {bad} at position 1"
    with pytest.raises(ValueError, match=message):
        tokenizer.decode([0, bad])
    with pytest.raises(ValueError, match=f"got {bad}"):
        tokenizer.token_bytes(bad)
    with pytest.raises(TypeError):
        tokenizer.decode([0.5])


def test_stream_holds_back_half_an_emoji(gpt2):
    ids = gpt2.encode("a\U0001f600b")
    assert len(ids) == 4  # the emoji is two tokens
    stream = StreamDecoder(gpt2)
    assert [stream.push(i) for i in ids] == ["a", "", "\U0001f600", "b"]
    assert stream.flush() == ""


def test_stream_ends_inside_a_character(gpt2):
    first = gpt2.encode("\U0001f600")[0]
    stream = StreamDecoder(gpt2)
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(gpt2.encode("x")[0]) == "x"  # nothing of the old text is left


@few
@given(GPT2_IDS)
def test_stream_of_any_gpt2_ids_equals_decode(ids):
    tokenizer = GPT2Tokenizer()
    stream = StreamDecoder(tokenizer)
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == tokenizer.decode(ids)


@few
@given(TEXT.filter(bool))
def test_stream_of_characters_lags_nothing(text):
    tokenizer = CharTokenizer.from_text(text)
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in tokenizer.encode(text)] == list(text)
    assert stream.flush() == ""


@pytest.mark.parametrize("tokenizer", [CharTokenizer.from_text('é"\n\U0001f600a'), GPT2Tokenizer()])
def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert type(loaded) is type(tokenizer)
    assert loaded.to_dict() == tokenizer.to_dict() == json.loads(path.read_text())
    assert loaded.encode("a") == tokenizer.encode("a")
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    CharTokenizer.from_text("old").save(path)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        CharTokenizer.from_text("new").save(path)
    assert load_tokenizer(path).to_dict()["chars"] == ["d", "l", "o"]
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_save_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "t.json", tmp_path / "gone" / "t.json", tmp_path / "folder"):
        with pytest.raises(OSError, match=r"Not a directory|No such file|Is a directory"):
            CharTokenizer.from_text("a").save(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON"),
        (b'{"type": "char"', "expected JSON"),
        (b"\x80\x81\x82", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"null", "got None"),
        (b"[]", r"got \[\]"),
        (b'{"type": "bpe"}', "got {'type': 'bpe'}"),
        (b'{"type": ["char"], "chars": []}', "expected"),
        (b'{"type": "char"}', "expected"),
        (b'{"type": "char", "chars": "abc"}', "expected"),
        (b'{"type": "char", "chars": {"a": 0}}', "expected"),
        (b'{"type": "char", "chars": []}', "at least one character"),
        (b'{"type": "char", "chars": ["ab"]}', "single characters, got 'ab'"),
        (b'{"type": "char", "chars": [["a"]]}', "single characters"),
        (b'{"type": "char", "chars": ["a", "a"]}', "'a' twice"),
        (b'{"type": "char", "chars": ["\\ud800"]}', "no surrogates"),
        (b'{"type": "gpt2", "vocab_size": 7}', "expected"),
    ],
)
def test_bad_tokenizer_files_are_refused(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 500


def test_huge_tokenizer_file_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match="expected at most 33554432 bytes, got more"):
        load_tokenizer(path)


def test_missing_tokenizer_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_from_dict_names_its_source():
    with pytest.raises(ValueError, match=r"^checkpoint\.pt: expected .* got 3$"):
        tokenizer_from_dict(3, "checkpoint.pt")
