"""`benchmarks/static_report.json` is what the kernels compile to, and holds what it promises."""

# ruff: noqa: E402 - what follows imports Triton

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pkgutil
import random

import numpy as np
import pytest
from places import INTERPRET

triton = pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from benchmarks.static_report import compiled, report, traffic
from benchmarks.static_report.launches import source_of
from benchmarks.static_report.table import Row, Table, occupancy, worse
from benchmarks.static_report.worker import run_jobs
from gptfast import kernels
from gptfast.backend import dtype_name
from gptfast.kernels import gelu
from gptfast.targets import TARGETS
from gptfast.testing import DTYPES

TABLE = Table.read()
ROWS = list(TABLE.rows.values())
SAMPLE = 4  # entries compiled again although nothing about them has changed
STALE = 12  # entries compiled again, of those whose kernel or configuration has changed
MEMORY_BOUND = {
    *("bias_gelu", "cross_entropy", "gelu", "glu", "layer_norm", "rms_norm", "rope"),
    *("add_layer_norm", "add_rms_norm", "dropout_add", "linear_decode"),
}
MATRIX_OPS = ("attention", "attention_varlen", "linear_cross_entropy")

have_table = pytest.mark.skipif(not ROWS, reason="no table yet: `make static` writes it")
same_triton = pytest.mark.skipif(
    TABLE.triton != triton.__version__,
    reason=f"the table was made by Triton {TABLE.triton}, this is {triton.__version__}",
)


def describe(rows) -> str:
    return "\n".join(", ".join(row.key) + f": {row}" for row in rows)


# ---- The committed table is true -----------------------------------------------------------------


@pytest.fixture(scope="module")
def reported() -> list[report.Entry]:
    return list(report.entries())


def check(entries: list[report.Entry]) -> None:
    """Compile and execute entries; none is worse than its committed rows."""
    rows, failures = report.make_rows(entries)
    assert not failures, "\n".join(failures)
    complaints = [
        f"{', '.join(row.key)}: {why}"
        for row in rows
        if row.key in TABLE.rows
        for why in worse(TABLE.rows[row.key], row)
    ]
    assert not complaints, "\n".join(complaints)


@same_triton
def test_every_kernel_of_a_reported_op_is_in_the_table(reported):
    keys = {key for entry in reported for key in report.fingerprints(entry)}
    missing, gone = keys - TABLE.rows.keys(), TABLE.rows.keys() - keys
    assert not missing, f"`make static` writes what is missing: {sorted(missing)[:5]}"
    assert not gone, f"`make static` removes what is gone: {sorted(gone)[:5]}"


@same_triton
def test_no_changed_kernel_is_worse(reported):
    def changed(entry: report.Entry) -> bool:
        return any(
            key in TABLE.rows and TABLE.rows[key].fingerprint != fingerprint
            for key, (fingerprint, _) in report.fingerprints(entry).items()
        )

    draw = random.Random(0)
    stale = [entry for entry in reported if changed(entry)]
    some = draw.sample(stale, min(STALE, len(stale)))
    check(some + draw.sample(reported, min(SAMPLE, len(reported))))


@same_triton
def test_a_worse_kernel_is_found(monkeypatch):
    worse_config = gelu.Config(1, 1024, 32)  # an element a thread: loads of 16 bits
    monkeypatch.setattr(gelu, "pick_config", lambda N, target: worse_config)
    entries = report.entries(["gelu"], ["bfloat16"], ["sm_90"], "=tanh")
    with pytest.raises(AssertionError, match="gelu_fwd_kernel, sm_90: load_bits 128 -> 16"):
        check([entry for entry in entries if "fwd" in entry.call])


@same_triton
@pytest.mark.slow
def test_no_kernel_is_worse(reported):
    check(reported)


# ---- What it promises ----------------------------------------------------------------------------


# (target, kernel, shape) -> bytes a thread, where what does not spill is slower: see WGMMA.
KNOWN_SPILLS = {
    ("sm_90", "attention_bwd_dkdv_kernel", "1x4x2x512x512x128-causal=True"): 264,
    (
        "sm_90",
        "attention_bwd_dkdv_kernel",
        "2x1x128-lengths=((100, 100), (150, 150))-causal=True",
    ): 304,
}


@have_table
def test_no_spills():
    spilling = [r for r in ROWS if r.spills > KNOWN_SPILLS.get((r.target, r.kernel, r.shape), 0)]
    assert not spilling, describe(spilling)


@have_table
def test_shared_memory_fits():
    too_large = [r for r in ROWS if r.smem > TARGETS[r.target].shared_memory]
    assert not too_large, describe(too_large)
    assert not [r for r in ROWS if not r.occupancy]


def launched() -> dict[str, JITFunction]:
    """The Triton functions of `kernels/` that no other one calls: its kernels, by name."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{module.name}")
        for module in pkgutil.iter_modules(kernels.__path__)
    ]
    functions = {
        f"{module.__name__}:{name}": value  # as `source_of` names them
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.module == module.__name__
    }
    called = {
        line.split(" = ")[0]
        for name, function in functions.items()
        for line in source_of(function)
        if not line.startswith(f"{name} = ")
    }
    return {f.fn.__name__: f for name, f in functions.items() if name not in called}


def kernel_of(row: Row) -> str:
    return row.kernel.split("#")[0]


@have_table
def test_every_kernel_has_rows_for_every_dtype_and_target():
    present = {(kernel_of(r), r.dtype, r.target) for r in ROWS}
    dtypes = [dtype_name(dtype) for dtype in DTYPES]
    missing = {
        name
        for name in launched()
        if any((name, *key) not in present for key in itertools.product(dtypes, report.REPORTED))
    }
    assert not missing, f"name cases for these in `reports`: {sorted(missing)}"


@have_table
def test_products_run_on_matrix_units():
    multiplies = {n for n, kernel in launched().items() if "tl.dot(" in "".join(source_of(kernel))}
    half = [r for r in ROWS if r.dtype != "float32" and kernel_of(r) in multiplies]
    # Tiles of decoding have 16 rows, where wgmma and tcgen05 begin at 64.
    few = [r for r in half if r.op == "attention_decode"]
    many = [r for r in half if r not in few]
    assert {r.op for r in many} == set(MATRIX_OPS)
    wrong = [r for r in many if r.matrix_share < 1]
    assert not wrong, describe(wrong)
    assert few
    wrong = [r for r in few if not r.matrix_instr or "fma" in r.matrix_instr]
    assert not wrong, describe(wrong)


@have_table
def test_attention_forward_moves_what_its_tiles_must():
    """Every block of queries reads its queries and the keys and values that it sees; no more."""
    rows = [r for r in ROWS if r.call == "attention_fwd" and "dropout" not in r.shape]
    assert rows
    for row in rows:
        assert row.bytes_ratio <= 1.05, row
        assert row.issued_ratio == pytest.approx(flash_bound(row), abs=1e-3), row


def flash_bound(row: Row) -> float:
    """Bytes that the blocks of queries ask for, over those of q, k, v, o and the log-sum-exp."""
    B, H, H_kv, T, S, D = map(int, row.shape.split("-")[0].split("x"))
    config = dict(part.split("=") for part in row.config.split())
    block_m, block_n = int(config["BLOCK_M"]), int(config["BLOCK_N"])
    options = row.shape.split("-")[1:]
    left = next((int(o[len("window=(") :].split(",")[0]) for o in options if "window" in o), None)
    size = 4 if row.dtype == "float32" else 2
    asked = 0
    for first in range(0, T, block_m):
        last = min(first + block_m, T) - 1
        end = min(S, last + S - T + 1) if "causal=True" in options else S
        begin = 0 if left is None else max(0, first + S - T - left) // block_n * block_n
        keys = min(S, begin + -(-(end - begin) // block_n) * block_n) - begin
        asked += (2 * (last + 1 - first) + 2 * keys) * D * size + 4 * (last + 1 - first)
        asked += 4 * any("alibi" in o for o in options)
    least = (2 * H * T + 2 * H_kv * S) * D * size + 4 * H * T
    return B * H * asked / (B * least)


@have_table
@pytest.mark.parametrize(
    ("call", "most", "most_swept"), [("_fwd", 1.05, 1.5), ("_bwd", 1.15, 1.75)]
)
def test_memory_bound_ops_move_little_more_than_they_must(call, most, most_swept):
    rows = [r for r in ROWS if r.op in MEMORY_BOUND and r.call.endswith(call)]
    assert rows
    # Norms read a row twice where registers have no room for it: see kernels/layer_norm.py.
    swept = {call_of(r) for r in rows if "ONE_BLOCK=False" in r.config}
    limits = [(r, most_swept if call_of(r) in swept else most) for r in rows]
    wasteful = [r for r, limit in limits if r.bytes_ratio > limit]
    assert not wasteful, describe(wasteful)


def call_of(row: Row) -> tuple[str, ...]:
    """What the kernels of one call have in common."""
    return (row.op, row.shape, row.dtype, row.call, row.target)


# ---- The report itself ---------------------------------------------------------------------------


ROW = Row(
    op="gelu",
    shape="4x8",
    dtype="bfloat16",
    call="gelu_fwd",
    kernel="gelu_fwd_kernel",
    target="sm_90",
    config="",
    regs=40,
    spills=0,
    smem=0,
    occupancy=1.0,
    matrix_instr={"wgmma": 2},
    load_bits=128,
    load_share=1.0,
    store_bits=128,
    bytes_ratio=1.0,
    issued_ratio=1.0,
    flops=1,
    fingerprint="",
)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spills": 8}, "spills 0 -> 8"),
        ({"occupancy": 0.5}, "occupancy 1.0 -> 0.5"),
        ({"matrix_instr": {"wgmma": 1, "fma": 1}}, "matrix_instr"),
        ({"matrix_instr": {"mma.sync": 2}}, "matrix_instr"),
        ({"matrix_instr": {}}, "matrix_instr"),
        ({"load_bits": 64}, "load_bits 128 -> 64"),
        ({"store_bits": 64}, "store_bits 128 -> 64"),
        ({"bytes_ratio": 1.02}, "bytes_ratio 1.0 -> 1.02"),
        ({"smem": 300_000}, "does not fit"),
    ],
)
def test_worse_is_found(change, complaint):
    (found,) = worse(ROW, dataclasses.replace(ROW, **change))
    assert complaint in found


def test_other_changes_are_not_worse():
    better = {"regs": 80, "load_share": 0.5, "flops": 9, "config": "x", "fingerprint": "y"}
    assert not worse(ROW, dataclasses.replace(ROW, **better))
    assert not worse(dataclasses.replace(ROW, spills=8), ROW)


@pytest.mark.parametrize(
    ("target", "regs", "smem", "tmem", "warps", "expected"),
    [
        ("sm_90", 32, 0, 0, 4, 1.0),
        ("sm_90", 255, 0, 0, 8, 0.125),  # one program: 65536 / (256 x 256 threads)
        ("sm_90", 128, 0, 0, 4, 0.25),
        ("sm_90", 32, 100 * 1024, 0, 4, 0.125),  # two programs of 101 KB in 228
        ("sm_100", 32, 0, 256, 4, 0.125),  # two programs of 256 columns in 512
        ("gfx942", 128, 0, 0, 4, 0.5),  # 512 / 128 = 4 of 8 wavefronts a SIMD
    ],
)
def test_occupancy(target, regs, smem, tmem, warps, expected):
    assert occupancy(TARGETS[target], regs, smem, tmem, warps) == expected


def test_ptx_accesses():
    ptx = """
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd1 + 0 ];
    @%p1 ld.global.L1::evict_last.b16 { %rs1 }, [ %rd2 + 0 ];
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x10, %r6;
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [ %r9 ];
    st.global.v2.b32 [ %rd4 + 0 ], { %r1, %r2 };
    """
    assert compiled.ptx_accesses(ptx) == ({128: 2, 16: 1}, {64: 1})


def test_amdgcn_accesses():
    text = """
    buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
    global_load_dword v1, v[2:3], off
    global_load_ushort v1, v[2:3], off
    buffer_store_short v1, v4, s[0:3], 0 offen
    s_load_dwordx2 s[0:1], s[2:3], 0x0
    """
    assert compiled.amdgcn_accesses(text) == ({128: 1, 32: 1, 16: 1}, {16: 1})


def test_dots_are_counted_by_their_place_in_the_source():
    ttgir = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8]}>
#mma = #ttg.nvidia_mma<{versionMajor = 2}>
    %0 = tt.dot %a, %b, %c : tensor<16x16xbf16, #x> * tensor<16x16xbf16, #y> -> tensor<16x16xf32, #mma> loc(#loc1)
    %1 = tt.dot %a, %b, %c : tensor<16x16xbf16, #x> * tensor<16x16xbf16, #y> -> tensor<16x16xf32, #mma> loc(#loc1)
    %2 = tt.dot %a, %b, %c : tensor<16x16xf32, #x> * tensor<16x16xf32, #y> -> tensor<16x16xf32, #blocked> loc(#loc2)
    %3 = ttng.warp_group_dot %a, %b, %c {isAsync = true} : !x * !y -> tensor<64x64xf32, #mma> loc(#loc3)
    %4 = ttng.warp_group_dot_wait %3 {pendings = 0 : i32} : tensor<64x64xf32, #mma> loc(#loc4)
    ttng.tc_gen5_mma %a, %b, %c, %true, %p {is_async} : !x, !y, !z loc(#loc5)
"""  # noqa: E501
    assert compiled.dots(ttgir) == {"fma": 1, "mma.sync": 1, "tcgen05": 1, "wgmma": 1}


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = Table("3.9.0", {ROW.key: ROW})
    table.write(tmp_path / "table.json")
    assert Table.read(tmp_path / "table.json") == table
    assert Table.read(tmp_path / "none.json") == Table("", {})


def count(*accesses):
    """(bytes of DRAM read, written, bytes asked for) of accesses (program, first, bytes, write)."""
    counter = traffic.Counter()
    interpreter.interpreter_builder.set_grid_dim(16, 1, 1)
    for program, first, size, write in accesses:
        interpreter.interpreter_builder.set_grid_idx(program, 0, 0)
        addresses = np.arange(first, first + size, 4, dtype=np.uint64)
        counter.access(addresses, np.ones(addresses.shape, bool), 4, write)
    return (*counter.dram(), counter.issued)


def test_what_counts_as_traffic():
    row, near, far = 1 << 20, traffic.NEAR // 2, 2 * traffic.NEAR
    assert count((0, row, 256, False), (0, row, 256, True)) == (256, 256, 512)
    assert count((0, row, 4, False)) == (32, 0, 4)  # a sector
    # Another program finds it in the cache, as the same one does at once, but not much later.
    assert count((0, row, 256, False), (1, row, 256, False)) == (256, 0, 512)
    assert count((0, row, near, False), (0, row, near, False)) == (near, 0, 2 * near)
    assert count((0, row, far, False), (0, row, far, False)) == (2 * far, 0, 2 * far)
    # Across the border of a page.
    border = traffic.SECTOR * traffic.PAGE
    assert count((0, border - 128, 256, False)) == (256, 0, 256)


def test_a_masked_lane_moves_nothing():
    counter = traffic.Counter()
    interpreter.interpreter_builder.set_grid_dim(1, 1, 1)
    interpreter.interpreter_builder.set_grid_idx(0, 0, 0)
    addresses = np.arange(0, 512, 4, dtype=np.uint64)
    counter.access(addresses, addresses < 256, 4, False)
    counter.access(addresses, np.zeros(addresses.shape, bool), 4, True)
    assert (*counter.dram(), counter.issued) == (256, 0, 256)


def test_gelu_reads_and_writes_once():
    (entry,) = (
        e for e in report.entries(["gelu"], ["bfloat16"], ["sm_90"], "=tanh") if "fwd" in e.call
    )
    jobs = [("", entry.traffic_job())]
    ((_, answer),) = run_jobs("traffic", jobs, 1, report.INTERPRET, cached=False)
    n = 2 * np.prod(entry.case.shape)
    (launch,) = answer["launches"]
    assert (launch["read"], launch["written"], launch["issued"]) == (n, n, 2 * n)
    assert answer["least"] == 2 * n
    assert launch["flops"] > 5 * n // 2


def test_a_worker_that_fails_says_why():
    jobs = [("", {"op": "gelu", "case": "no such case", "dtype": "float32", "call": 0})]
    ((_, answer),) = run_jobs("traffic", jobs, 1, report.INTERPRET, cached=False)
    assert "StopIteration" in answer["error"]


def test_the_fingerprint_covers_what_a_kernel_calls():
    (fwd, *_) = report.entries(["gelu"], ["bfloat16"], ["sm_90"], "=none")
    text = "\n".join(source_of(fwd.recording.launches[0].kernel))
    assert "def gelu_fwd_kernel(" in text
    assert "def gelu_phi(" in text
    assert "SQRT_HALF = 0.70" in text
    assert "# " not in text
