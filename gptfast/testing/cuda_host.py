"""Builds the CUDA sources for this CPU, to run on CPU tensors what ships for GPUs.

g++ compiles `csrc/cuda/*.cu` against the host runner, `csrc/cuda/host/cuda_on_cpu.h`, which says
what it finds and what it cannot. It needs the CUDA toolkit's headers, but no GPU and no driver.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


@cache
def toolkit() -> Path | None:
    """The CUDA toolkit that nvcc belongs to, or `CUDA_HOME`, or what PyPI's packages brought."""
    found = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run([nvcc, "-dryrun", "x.cu"], capture_output=True, text=True)
        found = [Path(top) for top in re.findall(r"^#\$ TOP=(.+)", dry.stderr, re.M)] + found
    found += Path(sysconfig.get_path("purelib")).glob("nvidia/cu*")
    return next((top for top in found if (top / "include/cuda_bf16.h").exists()), None)


def missing() -> str | None:
    """Why the CUDA sources cannot be run here, or None."""
    if not (ROOT / "csrc/cuda").is_dir():
        return "no csrc/cuda beside gptfast: not a source tree"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the host runner knows Linux on x86-64 only"
    if shutil.which("g++") is None:
        return "no g++ on PATH"
    if toolkit() is None:
        return "no CUDA headers: set CUDA_HOME, or install nvidia-cuda-nvcc and -runtime from PyPI"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def compile_all(
    sources: Sequence[Path], flags: Sequence[str], target: Path, of_kernels: Sequence[str] = ()
) -> Path:
    """Compile and link for the host runner, once for each state of the sources.

    Args:
        sources: .cu and .cpp files.
        flags: besides `FLAGS`; for the linker, too.
        target: in a folder of its own, which is replaced where it is out of date.
        of_kernels: more flags, for the compilation of the .cu files alone.

    Raises:
        RuntimeError: what is missing, or what the compiler said.
    """
    if reason := missing():
        raise RuntimeError(f"the CUDA sources cannot be run here: {reason}")
    command = ["g++", *FLAGS, *flags, "-isystem", f"{toolkit()}/include"]
    headers = [p for folder in ("common", "cuda") for p in (ROOT / "csrc" / folder).rglob("*.*")]
    state = hashlib.sha256(repr((command, of_kernels, sys.version)).encode())
    for path in sorted({*headers, *sources}):
        state.update(str(path).encode() + path.read_bytes())
    stamp = target.parent / "state"

    def compiled(source: Path) -> str:
        out = str(target.parent / f"{source.stem}{source.suffix}.o")
        more = of_kernels if source.suffix == ".cu" else ()
        _run([*command, *more, "-x", "c++", "-c", str(source), "-o", out])
        return out

    with _alone(target.parent):
        if target.exists() and stamp.exists() and stamp.read_text() == state.hexdigest():
            return target
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir(parents=True)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sources))
        _run([*command, *objects, "-o", str(target)])
        stamp.write_text(state.hexdigest())
    return target


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is within this block: tests run in several."""
    import fcntl  # where `missing` is None

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def load(counts: bool = False) -> ModuleType:
    """The module with the launchers of `gptfast._C.cuda`, and `set_seed` for the thread order.

    Args:
        counts: whether to build it with `watch` and `take` of csrc/cuda/host/traffic.cpp, too.

    Raises:
        RuntimeError: see `compile_all`.
    """
    import pybind11  # of the tests only

    include = ("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"))
    flags = ["-O1", "-shared", "-fvisibility=hidden", "-DGPTFAST_CUDA_ON_CPU", *include]
    folder = ROOT / "csrc/cuda"
    sources = [*sorted(folder.glob("*.cu")), folder / "bindings.cpp"]
    name, of_kernels = "module", []
    if counts:
        # Calls at every access, of our own functions: without the macro nothing asks for the rest.
        of_kernels = ["-fsanitize=thread", "-U__SANITIZE_THREAD__"]
        flags.append("-DGPTFAST_COUNTS")
        sources.append(folder / "host/traffic.cpp")
        name = "counting"
    target = ROOT / f"build/cuda-on-cpu/{name}/cuda_on_cpu.so"
    compile_all(sources, flags, target, of_kernels)
    loader = importlib.machinery.ExtensionFileLoader("cuda_on_cpu", str(target))
    module = importlib.util.module_from_spec(
        importlib.machinery.ModuleSpec("cuda_on_cpu", loader, origin=str(target))
    )
    loader.exec_module(module)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
