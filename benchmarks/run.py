"""Tokens per second of a whole GPT, training and generating, on gptfast and on stock PyTorch.

Every contender gets the same weights and the same text, all in one process and in turns. Before
anything is timed, gptfast's loss and gradients are held against stock PyTorch's: no figure is given
for a model that computes something else.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python benchmarks/run.py`

import gptfast
from benchmarks.stock_gpt import StockGPT
from benchmarks.timing import COMPILED, EAGER, OURS, Timing, interleave
from gptfast.data import Dataset, read_text
from gptfast.generate import generate
from gptfast.integrations.huggingface import save_gpt2
from gptfast.models import GPT, GPTConfig
from gptfast.nn import quantize

OURS_COMPILED = "gptfast, compiled"  # on a GPU, where launches from Python cost as much as kernels
QUANTIZED = {"gptfast int8": "int8", "gptfast int4": "int4"}  # generating on a CPU
TRANSFORMERS = "transformers"  # generating on a CPU, where it is installed
PEERS = (EAGER, COMPILED, TRANSFORMERS)


@dataclass(frozen=True)
class Work:
    """One thing to time: a model, and a batch to train on or tokens to generate."""

    name: str
    config: GPTConfig
    tokenizer: str
    batch_size: int
    new_tokens: int = 0  # 0: a training step (forward, backward, AdamW)
    quick: bool = True


CHAR = GPTConfig(block_size=64, vocab_size=67, n_layer=4, n_head=4, n_embd=128, bias=False)
LECTURE = GPTConfig.preset("shakespeare-char", vocab_size=67)
SMALL = GPTConfig.preset("gpt2", block_size=256)
WORKS = [
    Work("train, 0.8M char model, B=12 T=64", CHAR, "char", 12),
    Work("generate, 0.8M char model, B=1", CHAR, "char", 1, new_tokens=48),
    Work("train, 10.7M char model, B=32 T=256", LECTURE, "char", 32, quick=False),
    Work("train, GPT-2 124M, B=4 T=256", SMALL, "gpt2", 4, quick=False),
    Work("generate, GPT-2 124M, B=1", SMALL, "gpt2", 1, new_tokens=32, quick=False),
]
FULL = GPTConfig.preset("gpt2")
GPU_WORKS = [
    Work("train, GPT-2 124M, B=16 T=1024", FULL, "gpt2", 16),
    Work("generate, GPT-2 124M, B=1", FULL, "gpt2", 1, new_tokens=64, quick=False),
]


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    work: str
    contender: str
    device: str
    dtype: str
    threads: int
    tok_per_s: float
    ratio_to_best_peer: float
    tok_per_s_p20: float
    tok_per_s_p80: float


def train_step(
    forward: Callable[..., Any],
    model: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    bf16: bool,
) -> Callable[[], None]:
    """A closure that takes one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = forward(x, y)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        finish(x.device)

    return step


def generation(
    forward: Callable[..., Any], model: Any, prompt: torch.Tensor, new_tokens: int, bf16: bool
) -> Callable[[], None]:
    """A closure that generates greedily with a cache of keys and values."""
    model.eval()
    cache = model.new_cache(prompt.shape[0])

    @torch.inference_mode()
    def run() -> None:
        cache.reset()
        idx = prompt
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=bf16):
            for _ in range(new_tokens):
                idx = forward(idx, cache=cache)[0][:, -1].argmax(-1, keepdim=True)
        finish(idx.device)

    return run


def our_generation(
    model: GPT, prompt: torch.Tensor, new_tokens: int, bf16: bool
) -> Callable[[], None]:
    """The same through `gptfast.generate`."""

    def run() -> None:
        with torch.autocast(prompt.device.type, torch.bfloat16, enabled=bf16):
            generate(model, prompt, new_tokens, temperature=0)

    return run


def their_generation(
    model: GPT, prompt: torch.Tensor, new_tokens: int, bf16: bool
) -> Callable[[], None]:
    """The same weights through transformers' `generate`."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        theirs = AutoModelForCausalLM.from_pretrained(save_gpt2(model, f"{folder}/gpt2"))
    mask = torch.ones_like(prompt)

    def run() -> None:
        with torch.autocast(prompt.device.type, torch.bfloat16, enabled=bf16):
            theirs.generate(
                prompt,
                attention_mask=mask,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )

    return run


@torch.inference_mode()
def check_tokens(ours: GPT, stock: StockGPT, prompt: torch.Tensor, new_tokens: int) -> None:
    """Raise unless both models generate the same tokens in fp32."""
    got = generate(ours, prompt, new_tokens, temperature=0)
    cache, idx, expected = stock.eval().new_cache(prompt.shape[0]), prompt, [prompt]
    for _ in range(new_tokens):
        idx = stock(idx, cache=cache)[0][:, -1].argmax(-1, keepdim=True)
        expected.append(idx)
    if not torch.equal(got, torch.cat(expected, 1)):
        raise SystemExit("not timed: gptfast generates other tokens than stock PyTorch")


def finish(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_equal(ours: GPT, stock: StockGPT, x: torch.Tensor, y: torch.Tensor) -> None:
    """Raise unless both models give the same loss and gradients in fp32, without dropout."""
    losses: list[float] = []
    gradients: list[dict[str, Any]] = []
    for model in (ours, stock):
        model.eval().zero_grad()
        # Scores and all in fp32: some GPU kernels round them to less.
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(x, y)[1]
            loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    # fp32 sums over up to V = 50257 logits and 3072 channels in another order: 2^-24 sqrt(50257) is
    # 1.3e-5 of the largest entry, and a dozen layers add up.
    bound = 2e-4
    if abs(losses[0] - losses[1]) > bound * abs(losses[1]):
        raise SystemExit(f"not timed: gptfast's loss is {losses[0]}, stock PyTorch's {losses[1]}")
    for name, expected in gradients[1].items():
        error = (gradients[0][name] - expected).abs().max() / expected.abs().max()
        if not error < bound:
            raise SystemExit(f"not timed: gptfast's gradient of {name} is off by {error:.1e}")


def run_work(
    work: Work,
    contenders: list[str],
    device: str,
    bf16: bool,
    rounds: int,
    seconds: float,
    console: Console,
) -> list[Row]:
    """Time one work on all contenders."""
    data = Dataset.in_memory(read_text(), work.tokenizer)  # type: ignore[arg-type]
    config = work.config
    torch.manual_seed(0)
    weights = GPT(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    batch = data.batch("train", work.batch_size, config.block_size, generator)
    x, y = (tokens.to(device) for tokens in batch)

    models: dict[str, Any] = {}
    generating = work.new_tokens > 0 and device == "cpu"
    if generating:
        contenders = [*contenders, *QUANTIZED]
        if importlib.util.find_spec("transformers"):
            contenders.append(TRANSFORMERS)
    for name in contenders:
        is_ours = name in (OURS, OURS_COMPILED, TRANSFORMERS, *QUANTIZED)
        models[name] = (GPT(config) if is_ours else StockGPT(config)).to(device)
        models[name].load_state_dict(weights)
        if name in QUANTIZED:
            quantize(models[name], QUANTIZED[name])
    stock = StockGPT(config).to(device)
    stock.load_state_dict(weights)
    check_equal(models[OURS], stock, x[:2], y[:2])  # scores in fp32, as many as a GPU has room for
    if generating:
        check_tokens(models[OURS], stock, x[:, :8], work.new_tokens)
    del stock

    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        forward = model
        if name in (COMPILED, OURS_COMPILED):
            forward = torch.compile(model, dynamic=True if work.new_tokens else None)
        if generating and name in (OURS, *QUANTIZED):
            calls[name] = our_generation(model, x[:, :8], work.new_tokens, bf16)
        elif name == TRANSFORMERS:
            calls[name] = their_generation(model, x[:, :8], work.new_tokens, bf16)
        elif work.new_tokens:
            calls[name] = generation(forward, model, x[:, :8], work.new_tokens, bf16)
        else:
            calls[name] = train_step(forward, model, x, y, bf16)
    tokens = work.batch_size * (work.new_tokens or config.block_size)
    with Progress(
        *Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task(work.name, total=rounds * len(calls))
        timings = interleave(
            calls,
            rounds=rounds,
            warmup=2,
            seconds_per_turn=seconds,
            on_turn=lambda: bar.advance(task),
        )
    peers = [t.median for name, t in timings.items() if name in PEERS]
    best_peer = min(peers, default=None)
    return [row(work, name, device, t, best_peer, tokens, bf16) for name, t in timings.items()]


def row(
    work: Work,
    contender: str,
    device: str,
    t: Timing,
    best_peer: float | None,
    tokens: int,
    bf16: bool,
) -> Row:
    """A table row from a timing."""
    return Row(
        work=work.name,
        contender=contender,
        device=device_name(device),
        dtype=QUANTIZED.get(contender, "bfloat16" if bf16 else "float32"),
        threads=torch.get_num_threads(),
        tok_per_s=tokens / t.median,
        ratio_to_best_peer=float("nan") if best_peer is None else best_peer / t.median,
        tok_per_s_p20=tokens / t.p80,
        tok_per_s_p80=tokens / t.p20,
    )


def device_name(device: str) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def print_table(rows: list[Row], console: Console) -> None:
    """The rows as a table for people."""
    where = f"{rows[0].threads} threads" if rows[0].device == "cpu" else rows[0].device
    table = Table(title=f"Tokens per second, torch {torch.__version__}, {where}")
    for column in ("work", "contender", "dtype"):
        table.add_column(column)
    for column in ("tok/s", "p20 to p80", "ratio to best peer"):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            r.work,
            f"[bold]{r.contender}" if r.contender.startswith(OURS) else r.contender,
            r.dtype,
            f"{r.tok_per_s:,.0f}",
            f"{r.tok_per_s_p20:,.0f} to {r.tok_per_s_p80:,.0f}",
            f"{r.ratio_to_best_peer:.2f}",
        )
    console.print(table)


def main(
    quick: Annotated[
        bool, tyro.conf.arg(help="The small model only, in under two minutes.")
    ] = False,
    only: Annotated[
        str | None, tyro.conf.arg(help="Only works with this in their names, such as generate.")
    ] = None,
    json_file: Annotated[
        Path | None, tyro.conf.arg(name="json", help="Also write the rows to this file.")
    ] = None,
    device: Annotated[str, tyro.conf.arg(help="cpu, or cuda: GPT-2 124M on the GPU.")] = "cpu",
    dtype: Annotated[
        str, tyro.conf.arg(help="float32, or bfloat16 for autocast in every contender.")
    ] = "float32",
    threads: Annotated[
        int | None, tyro.conf.arg(help="Threads for every contender; default: PyTorch's choice.")
    ] = None,
    keep_memory: Annotated[
        bool,
        tyro.conf.arg(help="Call gptfast.keep_freed_memory() first, for every contender."),
    ] = False,
    compile: Annotated[bool, tyro.conf.arg(help="Whether torch.compile takes part.")] = True,
    seconds_per_turn: Annotated[
        float, tyro.conf.arg(help="How long a contender is timed before the next one's turn.")
    ] = 0.5,
) -> None:
    """Compare tokens per second of gptfast with stock PyTorch, eager and compiled."""
    console = Console()
    if dtype not in ("float32", "bfloat16"):
        raise SystemExit(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    if device not in ("cpu", "cuda"):
        raise SystemExit(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no GPU that PyTorch can use")
    if threads is not None and threads < 1:
        raise SystemExit(f"--threads must be at least 1, got {threads}")
    if json_file is not None and not json_file.parent.is_dir():
        raise SystemExit(f"--json: there is no folder {json_file.parent}")
    if keep_memory and not gptfast.keep_freed_memory():
        raise SystemExit("--keep-memory: this platform's allocator is not glibc's")
    if threads is not None:
        torch.set_num_threads(threads)
    works = [w for w in (WORKS if device == "cpu" else GPU_WORKS) if w.quick or not quick]
    works = [w for w in works if only is None or only in w.name]
    if not works:
        raise SystemExit(f"--only: no work has {only!r} in its name")
    contenders = [OURS, EAGER]
    if compile:
        contenders += [COMPILED] if device == "cpu" else [OURS_COMPILED, COMPILED]
    bf16, rounds = dtype == "bfloat16", 7 if quick else 11
    rows: list[Row] = []
    for work in works:
        rows += run_work(work, contenders, device, bf16, rounds, seconds_per_turn, console)
    print_table(rows, console)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
        console.print(f"rows written to {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
