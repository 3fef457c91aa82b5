"""What Triton would compile for a call of an op on a target, recorded with no GPU and no compiler.

A stand-in for the driver names the target, and Triton's own `jit_cache_hook` hands over each
specialisation (types, constants, divisibility by 16, arguments equal to 1) at the moment when a
launch misses Triton's cache, so that nothing of Triton's launch is imitated here.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.static_report.calls import Call, triton_takes_cpu_tensors
from gptfast import backend, targets


class TargetOnly:
    """As much of a Triton driver as a launch asks before it compiles."""

    def __init__(self) -> None:
        self.target: GPUTarget | None = None

    def get_current_target(self) -> GPUTarget | None:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton keeps one cache of kernels a device

    def get_current_stream(self, device: str) -> int:
        return 0


DRIVER = TargetOnly()


def use_target(target: GPUTarget) -> None:
    """Make Triton compile for this target from now on."""
    DRIVER.target = target
    driver.set_active(DRIVER)


def gpu_target(target: targets.Target) -> GPUTarget:
    """A target as Triton names it."""
    arch = target.name if target.platform == "hip" else int(target.name.removeprefix("sm_"))
    return GPUTarget(target.platform, arch, target.warp_size)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what would be compiled, and for how many programs."""

    kernel: JITFunction
    grid: tuple[int, ...]
    specialization: str  # Triton's JSON
    target: GPUTarget

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def constants(self) -> dict[str, Any]:
        """Constant arguments by name."""
        data = json.loads(self.specialization)
        names = [self.kernel.arg_names[path[0]] for path in data["constant_keys"]]
        return dict(zip(names, data["constant_vals"], strict=True))

    @property
    def options(self) -> dict[str, Any]:
        """Compile options: num_warps, num_stages, ..."""
        return json.loads(self.specialization)["options"]

    def job(self) -> dict[str, Any]:
        """For the worker in `compiled`."""
        return {
            "kernel": f"{self.kernel.module}:{self.kernel.fn.__qualname__}",
            "specialization": self.specialization,
            "target": [self.target.backend, self.target.arch, self.target.warp_size],
        }

    def fingerprint(self) -> str:
        """Changes with whatever the compiled kernel depends on, Triton apart."""
        data = json.loads(self.specialization)
        data["target"] = str(self.target)  # which Triton 3.5 leaves out
        del data["key"], data["options"]["extern_libs"]
        return digest([source_of(self.kernel), data])


@dataclass
class Recording:
    """What one call of an op did: launches, and the traffic of PyTorch's own kernels around them.

    Args:
        launches: in order.
        torch_bytes: read and written by PyTorch's operations.
        torch_kernels: how many those were.
    """

    launches: list[Launch] = field(default_factory=list)
    torch_bytes: int = 0
    torch_kernels: int = 0


class _CountTorch(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        results = [x for x in (output if isinstance(output, tuple) else (output,))]
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if not is_view and "empty" not in func.name():
            moved = [x for x in (*args, *results) if isinstance(x, torch.Tensor)]
            unique = {x.data_ptr(): x.numel() * x.element_size() for x in moved}
            self.recording.torch_bytes += sum(unique.values())
            self.recording.torch_kernels += 1
        return output


def record(call: Call, target: str) -> Recording:
    """The launches that a call makes on a target, in the order in which it makes them.

    Raises:
        RefusedError: the triton backend does not run it.
    """
    recording = Recording()
    choose = backend.Op.choose

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with _CountTorch(recording):
                return function(*args)

        return run

    def choose_counted(op: backend.Op, x: torch.Tensor, *args: Any) -> backend.Implementation:
        chosen = choose(op, x, *args)
        return backend.Implementation(counted(chosen.fwd), counted(chosen.bwd))

    with (
        targets.assume(target) as assumed,
        triton_takes_cpu_tensors(),
        mock.patch.object(backend.Op, "choose", choose_counted),
        _recording_launches(recording, assumed),
    ):
        call.run()
    return recording


@contextlib.contextmanager
def _recording_launches(recording: Recording, target: targets.Target) -> Iterator[None]:
    run = JITFunction.run
    grids: list[tuple[int, ...]] = []

    def remember_grid(self: JITFunction, *args: Any, grid: Any, **kwargs: Any) -> Any:
        names = dict(zip(self.arg_names, args, strict=False))
        grids.append(tuple(grid({**names, **kwargs}) if callable(grid) else grid))
        return run(self, *args, grid=grid, **kwargs)

    def remember_launch(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        data = compile["specialization_data"]
        launch = Launch(fn.jit_function, grids[-1], data, gpu_target(target))
        recording.launches.append(launch)
        return True  # do not compile, and so do not launch

    use_target(gpu_target(target))
    knobs = triton.knobs.runtime
    before, knobs.jit_cache_hook = knobs.jit_cache_hook, remember_launch
    try:
        with mock.patch.object(JITFunction, "run", remember_grid):
            yield
    finally:
        knobs.jit_cache_hook = before


def digest(value: Any) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def source_of(kernel: JITFunction) -> list[str]:
    """The code of a kernel, of every function of ours that it calls, and the constants they use.

    Without comments and line numbers: those change nothing that is compiled.
    """
    seen: dict[str, str] = {}

    def visit(function: JITFunction) -> None:
        name = f"{function.module}:{function.fn.__qualname__}"
        if name in seen:
            return
        tree = ast.parse(function.src)
        seen[name] = ast.unparse(tree)
        for node in ast.walk(tree):
            value = _value_of(node, function.fn.__globals__)
            if isinstance(value, JITFunction) and not value.module.startswith("triton."):
                visit(value)
            elif isinstance(value, triton.language.constexpr):
                seen[f"{name}:{ast.unparse(node)}"] = repr(value.value)

    visit(kernel)
    return [f"{name} = {text}" for name, text in sorted(seen.items())]


def _value_of(node: ast.AST, names: dict[str, Any]) -> Any:
    """What a name, or an attribute of a module, stands for in a function's module."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = names.get(node.value.id)
        return getattr(owner, node.attr, None) if inspect.ismodule(owner) else None
    return None


def find_kernel(path: str) -> JITFunction:
    """The kernel that `Launch.job` names."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
