"""Sharded checkpoints of `torch.distributed.checkpoint`, read without running code in them.

PyTorch reads two parts of such a folder with pickle, which calls whatever it is told to: the file
`.metadata`, and values in the shards that are no tensors. Here the first may name the classes of
the format alone, and the others are read as every checkpoint of ours: containers, numbers, strings
and tensors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from gptfast.checkpoint import UNPICKLING_ERRORS, unpickling_reason

__all__ = ["failure_reasons", "load_sharded"]


def _joined(*parts: str) -> str:
    """A path, which is nothing but remembered: a string does, on every system."""
    return "/".join(parts)


def _member(encoding: Any, name: Any) -> Any:
    """What an enum's member is read with where it was written by its name."""
    if encoding is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError("builtins.getattr is not part of it")
    return _MEM_FORMAT_ENCODING[name]


# What the metadata of a state of tensors, numbers and strings consists of: plain data,
RECORDS = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
            *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
# with these in it,
ALLOWED = RECORDS | {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}
# and what is written in a way that depends on the version of Python.
STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("pathlib", "PosixPath"): _joined,
    ("pathlib._local", "PosixPath"): _joined,
    ("builtins", "getattr"): _member,
}


def load_sharded(state: dict[str, Any], folder: Path) -> None:
    """Read a checkpoint of all processes into `state`, in place; all of them must call this.

    Args:
        state: what was saved, with tensors of the same shapes, split in any way.
        folder: of `torch.distributed.checkpoint.save`.

    Raises:
        ValueError: damaged, of another model, or there is code in it, which is not run.
    """
    try:
        load(state, storage_reader=_Reader(folder), planner=_Planner())
    except CheckpointException as error:
        raise ValueError(f"{folder}: {failure_reasons(error):.300}") from error


def failure_reasons(error: CheckpointException) -> str:
    """What went wrong in the processes, each reason once."""
    reasons = set()
    for failure, _ in error.failures.values():
        reason = unpickling_reason(failure).rpartition("metadata read failed: ")[2]
        if isinstance(failure, pickle.UnpicklingError):  # of a tensor
            reason = f"expected tensors without code: {reason}"
        reasons.add(reason)
    return "; ".join(sorted(reasons))


def _build(unpickler: Any) -> None:
    """Give a record its fields; a class or function that were given some would keep them."""
    kind = type(unpickler.stack[-2])
    if (kind.__module__, kind.__qualname__) not in RECORDS:
        raise pickle.UnpicklingError(f"fields of a {kind.__qualname__} are not part of it")
    pickle._Unpickler.dispatch[pickle.BUILD[0]](unpickler)


class _Unpickler(pickle._Unpickler):  # in Python: the one in C has no hook for fields
    """Of metadata: knows the classes of the format, and PyTorch's dtypes."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: _build,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in STAND_INS:
            return STAND_INS[module, name]
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of it")


class _Reader(FileSystemReader):
    # Without the base's arguments, so that PyTorch does not try again for a single process's.
    def read_metadata(self) -> Metadata:
        file = Path(self.path) / ".metadata"
        data = io.BytesIO(file.read_bytes())
        try:
            metadata = _Unpickler(data).load()
        except Exception as error:  # in Python it may be any, of a damaged file
            raise ValueError(f"{file}: expected metadata without code: {error}") from error
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError(f"{file}: expected metadata, got {type(metadata).__name__}")
        for info in metadata.storage_data.values():
            name = getattr(info, "relative_path", None)
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{file}: expected names of files beside it, got {name!r:.80}")
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        try:
            plain = torch.load(value, weights_only=True)
        except UNPICKLING_ERRORS as error:
            reason = unpickling_reason(error)
            name = read_item.dest_index.fqn
            raise ValueError(f"{name}: expected a value without code: {reason}") from error
        # Written anew for PyTorch's own reader, which would run what the file says.
        clean = io.BytesIO()
        torch.save(plain, clean)
        clean.seek(0)
        super().load_bytes(read_item, clean)
