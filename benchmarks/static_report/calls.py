"""The calls of registered ops that a case makes, with real arguments."""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

import gptfast
from gptfast import backend
from gptfast.optim import AdamW
from gptfast.testing import OPS, Case, record_calls
from gptfast.testing.case import VALUES

# Not an import: gptfast.ops has a function of this name.
LINEAR_CROSS_ENTROPY = sys.modules["gptfast.ops.linear_cross_entropy"]


class RefusedError(RuntimeError):
    """The triton backend does not run a call."""


class Call(NamedTuple):
    """One call of a registered op, `layer_norm_bwd` for example."""

    name: str
    op: Any
    args: tuple[Any, ...]
    reads: tuple[torch.Tensor, ...]
    writes: tuple[torch.Tensor, ...]  # results, and arguments that are written to

    def run(self) -> Any:
        """Call it on the triton backend.

        Raises:
            RefusedError: the op has no Triton kernel, or it cannot run this call.
        """
        with gptfast.use_backend("triton"), torch.no_grad():
            try:
                return self.op(*self.args)
            except RuntimeError as error:
                if "backend 'triton' is forced" in str(error):
                    raise RefusedError(str(error)) from None
                raise


@contextlib.contextmanager
def triton_takes_cpu_tensors() -> Iterator[None]:
    """Let the triton backend accept tensors on the CPU, as it does in the interpreter."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(backend, "interpreting", return_value=True))
        for op in backend.OPS.values():  # each remembers which backends take what
            patches.enter_context(mock.patch.object(op, "_candidates", {}))
        yield


def registered_calls(case: Case, dtype: torch.dtype) -> list[Call]:
    """Forward and backward of a case on the torch backend, as calls of registered ops."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    if case.op == "adamw":
        return [_adamw_call(case, dtype, generator)]
    row = OPS[case.op]

    def draw(shape: tuple[int, ...], values: str = "normal") -> torch.Tensor:
        return VALUES[values](torch.randn(shape, generator=generator), dtype)

    inputs = dict(row.inputs(case, dtype, draw))
    for name in row.gradients:
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    # As on a GPU, where no gradients are made in forward.
    as_on_a_gpu = mock.patch.object(LINEAR_CROSS_ENTROPY, "_in_chunks", return_value=False)
    with gptfast.use_backend("torch"), as_on_a_gpu, record_calls() as recorded:
        outputs = row.call(inputs, case.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if row.gradients:
            dys = [draw(y.shape).to(y.dtype) for y in outputs]
            torch.autograd.backward(outputs, dys)
    return [_call(c.op, c.args, c.output) for c in recorded.calls]


# A vector and matrices, the largest of which are several chunks; `adamw` has no row of its own in
# `gptfast.testing`, where rows are about tensors that an op returns.
ADAMW_REPORTS = (
    Case("adamw", (768, 3072), options={"max_norm": 1.0}),
    Case("adamw", (768, 3072), options={"max_norm": 1.0, "master_weights": True}),
)


def _adamw_call(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Call:
    """A step of `gptfast.optim.AdamW`, its second, on a Linear layer."""
    rows, columns = case.shape
    params = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((columns, rows), (columns,))
    ]
    optimizer = AdamW(params, **case.options)
    with gptfast.use_backend("torch"):
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            with record_calls() as recorded:
                optimizer.step()
    (call,) = recorded.calls
    return _call(call.op, call.args, call.output)


def reports_of(op: str) -> tuple[Case, ...]:
    """The cases that are reported on."""
    return ADAMW_REPORTS if op == "adamw" else OPS[op].reports


def _call(op: Any, args: tuple[Any, ...], output: Any) -> Call:
    arguments = op._schema.arguments
    written = [
        a
        for a, argument in zip(args, arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    name = op.name().split("::")[1]
    return Call(name, op, args, tuple(_tensors(args)), tuple(_tensors([output, written])))


def _tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in nested lists and tuples, each memory once."""
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    if not isinstance(value, (list, tuple)):
        return []
    found = {t.data_ptr(): t for part in value for t in _tensors(part)}
    return list(found.values())
