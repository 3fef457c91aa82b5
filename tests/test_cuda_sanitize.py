"""The CUDA kernels under sanitizers, as programs of their own; and that these checks can fail."""

from __future__ import annotations

import functools
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
    # Unoptimised, or they would compile for a minute; under "thread" -O0 runs for minutes.
    "address": ("-g", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-g", "-O1", "-fsanitize=thread"),
    "none": ("-O1",),
}


@functools.cache
def at_fixed_addresses():
    """ThreadSanitizer wants its address space where it expects it; newer ones see to it alone."""
    command = ("setarch", "--addr-no-randomize")
    allowed = shutil.which("setarch") and not subprocess.run([*command, "true"]).returncode
    return command if allowed else ()  # containers may forbid it


def run(program):
    environment = {
        **os.environ,
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [*at_fixed_addresses(), str(program)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def launch_all(source, flags, target, root=cuda_host.ROOT):
    """Every kernel of one source on every path: the program of its name."""
    sources = [root / f"tests/cuda/launch/{source}.cpp", root / f"csrc/cuda/{source}.cu"]
    return run(cuda_host.compile_all(sources, flags, target))


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("source", sorted(path.stem for path in KERNELS.glob("*.cu")))
def test_every_kernel(source, sanitizer):
    done = launch_all(source, SANITIZERS[sanitizer], BUILD / f"{source}-{sanitizer}/run")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "launched all\n"


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


def every(instruction):
    """The file and the number of each line of the kernels with such an instruction."""
    return [
        pytest.param(path, number, id=f"{path.name}:{number + 1}")
        for path in sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")])
        for number, line in enumerate(path.read_text().splitlines())
        if re.search(instruction, line)
    ]


def launch_without(tmp_path, instruction, path, number, flags):
    """The kernels that a file is for, without the instruction of one of its lines."""
    shutil.copytree(KERNELS.parent, tmp_path / "csrc")
    shutil.copytree(HERE, tmp_path / "tests/cuda")
    lines = path.read_text().splitlines()
    lines[number] = re.sub(instruction, "{}", lines[number])
    (tmp_path / "csrc/cuda" / path.name).write_text("\n".join(lines))
    source = {"common": "layer_norm", "column_sums": "gelu"}.get(path.stem, path.stem)
    return launch_all(source, flags, tmp_path / "build/run", root=tmp_path)


BARRIER, WAIT = r"__sync(threads|warp)\(\);", r"cp_async_wait<\d>\(\);"


@pytest.mark.slow
@pytest.mark.parametrize(("path", "number"), every(BARRIER))
def test_a_barrier_deleted_from_a_shipped_kernel_is_noticed(tmp_path, path, number):
    flags = "-g", "-O0", "-fsanitize=thread"  # it does not run for long
    done = launch_without(tmp_path, BARRIER, path, number, flags)
    assert "data race" in done.stderr, done


@pytest.mark.slow
@pytest.mark.parametrize(("path", "number"), every(WAIT))
def test_a_wait_deleted_from_attention_is_noticed(tmp_path, path, number):
    done = launch_without(tmp_path, WAIT, path, number, SANITIZERS["none"])
    assert done.returncode != 0
    assert re.search("not finite|never waited for", done.stderr), done.stderr[-4000:]
