"""The committed table: reading, writing, and what counts as worse."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gptfast.targets import KB, TARGETS, Target

FILE = Path(__file__).parents[1] / "static_report.json"
# The matrix instruction that a target is bought for.
NATIVE = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "sm_120": "mma.sync",
    "gfx942": "mfma",
}
SLACK = 0.005  # of ratios: last rows of a grid


@dataclass(frozen=True)
class Row:
    """One kernel, as one call of an op launches it on one target.

    Args:
        op: of the case.
        shape: the case, without its op.
        dtype: of the case.
        call: the registered op: layer_norm_bwd.
        kernel: its name; with "#2" where the call launches it in a second specialisation.
        target: the GPU.
        config: tiles, flags and launch options.
        regs: registers a thread.
        spills: bytes a thread that do not fit into them.
        smem: bytes of shared memory.
        occupancy: predicted share of the warps that a multiprocessor can hold.
        matrix_instr: products of the source, by the matrix instruction that they became.
        load_bits: of the widest load a thread makes.
        load_share: of the loaded bits that are loaded so, as written in the code.
        store_bits: of the widest store.
        bytes_ratio: bytes moved by the whole call over the least possible; see `traffic`.
        issued_ratio: the same of the bytes that loads and stores ask for.
        flops: floating-point operations of this kernel.
        fingerprint: of the kernel's source and specialisation.
    """

    op: str
    shape: str
    dtype: str
    call: str
    kernel: str
    target: str
    config: str
    regs: int
    spills: int
    smem: int
    occupancy: float
    matrix_instr: Mapping[str, int]
    load_bits: int
    load_share: float
    store_bits: int
    bytes_ratio: float
    issued_ratio: float
    flops: int
    fingerprint: str

    @property
    def key(self) -> tuple[str, ...]:
        """What an entry is about."""
        return (self.op, self.shape, self.dtype, self.call, self.kernel, self.target)

    @property
    def matrix_share(self) -> float:
        """Share of the products that run on the target's own matrix instruction; 0 of none."""
        total = sum(self.matrix_instr.values())
        return self.matrix_instr.get(NATIVE[self.target], 0) / total if total else 0.0


def occupancy(target: Target, regs: int, smem: int, tmem: int, warps: int) -> float:
    """Resident warps of a multiprocessor over what it can hold, as registers and memory allow.

    Registers are handed out to a warp in steps of 8 a thread, by a quarter of the multiprocessor
    (AMD: a SIMD). CUDA keeps 1 KB of shared memory for itself in each program; tensor memory
    (sm_100) has 512 columns.
    """
    step = -(-max(regs, 1) // 8) * 8
    warps_a_quarter = target.registers // 4 // (step * target.warp_size)
    limits = [
        target.programs,
        target.threads // (warps * target.warp_size),
        4 * warps_a_quarter // warps,
        target.shared_memory_total // (smem + KB * (target.platform == "cuda") or 1),
    ]
    if tmem:
        limits.append(512 // tmem)
    return round(min(limits) * warps * target.warp_size / target.threads, 4)


def worse(before: Row, after: Row) -> list[str]:
    """In which ways a new entry is worse than the committed one.

    Registers are no concern of their own: what more of them cost is occupancy, and spills.
    """
    found = []

    def check(name: str, is_worse: bool) -> None:
        if is_worse:
            found.append(f"{name} {getattr(before, name)} -> {getattr(after, name)}")

    check("spills", after.spills > before.spills)
    check("occupancy", after.occupancy < before.occupancy)
    check("matrix_instr", after.matrix_share < before.matrix_share)
    check("load_bits", after.load_bits < before.load_bits)
    check("store_bits", after.store_bits < before.store_bits)
    check("bytes_ratio", after.bytes_ratio > before.bytes_ratio + SLACK)
    smem, room = after.smem, TARGETS[after.target].shared_memory
    if smem > room:
        found.append(f"smem {smem} does not fit into {room}")
    return found


@dataclass(frozen=True)
class Table:
    """Entries by key, and the Triton that made them."""

    triton: str
    rows: Mapping[tuple[str, ...], Row]

    @classmethod
    def read(cls, file: Path = FILE) -> Table:
        """The committed table; an empty one where there is none."""
        if not file.exists():
            return cls("", {})
        data = json.loads(file.read_text())
        return cls(data["triton"], by_key(Row(**row) for row in data["rows"]))

    def write(self, file: Path = FILE) -> None:
        """One line an entry, sorted, so that a change shows as its lines."""
        rows = [json.dumps(asdict(self.rows[key])) for key in sorted(self.rows)]
        text = ",\n".join(rows)
        file.write_text(f'{{"triton": {json.dumps(self.triton)}, "rows": [\n{text}\n]}}\n')


def by_key(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """Rows by what they are about."""
    return {row.key: row for row in rows}


def column_names() -> list[str]:
    """The names of a row's fields."""
    return [f.name for f in fields(Row)]


def as_dicts(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows for JSON."""
    return [asdict(row) for row in rows]
