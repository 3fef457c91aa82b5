"""Models of others, patched and not: forward, a training step and generation, eager and compiled.

    python -m benchmarks.patched --json FILE --resume    # every family; or --only NAME
    python -m benchmarks.patched --show FILE             # the rows of FILE as a table in Markdown
    python -m benchmarks.patched --show FILE --into DOC  # the same, between two marks in DOC
    python -m benchmarks.patched --modules --json FILE   # what gptfast/patching/speed.py rests on

Contenders take turns, on the same weights in the same memory: where a copy happens to lie changes
the time of a model this small. Rows are written when a family is done, and `--resume` goes on
behind the last one. A family that fails is shown as failed, the others are timed all the same, and
the exit status is 1. Before anything is timed, logits, loss and gradients of the patched model are
held against the unpatched one's, both against fp64, in the mode that the model is made in and
uncompiled: no figure is given for a model that computes something else there. What `torch.compile`
makes of the two, and generated text, are not compared here; tests do that, on smaller models.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import nn

import gptfast
from benchmarks.documents import show_table
from benchmarks.plain_models import PLAIN, Sizes
from benchmarks.timing import Timing, interleave, paired_ratio, take_turns
from gptfast.patching import OPS, Report
from gptfast.testing import assert_close_in_norm, unit_roundoff

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Family:
    """A kind of model, small, with random weights, in fp32 on the CPU.

    Args:
        make: the model; the same weights at every call.
        batch: what `loss` takes.
        logits, loss: of a model, or of a compiled one, for a batch.
        losses: of each target, from the logits for a batch; `loss` is their mean.
        generate: as many new tokens as the family is timed with, greedily, or None.
        patch: patches a model; by default `gptfast.patch` alone.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    logits: Callable[[Any, Any], torch.Tensor]
    loss: Callable[[Any, Any], torch.Tensor]
    losses: Callable[[torch.Tensor, Any], torch.Tensor]
    generate: Callable[[Any, Any], torch.Tensor] | None
    patch: Callable[[nn.Module], Report] = gptfast.patch


# Two layers: to compile more of them takes longer, and does not run differently.
SIZES = Sizes(vocab_size=2048, block_size=128, n_layer=2, n_head=4, n_embd=256)
BATCH_SIZE = 8
NEW_TOKENS = 16


def loss_of_each(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In float64, so that what errors it has are those of the logits."""
    logits = logits.double().flatten(0, -2)
    return nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")


def plain_family(kind: Callable[[Sizes], nn.Module]) -> Family:
    """A family of `benchmarks/plain_models.py`."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return kind(SIZES)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (BATCH_SIZE, SIZES.block_size + 1)
        idx = torch.randint(SIZES.vocab_size, shape, generator=generator)
        return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()

    def generate(model: Any, batch: Any) -> torch.Tensor:
        idx = batch[0][:1, :32]
        for _ in range(NEW_TOKENS):  # without a cache, as the shortest scripts do it
            idx = torch.cat((idx, model(idx)[0][:, -1:].argmax(-1)), dim=1)
        return idx

    return Family(
        make,
        batch,
        logits=lambda model, batch: model(batch[0])[0],
        loss=lambda model, batch: model(*batch)[1],
        losses=lambda logits, batch: loss_of_each(logits, batch[1]),
        generate=generate,
    )


def huggingface_family(name: str) -> Family:
    """A family of `benchmarks/huggingface_models.py`, which loads transformers when it is used."""

    def make() -> nn.Module:
        from benchmarks.huggingface_models import new_model

        return new_model(name, SIZES)

    def batch() -> dict[str, torch.Tensor]:
        from benchmarks.huggingface_models import new_batch

        return new_batch(name, SIZES, B=BATCH_SIZE, padded=False)

    def logits(model: Any, batch: Any) -> torch.Tensor:
        return model(**{name: x for name, x in batch.items() if name != "labels"}).logits

    def losses(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        labels = batch["labels"]
        if name in ("bert", "vit"):
            return loss_of_each(logits, labels)
        return loss_of_each(logits[:, :-1], labels[:, 1:])  # the next token's

    def generate(model: Any, batch: Any) -> torch.Tensor:
        return model.generate(
            batch["input_ids"][:, :32],
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )

    return Family(
        make,
        batch,
        logits=logits,
        loss=lambda model, batch: model(**batch).loss,
        losses=losses,
        generate=None if name in ("bert", "vit") else generate,
    )


# Of `benchmarks.huggingface_models.CONFIGS`.
HUGGINGFACE = (
    *("gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"),
    *("phi", "phi3", "bert", "vit"),
)
FAMILIES: dict[str, Family] = {name: plain_family(kind) for name, kind in PLAIN.items()}
FAMILIES |= {f"transformers {name}": huggingface_family(name) for name in HUGGINGFACE}


@dataclass(frozen=True)
class Row:
    """A line of the table: seconds of the unpatched and of the patched model.

    `ratio` says how many times faster the patched model is: the median over the rounds, which lies
    from `low` to `high` with 95 % confidence; None where there were too few rounds to say so.
    A family that failed has no figures. forced: every op, also where it was measured to be slower.
    """

    family: str
    work: str
    dtype: str
    compiled: bool
    threads: int = field(default_factory=torch.get_num_threads)
    replaced: int = 0
    unpatched: float | None = None
    patched: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    torch_version: str = str(torch.__version__)
    failed: str = ""  # what went wrong
    forced: bool = False


def check(family: Family, model: nn.Module, patched: nn.Module) -> None:
    """Raise unless both models compute the same, within three times the unpatched one's error."""
    batch = family.batch()
    results = []
    for m in (patched, model, copy.deepcopy(model).double()):
        loss = family.loss(m, batch)
        parameters = {n: p for n, p in m.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        with torch.no_grad():
            logits = family.logits(m, batch)
        results.append([loss, logits, *gradients])
        names = ["logits", *(f"gradient of {name}" for name in parameters)]
    (loss, *ours), (_, *peers), (_, *exacts) = results
    for name, *values in zip(names, ours, peers, exacts, strict=True):
        there = [x is not None for x in values]
        assert len(set(there)) == 1, f"{name}: expected from all or none, got it from {there}"
        if all(there):
            assert_close_in_norm(name, *values)
    # One number may be exact by luck in the unpatched model. It is the mean of n losses, whose
    # errors e are not, and the rule of `assert_close_in_norm` for those bounds the mean as well:
    # |mean(e)| <= |e| / sqrt(n), the root mean square.
    losses, exact = family.losses(peers[0], batch), family.losses(exacts[0], batch)
    allowed = 3 * (losses - exact).norm() + 4 * unit_roundoff(loss.dtype) * exact.norm()
    allowed /= exact.numel() ** 0.5
    error = abs(loss.detach().double() - exact.mean())
    assert error <= allowed, f"loss: error {error:.3g}, allowed {allowed:.3g}"


def training_step(family: Family, model: nn.Module, forward: Any) -> Callable[[], object]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = family.batch()

    def step() -> None:
        family.loss(forward, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sharing(model: nn.Module) -> Any:
    """A copy with the model's own parameters and buffers."""
    memory = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memory)


def works_of(name: str, compiled: bool) -> list[str]:
    """What a family is timed with."""
    works = ["forward", "training step"]
    # `generate` of transformers calls the model itself, which `torch.compile` has not changed.
    if FAMILIES[name].generate is not None and not (compiled and name.startswith("transformers")):
        works.append("generation")
    return works


def without_grad(call: Callable[..., object], *args: Any) -> Callable[[], object]:
    """`call(*args)` as it is used in inference."""

    def run() -> None:
        with torch.no_grad():
            call(*args)

    return run


def works(name: str, model: nn.Module, compiled: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by name. Each has modules of its own, in its own mode."""
    family = FAMILIES[name]
    batch = family.batch()
    calls: dict[str, Callable[[], object]] = {}
    for work in works_of(name, compiled):
        own = sharing(model).train(work == "training step")
        dynamic = True if work == "generation" else None
        forward = torch.compile(own, dynamic=dynamic) if compiled else own
        if work == "forward":
            calls[work] = without_grad(family.logits, forward, batch)
        elif work == "training step":
            calls[work] = training_step(family, own, forward)
        else:
            assert family.generate is not None
            calls[work] = without_grad(family.generate, forward, batch)
    return calls


def run_family(
    name: str,
    dtype: str,
    compiled: bool,
    rounds: int,
    seconds: float,
    console: Console,
    force: bool = False,
) -> list[Row]:
    """Time one family, patched and not."""
    family = FAMILIES[name]
    model = family.make().to(DTYPES[dtype])
    patched = sharing(model)
    report = gptfast.patch(patched, ops=OPS) if force else family.patch(patched)
    check(family, model, patched)
    torch._dynamo.reset()
    contenders = {m: works(name, {"un": model, "": patched}[m], compiled) for m in ("un", "")}
    rows = []
    with Progress(console=console, transient=True) as bar:
        for work in contenders["un"]:
            task = bar.add_task(f"{name}, {work}", total=2 * rounds)
            times = take_turns(
                {f"{m}patched": calls[work] for m, calls in contenders.items()},
                rounds=rounds,
                warmup=3,
                seconds_per_turn=seconds,
                on_turn=lambda task=task: bar.advance(task),  # type: ignore[misc]
            )
            ratio = paired_ratio(times["unpatched"], times["patched"])
            rows.append(
                Row(
                    family=name,
                    work=work,
                    dtype=dtype,
                    compiled=compiled,
                    replaced=len(report.replaced),
                    unpatched=statistics.median(times["unpatched"]),
                    patched=statistics.median(times["patched"]),
                    ratio=ratio.median,
                    low=ratio.low,
                    high=ratio.high,
                    forced=force,
                )
            )
    return rows


def failed_family(
    name: str, dtype: str, compiled: bool, error: Exception, force: bool
) -> list[Row]:
    """The rows of a family that could not be timed."""
    return [
        Row(
            family=name,
            work=work,
            dtype=dtype,
            compiled=compiled,
            failed=f"{type(error).__name__}: {error}".splitlines()[0],
            forced=force,
        )
        for work in works_of(name, compiled)
    ]


# ---- Single modules ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleRow:
    """A module of one op on an input of so many elements: seconds, patched and not."""

    op: str
    work: str
    dtype: str
    compiled: bool
    elements: int
    unpatched: float
    patched: float

    @property
    def ratio(self) -> float:
        """How many times faster the patched module is."""
        return self.unpatched / self.patched


class Attention(nn.Module):
    """Self-attention of `nn.MultiheadAttention`, causal, heads of 64."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(C, C // 64, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        T = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(T, x.device, x.dtype)
        return self.attn(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


class Gated(nn.Module):
    """A SwiGLU MLP without its products, which are the same either way."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Loss(nn.Module):
    """`nn.CrossEntropyLoss` for the class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(x, torch.ones(x.shape[0], dtype=torch.int64))


class Head(nn.Module):
    """`nn.LinearCrossEntropyLoss` with 8192 classes, for the class 1."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.loss = nn.LinearCrossEntropyLoss(C, 8192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(x, torch.ones(x.shape[0], dtype=torch.int64))


# By op: the module for rows of C columns, and the shape of its input with M rows.
MODULES: dict[str, tuple[Callable[[int], nn.Module], Callable[[int, int], tuple[int, ...]]]] = {
    "layer_norm": (nn.LayerNorm, lambda M, C: (M, C)),
    "rms_norm": (nn.RMSNorm, lambda M, C: (M, C)),
    "gelu": (lambda C: nn.GELU(), lambda M, C: (M, C)),
    "gelu tanh": (lambda C: nn.GELU("tanh"), lambda M, C: (M, C)),
    "glu": (lambda C: Gated(), lambda M, C: (M, C)),
    "attention": (Attention, lambda M, C: (max(M // 128, 1), min(M, 128), C)),
    "cross_entropy": (lambda C: Loss(), lambda M, C: (M, C)),
    "linear_cross_entropy": (Head, lambda M, C: (M, C)),
}
COLUMNS = 256
ROWS = (1, 16, 64, 256, 1024, 4096)


def run_module(op: str, dtype: str, compiled: bool, rounds: int, seconds: float) -> list[ModuleRow]:
    """Time one op's module, forward alone and with backward, from one row to thousands."""
    make, shape = MODULES[op]
    rows = []
    for M in ROWS:
        torch.manual_seed(0)
        torch._dynamo.reset()
        unpatched = make(COLUMNS).to(DTYPES[dtype])
        patched = copy.deepcopy(unpatched)
        gptfast.patch(patched, ops=list(OPS))
        x = torch.randn(shape(M, COLUMNS)).to(DTYPES[dtype])
        calls: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "with backward": {}}
        for name, module in (("unpatched", unpatched), ("patched", patched)):
            forward = torch.compile(module) if compiled else module
            calls["forward"][name] = without_grad(forward, x)
            calls["with backward"][name] = forward_backward(forward, x)
        for work, contenders in calls.items():
            times: dict[str, Timing] = interleave(
                contenders, rounds=rounds, warmup=3, seconds_per_turn=seconds
            )
            figures = (times["unpatched"].median, times["patched"].median)
            rows.append(ModuleRow(op, work, dtype, compiled, x.numel(), *figures))
    return rows


def forward_backward(forward: Any, x: torch.Tensor) -> Callable[[], object]:
    """Forward, and the gradients of everything."""
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        dy = torch.randn_like(forward(x))

    def run() -> None:
        forward(leaf).backward(dy)

    return run


# ---- Tables --------------------------------------------------------------------------------------


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows of a file: a line for each family and work, eager beside compiled."""
    lines: dict[tuple[str, ...], dict[bool, Row]] = {}
    for given in rows:
        row = Row(**given)
        lines.setdefault((row.family, row.dtype, row.work), {})[row.compiled] = row
    table = [
        "| family | dtype | work | modules | eager, ms | patched, ms | ratio "
        "| compiled, ms | patched, ms | ratio |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (family, dtype, work), by_mode in lines.items():
        cells = [family, dtype, work, str(max(row.replaced for row in by_mode.values()))]
        for mode in (False, True):
            cells += _figures(by_mode.get(mode))
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def _figures(row: Row | None) -> list[str]:
    """Milliseconds of both models and their ratio."""
    if row is None or row.unpatched is None or row.patched is None or row.ratio is None:
        return ["" if row is None else "failed", "", ""]
    ratio = f"{row.ratio:.2f}"
    ratio = f"**{ratio}**" if float(ratio) < 0.97 else ratio
    if row.low is not None:
        ratio += f" ({row.low:.2f} to {row.high:.2f})"
    return [f"{1e3 * row.unpatched:.1f}", f"{1e3 * row.patched:.1f}", ratio]


def markdown_of_modules(rows: list[dict[str, Any]]) -> str:
    """The ratios of a file of modules: a line for each op and work, a column for each size."""
    lines: dict[tuple[str, ...], dict[int, float]] = {}
    for given in rows:
        row = ModuleRow(**given)
        mode = "compiled" if row.compiled else "eager"
        lines.setdefault((row.op, row.dtype, mode, row.work), {})[row.elements] = row.ratio
    sizes = sorted({size for line in lines.values() for size in line})
    head = " | ".join(f"{size:,}" for size in sizes)
    table = [
        f"| op | dtype | mode | work | {head} |",
        "|---|---|---|---" + "|--:" * len(sizes) + "|",
    ]
    for key, line in lines.items():
        ratios = (f"{line[size]:.2f}" if size in line else "" for size in sizes)
        table.append(f"| {' | '.join((*key, *ratios))} |")
    return "\n".join(table)


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, none if it is not there."""
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    return rows


def write(file: Path, rows: list[Any]) -> None:
    """Put rows into a JSON file, in place of those of the same work that are there.

    One that failed replaces no figures: a mishap would lose what took an hour.
    """
    fresh = [asdict(row) for row in rows]
    figures = {"unpatched", "patched", "ratio", "low", "high"}
    figures |= {"replaced", "threads", "torch_version", "failed"}

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(value for name, value in row.items() if name not in figures)

    kept = [asdict(Row(**row)) if "family" in row else row for row in read(file)]
    known = {key(row) for row in kept if row["unpatched"] is not None}
    fresh = [row for row in fresh if row["unpatched"] is not None or key(row) not in known]
    replaced = {key(row) for row in fresh}
    kept = [row for row in kept if key(row) not in replaced]
    lines = ",\n".join(json.dumps(row) for row in [*kept, *fresh])
    unfinished = file.with_name(f"{file.name}.tmp")
    unfinished.write_text(f"[\n{lines}\n]\n")
    os.replace(unfinished, file)  # whoever stops this finds the rows of before, or all


def main(
    only: Annotated[
        str | None, tyro.conf.arg(help="Only families (or ops) with this in their names.")
    ] = None,
    dtype: Annotated[
        str, tyro.conf.arg(help="float32, bfloat16, or both: of the weights, too.")
    ] = "both",
    compile: Annotated[
        str, tyro.conf.arg(help="no, yes, or both: whether torch.compile is timed.")
    ] = "both",
    modules: Annotated[
        bool, tyro.conf.arg(help="Single modules of each op instead of whole models.")
    ] = False,
    force: Annotated[
        bool, tyro.conf.arg(help="Every op, also where it was measured to be slower.")
    ] = False,
    json_file: Annotated[
        Path | None, tyro.conf.arg(name="json", help="Also put the rows into this file.")
    ] = None,
    show: Annotated[
        Path | None, tyro.conf.arg(help="Print the rows of a file in Markdown, and time nothing.")
    ] = None,
    resume: Annotated[
        bool, tyro.conf.arg(help="Leave out what the file of --json has all rows of.")
    ] = False,
    into: Annotated[
        Path | None,
        tyro.conf.arg(help="Put what --show prints between the marks of the file in this one."),
    ] = None,
    rounds: Annotated[int, tyro.conf.arg(help="Turns each contender gets.")] = 31,
    seconds: Annotated[float, tyro.conf.arg(help="How long a turn is.")] = 0.05,
) -> None:
    """Time models of others with and without `gptfast.patch`."""
    console = Console()
    to_markdown = markdown_of_modules if modules else markdown
    if show is not None:
        show_table(to_markdown(json.loads(show.read_text())), show.name, into)
        return
    dtypes = tuple(DTYPES) if dtype == "both" else (dtype,)
    if not set(dtypes) <= set(DTYPES):
        raise SystemExit(f"--dtype must be one of {', '.join(DTYPES)} or both, got {dtype!r}")
    modes = {"no": (False,), "yes": (True,), "both": (False, True)}.get(compile)
    if modes is None:
        raise SystemExit(f"--compile must be no, yes or both, got {compile!r}")
    known = [name for name in (MODULES if modules else FAMILIES) if only is None or only in name]
    if not known:
        raise SystemExit(f"--only: nothing has {only!r} in its name")
    if resume and (json_file is None or modules):
        raise SystemExit("--resume: expected --json FILE, and no --modules")
    there = [Row(**row) for row in read(json_file)] if resume and json_file else []
    here = (str(torch.__version__), torch.get_num_threads())
    for version, threads in {(row.torch_version, row.threads) for row in there} - {here}:
        raise SystemExit(
            f"--resume: expected rows of torch {here[0]} and {here[1]} threads in {json_file}, "
            f"got some of torch {version} and {threads}"
        )
    finished = (row for row in there if row.low is not None and row.forced == force)
    done = {(row.family, row.work, row.dtype, row.compiled) for row in finished}
    rows: list[Any] = []
    start = time.monotonic()
    for compiled, kind, name in itertools.product(modes, dtypes, known):
        if modules:
            fresh: list[Any] = list(run_module(name, kind, compiled, rounds, seconds))
        elif {(name, work, kind, compiled) for work in works_of(name, compiled)} <= done:
            continue
        else:
            try:
                fresh = list(run_family(name, kind, compiled, rounds, seconds, console, force))
            except Exception as error:  # the other families are timed all the same
                fresh = list(failed_family(name, kind, compiled, error, force))
        rows += fresh
        if json_file is not None:
            write(json_file, fresh)
        mode = "compiled" if compiled else "eager"
        if not modules and fresh[0].failed:
            results = [f"failed, {fresh[0].failed}"]
        else:
            results = [f"{row.work} {row.ratio:.2f}" for row in fresh]
        console.print(
            f"{time.monotonic() - start:5.0f} s  {name}, {kind}, {mode}: {', '.join(results)}",
            markup=False,
            highlight=False,
        )
    print(to_markdown([asdict(row) for row in rows]))
    if any(getattr(row, "failed", "") for row in rows):
        raise SystemExit("Some families failed: no figure is given for them.")


if __name__ == "__main__":
    tyro.cli(main)
