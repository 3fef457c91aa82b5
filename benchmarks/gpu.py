"""Times of the ops on this machine's GPU: gptfast against PyTorch eager, compiled, and fused.

Every contender is captured in a CUDA graph that calls it on several sets of random inputs, larger
than the second-level cache together, and keeps all results; the graphs are replayed in turns and
timed by events of the device. So a time is that of the kernels, without what launching them from
Python costs, which `benchmarks/run.py` shows for a whole model. Forward is that of training, which
keeps what backward needs; backward is timed alone.

Beside them stand the ceilings of the card, measured in the same run: a copy of 2 GB, which moves 4,
and a product of two 8192 x 8192 matrices of bf16. GB/s counts each input read and each result
written once, whatever a contender moves.

No time is given for an op whose results or gradients are off: see `check`.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch._functorch.config
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python benchmarks/gpu.py`

import gptfast
from benchmarks.gpu_works import Function, Tensors, Work, random, works
from benchmarks.timing import COMPILED, EAGER, OURS, Timing, summarise
from gptfast import backend
from gptfast.models import GPT, GPTConfig
from gptfast.optim import AdamW
from gptfast.testing import assert_close_in_norm

IN_CUDA = f"{OURS}, CUDA C++"  # where it is built; OURS are the Triton kernels
CACHE = 150e6  # bytes of inputs in all sets: three times the second-level cache of an H100
MOST_SETS = 8


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    op: str
    shape: str
    dtype: str
    pass_: str
    contender: str
    median_us: float
    p20_us: float
    p80_us: float
    gb_per_s: float
    tflop_per_s: float
    percent_of_ceiling: float  # of the matrix product's rate where there is one, else of the copy's
    ratio_to_best_peer: float


# ---- Checks --------------------------------------------------------------------------------------


def check(work: Work) -> None:
    """Hold our results and gradients against fp64: at most three times the first peer's error.

    Raises:
        AssertionError: naming what is off, by how much.
    """
    given = (work.small or work.inputs)()
    peer = next(iter(work.peers.values()))
    exact = work.exact or peer
    wide = [x.double() if x.is_floating_point() else x for x in given]
    dys: list[torch.Tensor] = []
    found = [results(exact, wide, work, dys)]
    found += [results(f, given, work, dys) for f in (work.ours, peer)]
    if "dropout" in work.op:  # which the peer draws anew: our own formulas in bf16 instead
        found[2] = results(exact, given, work, dys)
    for name, expected in found[0].items():
        assert_close_in_norm(f"{work.op}, {name}", found[1][name], found[2][name], expected)


def results(
    function: Function, given: Tensors, work: Work, dys: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What it returns, and its gradients, by number; dys are drawn where there are none yet."""
    leaves = leaves_of(given, work)
    outputs = outputs_of(function, leaves, dys)
    found = {f"result {i}": y.detach() for i, y in enumerate(outputs)}
    wanted = [x for x in leaves if x.requires_grad]
    if wanted:
        own = [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, wanted, own)
        found |= {f"gradient {i}": g for i, g in enumerate(grads)}
    return found


def leaves_of(given: Tensors, work: Work) -> list[torch.Tensor]:
    """The inputs, which want gradients if backward is timed."""
    wanting = [
        "bwd" in work.passes and x.is_floating_point() and i not in work.constant
        for i, x in enumerate(given)
    ]
    return [x.detach().requires_grad_(wants) for x, wants in zip(given, wanting, strict=True)]


def outputs_of(function: Function, leaves: Tensors, dys: list[torch.Tensor]) -> list[torch.Tensor]:
    """What it returns, as a list; dys (of bf16) are drawn where there are none yet."""
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not dys:
        dys += [torch.randn_like(y).to(torch.bfloat16) for y in outputs]
    return outputs


# ---- Times ---------------------------------------------------------------------------------------


class Captured(NamedTuple):
    """A graph of calls, and the calls: they hold tensors that the graph reads and does not own."""

    graph: torch.cuda.CUDAGraph
    calls: Sequence[Callable[[], object]]


def captured(calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream) -> Captured:
    """A graph of all calls, whose results all have memory of their own: none is written into what
    another one has left in the cache.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = []
    with torch.cuda.graph(graph, stream=stream):
        kept.extend(call() for call in calls)
    return Captured(graph, calls)


def replayed(graphs: Mapping[str, Captured], rounds: int) -> dict[str, Timing]:
    """Seconds per call: the graphs in turns."""
    samples: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in graphs}
    for graph, _ in graphs.values():
        graph.replay()
    for _ in range(rounds):
        for name, (graph, _) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            samples[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: summarise(
            [begin.elapsed_time(end) / 1e3 / len(graphs[name].calls) for begin, end in pairs]
        )
        for name, pairs in samples.items()
    }


def ceilings() -> dict[str, float]:
    """Bytes per second of a large copy, and operations per second of a large product of bf16.

    The copy is the faster one of the driver's and a kernel's.
    """
    stream = torch.cuda.Stream()
    x = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    a, b = random(8192, 8192), random(8192, 8192)
    graphs = {
        "copy": captured([lambda: y.copy_(x)], stream),
        "kernel": captured([lambda: torch.neg(x, out=y)], stream),
        "product": captured([lambda: a @ b], stream),
    }
    times = replayed(graphs, 15)
    return {
        "copy_bytes_per_s": 4 * x.numel() / min(times["copy"].median, times["kernel"].median),
        "bf16_flop_per_s": 2 * 8192**3 / times["product"].median,
    }


def contenders(work: Work, compile: bool) -> dict[str, Function]:
    """Every function to time, by name."""
    found = {OURS: work.ours, **work.peers}
    if backend.missing("cuda") is None:
        found[IN_CUDA] = work.ours
    if compile and EAGER in work.peers:
        torch._dynamo.reset()
        found[COMPILED] = torch.compile(work.peers[EAGER], dynamic=False)
    return found


def time_work(
    work: Work, ceiling: Mapping[str, float], compile: bool, rounds: int, say: Callable[[str], None]
) -> list[Row]:
    """Check a work and time all contenders on it, but those that refuse it."""
    check(work)
    torch.cuda.empty_cache()
    sets = [work.inputs()]
    bytes_of_set = sum(x.numel() * x.element_size() for x in sets[0])
    while len(sets) < MOST_SETS and len(sets) * bytes_of_set < CACHE:
        sets.append(work.inputs())
    graphs: dict[str, dict[str, Captured]] = {p: {} for p in work.passes}
    for name, function in contenders(work, compile).items():
        for pass_, calls_of in (("fwd", forward_calls), ("bwd", backward_calls)):
            if pass_ in work.passes:
                stream = torch.cuda.Stream()
                try:
                    with gptfast.use_backend("cuda" if name == IN_CUDA else "triton"):
                        calls = calls_of(work, function, sets, stream)
                        graphs[pass_][name] = captured(calls, stream)
                except RuntimeError as error:
                    if name == OURS:
                        raise
                    say(f"{work.op}, {work.shape}: {name}: {str(error).splitlines()[0]}")
    rows = []
    for pass_, of_pass in graphs.items():
        timings = replayed(of_pass, rounds)
        best = best_peer(timings)
        rows += [row(work, pass_, name, t, best, ceiling) for name, t in timings.items()]
    return rows


def best_peer(timings: Mapping[str, Timing]) -> float | None:
    """Seconds of the fastest that is not ours."""
    peers = [t.median for name, t in timings.items() if name not in (OURS, IN_CUDA)]
    return min(peers, default=None)


Calls = list[Callable[[], object]]


def forward_calls(
    work: Work, function: Function, sets: Sequence[Tensors], stream: torch.cuda.Stream
) -> Calls:
    """Calls of forward on each set."""
    calls: Calls = []
    for given in sets:
        leaves = leaves_of(given, work)
        calls.append(lambda leaves=leaves: function(*leaves))  # type: ignore[misc]
    return calls


def backward_calls(
    work: Work, function: Function, sets: Sequence[Tensors], stream: torch.cuda.Stream
) -> Calls:
    """Calls of backward alone; forward runs here, on the stream on which backward will run."""
    calls: Calls = []
    dys: list[torch.Tensor] = []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for given in sets:
            leaves = leaves_of(given, work)
            outputs = outputs_of(function, leaves, dys)
            own = [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)]
            wanted = [x for x in leaves if x.requires_grad]

            def backward(outputs: Any = outputs, wanted: Any = wanted, own: Any = own) -> object:
                return torch.autograd.grad(outputs, wanted, own, retain_graph=True)

            calls.append(backward)
    torch.cuda.current_stream().wait_stream(stream)
    return calls


def row(
    work: Work,
    pass_: str,
    contender: str,
    t: Timing,
    best_peer: float | None,
    ceiling: Mapping[str, float],
) -> Row:
    """A table row from a timing."""
    which = ("fwd", "bwd").index(pass_)
    moved, flops = work.bytes[which], work.flops[which]
    if flops:
        share = flops / t.median / ceiling["bf16_flop_per_s"]
    else:
        share = moved / t.median / ceiling["copy_bytes_per_s"]
    return Row(
        op=work.op,
        shape=work.shape,
        dtype="float32" if work.op == "adamw" else "bfloat16",
        pass_=pass_,
        contender=contender,
        median_us=t.median * 1e6,
        p20_us=t.p20 * 1e6,
        p80_us=t.p80 * 1e6,
        gb_per_s=moved / t.median / 1e9,
        tflop_per_s=flops / t.median / 1e12,
        percent_of_ceiling=100 * share,
        ratio_to_best_peer=float("nan") if best_peer is None else best_peer / t.median,
    )


def time_adamw(ceiling: Mapping[str, float], rounds: int, clip: bool) -> list[Row]:
    """A step for the parameters of GPT-2 124M in fp32; with `clip`, the gradients' norm is clipped.

    Raises:
        AssertionError: our step is not PyTorch's.
    """
    with torch.device("cuda"):
        sizes = [p.shape for p in GPT(GPTConfig.preset("gpt2")).parameters()]
    start = [torch.randn(size, device="cuda") for size in sizes]
    grads = [torch.randn(size, device="cuda") for size in sizes]
    max_norm = 1.0 if clip else None

    def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[list[Any], Callable[[], None]]:
        params = [torch.nn.Parameter(x.to(dtype, copy=True)) for x in start]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(dtype, copy=True)
        optimizer: Any
        if name in (OURS, IN_CUDA):
            optimizer = AdamW(params, lr=1e-4, max_norm=max_norm)
            return params, optimizer.step
        kind = {"torch fused": {"fused": True}, "torch foreach": {"foreach": True}}[name]
        optimizer = torch.optim.AdamW(params, lr=1e-4, capturable=True, **kind)  # type: ignore

        def step() -> None:
            if clip:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

        return params, step

    found = {}
    for name, dtype in ((OURS, torch.float32), ("torch fused", torch.float32)):
        params, step = make(name, dtype)
        step()
        found[name] = params
    exact, step = make("torch foreach", torch.float64)
    step()
    for i, p in enumerate(exact):
        ours, theirs = (found[name][i].detach() for name in (OURS, "torch fused"))
        assert_close_in_norm(f"adamw, parameter {i}", ours, theirs, p.detach())
    del found, exact, params, step
    torch.cuda.empty_cache()
    elements = sum(size.numel() for size in sizes)
    work = Work(
        "adamw",
        f"{elements:,} in {len(sizes)} tensors" + (", clipped" if clip else ""),
        lambda: (),
        AdamW,
        {},
        ((32.0 if clip else 28.0) * elements, 0.0),
    )
    stream = torch.cuda.Stream()
    graphs = {}
    in_cuda = (IN_CUDA,) if backend.missing("cuda") is None else ()
    for name in (OURS, *in_cuda, "torch fused", "torch foreach"):
        _, step = make(name)
        with gptfast.use_backend("cuda" if name == IN_CUDA else "triton"):
            graphs[name] = captured([step], stream)
    timings = replayed(graphs, rounds)
    best = best_peer(timings)
    return [row(work, "fwd", name, t, best, ceiling) for name, t in timings.items()]


# ---- Tables --------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What was measured on, and when."""
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "unknown",
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


def print_table(rows: Sequence[Row], console: Console) -> None:
    """The rows as a table for people."""
    table = Table("op", "shape", "pass", "contender")
    for column in ("us", "p20 to p80", "GB/s", "TFLOP/s", "% of ceiling", "x best peer"):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            r.op,
            r.shape,
            r.pass_,
            f"[bold]{r.contender}" if r.contender == OURS else r.contender,
            f"{r.median_us:.1f}",
            f"{r.p20_us:.1f} to {r.p80_us:.1f}",
            f"{r.gb_per_s:.0f}",
            f"{r.tflop_per_s:.0f}" if r.tflop_per_s else "",
            f"{r.percent_of_ceiling:.0f}",
            f"{r.ratio_to_best_peer:.2f}",
        )
    console.print(table)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table for a page: a line for each pass of a work, every contender in it."""
    lines = [
        "| op | shape | pass | gptfast, us | GB/s or TFLOP/s | % of ceiling | best peer, us | "
        "ratio | others, us |",
        "|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    works: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        works.setdefault((r.op, r.shape, r.pass_), []).append(r)
    for key, found in works.items():
        ours, *others = sorted(found, key=lambda r: (r.contender != OURS, r.median_us))
        peers = [r for r in others if r.contender != IN_CUDA]
        others.remove(peers[0])
        rate = f"{ours.tflop_per_s:.0f} TF" if ours.tflop_per_s else f"{ours.gb_per_s:,.0f}"
        ratio = f"{ours.ratio_to_best_peer:.2f}"
        lines.append(
            f"| {' | '.join(key)} | {ours.median_us:,.1f} | {rate} | {ours.percent_of_ceiling:.0f} "
            f"| {peers[0].median_us:,.1f} {peers[0].contender} "
            f"| {ratio if ours.ratio_to_best_peer >= 1 else f'**{ratio}**'} "
            f"| {', '.join(f'{r.median_us:,.1f} {r.contender}' for r in others)} |"
        )
    return "\n".join(lines) + "\n"


def main(
    json_file: Annotated[
        Path | None, tyro.conf.arg(name="json", help="Also write everything to this file.")
    ] = None,
    op: Annotated[str, tyro.conf.arg(help="Only ops whose name has this in it.")] = "",
    rounds: Annotated[int, tyro.conf.arg(help="Turns of each contender.")] = 21,
    compile: Annotated[bool, tyro.conf.arg(help="Whether torch.compile takes part.")] = True,
    show: Annotated[
        Path | None, tyro.conf.arg(help="Time nothing: print this file of --json as a table.")
    ] = None,
) -> None:
    """Time the ops on this machine's GPU."""
    if show is not None:
        print(markdown([Row(**r) for r in json.loads(show.read_text())["rows"]]), end="")
        return
    if not torch.cuda.is_available():
        raise SystemExit("gpu: there is no GPU that PyTorch can use")
    torch._functorch.config.donated_buffer = False  # backward runs more than once
    console = Console(width=150)
    torch.manual_seed(0)
    ceiling = ceilings()
    facts = machine() | {name: f"{value:.4g}" for name, value in ceiling.items()}
    console.print(facts)
    rows: list[Row] = []
    refused: dict[str, str] = {}

    def attempt(name: str, timed: Callable[[], list[Row]]) -> None:
        try:
            rows.extend(timed())
        except (AssertionError, RuntimeError) as error:
            refused[name] = f"{type(error).__name__}: {error}"
            console.print(f"not timed: {name}: {refused[name]}", markup=False)
        torch.cuda.empty_cache()
        if json_file is not None:  # after each: a run that is cut short leaves what it has
            content = {**facts, "refused": refused, "rows": [asdict(r) for r in rows]}
            json_file.write_text(json.dumps(content, indent=1) + "\n")

    with gptfast.use_backend("triton"):
        for work in works():
            if op in work.op:
                name = f"{work.op}, {work.shape}"
                timed = partial(time_work, work, ceiling, compile, rounds, console.print)
                attempt(name, timed)
        for clip in (False, True) if op in "adamw" else ():
            attempt("adamw", partial(time_adamw, ceiling, rounds, clip))
    print_table(rows, console)
    if refused:
        raise SystemExit(f"{len(refused)} works were not timed")


if __name__ == "__main__":
    tyro.cli(main)
