"""Where an op can run on this machine: every backend, on every device, at every SIMD level.

And where in its results a test plants a fault.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from gptfast import backend
from gptfast.testing import Case

EXTENSION = backend.extension()
ISAS = EXTENSION.cpu_isas() if EXTENSION else []
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class Place(NamedTuple):
    """A backend, on a device, at a SIMD level."""

    backend: str
    device: str = "cpu"
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.backend}-{self.isa or self.device}"


PLACES = [Place("torch"), *(Place("cpu", isa=isa) for isa in ISAS)]
if INTERPRET:
    PLACES.append(Place("triton"))
elif torch.cuda.is_available():
    PLACES += [Place("torch", "cuda"), Place("triton", "cuda")]
    if backend.missing("cuda") is None:
        PLACES.append(Place("cuda", "cuda"))


# Sizes of tails on a GPU, where each may need kernels of its own, compiled in seconds: one, and
# those around the least width of a tile, of a vector and of a warp.
GPU_TAILS = (1, 8, 15, 16, 17, 33)


DECODE = ("attention_decode", "attention_decode_append")
ATTENTION = ("attention", "attention_qkv", "attention_varlen", *DECODE)


# Their C++ copies memory, is that of other ops, or is for the best SIMD level, which shows it.
ONE_LEVEL = ("attention_decode_append", "kv_cache_append", "linear_gelu")


def implemented(op: str) -> list[Place]:
    """The places where an op has an implementation; under the interpreter what is there for it."""
    places = [p for p in PLACES if p.backend in backend.OPS[op].implementations]
    if INTERPRET:
        return [p for p in places if p.backend == "triton"]
    if op in ONE_LEVEL:
        places = [p for p in places if p.isa not in ISAS[:-1]]
    return places


def refused(case: Case, dtype: torch.dtype) -> str | None:
    """What of a case the `cuda` backend refuses, as its reason says; None: it runs."""
    if case.op not in ATTENTION:
        return None
    if dtype == torch.float32:
        return "bfloat16 or float16, got float32"
    widths = case.shape[-2:] if case.op in DECODE else case.shape[-1:]
    if any(width % 8 for width in (*widths, case.options.get("Dv", 8))):
        return "head dims must be multiples of 8"
    if case.layout in ("transposed", "sliced", "strided", "scalar"):
        return "contiguous rows"
    if case.op not in DECODE:
        for name in ("dropout_p", "softcap", "alibi"):
            if case.options.get(name):
                return f"it has no {name}"
    return None


def first_result(op: str, outputs: Any, args: Sequence[Any]) -> torch.Tensor:
    """Where to plant a fault: in the first tensor that an op returns, or else writes to."""
    if outputs is not None:
        return outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    schema = getattr(torch.ops.gptfast, f"{op}_fwd").default._schema
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    return args[written.index(True)]


@contextlib.contextmanager
def at_level(isa: str | None) -> Iterator[None]:
    if isa is None:
        yield
        return
    assert EXTENSION is not None
    before = EXTENSION.cpu_isa()
    EXTENSION.set_cpu_isa(isa)
    yield
    EXTENSION.set_cpu_isa(before)
