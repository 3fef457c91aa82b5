"""What this machine and this installation can do: `gptfast doctor`.

`examine()` gathers facts as plain data; the tables and the JSON show the same. Which backend runs
an op is asked of `gptfast.backend`, never worked out here.
"""

from __future__ import annotations

import importlib
import json as json_
import os
import platform
import random
import shlex
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import gptfast.ops  # noqa: F401  fills backend.OPS
from gptfast import backend
from gptfast._version import __version__

Facts = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PACKAGES = ("torch", "numpy", "triton", "safetensors", "tiktoken")
# Shapes of what an op's `choose` is given; (M, N) where none is named.
EXAMPLES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "attention": ((1, 1, 4, 64),) * 3,
    "attention_decode": ((1, 1, 4, 64),) * 3,
    "attention_decode_append": ((1, 1, 4, 64),) * 5,
    "attention_qkv": ((1, 4, 3 * 64),),
    "attention_varlen": ((4, 1, 64),) * 3,
    "linear_decode": ((4, 64), (16, 64)),
}
DEFAULT_EXAMPLE = ((4, 64),)
# What the SIMD levels need, as Linux spells it.
CPU_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"),
    *("avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "bf16"),
)
SELFTEST_SECONDS = 60.0


def doctor(json: bool = False, selftest: bool = False) -> int:
    """Print what this machine and this installation can do.

    With `json`, one object with these keys, where null stands for what is not there:

        versions        gptfast, python, torch, numpy, triton, safetensors, tiktoken, and cuda and
                        hip (what torch was built for): version or null
        platform        system, machine, cpu (the model's name), cores, memory_gb, cpu_features
        extension       error: why gptfast._C does not load, or null, and then
                        isa: SIMD level in use; isas: those that this processor has and this
                        build has code for; threads; shares_openmp: whether it follows
                        torch.set_num_threads;
                        build: {compiler, cpu_isas, cuda_archs, cuda: for what the CUDA kernels
                        were built and by what, or why there are none}
        tools           compiler, nvcc: what they say of their version, or null
        gpus            [{name, capability, memory_gb}]
        forced_backend  from GPTFAST_BACKEND, or null
        missing         backend -> why this installation does not have it, or null
        ops             [{op, device, dtype, backend: the one that runs it, or null where the
                        forced one refuses, refused: {backend: reason}}]
        notes           what to do about it, as sentences
        selftest        null, or [{op, backend, device, dtype, cases: how many were run, of: how
                        many there are, seconds, failures: [message]}]

    Args:
        json: print JSON instead of tables.
        selftest: also judge every op on every backend that is there against PyTorch in fp64,
            forward and gradients, for up to a minute.

    Returns:
        The exit status: 1 when a self-test failed, else 0.
    """
    facts = examine()
    results = run_selftest() if selftest else None
    facts["selftest"] = results
    if json:
        print(json_.dumps(facts, indent=1))
    else:
        print_tables(facts, Console())
    return int(any(r["failures"] for r in results or ()))


def examine() -> Facts:
    """The facts, as `doctor` describes them."""
    with _no_fallback_warning():
        facts: Facts = {
            "versions": _versions(),
            "platform": _platform(),
            "extension": _extension(),
            "tools": _tools(),
            "gpus": _gpus(),
            "forced_backend": backend.forced_backend(),
            "missing": {name: backend.missing(name) for name in backend.BACKENDS},
            "ops": [_choice(*which) for which in product(backend.OPS, _devices(), DTYPES)],
        }
    facts["notes"] = list(_notes(facts))
    return facts


@contextmanager
def _no_fallback_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gptfast has no compiled kernels", RuntimeWarning)
        yield


def _versions() -> Facts:
    return {
        "gptfast": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _platform() -> Facts:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    about = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    about = {key.strip(): value.strip() for key, value in about.items()}
    flags = about.get("flags", about.get("Features", "")).split()
    memory = None
    if hasattr(os, "sysconf"):
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": about.get("model name") or platform.processor() or None,
        "cores": os.cpu_count(),
        "memory_gb": memory,
        "cpu_features": [name for name in CPU_FEATURES if name in flags],
    }


def _extension() -> Facts:
    try:
        extension = importlib.import_module("gptfast._C")
    except ImportError as error:
        return {"error": str(error)}
    backend.extension()  # applies GPTFAST_CPU_ISA
    return {
        "error": None,
        "isa": extension.cpu_isa(),
        "isas": extension.cpu_isas(),
        "threads": extension.num_threads(),
        "shares_openmp": _shares_openmp(extension),
        "build": extension.build_info(),
    }


def _shares_openmp(extension: ModuleType) -> bool:
    """Whether the extension follows torch's number of threads."""
    before = torch.get_num_threads()
    other = before % 2 + 1
    torch.set_num_threads(other)
    try:
        return bool(extension.num_threads() == other)
    finally:
        torch.set_num_threads(before)


def _tools() -> Facts:
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "clang++"]
    return {"compiler": _tool_version(compiler, 0), "nvcc": _tool_version(["nvcc"], -1)}


def _tool_version(command: list[str], line: int) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return lines[line] if done.returncode == 0 and lines else None


def _gpus() -> list[Facts]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        capability = f"{gpu.major}.{gpu.minor}"
        memory = round(gpu.total_memory / 2**30, 1)
        gpus.append({"name": gpu.name, "capability": capability, "memory_gb": memory})
    return gpus


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _examples(op: str, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = EXAMPLES.get(op, DEFAULT_EXAMPLE)
    return [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]


def _choice(name: str, device: str, dtype: torch.dtype) -> Facts:
    """Which backend runs an op, and why not the others."""
    op = backend.OPS[name]
    x, *args = _examples(name, device, dtype)
    reasons = {b: op.why_not(b, x, *args) for b in backend.BACKENDS}
    chosen = None
    if not (reasons.get(backend.forced_backend() or "torch")):
        implementation = op.choose(x, *args)
        chosen = next(b for b, i in op.implementations.items() if i is implementation)
    return {
        "op": name,
        "device": device,
        "dtype": backend.dtype_name(dtype),
        "backend": chosen,
        "refused": {b: reason for b, reason in reasons.items() if reason},
    }


def _notes(facts: Facts) -> Iterator[str]:
    extension, missing = facts["extension"], facts["missing"]
    if extension["error"]:
        yield (
            f"There are no compiled kernels ({extension['error']}): ops on CPU tensors run on the "
            f"PyTorch reference. {backend.HOW_TO_BUILD}."
        )
    elif not extension["shares_openmp"]:
        yield (
            "gptfast._C has another OpenMP runtime than PyTorch and does not follow "
            "torch.set_num_threads: set OMP_NUM_THREADS instead, or rebuild with g++."
        )
    elif extension["isa"] != extension["isas"][-1]:
        yield f"GPTFAST_CPU_ISA keeps the kernels at {extension['isa']}."
    if facts["gpus"] and missing["triton"]:
        yield f"There is a GPU, but no Triton kernels: {missing['triton']}."
    if not facts["gpus"]:
        yield "There is no GPU that PyTorch can use."
    if not extension["error"] and extension["build"]["cuda_archs"] and missing["cuda"]:
        yield f"The CUDA kernels of this build cannot run: {missing['cuda']}."
    if facts["forced_backend"]:
        yield f"GPTFAST_BACKEND forces {facts['forced_backend']}: where it refuses, ops raise."


# ---- Self-test -----------------------------------------------------------------------------------


def run_selftest(seconds: float = SELFTEST_SECONDS) -> list[Facts]:
    """Judge every op on every backend that is there, in every dtype.

    Args:
        seconds: to spend. All combinations run their first case, then their second one, and so
            on, in an order that is random and always the same.

    Returns:
        The list that `doctor` describes.
    """
    from gptfast import testing

    cases = {name: [case for case in testing.CASES if case.op == name] for name in backend.OPS}
    for of_one_op in cases.values():
        random.Random(0).shuffle(of_one_op)
    with _no_fallback_warning():
        results: list[Facts] = [
            {
                "op": name,
                "backend": b,
                "device": device,
                "dtype": backend.dtype_name(dtype),
                "cases": 0,
                "of": len(cases[name]),
                "seconds": 0.0,
                "failures": [],
            }
            for name, b, device, dtype in product(
                backend.OPS, backend.BACKENDS, _devices(), testing.DTYPES
            )
            if not backend.OPS[name].why_not(b, *_examples(name, device, dtype))
        ]
    start = time.perf_counter()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("self-test", total=seconds)
        for i in range(max(map(len, cases.values()))):
            for result in results:
                spent = time.perf_counter() - start
                bar.update(task, completed=spent)
                if i < result["of"] and (i == 0 or spent < seconds):
                    _judge(testing, cases[result["op"]][i], result)
    return results


def _judge(testing: ModuleType, case: Any, result: Facts) -> None:
    """Run one case and count it in `result`."""
    start = time.perf_counter()
    dtype = getattr(torch, result["dtype"])
    try:
        testing.run_case(case, result["backend"], dtype, result["device"])
    except backend.RefusedError:  # which `auto` would pass on; not counted
        return
    except Exception as error:  # whatever a kernel or its compiler raises: a failure, shown
        result["failures"].append(f"{case}: {type(error).__name__}: {error}")
    result["cases"] += 1
    result["seconds"] += time.perf_counter() - start


# ---- Tables --------------------------------------------------------------------------------------


def print_tables(facts: Facts, console: Console) -> None:
    """The facts for people."""
    console.print(_facts_table(facts))
    console.print(_ops_table(facts["ops"]))
    console.print(_reasons_table(facts["ops"]))
    if facts["selftest"] is not None:
        console.print(_selftest_table(facts["selftest"]))
        for result in facts["selftest"]:
            for failure in result["failures"]:
                where = f"{result['op']} on {result['backend']}, {result['dtype']}"
                console.print(f"FAILED {where}: {failure}", style="red", markup=False)
    for note in facts["notes"]:
        console.print(f"* {note}", markup=False)


def _facts_table(facts: Facts) -> Table:
    machine, extension, tools = facts["platform"], facts["extension"], facts["tools"]
    table = Table("what", "found", title="gptfast doctor", box=box.SIMPLE)
    table.add_row("versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v))
    table.add_row("system", f"{machine['system']} on {machine['machine']}")
    table.add_row(
        "processor",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB of memory",
    )
    table.add_row("its features", " ".join(machine["cpu_features"]) or "-")
    if extension["error"]:
        table.add_row("gptfast._C", f"not there: {extension['error']}")
    else:
        build = extension["build"]
        shared = "yes" if extension["shares_openmp"] else "no"
        table.add_row("gptfast._C", f"built by {build['compiler']}")
        table.add_row("SIMD level", f"{extension['isa']}, of {', '.join(extension['isas'])}")
        table.add_row("threads", f"{extension['threads']}; OpenMP shared with PyTorch: {shared}")
        table.add_row("CUDA kernels", build["cuda"])
    table.add_row("C++ compiler", tools["compiler"] or "none")
    table.add_row("nvcc", tools["nvcc"] or "none")
    for gpu in facts["gpus"]:
        table.add_row("GPU", f"{gpu['name']}, {gpu['capability']}, {gpu['memory_gb']} GB")
    return table


def _ops_table(ops: list[Facts]) -> Table:
    table = Table("op", "device", title="Which backend runs what", box=box.SIMPLE)
    for dtype in DTYPES:
        table.add_column(backend.dtype_name(dtype))
    rows: dict[tuple[str, str], list[str]] = {}
    for choice in ops:
        cells = rows.setdefault((choice["op"], choice["device"]), [])
        cells.append(choice["backend"] or "refused")
    for which, cells in rows.items():
        table.add_row(*which, *cells)
    return table


def _reasons_table(ops: list[Facts]) -> Table:
    table = Table("backend", "why not", "where", title="Refused", box=box.SIMPLE)
    columns = ("op", "device", "dtype")
    everything = [dict.fromkeys(choice[column] for choice in ops) for column in columns]
    places: dict[tuple[str, str], list[Facts]] = {}
    for choice in ops:
        for name, reason in choice["refused"].items():
            same = reason.replace(choice["op"], "the op")
            places.setdefault((name, same), []).append(choice)
    for which, found in places.items():
        values = [dict.fromkeys(choice[column] for choice in found) for column in columns]
        limits = [", ".join(v) for v, every in zip(values, everything, strict=True) if v != every]
        table.add_row(*which, "; ".join(limits) or "everywhere")
    return table


def _selftest_table(results: list[Facts]) -> Table:
    table = Table(title="Self-test: forward and gradients against fp64", box=box.SIMPLE)
    for column in ("op", "backend", "device", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("cases", "time"):
        table.add_column(column, justify="right")
    table.add_column("result")
    for r in results:
        failed = len(r["failures"])
        verdict = f"[red]{failed} FAILED[/red]" if failed else "[green]pass[/green]"
        names = (r["op"], r["backend"], r["device"], r["dtype"])
        table.add_row(*names, f"{r['cases']} of {r['of']}", f"{r['seconds']:.1f} s", verdict)
    return table
