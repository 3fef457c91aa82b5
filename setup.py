"""Builds gptfast._C: plain pybind11 + OpenMP over raw pointers, with no PyTorch header or library.

The CPU sources are compiled once per instruction set and linked together; the level is chosen at
run time. The CUDA sources are compiled by nvcc, where it is, for several generations of cards, and
CUDA's runtime is linked in: the module loads where there is no driver. pyproject.toml holds all
metadata. Environment:

  GPTFAST_REQUIRE_EXT=1   fail where the extension cannot be built (default: install without)
  GPTFAST_CUDA=auto|1|0   CUDA kernels: when nvcc can build them, required, or never
  GPTFAST_CUDA_ARCHS      what for, as in "80 90a" (default: of 80 90 100 120, what nvcc knows)
  CXX                     C++20 compiler with OpenMP (default: g++, else clang++)
  MAX_JOBS=N              compile jobs (default: what cores and memory allow)
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
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
BINDINGS = ["-O1"]  # of files that do nothing else
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mprfchw"]
AMX += ["-mamx-tile", "-mamx-bf16", "-mamx-int8"]
# Name -> bytes in a vector, flags. Ascending: where the linker meets the same inline function twice
# it keeps the first, and that one must run on every processor (tests/test_packaging.py checks it).
LEVELS = {"baseline": (16, []), "avx2": (32, AVX2), "avx512": (64, AVX512), "amx": (64, AMX)}
EXPORTS = "{ global: PyInit__C; local: *; };"  # -fvisibility=hidden does not hide std:: instances
CUDA_ARCHS = ("80", "90", "100", "120")  # A100, H100, B200, RTX 50; cards between them run one
CUDA_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Werror", "all-warnings"]
CUDA_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]


class NinjaBuild(build_ext):
    """One ninja file for all objects, in parallel and rebuilding only what changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "clang++"]
        cuda, why = find_cuda(compiler)
        try:
            try:
                self.build_module(target, compiler, cuda, why)
            except subprocess.CalledProcessError:
                if cuda is None or cuda_wish() == "1":
                    raise
                # What nvcc cannot compile must not cost the CPU kernels.
                self.build_module(target, compiler, None, f"none: {why} could not build them")
        except (OSError, subprocess.CalledProcessError) as error:
            # setuptools only warns, where the extension is optional
            raise CompileError(
                f"{error}\ngptfast: no CPU kernels: ops on CPU tensors will run on PyTorch's own. "
                "For the kernels, install g++ 11 or newer and reinstall gptfast-kernels."
            ) from error

    def build_module(
        self, target: Path, compiler: list[str], cuda: "Cuda | None", why: str
    ) -> None:
        say(f"CUDA kernels: {why}")
        identity = subprocess.check_output([*compiler, "--version"], text=True).splitlines()[0]
        if not compiles([*compiler, *FLAGS], "#include <omp.h>"):
            raise OSError(f"{identity} does not compile C++20 with OpenMP")
        levels = [name for name, (_, flags) in LEVELS.items() if compiles([*compiler, *flags])]
        say(f"{identity}; CPU levels {', '.join(levels)}; {max_jobs()} jobs")

        # What changes from one pip run to the next (self.build_temp, the path of pybind11) must not
        # show in the commands: then ninja rebuilds only what changed, in editable installs too.
        build = ROOT / f"build/ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        build = build.resolve()  # of a link: paths relative to it are the system's to follow
        headers = build / f"pybind11-{pybind11.__version__}"
        headers.unlink(missing_ok=True)
        headers.symlink_to(pybind11.get_include())
        (build / "exports.map").write_text(EXPORTS)
        bound_h = build / "bound.h"
        if not bound_h.exists():  # a newer one would have everything compiled again
            bound_h.write_text("#include <pybind11/pybind11.h>\n")
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
            libraries = cuda.libraries if cuda else []
            writer.rule("link", f"{quoted(link)} $in {quoted(libraries)} -o $out")
            # pybind11 is parsed once for all who bind: 3 of the 14 seconds that one of them takes.
            # g++ finds bound.h.gch by itself; for other compilers bound.h is one more header.
            precompiled = ["bound.h.gch"] if "g++" in identity else []
            if precompiled:
                header = {"flags": "-x c++-header"}
                writer.build(precompiled, "cxx", "bound.h", variables=header)
            bound = ["-include", "bound.h"]
            objects = []

            def add(source: Path, name: str, flags: list[str], rule: str = "cxx") -> None:
                objects.append(f"{name}.o")
                path = os.path.relpath(source, build)  # so that a copied tree need not be rebuilt
                needs = precompiled if "bound.h" in flags else []
                variables = {"flags": quoted(flags)}
                writer.build(objects[-1], rule, path, implicit=needs, variables=variables)

            if cuda:
                # The slowest first, so that none is left alone at the end.
                flags = [*bound, *BINDINGS, *cuda.includes]
                add(ROOT / "csrc/cuda/bindings.cpp", "bindings.cuda", flags)
                sources = sorted(ROOT.glob("csrc/cuda/*.cu"), key=lambda p: -p.stat().st_size)
                rule = f"{quoted(cuda.command)} -MD -MF $out.d -c $in -o $out"
                writer.rule("nvcc", rule, depfile="$out.d")
                for source in sources:
                    add(source, f"{source.stem}.cuda", [], "nvcc")
            for level in levels:
                width, flags = LEVELS[level]
                flags = [*flags, f"-DGPTFAST_ISA={level}", f"-DGPTFAST_VECTOR_BYTES={width}"]
                if level == "baseline":
                    flags += ["-DGPTFAST_BASELINE", *bound]
                for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
                    if source.stem != "isa":
                        add(source, f"{source.stem}.{level}", flags)
            archs = ",".join(cuda.archs) if cuda else ""
            facts = {"COMPILER": identity, "CPU_ISAS": ",".join(levels), "CUDA_ARCHS": archs}
            defines = [f'-DGPTFAST_{name}="{value}"' for name, value in facts.items()]
            defines.append(f'-DGPTFAST_CUDA_BUILD="{why}"')
            add(ROOT / "csrc/cpu/isa.cpp", "isa", defines)
            flags = [*bound, *BINDINGS, *defines, *["-DGPTFAST_CUDA"] * bool(cuda)]
            add(ROOT / "csrc/bindings.cpp", "bindings", flags)
            writer.build("module", "link", objects)
        subprocess.run(
            [Path(ninja.BIN_DIR, "ninja"), "-C", build, "-j", str(max_jobs())], check=True
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        # Never into the old file: processes that have loaded it would crash.
        shutil.copyfile(build / "module", f"{target}.new")
        os.replace(f"{target}.new", target)


def compiles(command: list[str], source: str = "", language: str = "c++") -> bool:
    command = [*command, "-x", language, "-c", "-", "-o", os.devnull]
    return subprocess.run(command, input=source, capture_output=True, text=True).returncode == 0


@dataclass(frozen=True)
class Cuda:
    """How to compile CUDA kernels."""

    command: list[str]  # nvcc and its flags
    archs: list[str]
    includes: list[str]  # for a C++ compiler
    libraries: list[str]  # for the linker


def cuda_wish() -> str:
    wish = os.environ.get("GPTFAST_CUDA") or "auto"
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"gptfast: GPTFAST_CUDA must be auto, 0 or 1, got {wish!r}")
    return wish


def find_cuda(compiler: list[str]) -> tuple[Cuda | None, str]:
    """How to compile CUDA kernels, or None; and what was decided, in words."""
    wish = cuda_wish()
    if wish == "0":
        return None, "none, as GPTFAST_CUDA=0 says"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        if wish == "1":
            raise SystemExit(
                "gptfast: GPTFAST_CUDA=1, but nvcc is not on PATH. Install the CUDA toolkit (from "
                "PyPI: nvidia-cuda-nvcc, nvidia-cuda-cccl, nvidia-cuda-runtime) and put its bin on "
                "PATH; or unset GPTFAST_CUDA to use the Triton kernels"
            )
        return None, "none, as nvcc is not on PATH"
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True)
    known = [name.removeprefix("sm_") for name in known.split()]
    given = re.split(r"[\s,;]+", os.environ.get("GPTFAST_CUDA_ARCHS", "").strip())
    archs = [name.removeprefix("sm_") for name in given if name]
    archs = archs or [arch for arch in CUDA_ARCHS if arch in known]
    for arch in archs:
        if arch.rstrip("af") not in known:
            raise SystemExit(
                f"gptfast: GPTFAST_CUDA_ARCHS must be of {' '.join(known)}, which {nvcc} knows; "
                f"got {arch!r}"
            )
    archs.sort(key=lambda arch: (int(arch.rstrip("af")), arch))
    dry = subprocess.run([nvcc, "-dryrun", "x.cu"], capture_output=True, text=True).stderr
    paths = {
        name: shlex.split(" ".join(re.findall(rf"^#\$ {name}=(.*)", dry, re.M)))
        for name in ("INCLUDES", "LIBRARIES")
    }
    command = [nvcc, *CUDA_FLAGS]
    if len(compiler) == 1:
        command += ["-ccbin", compiler[0]]
    # One PTX for all cards, for making it is most of the work, and no kernel wants more than the
    # oldest has. Newer cards than these can run it, too. Names like 90a must have their own.
    plain = [arch for arch in archs if arch.isdigit()]
    if plain:
        code = ",".join([*(f"sm_{arch}" for arch in plain), f"compute_{plain[0]}"])
        command.append(f"-gencode=arch=compute_{plain[0]},code=[{code}]")
    for arch in archs:
        if arch not in plain:
            command.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
    version = subprocess.check_output([nvcc, "--version"], text=True)
    release = "".join(re.findall(r"release ([\d.]+)", version)) or version.strip()
    if not archs or not compiles(command, "__global__ void kernel() {}", "cu"):
        why = f"nvcc {release} does not compile C++20 with {' '.join(compiler)}"
        if wish == "1":
            raise SystemExit(f"gptfast: GPTFAST_CUDA=1, but {why}. Install CUDA 12.0 or newer")
        return None, f"none, as {why}"
    includes = [part.replace("-I", "-isystem", 1) for part in paths["INCLUDES"]]
    libraries = [*paths["LIBRARIES"], "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    names = ", ".join(f"sm_{arch}" for arch in archs)
    ptx = " and PTX" if plain else ""
    decision = f"{names}{ptx}, by nvcc {release}"
    return Cuda(command, archs, includes, libraries), decision


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
