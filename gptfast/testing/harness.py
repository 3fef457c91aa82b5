"""Runs of the cases: problems with their exact results, verdicts, checks of the registration."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gptfast
from gptfast import backend as backends
from gptfast.testing.case import VALUES, Case, Inputs, Options
from gptfast.testing.judge import assert_close, rounding_bound
from gptfast.testing.memory import all_bytes, lay_out, poison_empty
from gptfast.testing.rows import OPS


@dataclass(frozen=True)
class Problem:
    """A case in one dtype: its inputs, its incoming gradients, and what is right.

    dys are by name of the result; exact, peer and bounds also by name of the input that gets a
    gradient.
    """

    case: Case
    dtype: torch.dtype
    inputs: Inputs
    dys: Mapping[str, torch.Tensor]
    exact: Mapping[str, torch.Tensor]
    peer: Mapping[str, torch.Tensor]
    bounds: Mapping[str, torch.Tensor]

    def run(
        self,
        backend: str,
        call: Callable[[Inputs, Options], Any] | None = None,
        poison: bool = True,
    ) -> dict[str, torch.Tensor]:
        """The results and every gradient on one backend, by name; no gradient where it has none.

        Args:
            backend: forced while it runs.
            call: instead of the op's own, for example that one compiled.
            poison: whether to run in `poison_empty` (compilers do not like it).

        Raises:
            AssertionError: an input or dy was written to, or a kernel wrote outside its tensors.
        """
        row = OPS[self.case.op]
        gradients = backend == "auto" or backends.OPS[self.case.op].has_backward(backend)
        given = [x for x in (*self.inputs.values(), *self.dys.values()) if x is not None]
        before = [all_bytes(x).clone() for x in given]
        with gptfast.use_backend(backend), poison_empty() if poison else contextlib.nullcontext():
            results = _differentiate(
                *(call or row.call, self.inputs, self.case, lambda name, _: self.dys[name]),
                gradients,
            )
        for x, memory in zip(given, before, strict=True):
            if not torch.equal(all_bytes(x), memory):
                raise AssertionError(
                    f"{self.case}: an input or dy of {tuple(x.shape)} was written to"
                )
        return results

    def judge(self, results: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """`assert_close` for each result; returns the errors in units of what is allowed."""
        ratios = {}
        for name, exact in self.exact.items():
            is_result = name in self.dys
            if not is_result and name not in results:  # a gradient, of a backend that has none
                continue
            got, what = results[name], name if is_result else f"gradient of {name}"
            expected = (
                result_dtype(self.case, name, self.dtype, self.inputs)
                if is_result
                else self.inputs[name].dtype
            )
            title = f"{self.case}, {backends.dtype_name(self.dtype)}, {what}"
            if got.dtype != expected:
                raise AssertionError(f"{title}: dtype must be {expected}, got {got.dtype}")
            factor = 2.0 if is_result else 3.0
            ratios[name] = assert_close(
                title, got, self.peer[name], exact, self.bounds[name], factor
            )
        return ratios

    def check(self, backend: str) -> dict[str, float]:
        """`run` and `judge`.

        Raises:
            AssertionError: from `run` or `judge`.
            RefusedError: the backend cannot run the case.
        """
        return self.judge(self.run(backend))


def result_dtype(case: Case, name: str, dtype: torch.dtype, inputs: Inputs) -> torch.dtype:
    """What one of the op's results must have where the inputs are made for `dtype`."""
    row = OPS[case.op]
    if name in row.like:
        return inputs[row.like[name]].dtype
    fixed = row.float32_result
    return torch.float32 if fixed is True or (fixed and name in fixed) else dtype


def make_problem(case: Case, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Random inputs for a case (always the same), exact results, the peer's results and bounds.

    Exact is the peer in fp64 on the inputs as rounded to `dtype`. The peer runs in `dtype` where
    kernels may multiply in it, otherwise in fp32; see `OpRow`.
    """
    row = OPS[case.op]
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def draw(shape: tuple[int, ...], values: str = "normal") -> torch.Tensor:
        normal = torch.randn(shape, generator=generator)
        return VALUES[values](normal, dtype) if normal.numel() else normal

    layout = "contiguous" if case.layout == "packed" else case.layout
    inputs = {
        name: x if x is None or case.layout == "packed" else lay_out(x, layout)
        for name, x in _on(row.inputs(case, dtype, draw), device).items()
    }

    @functools.cache
    def dy(name: str, shape: torch.Size) -> torch.Tensor:
        own = result_dtype(case, name, dtype, inputs)
        return lay_out(draw(shape).to(dtype).to(device, own), case.grad_layout)

    wide = _cast(inputs, torch.float64)
    exact = _differentiate(row.peer, wide, case, dy)
    peer_inputs = _cast(inputs, dtype if row.matrix_units else torch.float32)
    peer = _differentiate(row.peer, peer_inputs, case, dy)
    dys = {name: dy(name, exact[name].shape) for name in row.results}
    magnitudes = row.magnitudes(wide, case.options, *(x.double() for x in dys.values()))
    bounds = {}
    for name in exact:
        own = result_dtype(case, name, dtype, inputs) if name in dys else inputs[name].dtype
        stored = row.matrix_units or magnitudes[name].stored is not None
        storage = dtype if stored else None
        equal = case.values == "constant"
        bounds[name] = rounding_bound(exact[name], magnitudes[name], own, storage, equal)
    return Problem(case, dtype, inputs, dys, exact, peer, bounds)


def run_case(
    case: Case, backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, float]:
    """Forward and every gradient of one case on one backend, in poisoned memory.

    Returns:
        The largest error of the result and of each gradient, in units of what is allowed.

    Raises:
        AssertionError: naming op, case, dtype, tensor, worst element, error and bound.
        RefusedError: the backend cannot run the case.
    """
    return make_problem(case, dtype, device).check(backend)


def _on(inputs: Mapping[str, Any], device: str) -> dict[str, Any]:
    return {name: x if x is None else _moved(x, device) for name, x in inputs.items()}


def _moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """x on a device, with its strides, which `to` keeps only where x fills its memory."""
    if x.device.type == device:
        return x
    size = x.untyped_storage().nbytes() // x.element_size()
    memory = x.as_strided((size,), (1,), 0).to(device)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Contiguous copies, the floating-point ones in `dtype`."""
    return {
        name: x if x is None or not x.is_floating_point() else x.detach().to(dtype).contiguous()
        for name, x in inputs.items()
    }


def _differentiate(
    function: Callable[[Inputs, Options], Any],
    inputs: Inputs,
    case: Case,
    dy: Callable[[str, torch.Size], torch.Tensor],
    gradients: bool = True,
) -> dict[str, torch.Tensor]:
    row = OPS[case.op]
    names = [name for name in row.gradients if gradients and inputs[name] is not None]
    leaves: dict[str, Any] = {
        name: x if x is None else x.detach().requires_grad_(name in names)
        for name, x in inputs.items()
    }
    outputs = function(leaves, case.options)
    results = dict(
        zip(row.results, outputs if isinstance(outputs, tuple) else (outputs,), strict=True)
    )
    grads: tuple[torch.Tensor, ...] = ()
    if names:
        grads = torch.autograd.grad(
            list(results.values()),
            [leaves[name] for name in names],
            [dy(name, x.shape).to(x.dtype) for name, x in results.items()],
        )
    detached = {name: x.detach() for name, x in results.items()}
    return {**detached, **dict(zip(names, grads, strict=True))}


class RecordedCall(NamedTuple):
    """One call of a registered op: the op, its arguments, what it returned."""

    op: Any
    args: tuple[Any, ...]
    output: Any


class record_calls(TorchDispatchMode):  # noqa: N801 - a context manager
    """Collects the calls of `gptfast::` ops made inside the `with` block, in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the op, and remember it where it is one of ours."""
        output = func(*args, **(kwargs or {}))
        if func.namespace == "gptfast":
            self.calls.append(RecordedCall(func, args, output))
        return output


def opcheck(case: Case, dtype: torch.dtype = torch.float32) -> set[str]:
    """`torch.library.opcheck` for every registered op that a case calls, forward and backward.

    Returns:
        The names of those ops.
    """
    problem = make_problem(case, dtype)
    with record_calls() as recorded:
        problem.run("auto", poison=False)
    for op, args, _ in recorded.calls:
        differentiable = bool(OPS[case.op].gradients) and "bwd" not in op.name()
        fresh = [
            a.detach().clone().requires_grad_(differentiable and a.is_floating_point())
            if isinstance(a, torch.Tensor)
            else a
            for a in args
        ]
        torch.library.opcheck(op, tuple(fresh))
    return {call.op.name() for call in recorded.calls}


def gradcheck(case: Case) -> None:
    """`torch.autograd.gradcheck` in fp64 of the torch backend's own formulas, as registered."""
    row = OPS[case.op]
    inputs = _cast(make_problem(case, torch.float32).inputs, torch.float64)
    names = [name for name in row.gradients if inputs[name] is not None]

    def function(*leaves: torch.Tensor) -> Any:
        return row.call({**inputs, **dict(zip(names, leaves, strict=True))}, case.options)

    leaves = [inputs[name].clone().requires_grad_() for name in names]
    with gptfast.use_backend("torch"):
        torch.autograd.gradcheck(function, leaves)
