"""Builds gptfast._C: plain pybind11 + OpenMP over raw pointers, with no PyTorch header or library.

The CPU sources are compiled once per instruction set and linked together; the level is chosen at
run time. pyproject.toml holds all metadata. Environment:

  GPTFAST_REQUIRE_EXT=1   fail where the extension cannot be built (default: install without)
  GPTFAST_CUDA=auto|1|0   CUDA kernels: when nvcc is there, required, or never
  CXX                     C++20 compiler with OpenMP (default: g++, else clang++)
  MAX_JOBS=N              compile jobs (default: what cores and memory allow)
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Wno-psabi"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # both only name gcc's own headers
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mprfchw"]
AMX += ["-mamx-tile", "-mamx-bf16", "-mamx-int8"]
# Name -> bytes in a vector, flags. Ascending: where the linker meets the same inline function twice
# it keeps the first, and that one must run on every processor (tests/test_packaging.py checks it).
LEVELS = {"baseline": (16, []), "avx2": (32, AVX2), "avx512": (64, AVX512), "amx": (64, AMX)}
EXPORTS = "{ global: PyInit__C; local: *; };"  # -fvisibility=hidden does not hide std:: instances


class NinjaBuild(build_ext):
    """One ninja file for all objects, in parallel and rebuilding only what changed."""

    def build_extension(self, ext: Extension) -> None:
        say(f"CUDA: {cuda_decision()}")
        try:
            self.build_module(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (OSError, subprocess.CalledProcessError) as error:
            # setuptools only warns, where the extension is optional
            raise CompileError(
                f"{error}\ngptfast: no CPU kernels: ops on CPU tensors will run on PyTorch's own. "
                "For the kernels, install g++ 11 or newer and reinstall gptfast-kernels."
            ) from error

    def build_module(self, target: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "clang++"]
        identity = subprocess.check_output([*compiler, "--version"], text=True).splitlines()[0]
        if not compiles([*compiler, *FLAGS], "#include <omp.h>"):
            raise OSError(f"{identity} does not compile C++20 with OpenMP")
        levels = [name for name, (_, flags) in LEVELS.items() if compiles([*compiler, *flags])]
        say(f"{identity}; CPU levels {', '.join(levels)}; {max_jobs()} jobs")

        # What changes from one pip run to the next (self.build_temp, the path of pybind11) must not
        # show in the commands: then ninja rebuilds only what changed, in editable installs too.
        build = ROOT / f"build/ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        headers = build / f"pybind11-{pybind11.__version__}"
        headers.unlink(missing_ok=True)
        headers.symlink_to(pybind11.get_include())
        (build / "exports.map").write_text(EXPORTS)
        flags = [*FLAGS, "-isystem", headers.name, "-isystem", sysconfig.get_path("include")]
        link = [*compiler, "-shared", "-fopenmp"]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup", "-Wl,-exported_symbol,_PyInit__C"]
        else:
            link += ["-s", "-Wl,--version-script=exports.map"]

        with open(build / "build.ninja", "w") as file:
            writer = ninja.ninja_syntax.Writer(file)
            rule = f"{quoted([*compiler, *flags])} $flags -MMD -MF $out.d -c $in -o $out"
            writer.rule("cxx", rule, depfile="$out.d")
            writer.rule("link", f"{quoted(link)} $in -o $out")
            objects = []

            def add(source: Path, name: str, flags: list[str]) -> None:
                objects.append(f"{name}.o")
                writer.build(objects[-1], "cxx", str(source), variables={"flags": quoted(flags)})

            for level in levels:
                width, flags = LEVELS[level]
                flags = [*flags, f"-DGPTFAST_ISA={level}", f"-DGPTFAST_VECTOR_BYTES={width}"]
                if level == "baseline":
                    flags.append("-DGPTFAST_BASELINE")
                for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
                    if source.stem != "isa":
                        add(source, f"{source.stem}.{level}", flags)
            facts = {"COMPILER": identity, "CPU_ISAS": ",".join(levels), "CUDA_ARCHS": ""}
            defines = [f'-DGPTFAST_{name}="{value}"' for name, value in facts.items()]
            add(ROOT / "csrc/cpu/isa.cpp", "isa", defines)
            add(ROOT / "csrc/bindings.cpp", "bindings", defines)
            writer.build("module", "link", objects)
        subprocess.run(
            [Path(ninja.BIN_DIR, "ninja"), "-C", build, "-j", str(max_jobs())], check=True
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / "module", target)


def compiles(command: list[str], source: str = "") -> bool:
    command = [*command, "-x", "c++", "-c", "-", "-o", os.devnull]
    return subprocess.run(command, input=source, capture_output=True, text=True).returncode == 0


def cuda_decision() -> str:
    wish = os.environ.get("GPTFAST_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"gptfast: GPTFAST_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return "off, as GPTFAST_CUDA=0 says"
    if shutil.which("nvcc"):
        return "nvcc is there, but this version has no CUDA kernels yet; GPUs use Triton"
    if wish == "1":
        raise SystemExit("gptfast: GPTFAST_CUDA=1, but nvcc is not on PATH")
    return "off, no nvcc on PATH"


def max_jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory_gb)))  # a compile job takes up to 1 GB


def quoted(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def say(text: str) -> None:
    print(f"gptfast: {text}", flush=True)


required = "1" in (os.environ.get("GPTFAST_REQUIRE_EXT"), os.environ.get("GPTFAST_CUDA"))
setup(
    ext_modules=[Extension("gptfast._C", sources=[], optional=not required)],
    cmdclass={"build_ext": NinjaBuild},
)
