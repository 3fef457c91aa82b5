"""Builds gptfast._C: plain pybind11 + OpenMP over raw pointers, with no PyTorch header or library.

The CPU sources are compiled once per instruction set and linked together; the level is chosen at run
time. pyproject.toml holds all metadata. Environment:

  GPTFAST_REQUIRE_EXT=1   fail the install when the extension cannot be built (default: go on without)
  GPTFAST_CUDA=auto|1|0   CUDA kernels: when nvcc is there, required, or never
  MAX_JOBS=N              compile jobs (default: what cores and memory allow)
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]  # the latter only ever names gcc's own headers
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
# Ascending: where the linker meets the same inline function twice it keeps the first, and that one
# must run on every processor.
LEVELS = {"baseline": (16, []), "avx2": (32, AVX2), "avx512": (64, AVX512), "amx": (64, AMX)}


def compiles(compiler: str, flags: list[str], source: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "probe.cpp")
        file.write_text(source)
        command = [compiler, *flags, "-c", str(file), "-o", str(file.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def max_jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory_gb)))  # a compile job takes up to 1 GB


class NinjaBuild(build_ext):
    """One ninja file for all objects, in parallel and rebuilding only what changed."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_with_ninja(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("GPTFAST_REQUIRE_EXT") == "1":
                raise
            print(f"gptfast: could not build the C++ extension ({error}).", file=sys.stderr)
            print("gptfast: installing without it; the torch backend will be used.", file=sys.stderr)
            print("gptfast: install g++ 11 or newer and reinstall for the CPU kernels.", file=sys.stderr)

    def build_with_ninja(self, ext: Extension) -> None:
        from ninja import BIN_DIR, ninja_syntax  # type: ignore[attr-defined]

        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
        if not shutil.which(compiler):
            raise OSError(f"no C++ compiler: {compiler!r} is not on PATH")
        if not compiles(compiler, FLAGS, "#include <omp.h>\nint main() {}\n"):
            raise OSError(f"{compiler} does not compile C++20 with OpenMP")
        cuda = os.environ.get("GPTFAST_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            raise OSError(f"GPTFAST_CUDA must be auto, 0 or 1, got {cuda!r}")
        if cuda == "1" and not shutil.which("nvcc"):
            raise SystemExit("gptfast: GPTFAST_CUDA=1, but nvcc is not on PATH")
        x86 = compiles(compiler, ["-mavx2"], "#include <immintrin.h>\n")
        levels = [
            name
            for name, (_, flags) in LEVELS.items()
            if name == "baseline" or (x86 and compiles(compiler, flags, "#include <immintrin.h>\n"))
        ]
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
        identity = version.stdout.splitlines()[0]
        print(f"gptfast: {identity}; CPU levels {', '.join(levels)}; {max_jobs()} jobs", flush=True)
        print("gptfast: no CUDA kernels in this version; GPUs use Triton", flush=True)

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        defines = [
            f'-DGPTFAST_COMPILER="{identity}"',
            f'-DGPTFAST_CPU_ISAS="{",".join(levels)}"',
            '-DGPTFAST_CUDA_ARCHS=""',
        ]

        def quoted(arguments: list[str]) -> str:
            return " ".join("'" + a.replace("$", "$$") + "'" for a in arguments)

        with open(build / "build.ninja", "w") as file:
            ninja = ninja_syntax.Writer(file, width=1000)
            common = quoted([*FLAGS, *includes])
            ninja.rule(
                "cxx", f"{compiler} {common} $flags -MD -MF $out.d -c $in -o $out", depfile="$out.d"
            )
            libraries = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-s"
            ninja.rule("link", f"{compiler} -shared -fopenmp $in -o $out {libraries}")
            objects = []
            for name in levels:
                width, flags = LEVELS[name]
                define = [f"-DGPTFAST_ISA={name}", f"-DGPTFAST_VECTOR_BYTES={width}"]
                if name == "baseline":
                    define.append("-DGPTFAST_BASELINE")
                for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
                    if source.stem == "isa":
                        continue
                    objects.append(f"{source.stem}.{name}.o")
                    ninja.build(
                        objects[-1], "cxx", str(source), variables={"flags": quoted(flags + define)}
                    )
            for source in (ROOT / "csrc/cpu/isa.cpp", ROOT / "csrc/bindings.cpp"):
                objects.append(f"{source.stem}.o")
                ninja.build(objects[-1], "cxx", str(source), variables={"flags": quoted(defines)})
            ninja.build("module", "link", objects)
        subprocess.run([Path(BIN_DIR, "ninja"), "-C", build, "-j", str(max_jobs())], check=True)
        shutil.copyfile(build / "module", target)


setup(
    ext_modules=[Extension("gptfast._C", sources=[], optional=False)],
    cmdclass={"build_ext": NinjaBuild},
)
