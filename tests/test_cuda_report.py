"""`benchmarks/cuda_report.json` is what nvcc makes of the kernels; and how many bytes they move."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest
import torch

from benchmarks import cuda_report, cuda_traffic
from benchmarks.static_report.calls import reports_of
from gptfast import targets
from gptfast.ops.library import cuda_room
from gptfast.testing import cuda_host

TABLE = cuda_report.Table.read()
ROWS = list(TABLE.rows.values())
TARGETS = [f"sm_{arch}" for arch in cuda_report.from_setup("CUDA_ARCHS")]
SOURCES = sorted(path.stem for path in cuda_report.SOURCES.glob("*.cu"))
STREAMING = {"adamw", "cross_entropy", "gelu", "glu", "layer_norm"}  # files: memory-bound kernels
# Second stages, a column a thread; they read and write a hundredth of the first ones.
COLUMNWISE = ("column_sums_kernel", "layer_norm_bwd_sums_kernel")
ONLY_SCALARS = ("cross_entropy_fwd_kernel", "adamw_prepare_kernel")  # is all that these write


@pytest.mark.parametrize("file", SOURCES)
def test_every_kernel_is_there_for_every_target(file):
    """Stale after a new kernel: `make cuda-report` writes it, and files that are not there yet."""
    source = cuda_report.SOURCES / f"{file}.cu"
    for target in TARGETS:
        kernels = re.findall(r"__global__.*?(\w+_kernel)\(", source.read_text(), re.S)
        assert source.read_text().count("__global__") == len(kernels) > 0
        reported = {
            re.match(r"\w+", r.kernel)[0] for r in ROWS if (r.file, r.target) == (file, target)
        }
        assert set(kernels) <= reported, target


def test_no_spills_and_wide_accesses():
    assert [row.key for row in ROWS if row.spills or row.stack] == []
    for row in ROWS:
        single = ", 1," in row.kernel  # elements at a time: of rows that are not aligned
        if row.file in STREAMING and not single and not row.kernel.startswith(COLUMNWISE):
            assert row.load_bits == 128, row.key
            assert row.store_bits == 128 or row.kernel.startswith(ONLY_SCALARS), row.key


def test_attention_multiplies_on_matrix_units_and_copies_16_bytes():
    rows = [r for r in ROWS if re.match(r"attention_(fwd|decode)_kernel", r.kernel)]
    assert len(rows) == 2 * 2 * 4 * len(TARGETS)  # kernels, dtypes and widths
    assert all(r.matrix_instr and r.async_bits == r.store_bits == 128 for r in rows)


def test_decoding_and_sampling_read_16_bytes():
    """They write less than a row reads by its length: a number a channel, and a token a row."""
    rows = [r for r in ROWS if r.file in ("linear_decode", "sampling")]
    assert len(rows) == (5 * 5 + 3) * len(TARGETS)  # formats and rows at once, dtypes of logits
    assert all(r.load_bits == 128 for r in rows)


def test_there_is_room_for_what_kernels_declare_themselves():
    """Besides what a launch asks for: see `cuda_room`, and kWithoutAsking in platform.cuh."""
    for row in ROWS:
        asks = row.kernel.startswith(("layer_norm_fwd", "layer_norm_bwd_k", "cross_entropy_fused"))
        assert row.smem <= (512 if asks else 8192), row.key
    with targets.assume(targets.SMALLEST.name):
        assert cuda_room(torch.empty(0)) >= 50257 * 2 + 16  # GPT-2's row in `cross_entropy_fused`


def test_a_worse_entry_is_noticed():
    row = ROWS[0]
    assert cuda_report.worse(row, row) == []
    for name, value in (("regs", row.regs + 8), ("spills", 4), ("stack", 8), ("load_bits", 0)):
        (found,) = cuda_report.worse(row, dataclasses.replace(row, **{name: value}))
        assert found.startswith(name)


def assert_not_worse(file, archs):
    if shutil.which("nvcc") is None or cuda_report.nvcc_release() != TABLE.nvcc:
        pytest.skip(f"the table is of nvcc {TABLE.nvcc}")
    for row in cuda_report.compile_file(cuda_report.SOURCES / f"{file}.cu", archs):
        assert row.key in TABLE.rows, "not in the table: make cuda-report"
        assert cuda_report.worse(TABLE.rows[row.key], row) == [], row.key


def test_a_file_compiled_again_is_not_worse():
    assert_not_worse("adamw", ["90"])


@pytest.mark.slow
@pytest.mark.parametrize("file", SOURCES)
def test_everything_compiled_again_is_not_worse(file):
    assert_not_worse(file, cuda_report.from_setup("CUDA_ARCHS"))


# ---- Bytes ---------------------------------------------------------------------------------------

needs_runner = pytest.mark.skipif(
    cuda_host.missing() is not None, reason=f"CUDA on the CPU: {cuda_host.missing()}"
)


def assert_few_bytes(op, dtype):
    for case in reports_of(op):
        for call in cuda_traffic.calls(case, dtype):
            limit = 1.15 if call.name.endswith("_bwd") else 1.05
            limit = KNOWN_TRAFFIC.get((call.name, "x".join(map(str, case.shape))), limit)
            if call.name == "cross_entropy_fused" and case.shape[-1] * dtype.itemsize > 162 * 1024:
                limit = 1.35  # what shared memory does not hold of such a row is read again
            ratio = cuda_traffic.count(call).ratio
            assert 0.99 < ratio <= limit, (str(case), call.name, ratio)


NORMS = ("add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm")
# The call and the shape of what moves more, and how much; benchmarks/cuda_traffic.py prints it.
# Backward of a norm reads twice what shared memory (here sm_80's) does not hold of a row beside the
# sums of its columns; where it does not hold the sums either, as LayerNorm's of 32768 columns, they
# are a kernel of their own, which reads everything once more.
KNOWN_TRAFFIC: dict[tuple[str, str], float] = {
    **{(f"{op}_bwd", "128x17003"): 1.65 for op in NORMS},
    **{(f"{op}_bwd", "64x32768"): 2.0 for op in NORMS},
}


@needs_runner
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", cuda_traffic.OPS)
def test_few_bytes(op, dtype):
    assert_few_bytes(op, dtype)
