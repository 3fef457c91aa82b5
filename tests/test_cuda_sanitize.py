"""The CUDA kernels under sanitizers, as programs of their own; and that these checks can fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gptfast.testing import cuda_host

pytestmark = pytest.mark.skipif(
    cuda_host.missing() is not None, reason=f"CUDA on the CPU: {cuda_host.missing()}"
)
HERE = Path(__file__).parent / "cuda"
BUILD = cuda_host.ROOT / "build/cuda-on-cpu"
KERNELS = cuda_host.ROOT / "csrc/cuda"
SANITIZERS = {
    # Unoptimised: these programs run for seconds, and would compile for a minute.
    "address": ("-g", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-g", "-O0", "-fsanitize=thread"),
    "none": ("-O1",),
}


def run(program):
    environment = {
        **os.environ,
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    # ThreadSanitizer wants its address space where it expects it.
    command = ["setarch", "--addr-no-randomize", str(program)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_every_kernel(sanitizer):
    target = BUILD / f"everything-{sanitizer}/run"
    sources = [HERE / "launch_everything.cpp", *sorted(KERNELS.glob("*.cu"))]
    done = run(cuda_host.compile_all(sources, SANITIZERS[sanitizer], target))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "ran everything\n"


def build_planted(fault, sanitizer):
    flags = [*SANITIZERS[sanitizer], *([f"-DPLANT_{fault}"] if fault else [])]
    target = BUILD / f"planted-{fault}-{sanitizer}/run"
    return cuda_host.compile_all([HERE / "planted.cu"], flags, target)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_nothing_is_found_where_nothing_is_wrong(sanitizer):
    done = run(build_planted("", sanitizer))
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


FAULTS = [
    ("MISSING_BARRIER", "thread", "data race"),
    ("MISSING_BARRIER", "none", "wrong value"),
    ("MISSING_WAIT", "none", "never waited for"),
    ("SHARED_OVERRUN", "address", "heap-buffer-overflow"),
    ("STATIC_OVERRUN", "address", "index 64 out of bounds|global-buffer-overflow"),
    ("GLOBAL_OVERRUN", "address", "heap-buffer-overflow"),
    ("DIVERGENT_BARRIER", "none", r"waits at __syncthreads at .*, others at __syncthreads at"),
    (
        "LEFT_BEFORE_BARRIER",
        "none",
        r"waits at __syncthreads at .*, but thread \(5,0,0\) has ended",
    ),
    ("LANE_MISSING", "none", r"__shfl_xor_sync at .*planted.cu"),
    ("SHUFFLE_AS_BARRIER", "thread", "data race"),
]


@pytest.mark.parametrize(("fault", "sanitizer", "report"), FAULTS, ids=lambda x: str(x)[:25])
def test_a_planted_fault_is_found(fault, sanitizer, report):
    done = run(build_planted(fault, sanitizer))
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stderr[-4000:]


def run_without(tmp_path, file, deleted, sanitizer):
    """Everything, with the last place of a text deleted from one of the sources."""
    before, behind = (KERNELS / file).read_text().rsplit(deleted, 1)
    shutil.copytree(KERNELS.parent, tmp_path / "csrc")
    shutil.copytree(HERE, tmp_path / "tests/cuda")
    (tmp_path / "csrc/cuda" / file).write_text(before + behind)
    sources = [tmp_path / "tests/cuda/launch_everything.cpp", *tmp_path.glob("csrc/cuda/*.cu")]
    return run(cuda_host.compile_all(sources, SANITIZERS[sanitizer], tmp_path / "build/run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "barrier"),
    [
        ("common.cuh", "  __syncthreads();"),  # behind it row_reduce reads the warps' sums
        ("attention.cu", "    __syncthreads();"),  # that waits for the next keys
        ("attention_decode.cu", "    __syncwarp();  // this tile is there\n"),
    ],
)
def test_a_barrier_deleted_from_a_shipped_kernel_is_noticed(tmp_path, file, barrier):
    assert "data race" in run_without(tmp_path, file, barrier, "thread").stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "wait"),
    [
        ("attention.cu", "    cp_async_wait<0>();"),  # for the next keys
        ("attention_decode.cu", "    cp_async_wait<1>();"),
    ],
)
def test_a_wait_deleted_from_attention_is_noticed(tmp_path, file, wait):
    done = run_without(tmp_path, file, wait, "none")
    assert done.returncode != 0
    assert re.search("not finite|never waited for", done.stderr), done.stderr[-4000:]
