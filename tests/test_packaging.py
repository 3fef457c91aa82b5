"""Wheel, sdist, editable install and installs without a compiler, each built as pip builds it."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCE = (".git", ".venv*", "build", "dist", "out", "demo", "*.so", "*.egg-info", "__pycache__")
COMPILER = shutil.which("g++")
LINUX_X86 = sys.platform == "linux" and platform.machine() == "x86_64"

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on PATH")
needs_binutils = pytest.mark.skipif(
    not (LINUX_X86 and shutil.which("objdump")), reason="reads x86-64 ELF files with binutils"
)


def run(*command: str | Path, cwd: Path, fails: bool = False, **environment: str) -> str:
    """What a command printed; it must succeed, or with `fails` must not."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("GPTFAST_", "CXX"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


class Environment:
    """A new virtual environment that sees the packages of this one, but not its gptfast."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.folder = folder
        self.python = folder / "bin/python"
        base = {"base": str(folder), "platbase": str(folder)}
        self.site = Path(sysconfig.get_path("purelib", "venv", base))
        # A path from a .pth file comes last, and .pth files in it (an editable gptfast) do not run.
        present = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (self.site / "present.pth").write_text("\n".join(sorted(present)))

    def pip_install(self, *arguments: str | Path, **options: bool | str) -> str:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "-v")
        return run(*pip, *arguments, cwd=self.folder, **options)

    def execute(self, code: str, **environment: str) -> str:
        return run(self.python, "-I", "-c", code, cwd=self.folder, **environment)


def clean_copy(folder: Path) -> Path:
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return folder


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="session")
def no_tools(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with nothing on it."""
    return str(tmp_path_factory.mktemp("empty_path"))


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    tree = clean_copy(folder / "tree")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, tree, cwd=folder)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def unpacked(sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def wheel(unpacked: Path) -> Path:
    """The wheel built from the sdist, whose build/ keeps the objects.

    ninja compiles what differs from this checkout's own build, or has a header that is missing.
    """
    for folder in ROOT.glob("build/ninja-*"):
        shutil.copytree(folder, unpacked / "build" / folder.name, symlinks=True)
    out = unpacked.parent / "wheel"
    build = (sys.executable, "-m", "build", "--wheel", "--outdir", out, unpacked)
    run(*build, cwd=unpacked.parent, GPTFAST_REQUIRE_EXT="1", GPTFAST_CUDA="0")
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("wheel_environment"))
    environment.pip_install("--no-index", wheel)
    return environment


@pytest.fixture(scope="session")
def extension(installed: Environment) -> Path:
    return next((installed.site / "gptfast").glob("_C.*.so"))


@pytest.fixture(scope="session")
def without_compiler(tmp_path_factory: pytest.TempPathFactory, no_tools: str) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("plain_environment"))
    tree = clean_copy(environment.folder / "tree")
    log = environment.pip_install(tree, PATH=no_tools)
    assert "no CPU kernels: ops on CPU tensors will run on PyTorch's own" in log
    return environment


IMPORT_EVERYTHING = """
import importlib, importlib.util, pkgutil, sys
import gptfast, gptfast.kernels
assert gptfast.__file__.startswith(sys.prefix), gptfast.__file__
found = [*pkgutil.walk_packages(gptfast.__path__, "gptfast."),
         *pkgutil.iter_modules(gptfast.kernels.__path__, "gptfast.kernels.")]
for module in found:
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name in ("triton", "transformers"), error  # optional
spec = importlib.util.find_spec("kernels")
where = [] if spec is None else list(spec.submodule_search_locations)
assert not any(path.startswith(sys.prefix) for path in where), where
print(len(found), "modules")
"""

LAYER_NORM = """
import torch, gptfast
x = torch.randn(5, 7, requires_grad=True)
dy = torch.randn(5, 7)
y = gptfast.layer_norm(x)
expected = torch.nn.functional.layer_norm(x, (7,))
torch.testing.assert_close(y, expected)
torch.testing.assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, expected)))
"""


def test_the_sdist_holds_all_sources(unpacked: Path) -> None:
    patterns = ("csrc/**/*.*", "kernels/*", "gptfast/**/*.py", "gptfast/assets/*", "tests/*.py")
    plain = ["LICENSE", "README.md", "pyproject.toml", "setup.py", "gptfast/py.typed"]
    expected = plain + [str(p.relative_to(ROOT)) for glob in patterns for p in ROOT.glob(glob)]
    linked = "gptfast/kernels/"  # the link to kernels/, which is there itself
    missing = [
        name
        for name in expected
        if not name.startswith(linked)
        and "__pycache__" not in name
        and not (unpacked / name).exists()
    ]
    assert not missing


@needs_compiler
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    held = names(wheel)
    assert {name.split("/")[0] for name in held} == {
        "gptfast",
        "gptfast_kernels-" + wheel.name.split("-")[1] + ".dist-info",
    }
    sources = [
        p.relative_to(ROOT) for p in ROOT.glob("gptfast/**/*.py") if "kernels" not in p.parts
    ]
    sources += [Path("gptfast") / p.relative_to(ROOT) for p in ROOT.glob("kernels/*.py")]
    sources += [p.relative_to(ROOT) for p in ROOT.glob("gptfast/assets/*.gz")]
    missing = {str(p) for p in sources} - held
    assert not missing, "list their packages in pyproject.toml"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)
    assert "gptfast/py.typed" in held


@needs_compiler
def test_the_installed_wheel_imports_and_computes(installed: Environment) -> None:
    installed.execute(IMPORT_EVERYTHING)
    installed.execute(LAYER_NORM, GPTFAST_BACKEND="cpu")


@needs_compiler
def test_the_thread_count_is_torchs(installed: Environment) -> None:
    installed.execute(
        "import torch; from gptfast import _C\n"
        "for n in (1, 3, 2):\n"
        "    torch.set_num_threads(n)\n"
        "    assert _C.num_threads() == n, (_C.num_threads(), n)"
    )


@needs_compiler
def test_the_extension_runs_where_torch_is_not(extension: Path) -> None:
    """One build for every version of PyTorch: it works with none at all, at every SIMD level."""
    code = f"""
import importlib.util, math, sys
from array import array
sys.modules["torch"] = None  # importing it now fails
spec = importlib.util.spec_from_file_location("_C", {str(extension)!r})
C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(C)
n = 1003
x = array("f", [(i - 500) / 100 for i in range(n)])
for isa in C.cpu_isas():
    C.set_cpu_isa(isa)
    y = array("f", [math.nan]) * n
    C.gelu_fwd(x.buffer_info()[0], y.buffer_info()[0], n, False, 0)
    for xi, yi in zip(x, y):
        expected = xi * 0.5 * math.erfc(-xi / math.sqrt(2))
        assert abs(yi - expected) <= 4e-7 * max(abs(xi), 1e-3), (isa, xi, yi, expected)
if sys.platform == "linux":
    assert "libtorch" not in open("/proc/self/maps").read()
"""
    run(sys.executable, "-I", "-c", code, cwd=extension.parent)


@needs_compiler
@needs_binutils
def test_the_extension_links_only_the_systems_libraries(extension: Path) -> None:
    dynamic = run("readelf", "--dynamic", extension, cwd=extension.parent)
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    assert "libgomp.so.1" in needed
    system = r"lib(stdc\+\+|m|gomp|gcc_s|c|pthread)\.so\.\d+|ld-linux.*"
    assert not {name for name in needed if not re.fullmatch(system, name)}
    assert not re.search("RPATH|RUNPATH", dynamic)
    exported = run("nm", "--dynamic", "--defined-only", extension, cwd=extension.parent)
    assert [line.split()[-1] for line in exported.splitlines()] == ["PyInit__C"]
    assert ".symtab" not in run("readelf", "--sections", extension, cwd=extension.parent)


def vector_functions(library: Path) -> tuple[set[str], set[str]]:
    """Functions with AVX or AMX code (VEX, EVEX, tiles): those of a SIMD level, and others."""
    # Of a level, or a template of internal linkage (L) over a type of that level: no other object
    # can take its place.
    level = re.compile(r"7gptfast(4avx2|6avx512|3amx)|7gptfastL.*NS_(4avx2|6avx512|3amx)")
    own, foreign = set(), set()
    function = ""
    for line in run(
        "objdump", "-d", "--no-show-raw-insn", library, cwd=library.parent
    ).splitlines():
        if match := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            function = match[1]
        elif re.search(r"\t(v(?!err|erw|mcall)\w|k[a-z]+[bwdq]\b|tile|tdp)|%[yzt]mm", line):
            (own if level.search(function) else foreign).add(function)
    return own, foreign


@needs_compiler
@needs_binutils
def test_code_outside_the_simd_levels_runs_on_every_processor(wheel: Path, unpacked: Path) -> None:
    """Linked in the order of setup.py, no copy of a shared inline function may be one with AVX."""
    (folder,) = unpacked.glob("build/ninja-*")
    ninja = (folder / "build.ninja").read_text().replace("$\n", "")
    objects = re.search(r"^build module: link (.+)$", ninja, re.MULTILINE)[1].split()
    run(str(COMPILER), "-shared", "-fopenmp", *objects, "-o", "unstripped.so", cwd=folder)
    own, foreign = vector_functions(folder / "unstripped.so")
    assert not foreign
    for name in ("avx2", "avx512", "amx"):
        assert any(name in function for function in own) == any(f".{name}.o" in o for o in objects)


@needs_compiler
@needs_binutils
def test_that_check_sees_a_wrong_link_order(tmp_path: Path) -> None:
    (tmp_path / "shared.h").write_text(
        "inline __attribute__((noinline)) float twice(const float* x) { return *x + *x; }\n"
    )
    for name, flags in (("plain", []), ("avx", ["-mavx2"])):
        text = f'#include "shared.h"\nfloat use_{name}(const float* x) {{ return twice(x); }}\n'
        (tmp_path / f"{name}.cpp").write_text(text)
        run(str(COMPILER), "-O1", "-fPIC", *flags, "-c", f"{name}.cpp", cwd=tmp_path)
    found = {}
    for order in (("plain.o", "avx.o"), ("avx.o", "plain.o")):
        run(str(COMPILER), "-shared", *order, "-o", "library.so", cwd=tmp_path)
        found[order[0]] = vector_functions(tmp_path / "library.so")[1]
    assert found == {"plain.o": set(), "avx.o": {"_Z5twicePKf"}}


def test_an_install_without_a_compiler_works_on_torch(without_compiler: Environment) -> None:
    without_compiler.execute(IMPORT_EVERYTHING)
    log = without_compiler.execute(LAYER_NORM)
    assert log.count("RuntimeWarning: gptfast has no compiled kernels here") == 1


def test_a_forced_backend_says_that_the_extension_is_missing(without_compiler: Environment) -> None:
    code = f"try:\n{LAYER_NORM.replace(chr(10), chr(10) + ' ')}\nexcept RuntimeError as e: print(e)"
    assert "Install g++ 11 or newer" in without_compiler.execute(code, GPTFAST_BACKEND="cpu")


@pytest.mark.parametrize(
    ("variable", "message"),
    [("GPTFAST_REQUIRE_EXT", "no CPU kernels"), ("GPTFAST_CUDA", "nvcc is not on PATH")],
)
def test_what_is_required_fails_when_missing(
    without_compiler: Environment, no_tools: str, variable: str, message: str
) -> None:
    wanted = {"PATH": no_tools, variable: "1"}
    tree = without_compiler.folder / "tree"
    log = without_compiler.pip_install("--force-reinstall", tree, fails=True, **wanted)
    assert message in log


FAKE_COMPILER = """#!/bin/sh
case "$*" in
  *--version) echo "fake 1.0"; exit ;;
  *--list-gpu-code) echo sm_75 sm_80 sm_90; exit ;;
  *-dryrun*) exit ;;
  *-mamx*) exit 1 ;;
esac
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""


@pytest.fixture
def fake_tools(tmp_path: Path) -> Path:
    """A folder for PATH, with a C++ compiler and an nvcc that compile nothing."""
    for name in ("g++", "nvcc"):
        (tmp_path / name).write_text(FAKE_COMPILER)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def build_wheel(fake_tools: Path, sdist: Path, **options: str | bool) -> str:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", fake_tools, sdist)
    wanted = {"PATH": str(fake_tools), "GPTFAST_CUDA": "1", "GPTFAST_REQUIRE_EXT": "1"}
    return run(*pip, cwd=fake_tools, **{**wanted, **options})


def test_what_the_compilers_do_not_know_is_left_out(fake_tools: Path, sdist: Path) -> None:
    log = build_wheel(fake_tools, sdist)
    assert "gptfast: fake 1.0; CPU levels baseline, avx2, avx512;" in log
    assert "gptfast: CUDA kernels: sm_80, sm_90 and PTX, by nvcc fake 1.0" in log
    (built,) = fake_tools.glob("*.whl")
    assert any(name.startswith("gptfast/_C.") for name in names(built))


def test_an_architecture_that_nvcc_does_not_know(fake_tools: Path, sdist: Path) -> None:
    log = build_wheel(fake_tools, sdist, fails=True, GPTFAST_CUDA_ARCHS="sm_90, 130")
    assert "GPTFAST_CUDA_ARCHS must be of 75 80 90, which " in log
    assert "got '130'" in log


WITHOUT_A_DRIVER = """
from gptfast import _C, backend
assert _C.build_info()["cuda_archs"] == "80,90", _C.build_info()
assert _C.build_info()["cuda"].startswith("sm_80, sm_90 and PTX, by nvcc ")
driver, runtime = _C.cuda.versions()
assert runtime >= 12000
if driver == 0:
    assert backend.missing("cuda") == "there is no NVIDIA driver here"
    try:
        _C.cuda.gelu_fwd(0, 0, 0, 1, True, 0, 0)
    except RuntimeError as error:
        assert "Without a GPU and its driver no kernel can run" in str(error), error
    else:
        raise AssertionError("launched without a driver")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_a_build_with_cuda_kernels_loads_without_a_driver(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    tree = clean_copy(tmp_path / "environment/tree")
    wanted = {"GPTFAST_CUDA": "1", "GPTFAST_CUDA_ARCHS": "90 80"}
    log = environment.pip_install(tree, **wanted)
    assert "gptfast: CUDA kernels: sm_80, sm_90 and PTX, by nvcc " in log
    environment.execute(WITHOUT_A_DRIVER)
    environment.execute("from gptfast.doctor import doctor; assert doctor() == 0")


def test_an_editable_install_imports_the_tree(tmp_path: Path, no_tools: str) -> None:
    environment = Environment(tmp_path / "environment")
    tree = clean_copy(tmp_path / "environment/tree")
    environment.pip_install("-e", tree, PATH=no_tools)
    environment.execute(IMPORT_EVERYTHING)


def test_kernels_is_a_link_and_no_package() -> None:
    assert os.readlink(ROOT / "gptfast/kernels") == "../kernels"
    assert not (ROOT / "kernels/__init__.py").exists()
