"""Sharded checkpoints of `torch.distributed.checkpoint`, read without running code in them.

PyTorch reads two parts of such a folder with pickle, which calls whatever it is told to: the file
`.metadata`, and values in the shards that are no tensors. Here the first may name the classes of
the format alone, and the others are read as every checkpoint of ours: containers, numbers, strings
and tensors.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from gptfast.checkpoint import UNPICKLING_ERRORS, unpickling_reason

__all__ = ["load_sharded"]

# What the metadata of a state of tensors, numbers and strings consists of. All are constructors of
# plain data; dtypes and layouts come by the name of one function.
ALLOWED = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
            *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # as Python 3.13 calls it
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
        reasons = {str(failure[0]) for failure in error.failures.values()}
        raise ValueError(f"{folder}: {'; '.join(sorted(reasons)):.300}") from error


class _Unpickler(pickle.Unpickler):
    """Of metadata: knows the classes of the format, and PyTorch's dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of it")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
        except UNPICKLING_ERRORS as error:
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
