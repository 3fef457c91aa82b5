"""What nvcc makes of the CUDA kernels, with no GPU: `python -m benchmarks.cuda_report`.

`benchmarks/cuda_report.json` is the committed table, an entry a line: every kernel of csrc/cuda for
every architecture of a build. Registers, spills, stack and shared memory are what ptxas says;
the width of loads and stores and the matrix instructions are read from the PTX.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gptfast.testing.cuda_host import ROOT

FILE = Path(__file__).parent / "cuda_report.json"
SOURCES = ROOT / "csrc/cuda"
Names = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class Row:
    """One kernel on one target.

    Args:
        file: stem of its source.
        kernel: its name and template arguments.
        target: the GPU.
        regs: registers a thread.
        spills: bytes a thread that are stored because they do not fit into them.
        stack: bytes a thread of local memory.
        smem: bytes of static shared memory.
        load_bits: of the widest load from global memory a thread makes.
        store_bits: of the widest store.
        async_bits: of the widest copy from global to shared memory past the registers.
        matrix_instr: matrix instructions in the code.
    """

    file: str
    kernel: str
    target: str
    regs: int
    spills: int
    stack: int
    smem: int
    load_bits: int
    store_bits: int
    async_bits: int
    matrix_instr: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What an entry is about."""
        return (self.file, self.kernel, self.target)


def from_setup(name: str) -> list[str]:
    """A list of strings that setup.py defines, which cannot be imported."""
    values: list[str] = []
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AugAssign):
            targets = [node.target]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            values += ast.literal_eval(node.value)  # type: ignore[attr-defined]
    return values


def nvcc_release() -> str:
    """ "13.0", of the nvcc on PATH."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    return found[1] if found else said


def compile_file(source: Path, archs: Sequence[str]) -> list[Row]:
    """Every kernel of one source for some architectures, from the PTX of a build for all.

    Raises:
        RuntimeError: what nvcc said.
    """
    oldest = from_setup("CUDA_ARCHS")[0]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ptx = f"{folder}/{source.stem}.ptx"

        def nvcc(given: str | Path, *flags: str) -> str:
            command = ["nvcc", *from_setup("CUDA_FLAGS"), *flags, str(given)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name}: {done.stderr[-4000:]}")
            return done.stderr

        nvcc(source, f"-arch=compute_{oldest}", "-ptx", "-o", ptx)
        code = instructions(Path(ptx).read_text())
        names = demangled(list(code))
        for arch in archs:
            target = f"-gencode=arch=compute_{oldest},code=sm_{arch}"
            said = nvcc(ptx, target, "-cubin", "-Xptxas", "-v", "-o", f"{folder}/cubin")
            rows += [
                Row(source.stem, names[mangled], f"sm_{arch}", **usage, **code[mangled])
                for mangled, usage in resources(said).items()
            ]
    return rows


def resources(said: str) -> dict[str, dict[str, int]]:
    """Registers and memory by mangled name, from what `ptxas -v` says."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in said.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
            found[name] = {"regs": 0, "spills": 0, "stack": 0, "smem": 0}
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            found[name]["stack"] += int(match[1])
            found[name]["spills"] += int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            found[name]["regs"] = int(match[1])
            smem = re.search(r"(\d+) bytes smem", line)
            found[name]["smem"] = int(smem[1]) if smem else 0
    return found


# Memory that is not shared, local, constant or an argument; without a name, too: an address that
# came from a table.
ACCESS = re.compile(
    r"\b(ld|st)(?:\.(?:relaxed|weak|volatile|gpu))*(?:\.global)?(?:\.nc)?(?:\.L[12]\S*?)?"
    r"(?:\.v([248]))?\.[busf](\d+)\b"
)


def instructions(ptx: str) -> dict[str, dict[str, int]]:
    """Widths and matrix instructions by mangled name, from PTX."""
    found = {}
    for part in re.split(r"\.entry ", ptx)[1:]:
        widths = {"ld": 0, "st": 0}
        for kind, vector, bits in ACCESS.findall(part):
            widths[kind] = max(widths[kind], int(vector or 1) * int(bits))
        copies = [8 * int(n) for n in re.findall(r"cp\.async\.\w+\.shared\S* .*?, (\d+)", part)]
        found[re.match(r"\w+", part)[0]] = {  # type: ignore[index]
            "load_bits": widths["ld"],
            "store_bits": widths["st"],
            "async_bits": max(copies, default=0),
            "matrix_instr": len(re.findall(r"\bmma\.sync", part)),
        }
    return found


def demangled(names: Sequence[str]) -> dict[str, str]:
    """Short names: without namespaces, arguments, and the types of template arguments."""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    short = {}
    for mangled, name in zip(names, done.stdout.splitlines(), strict=True):
        for noise in ("gptfast::cuda::", "(anonymous namespace)::", "(int)", "(bool)", "void "):
            name = name.replace(noise, "")
        short[mangled] = re.sub(r"(>|\w)\(.*\)$", r"\1", name)
    return short


def worse(before: Row, after: Row) -> list[str]:
    """In which ways an entry is worse than the committed one.

    Registers count in steps of 8, in which they are handed out.
    """

    def steps(row: Row) -> int:
        return -(-row.regs // 8)

    checks = {
        "regs": steps(after) > steps(before),
        "spills": after.spills > before.spills,
        "stack": after.stack > before.stack,
        "smem": after.smem > before.smem,
        "load_bits": after.load_bits < before.load_bits,
        "store_bits": after.store_bits < before.store_bits,
        "async_bits": after.async_bits < before.async_bits,
        "matrix_instr": after.matrix_instr < before.matrix_instr and not after.matrix_instr,
    }
    return [
        f"{name} {getattr(before, name)} -> {getattr(after, name)}"
        for name, is_worse in checks.items()
        if is_worse
    ]


@dataclass(frozen=True)
class Table:
    """Entries by key, and the nvcc that made them."""

    nvcc: str
    rows: Mapping[tuple[str, str, str], Row]

    @classmethod
    def read(cls) -> Table:
        """The committed table; an empty one where there is none."""
        if not FILE.exists():
            return cls("", {})
        data = json.loads(FILE.read_text())
        rows = [Row(**row) for row in data["rows"]]
        return cls(data["nvcc"], {row.key: row for row in rows})

    def write(self) -> None:
        """One line an entry, sorted, so that a change shows as its lines."""
        lines = ",\n".join(json.dumps(asdict(self.rows[key])) for key in sorted(self.rows))
        FILE.write_text(f'{{"nvcc": {json.dumps(self.nvcc)}, "rows": [\n{lines}\n]}}\n')


def report(files: Iterable[Path], archs: Iterable[str], processes: int) -> list[Row]:
    """The rows of some sources for some architectures."""
    archs = list(archs)
    with ThreadPoolExecutor(processes) as pool:
        return [r for rows in pool.map(lambda file: compile_file(file, archs), files) for r in rows]


def main(
    file: Annotated[Names, tyro.conf.arg(help="Only this source (its stem); may repeat.")] = (),
    target: Annotated[Names, tyro.conf.arg(help="Only this GPU: sm_90; may repeat.")] = (),
    write: Annotated[
        bool, tyro.conf.arg(help=f"Write the rows into {FILE.name}, unless one is worse there.")
    ] = False,
    accept_worse: Annotated[bool, tyro.conf.arg(help="Write rows that got worse, too.")] = False,
    processes: Annotated[int, tyro.conf.arg(help="How many compile at a time.")] = 2,
) -> None:
    """Registers, spills, memory and the width of accesses of the CUDA kernels, with no GPU."""
    sources = {path.stem: path for path in sorted(SOURCES.glob("*.cu"))}
    targets = [f"sm_{arch}" for arch in from_setup("CUDA_ARCHS")]
    for given, known, what in ((file, list(sources), "file"), (target, targets, "target")):
        if set(given) - set(known):
            raise SystemExit(f"--{what} must be one of {', '.join(known)}; got {', '.join(given)}")
    chosen = [sources[name] for name in file or sources]
    archs = [name.removeprefix("sm_") for name in target or targets]
    rows = report(chosen, archs, processes)
    for row in rows:
        print(
            f"{row.target:7} {row.file} {row.kernel}: {row.regs} registers, {row.spills} B spilled,"
            f" {row.stack} B stack, {row.smem} B shared, loads {row.load_bits}, stores "
            f"{row.store_bits}, copies {row.async_bits} bits, {row.matrix_instr} mma"
        )
    before = Table.read()
    release = nvcc_release()
    complaints = []
    if before.nvcc == release:
        for row in rows:
            known_row = before.rows.get(row.key)
            complaints += [
                f"worse: {', '.join(row.key)}: {why}"
                for why in (worse(known_row, row) if known_row else ())
            ]
    print("\n".join(complaints))
    if write:
        if complaints and not accept_worse:
            raise SystemExit("not written: entries got worse (--accept-worse writes them)")
        covered = {(path.stem, f"sm_{arch}") for path in chosen for arch in archs}
        kept = {
            key: row
            for key, row in before.rows.items()
            if (row.file, row.target) not in covered and row.file in sources
        }
        Table(release, {**kept, **{row.key: row for row in rows}}).write()
        print(f"{len(rows)} rows written to {FILE.name}")


if __name__ == "__main__":
    tyro.cli(main)
