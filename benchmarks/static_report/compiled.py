"""Compiles one specialisation of a kernel and reads what became of it. A worker; see `worker`."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.static_report.launches import find_kernel, use_target
from benchmarks.static_report.worker import serve

CUOBJDUMP = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
BULK_COPY = 32 * 128  # bits, at least, that one cp.async.bulk moves: its size is not in the PTX


def compile_launch(job: dict[str, Any]) -> dict[str, Any]:
    """Resources and instructions of one kernel.

    Args:
        job: from `Launch.job`.

    Returns:
        regs (a thread), spills (bytes a thread), smem (bytes), tmem (columns), warps, dots (how
        many of the source's products became which matrix instruction), load_bits, load_share (of
        the loaded bits), store_bits.
    """
    target = GPUTarget(*job["target"])
    use_target(target)
    kernel = find_kernel(job["kernel"]).preload(job["specialization"])
    facts = {
        "smem": kernel.metadata.shared,
        "tmem": getattr(kernel.metadata, "tmem_size", None) or 0,
        "warps": kernel.metadata.num_warps,
        "dots": dots(kernel.asm["ttgir"]),
    }
    if target.backend == "cuda":
        loads, stores = ptx_accesses(kernel.asm["ptx"])
        facts |= cubin_resources(kernel.asm["cubin"])
    else:
        loads, stores = amdgcn_accesses(kernel.asm["amdgcn"])
        facts |= amdgcn_resources(kernel.asm["amdgcn"])
    widest = max(loads, default=0)
    share = widest * loads[widest] / loads_total(loads) if widest else 0.0
    return facts | {
        "load_bits": widest,
        "load_share": round(share, 3),
        "store_bits": max(stores, default=0),
    }


def loads_total(accesses: Counter[int]) -> int:
    """Bits of all accesses."""
    return sum(bits * number for bits, number in accesses.items())


def cubin_resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread; bytes of stack a thread, which is where ptxas spills to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    regs, stack, local = (
        max(map(int, re.findall(rf"\b{name}:(\d+)", usage))) for name in ("REG", "STACK", "LOCAL")
    )
    return {"regs": regs, "spills": stack + local}


def amdgcn_resources(text: str) -> dict[str, int]:
    """Vector registers a lane (AGPRs included); bytes of scratch a lane."""

    def value(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", text)[0])

    spills = max(value("private_segment_fixed_size"), 4 * value("vgpr_spill_count"))
    return {"regs": value("vgpr_count"), "spills": spills}


# A product in Triton's GPU IR, with the type of its result where it needs that, and where it stands
# in the source: pipelining and unrolling copy products, but not their places.
DOT = re.compile(
    r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma|tt\.dot_scaled|ttng\.tc_gen5_mma_scaled) "
    r"(?:[^\n]*-> tensor<[^\n]*, #(\w+)>)?[^\n]*loc\((#?\w+)\)"
)
ENCODING = re.compile(r"^#(\w+) = #ttg\.(\w+)<", re.MULTILINE)
KINDS = {"nvidia_mma": "mma.sync", "amd_mfma": "mfma", "amd_wmma": "wmma"}


def dots(ttgir: str) -> dict[str, int]:
    """How many products of the source became which matrix instruction; "fma" is none."""
    encodings = dict(ENCODING.findall(ttgir))
    places: dict[str, str] = {}
    for operation, encoding, place in DOT.findall(ttgir):
        if operation.startswith("ttng.tc_gen5"):
            kind = "tcgen05"
        elif operation == "ttng.warp_group_dot":
            kind = "wgmma"
        else:
            kind = KINDS.get(encodings.get(encoding, ""), "fma")
        if places.get(place) != "fma":
            places[place] = kind
    return dict(sorted(Counter(places.values()).items()))


def ptx_accesses(ptx: str) -> tuple[Counter[int], Counter[int]]:
    """Loads from and stores to global memory, by bits a thread moves at once."""
    loads, stores = Counter(_ptx_widths(ptx, "ld")), Counter(_ptx_widths(ptx, "st"))
    copy = r"cp\.async\.c[ag]\.shared\.global[^;\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-fA-F]+|\d+)"
    for size in re.findall(copy, ptx):
        loads[8 * int(size, 0)] += 1
    bulk = len(re.findall(r"cp\.async\.bulk[\w.:]*\.shared::cluster\.global", ptx))
    loads[128] += bulk * BULK_COPY // 128
    stores[128] += len(re.findall(r"cp\.async\.bulk[\w.:]*\.global\.shared::cta", ptx))
    return +loads, +stores


def _ptx_widths(ptx: str, operation: str) -> Iterator[int]:
    for name in re.findall(rf"\b{operation}\.global[\w.:]*", ptx):
        scalar = re.search(r"\.[bfsu](\d+)$", name)
        vector = re.search(r"\.v(\d)\b", name)
        if scalar:
            yield int(scalar[1]) * (int(vector[1]) if vector else 1)


def amdgcn_accesses(text: str) -> tuple[Counter[int], Counter[int]]:
    """The same of AMD's assembly."""
    counts: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    pattern = r"\b(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)"
    for operation, size in re.findall(pattern, text):
        words = re.match(r"(?:dword|b)(?:x)?(\d*)", size)
        if size.startswith("dword"):
            bits = 32 * int(words[1] or 1) if words else 32
        else:
            bits = 8 if "byte" in size else 16
        counts[operation][bits] += 1
    return counts["load"], counts["store"]


if __name__ == "__main__":
    serve(compile_launch)
