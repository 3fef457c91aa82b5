"""GPU targets: what a launch heuristic may know of a card, so that it can be tried without one.

`pick_config(..., target)` of a kernel takes a `Target`; its launcher asks `target_of(x.device)`.
`assume("sm_90")` answers for tensors on a CPU, where the interpreter or the compiler stands in.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3
ISA reference guide and MI300X data sheet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Target:
    """One generation of cards; sizes are of one multiprocessor (AMD: compute unit).

    Args:
        name: "sm_90", "gfx942".
        platform: "cuda" or "hip", as Triton names it.
        warp_size: threads in a warp (AMD: wavefront).
        shared_memory: bytes that one program may use.
        shared_memory_total: bytes that its resident programs share.
        registers: 32-bit registers.
        threads: resident at most.
        programs: resident at most.
        multiprocessors: of the largest card. Heuristics share work out by it, so that all cards of
            a generation give the same bits.
    """

    name: str
    platform: str
    warp_size: int
    shared_memory: int
    shared_memory_total: int
    registers: int
    threads: int
    programs: int
    multiprocessors: int


KB = 1024
TARGETS: Mapping[str, Target] = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 32, 163 * KB, 164 * KB, 64 * KB, 2048, 32, 108),
        Target("sm_86", "cuda", 32, 99 * KB, 100 * KB, 64 * KB, 1536, 16, 84),
        Target("sm_89", "cuda", 32, 99 * KB, 100 * KB, 64 * KB, 1536, 24, 142),
        Target("sm_90", "cuda", 32, 227 * KB, 228 * KB, 64 * KB, 2048, 32, 132),
        Target("sm_100", "cuda", 32, 227 * KB, 228 * KB, 64 * KB, 2048, 32, 148),
        Target("sm_120", "cuda", 32, 99 * KB, 100 * KB, 64 * KB, 1536, 24, 188),
        # Four SIMDs of 512 registers for 64 lanes each; 8 wavefronts a SIMD.
        Target("gfx942", "hip", 64, 64 * KB, 64 * KB, 128 * KB, 2048, 32, 304),
    )
}
SMALLEST = TARGETS["sm_86"]  # of an unknown card: every other one has more room

_assumed = TARGETS["sm_80"]


@contextlib.contextmanager
def assume(name: str) -> Iterator[Target]:
    """Take this target for tensors that are on no GPU, inside the `with` block.

    Raises:
        ValueError: unknown name.
    """
    global _assumed
    if name not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}; got {name!r}")
    before, _assumed = _assumed, TARGETS[name]
    try:
        yield _assumed
    finally:
        _assumed = before


def target_of(device: torch.device) -> Target:
    """The target of a GPU; of any other device the one that `assume` names."""
    if device.type != "cuda":
        return _assumed
    return _target_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _target_of_gpu(index: int) -> Target:
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    else:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
    return TARGETS.get(name, SMALLEST)
