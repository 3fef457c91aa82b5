"""Measures launch configurations on this machine's GPU, and writes down those that pay.

For every op, case and dtype: the configurations that its kernels pick are noted; then one field of
one of them at a time is halved or doubled, as long as that makes the pass faster. What is at least
5 % faster in the end is written, with the results checked against fp64 before. The file is used by
pointing GPTFAST_TUNED at it, and belongs into kernels/tuned.json once several runs agree.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python benchmarks/tune.py`

from gptfast import testing, tuning, use_backend
from gptfast.backend import dtype_name

GAIN = 1.05  # less is within the noise of a timer
LARGEST = {"num_warps": 16, "num_stages": 5}  # of other fields: four times the heuristic's


def neighbours(config: Any, heuristic: Any) -> Iterator[Any]:
    """Configurations with one field halved or doubled (stages: one less or more)."""
    for field in dataclasses.fields(config):
        value, first = getattr(config, field.name), getattr(heuristic, field.name)
        if type(value) is not int:
            continue
        step = field.name == "num_stages"
        for other in (value - 1, value + 1) if step else (value // 2, value * 2):
            if 1 <= other <= LARGEST.get(field.name, 4 * first):
                yield dataclasses.replace(config, **{field.name: other})


def tune_case(
    case: testing.Case,
    dtype: torch.dtype,
    device: str,
    measure: Callable[[Callable[[], object]], float],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The table of what pays for one case.

    Args:
        case: of `testing.OPS[...].reports`, or any other.
        dtype: of its inputs.
        device: where it runs.
        measure: seconds (or milliseconds) of a call.
        say: told of what was found.
    """
    problem = testing.make_problem(case, dtype, device)
    with tuning.observed() as picked, testing.record_calls() as recorded:
        problem.judge(problem.run("triton", poison=False))

    def run() -> object:
        return [op(*args) for op, args, _ in recorded.calls]

    found: dict[str, Any] = {}
    for (target, name, key), heuristic in picked.items():
        with use_backend("triton"):
            best, before = heuristic, measure(run)
            fastest = before
            improved = True
            while improved:
                improved = False
                for candidate in neighbours(best, heuristic):
                    seconds = _measured(target, name, key, candidate, problem, run, measure)
                    if seconds is not None and seconds < fastest / 1.01:
                        best, fastest, improved = candidate, seconds, True
        say(f"{name}({key}) on {target}: {before / fastest:.2f} x with {best}")
        if before / fastest >= GAIN:
            changed = {
                field.name: getattr(best, field.name)
                for field in dataclasses.fields(best)
                if getattr(best, field.name) != getattr(heuristic, field.name)
            }
            found = dict(tuning.merge(found, {target: {name: {key: changed}}}))
    return found


def _measured(
    target: str,
    name: str,
    key: str,
    candidate: Any,
    problem: testing.Problem,
    run: Callable[[], object],
    measure: Callable[[Callable[[], object]], float],
) -> float | None:
    """The time of a candidate; None where the card cannot run it, or it computes something else."""
    from triton.runtime.errors import OutOfResources

    with tuning.forced(target, name, key, candidate):
        try:
            problem.judge(problem.run("triton", poison=False))
        except (OutOfResources, AssertionError):
            return None
        return measure(run)


def main(
    out: Annotated[Path, tyro.conf.arg(help="File to write.")] = Path("tuned.json"),
    op: Annotated[str | None, tyro.conf.arg(help="Only this op.")] = None,
    dtype: Annotated[str, tyro.conf.arg(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Tune the Triton kernels on this machine's GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("tune: needs a GPU: times of the interpreter say nothing about a card")
    if op is not None and op not in testing.OPS:
        raise SystemExit(f"--op must be one of {', '.join(testing.OPS)}; got {op!r}")
    if dtype not in map(dtype_name, testing.DTYPES):
        raise SystemExit(f"--dtype must be float32, bfloat16 or float16; got {dtype!r}")
    from triton.testing import do_bench

    console = Console()
    cases = [c for name, row in testing.OPS.items() if op in (None, name) for c in row.reports]
    found: dict[str, Any] = {}
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        for case in bar.track(cases, description="tuning"):
            of_case = tune_case(case, getattr(torch, dtype), "cuda", do_bench, console.print)
            found = dict(tuning.merge(found, of_case))
    out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    console.print(f"written to {out}; to use it: export GPTFAST_TUNED={out}")


if __name__ == "__main__":
    tyro.cli(main)
