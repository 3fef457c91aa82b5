"""The one place where a backend is chosen.

Every op offers its implementations as an `Op`; `Op.choose` takes the first backend in the device's
order that has no reason to refuse. A forced backend (`GPTFAST_BACKEND`, or `use_backend`) never
falls back: it raises with its reason.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("torch", "cpu", "triton", "cuda")
# Device type -> backends from best to plainest. Triton comes before CUDA: on an H100 it was faster
# in all but a few cases (docs/gpu.md).
ORDER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu", "torch"),
    "cuda": ("triton", "cuda", "torch"),
}
OLDEST_TRITON = (3, 5)
HOW_TO_BUILD = "Install g++ 11 or newer and reinstall gptfast-kernels"
HOW_TO_BUILD_CUDA = "Put nvcc on PATH and reinstall gptfast-kernels with GPTFAST_CUDA=1"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/dtype.h


@cache
def extension() -> ModuleType | None:
    """The compiled module `gptfast._C`, or None, with a warning, where this install has none."""
    try:
        from gptfast import _C  # type: ignore[attr-defined]
    except ImportError as error:
        warnings.warn(
            f"gptfast has no compiled kernels here ({error}): CPU tensors go through the PyTorch "
            f"reference. {HOW_TO_BUILD}; `gptfast doctor` tells more.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    isa = os.environ.get("GPTFAST_CPU_ISA")
    if isa:
        try:
            _C.set_cpu_isa(isa)
        except ValueError as error:
            raise RuntimeError(f"GPTFAST_CPU_ISA: {error}") from None
    return _C


@cache
def missing(backend: str) -> str | None:
    """Why this installation has no such backend at all, or None."""
    if backend in ("cpu", "cuda") and extension() is None:
        return f"gptfast._C is not built. {HOW_TO_BUILD}"
    if backend == "cuda":
        return _no_cuda(extension())  # type: ignore[arg-type]
    if backend == "triton":
        try:
            import triton
        except ImportError:
            return "triton is not installed: pip install triton"
        if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
            oldest = ".".join(map(str, OLDEST_TRITON))
            return f"triton must be {oldest} or newer, got {triton.__version__}"
    return None


def _no_cuda(extension: ModuleType) -> str | None:
    """Why the CUDA kernels of this build, if any, cannot be launched on any card, or None."""
    if not extension.build_info()["cuda_archs"]:
        return f"gptfast._C was built without CUDA kernels. {HOW_TO_BUILD_CUDA}"
    driver, runtime = extension.cuda.versions()
    if not driver:
        return "there is no NVIDIA driver here"
    if driver // 1000 < runtime // 1000:
        has, needs = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime))
        return (
            f"the NVIDIA driver is of CUDA {has}, gptfast._C was built with CUDA {needs}: update "
            "the driver, or rebuild with an older nvcc"
        )
    return None


def uncovered(capability: tuple[int, int], archs: str) -> str | None:
    """Why kernels built for `archs` do not run on a card, or None.

    Args:
        capability: the card's, (9, 0) for example.
        archs: as in `_C.build_info()`: "80,90a"; of the first without a letter there is PTX, too.
    """
    major, minor = capability
    names = archs.split(",")
    for name in names:
        built = divmod(int(name.rstrip("af")), 10)
        specific = not name.isdigit()
        if built == capability or (built[0] == major and built[1] <= minor and not specific):
            return None
    plain = [int(name) for name in names if name.isdigit()]
    if plain and plain[0] < 10 * major + minor:
        return None  # the driver compiles the PTX for the card
    return (
        f"gptfast._C was built for sm_{', sm_'.join(names)}, the card is sm_{major}{minor}: "
        f"rebuild with GPTFAST_CUDA_ARCHS={major}{minor}"
    )


_cuda_on_cpu: ModuleType | None = None


@contextlib.contextmanager
def cuda_on_cpu(module: ModuleType) -> Iterator[None]:
    """Let the `cuda` backend run on CPU tensors, by the launchers in `module`, inside the block.

    Args:
        module: what `gptfast.testing.cuda_host.load` returns.
    """
    global _cuda_on_cpu
    before, _cuda_on_cpu = _cuda_on_cpu, module
    _forget_candidates()
    try:
        yield
    finally:
        _cuda_on_cpu = before
        _forget_candidates()


def launch_cuda(kernel: str, x: torch.Tensor, *args: Any) -> None:
    """Call a launcher of csrc/cuda/launchers.h, on x's device and PyTorch's current stream there.

    Args:
        kernel: the launcher's name.
        x: decides device and dtype.
        args: all but dtype and stream; tensors go as their addresses, None as a null pointer.
    """
    launch_cuda_on(x.device, kernel, *args, DTYPE_CODES[x.dtype])


def launch_cuda_on(place: torch.device, kernel: str, *args: Any) -> None:
    """Like `launch_cuda`, for a launcher that takes no dtype, or several."""
    addresses = [
        a.data_ptr() if isinstance(a, torch.Tensor) else 0 if a is None else a for a in args
    ]
    if _cuda_on_cpu is not None:
        module, device, stream = _cuda_on_cpu, 0, 0
    else:
        module, device = extension().cuda, place.index  # type: ignore[union-attr]
        stream = torch.cuda.current_stream(place).cuda_stream
    getattr(module, kernel)(device, *addresses, stream)


class RefusedError(RuntimeError):
    """A forced backend cannot run the call."""


def no_backward(*args: Any) -> Any:
    """The `bwd` of an op that has a forward only."""
    raise RuntimeError("the op has no backward")


@dataclass(frozen=True)
class Implementation:
    """One backend of one op.

    `why_not` gets what `Op.choose` gets and returns the reason to refuse it, or None.
    """

    fwd: Callable[..., Any]
    bwd: Callable[..., Any] = no_backward
    why_not: Callable[..., str | None] | None = None


def triton_implementation(
    op: str,
    file: str | None = None,
    why_not: Callable[..., str | None] | None = None,
    *,
    forward_only: bool = False,
) -> Implementation:
    """`<op>_fwd` and `<op>_bwd` of `gptfast.kernels.<file>`, imported when first called.

    Args:
        op: the op's name.
        file: where its kernels stand, if not in a file of the op's name.
        why_not: see `Implementation`.
        forward_only: whether the op has no backward.
    """

    @cache
    def kernel(name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"gptfast.kernels.{file or op}"), f"{op}_{name}")

    def launcher(name: str) -> Callable[..., Any]:
        def launch(x: torch.Tensor | list[torch.Tensor], *args: Any) -> Any:
            device = x[0].device if isinstance(x, list) else x.device
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return kernel(name)(x, *args)
            with torch.cuda.device(device):  # Triton launches on the current device
                return kernel(name)(x, *args)

        return launch

    bwd = no_backward if forward_only else launcher("bwd")
    return Implementation(launcher("fwd"), bwd, why_not)


_forced: str | None = None


def _checked(name: str, source: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


def forced_backend() -> str | None:
    """The backend forced by `use_backend` or `GPTFAST_BACKEND`, or None."""
    name = _forced or _environment_backend()
    return None if name == "auto" else name


@cache
def _environment_backend() -> str:
    return _checked(os.environ.get("GPTFAST_BACKEND") or "auto", "GPTFAST_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every gptfast op onto one backend inside the `with` block.

    Process-wide, like the flags in `torch.backends`: the threads of the autograd engine follow it
    too.

    Args:
        name: "torch", "cpu", "triton", "cuda", or "auto" for the automatic choice.

    Raises:
        ValueError: unknown name.
        RuntimeError: from the op that is called, where the backend cannot run it.
    """
    global _forced
    before, _forced = _forced, _checked(name, "use_backend: the backend")
    try:
        yield
    finally:
        _forced = before


OPS: dict[str, Op] = {}  # every listed op by name, once gptfast.ops is imported
_every_op: list[Op] = []


def _forget_candidates() -> None:
    for op in _every_op:
        op._candidates.clear()


class Op:
    """An op's name and its implementations by backend.

    Entered in `OPS` unless it is not `listed`, because no row of `gptfast.testing` can describe it.
    """

    def __init__(
        self, name: str, implementations: Mapping[str, Implementation], listed: bool = True
    ) -> None:
        self.name = name
        self.implementations = implementations
        self._candidates: dict[tuple[str, str, torch.dtype], tuple[str, ...]] = {}
        _every_op.append(self)
        if listed:
            OPS[name] = self

    @property
    def registered(self) -> tuple[str, ...]:
        """The names under which the op is registered: its forward, and its backward if any."""
        forward_only = self.implementations["torch"].bwd is no_backward
        return (f"{self.name}_fwd",) if forward_only else (f"{self.name}_fwd", f"{self.name}_bwd")

    def has_backward(self, backend: str) -> bool:
        """Whether `backend` has a backward of this op, too."""
        return self.implementations[backend].bwd is not no_backward

    def why_not(self, backend: str, x: torch.Tensor, *args: Any) -> str | None:
        """Why `backend` cannot run this op on these arguments, or None; x decides the device."""
        if backend == "torch":
            return None
        reason = self._why_never(backend, x)
        if reason:
            return reason
        refuses = self.implementations[backend].why_not
        return refuses(x, *args) if refuses else None

    def _why_never(self, backend: str, x: torch.Tensor) -> str | None:
        """The part of `why_not` that device and dtype decide."""
        if backend not in self.implementations:
            return f"{self.name} has no {backend} kernel yet"
        hosted = backend == "cuda" and _cuda_on_cpu is not None
        reason = None if hosted else missing(backend)
        if reason:
            return reason
        device = "cpu" if backend == "cpu" else "cuda"
        if x.device.type != device and not (hosted or (backend == "triton" and interpreting(x))):
            return f"its tensors must be on {device}, got {x.device.type}"
        if backend == "cuda" and not hosted:
            card = torch.cuda.get_device_capability(x.device)
            reason = uncovered(card, extension().build_info()["cuda_archs"])  # type: ignore[union-attr]
            if reason:
                return reason
        if x.dtype not in DTYPE_CODES:
            return f"its tensors must be float32, bfloat16 or float16, got {dtype_name(x.dtype)}"
        return None

    def has_kernel(self, x: torch.Tensor) -> bool:
        """Whether device and dtype of x let another backend than the reference run."""
        candidates = self._candidates_for(x, _forced or _environment_backend())
        return any(backend != "torch" for backend in candidates)

    def _candidates_for(self, x: torch.Tensor, wanted: str) -> tuple[str, ...]:
        """Backends that device and dtype allow, best first: found out once for each."""
        key = (wanted, x.device.type, x.dtype)
        candidates = self._candidates.get(key)
        if candidates is None:
            order = ORDER.get(x.device.type, ("torch",)) if wanted == "auto" else (wanted,)
            candidates = tuple(b for b in order if b == "torch" or self._why_never(b, x) is None)
            self._candidates[key] = candidates
        return candidates

    def choose(self, x: torch.Tensor, *args: Any) -> Implementation:
        """The implementation that runs this call.

        Raises:
            RefusedError: a backend is forced and refuses.
        """
        wanted = _forced or _environment_backend()
        for backend in self._candidates_for(x, wanted):
            implementation = self.implementations[backend]
            if implementation.why_not is None or implementation.why_not(x, *args) is None:
                return implementation
        reason = self.why_not(wanted, x, *args)
        raise RefusedError(f"{self.name}: backend {wanted!r} is forced, but {reason}")

    def choose_bwd(self, x: torch.Tensor, *args: Any) -> Implementation:
        """The implementation that runs this call of backward, which not every backend may have.

        Raises:
            RefusedError: a backend is forced and refuses, or has a forward only.
        """
        wanted = _forced or _environment_backend()
        for backend in self._candidates_for(x, wanted):
            implementation = self.implementations[backend]
            refuses = implementation.why_not
            if self.has_backward(backend) and not (refuses and refuses(x, *args)):
                return implementation
        reason = self.why_not(wanted, x, *args)
        if reason is None:
            others = ", ".join(b for b in self.implementations if self.has_backward(b))
            reason = f"it has no backward of this op; {others} have"
        raise RefusedError(f"{self.name}: backend {wanted!r} is forced, but {reason}")


def interpreting(x: torch.Tensor) -> bool:
    """Whether Triton's interpreter is on, which runs kernels on CPU tensors."""
    return x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")
