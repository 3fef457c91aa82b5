"""Which instructions nvcc makes of the kernels; registers are in the CUDA report."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from gptfast.testing.cuda_host import ROOT

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
DTYPES = {"__half": "f16", "__nv_bfloat16": "bf16"}


def ptx_of(file, kernel, tmp_path):
    """The PTX of each instance of a kernel."""
    source, ptx = ROOT / f"csrc/cuda/{file}.cu", tmp_path / "out.ptx"
    command = ["nvcc", "-std=c++20", "-O3", "-arch=compute_80", "-ptx", source, "-o", ptx]
    subprocess.run(command, check=True)
    return [
        code
        for code in re.split(r"\.entry ", ptx.read_text())[1:]
        if re.match(rf"\w*{kernel}_kernel", code)
    ]


@pytest.mark.parametrize("file", ["attention", "attention_decode"])
def test_attention_runs_on_matrix_units_and_copies_16_bytes(file, tmp_path):
    kernels = ptx_of(file, "attention_(fwd|decode)", tmp_path)
    assert len(kernels) == 2 * 4  # dtypes and widths
    for code in kernels:
        name = code.split("(", 1)[0]
        (dtype,) = (short for long, short in DTYPES.items() if long in name)
        products = set(re.findall(r"mma\.sync[\w.]+", code))
        assert products == {f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"}, name
        loads = set(re.findall(r"ldmatrix[\w.]+", code))
        assert loads == {
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        }, name
        assert set(re.findall(r"cp\.async\.cg\.shared\.global .*?, (\d+),", code)) == {"16"}, name
        assert re.search(r"st\.global\.v4\.[ub]32", code), name


WIDE_LOAD = r"ld\.global(?:\.nc)?\.v4\.[bfu]32"


@pytest.mark.slow
def test_linear_decode_reads_a_step_of_weights_in_four_loads_of_16_bytes(tmp_path):
    kernels = ptx_of("linear_decode", "linear_decode", tmp_path)
    assert len(kernels) == 5 * 5  # formats and rows at once
    for code in kernels:
        name = code.split("(", 1)[0]
        # With zero points, and without.
        assert len(re.findall(WIDE_LOAD, code)) == 4 * (1 + ("Int4" in name)), name


@pytest.mark.slow
def test_sampling_reads_16_bytes_at_every_walk_over_the_logits(tmp_path):
    kernels = ptx_of("sampling", "sample", tmp_path)
    assert len(kernels) == 3  # dtypes
    for code in kernels:  # highest, first of them, two totals, a draw; three in each of two cuts
        assert len(re.findall(WIDE_LOAD, code)) == 11, code.split("(", 1)[0]
