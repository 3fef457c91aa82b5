"""Data sets by name: which files of Hugging Face's hub they are, fetched into its cache."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path


@dataclass(frozen=True)
class Hub:
    """Files of a data set on the hub; patterns as of a shell."""

    repo: str
    train: str
    val: str | None = None  # None: the last part of the others
    revision: str = "main"


NAMED = {
    "tinystories": Hub(
        "roneneldan/TinyStories",
        train="TinyStoriesV2-GPT4-train.txt",
        val="TinyStoriesV2-GPT4-valid.txt",
    ),
    "fineweb-edu": Hub("HuggingFaceFW/fineweb-edu", train="sample/10BT/*.parquet"),
    # 8 million documents, which the hub itself keeps as Parquet on a branch of its own.
    "openwebtext": Hub(
        "Skylion007/openwebtext",
        train="plain_text/train/*.parquet",
        revision="refs/convert/parquet",
    ),
}


def fetch(name: str) -> tuple[list[Path], list[Path]]:
    """The files of a named data set, to train on and to validate.

    Raises:
        ImportError: huggingface-hub is not installed.
        ConnectionError: they are not in its cache and cannot be fetched.
    """
    data_set = NAMED[name]
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} comes from Hugging Face's hub: pip install 'gptfast-kernels[data]'"
        ) from error
    patterns = [data_set.train] + ([data_set.val] if data_set.val else [])
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                data_set.repo,
                repo_type="dataset",
                revision=data_set.revision,
                allow_patterns=patterns,
            )
        )
    except (OSError, huggingface_hub.errors.HfHubHTTPError, ValueError) as error:
        raise ConnectionError(
            f"cannot fetch {name} ({data_set.repo}) from Hugging Face's hub: "
            f"{str(error).splitlines()[0]:.200}; give files of your own with --file, or set "
            "HF_HOME to a cache that has it"
        ) from error
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def matching(pattern: str | None) -> list[Path]:
        return [f for f in files if pattern and fnmatch(str(f.relative_to(folder)), pattern)]

    if not matching(data_set.train):
        raise ConnectionError(
            f"{folder}: expected {data_set.train} of {data_set.repo} in the hub's cache, got none"
        )
    return matching(data_set.train), matching(data_set.val)
