"""Kernel launches in a training step of GPT-2, with no GPU: `python -m benchmarks.launches`.

A narrow GPT with the twelve layers of GPT-2 124M takes a step in fp32 (forward, backward, AdamW on
clipped gradients) on CPU tensors, and every launch that it would make on a GPU is counted:

- ours: the launches of Triton kernels, which are counted in place of being run, and PyTorch's own
  ops, of which each one that neither makes a view nor only allocates is a launch. The fused loss,
  which stores no logits, takes three more for every 2^25 of them after the first: GPT-2's on
  8 x 1024 tokens are 13 such chunks;
- stock PyTorch: its ops likewise, with the kernels of `KERNELS` where one op is several. An op that
  is not listed there counts as one, which favours PyTorch (its embedding's backward, for one, is
  often more). Its foreach and fused optimizers are counted by the rule of
  aten/src/ATen/native/cuda/MultiTensorApply.cuh on the sizes of the real GPT-2: a launch takes so
  many tensors and so many blocks of 65536 elements, more of them in builds for CUDA 13;
- torch.compile: the kernels and library calls in the code that Inductor writes. Without a GPU
  that is its code for CPUs, in which one kernel may hold several loops: it stands in, and favours
  Inductor. The optimizer stays outside, as is usual.

Copies from host to device are not launches; our step makes one when the learning rate or a
gradient's address changes.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # kernels are counted on CPU tensors; before triton's import

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import triton
import tyro
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import gptfast
from benchmarks.stock_gpt import StockGPT
from gptfast.models import GPT, GPTConfig
from gptfast.ops import library
from gptfast.optim import AdamW

GPT2 = GPTConfig.preset("gpt2")
NARROW = GPTConfig(block_size=32, vocab_size=64, n_layer=GPT2.n_layer, n_head=2, n_embd=32)
OURS, OURS_FUSED = "gptfast", "gptfast, fused loss"
EAGER, FUSED, COMPILED = "eager", "eager, fused AdamW", "torch.compile"

CHECKS = (
    (GPT, "_check"),
    (sys.modules["gptfast.ops.embedding"], "check_tokens"),
    (sys.modules["gptfast.ops.cross_entropy"], "check_targets"),
    (sys.modules["gptfast.ops.linear_cross_entropy"], "check_targets"),
)

# Kernels of one op, where they are more than one: dx, and dw with db, in layer_norm_kernel.cu; the
# product do o, its sums, and dq with dk and dv, in attention_backward.cu (efficient attention, what
# fp32 gets; flash attention takes three as well).
KERNELS = {
    "native_layer_norm_backward": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
}
# Allocations, and views that do not say so in their schema.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"),
    *("_unsafe_view", "_reshape_alias", "lift_fresh", "detach"),
}


@dataclass(frozen=True)
class Limits:
    """What one launch of MultiTensorApply.cuh takes, by the number of lists of tensors (from 1)."""

    tensors: tuple[int, ...]
    tensors_with_scalars: tuple[int, ...]
    blocks: int


CUDA_12 = Limits((110, 64, 48, 36, 30), (96, 64, 48, 36, 30), 320)
CUDA_13 = Limits((770, 448, 336, 252, 210), (672, 448, 336, 252, 210), 2240)
BLOCK = 65536


def multi_tensor_launches(sizes: Sequence[int], max_tensors: int, max_blocks: int) -> int:
    """How often MultiTensorApply.cuh launches for tensors of these sizes."""
    launches = tensors = blocks = 0
    for size in sizes:
        tensors += size > 0
        chunks = -(-size // BLOCK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == max_tensors and last) or blocks == max_blocks:
                launches, blocks = launches + 1, 0
                tensors = 0 if last else 1
    return launches + (blocks > 0)


def foreach_launches(func: Any, args: Sequence[Any], sizes: Sequence[int], limits: Limits) -> int:
    """Launches of a foreach or fused op, had its tensors the given sizes."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and torch.is_tensor(a[0])]
    if len(lists[0]) != len(sizes):
        raise ValueError(f"{func}: expected {len(sizes)} tensors, got {len(lists[0])}")
    name = func._schema.name.removeprefix("aten::")
    if lists[0][0].dim() == 0:  # the steps: AdamW keeps them on the host unless it is fused
        sizes = [1] * len(sizes) if func._overloadname == "Scalar" else []
    if name.startswith("_fused_adamw"):  # params, grads, exp_avgs, exp_avg_sqs; steps ride along
        return multi_tensor_launches(sizes, limits.tensors[3], limits.blocks)
    if name == "_foreach_norm":  # ForeachReduceOp.cu: a second kernel adds up a tensor's blocks
        return 1 + multi_tensor_launches(sizes, limits.tensors[0], limits.blocks)
    depth = len(lists) + (not name.endswith("_"))  # and a list of results
    scalars = func._overloadname == "ScalarList"
    tensors = (limits.tensors_with_scalars if scalars else limits.tensors)[depth - 1]
    return multi_tensor_launches(sizes, tensors, limits.blocks)


class CountLaunches(TorchDispatchMode):
    """Collects in `launches` how often each op of PyTorch would launch a kernel."""

    def __init__(self, sizes: Sequence[int], limits: Limits) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.sizes, self.limits = sizes, limits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(("_foreach", "_fused")):
            self.launches[name] += foreach_launches(func, args, self.sizes, self.limits)
        elif not self._is_free(func, name, output):
            self.launches[name] += KERNELS.get(name, 1)
        return output

    @staticmethod
    def _is_free(func: Any, name: str, output: Any) -> bool:
        aliases = [r.alias_info for r in func._schema.returns]
        if name in FREE or any(a is not None and not a.is_write for a in aliases):
            return True
        results = output if isinstance(output, (list, tuple)) else [output]
        tensors = [t for t in results if isinstance(t, torch.Tensor)]
        return all(t.numel() == 0 for t in tensors)


@contextlib.contextmanager
def triton_launches() -> Iterator[Counter[str]]:
    """Count the launches of Triton kernels instead of making them."""
    launches: Counter[str] = Counter()

    def count(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            launches[kernel.fn.__name__] += 1

        return launch

    with mock.patch.object(triton.runtime.jit.KernelInterface, "__getitem__", count):
        yield launches


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Ops of ours on the triton backend, without what they do for CPU tensors only."""

    def nothing(*args: Any) -> None:
        """Instead of a look at every token, which a GPU is spared."""

    with contextlib.ExitStack() as stack:
        for owner, name in CHECKS:
            stack.enter_context(mock.patch.object(owner, name, nothing))
        # Straight to the implementations, so that the ops that they call are seen.
        stack.enter_context(mock.patch.object(library, "plain_eager", return_value=True))
        stack.enter_context(gptfast.use_backend("triton"))
        yield


@dataclass(frozen=True)
class Row:
    """Launches of one contender."""

    contender: str
    forward: int
    backward: int
    clipping: int
    optimizer: int
    total: int
    ops: dict[str, int]  # by op or kernel


def count_step(
    contender: str,
    model: Callable[..., Any],
    clip: Callable[[], object],
    step: Callable[[], object],
    sizes: Sequence[int],
    limits: Limits,
) -> Row:
    """The launches of forward, backward, clipping and optimizer, in that order."""
    x, y = torch.randint(NARROW.vocab_size, (2, 1, NARROW.block_size))
    outputs: list[torch.Tensor] = []
    parts = (lambda: outputs.append(model(x, y)[1]), lambda: outputs[0].backward(), clip, step)
    counts, ops = [], Counter[str]()
    for part in parts:
        with triton_launches() as ours, CountLaunches(sizes, limits) as theirs:
            part()
        ops += ours + theirs.launches
        counts.append(ours.total() + theirs.launches.total())
    forward, backward, clipping, optimizer = counts
    total = sum(counts)
    ops_of = dict(ops.most_common())
    return Row(contender, forward, backward, clipping, optimizer, total, ops_of)


def count_ours(sizes: Sequence[int], limits: Limits, fused: bool) -> Row:
    """gptfast on the triton backend, where clipping is part of the optimizer's step."""
    model = GPT(NARROW, fused_loss=fused)
    forward = partial(model, loss_only=True)
    optimizer = AdamW(model.parameters(), max_norm=1.0)
    warm(model, optimizer)
    with as_on_a_gpu():
        contender = OURS_FUSED if fused else OURS
        return count_step(contender, forward, lambda: None, optimizer.step, sizes, limits)


def count_eager(sizes: Sequence[int], limits: Limits, fused: bool) -> Row:
    """Stock PyTorch."""
    model = StockGPT(NARROW)
    kind = {"fused": True} if fused else {"foreach": True}  # foreach is the default on a GPU
    optimizer = torch.optim.AdamW(model.parameters(), **kind)  # type: ignore[arg-type]
    warm(model, optimizer)

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)

    return count_step(FUSED if fused else EAGER, model, clip, optimizer.step, sizes, limits)


def warm(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its state, and drop the gradients."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def count_compiled(eager: Row) -> Row:
    """Kernels and library calls in Inductor's code of both passes; the rest as in eager."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []

    def no_kernel(*args: Any, **kwargs: Any) -> Callable[..., None]:
        return lambda *arguments: None

    model = StockGPT(NARROW)
    x, y = torch.randint(NARROW.vocab_size, (2, 1, NARROW.block_size))
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(force_disable_caches=True, cpp_wrapper=False),
        mock.patch.object(GraphLowering, "save_output_code", codes.append),
        mock.patch.object(AsyncCompile, "cpp_pybinding", no_kernel),  # nothing is run
    ):
        torch.compile(model)(x, y)[1].backward()
    ops = Counter(op for code in codes for op in calls_in(code))
    forward, backward = (sum(calls_in(code).values()) for code in codes)
    total = forward + backward + eager.clipping + eager.optimizer
    return Row(
        COMPILED, forward, backward, eager.clipping, eager.optimizer, total, dict(ops.most_common())
    )


def calls_in(code: str) -> Counter[str]:
    """The kernels and library functions that a module written by Inductor calls, and how often."""
    body = code[re.search(r"^ *def call\(", code, re.MULTILINE).start() :]  # type: ignore[union-attr]
    pattern = r"\b(cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.aten\.\w+)(?:\.\w+)?\("
    found = Counter(re.findall(pattern, body))
    for name in found:
        found[name] *= KERNELS.get(name.removeprefix("torch.ops.aten."), 1)
    return found


def count_all(compiled: bool = True, limits: Limits = CUDA_13) -> list[Row]:
    """Every contender's launches."""
    with torch.device("meta"):
        sizes = [p.numel() for p in GPT(GPT2).parameters()]
    eager = count_eager(sizes, limits, fused=False)
    ours = [count_ours(sizes, limits, fused) for fused in (False, True)]
    rows = [*ours, eager, count_eager(sizes, limits, fused=True)]
    return [*rows, count_compiled(eager)] if compiled else rows


def main(
    json_file: Annotated[
        Path | None, tyro.conf.arg(name="json", help="Also write the rows to this file.")
    ] = None,
    compile: Annotated[bool, tyro.conf.arg(help="Whether torch.compile takes part.")] = True,
    cuda: Annotated[
        int, tyro.conf.arg(help="12 or 13: the build of PyTorch whose foreach ops are counted.")
    ] = 13,
    ops: Annotated[bool, tyro.conf.arg(help="List the launches of every op.")] = False,
) -> None:
    """Count the kernel launches of one training step of GPT-2, ours and others'."""
    if cuda not in (12, 13):
        raise SystemExit(f"--cuda must be 12 or 13, got {cuda}")
    rows = count_all(compile, CUDA_13 if cuda == 13 else CUDA_12)
    table = Table(title=f"Kernel launches in a step of GPT-2, 12 layers; torch {torch.__version__}")
    table.add_column("contender")
    for column in ("forward", "backward", "clipping", "AdamW", "total", "to eager"):
        table.add_column(column, justify="right")
    eager = next(row for row in rows if row.contender == EAGER)
    for r in rows:
        counts = (r.forward, r.backward, r.clipping, r.optimizer, r.total)
        table.add_row(r.contender, *map(str, counts), f"{r.total / eager.total:.2f}")
    console = Console()
    console.print(table)
    if ops:
        for r in rows:
            console.print(r.contender, r.ops)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
