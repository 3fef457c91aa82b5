"""Registration with `torch.library`, so that autograd, compile, autocast and vmap know the ops.

`Library.define`/`impl` is used rather than `torch.library.custom_op`, whose call costs 2.5 times as
much.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch._functorch import autograd_function as functorch
from torch.autograd import forward_ad

from gptfast import backend
from gptfast.targets import target_of

LIBRARY = torch.library.Library("gptfast", "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    autocast: Collection[str] = (),
) -> Callable[..., Any]:
    """Register one op as `torch.ops.gptfast.<name>` and return a function that calls it.

    In plain eager mode that function goes to the implementation directly: a call through the
    dispatcher and back into Python costs three times as much as a small kernel. Anything that wants
    to see the op (compile, export, fake tensors, subclasses, functorch, autocast, a profiler) gets
    it.

    Args:
        schema: "name(Tensor x, ...) -> Tensor", in the language of `torch.library`.
        implementation: runs on real tensors of any device; it chooses the backend itself.
        fake: the same call on fake tensors: shapes, dtypes, devices and strides of the results.
        backward: autograd formula, `backward(ctx, *grads)`, returning None for the keyset and then
            a gradient per input; without it the op refuses differentiation.
        setup_context: `setup_context(ctx, inputs, output)`, saves what backward needs.
        autocast: names of the tensors that are cast to the autocast dtype, as torch does for
            products.
    """
    name = schema.split("(", 1)[0]
    qualified = f"gptfast::{name}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)

    def not_differentiable(ctx: Any, *grads: torch.Tensor) -> None:
        reason = "double backward is not supported" if name.endswith("_bwd") else "forward only"
        raise RuntimeError(f"gptfast: {name} has no derivative ({reason})")

    op: torch._ops.OpOverload = getattr(torch.ops.gptfast, name).default
    function = _autograd_function(op, implementation, backward or not_differentiable, setup_context)

    def autograd_rule(keyset: Any, *args: Any) -> Any:
        _refuse_forward_mode(name, args)
        if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*args):
            return _below_autograd(op, keyset, args)
        if torch._C._are_functorch_transforms_active():
            # `Function.apply` would start the transforms anew; the dispatcher is within one.
            with functorch.enable_single_level_autograd_function():  # type: ignore[attr-defined]
                return super(torch.autograd.Function, function).apply(keyset, *args)
        return function.apply(keyset, *args)

    LIBRARY.impl(name, autograd_rule, "Autograd", with_keyset=True)
    torch.library.register_vmap(qualified, _vmap_rule(op), lib=LIBRARY)
    if autocast:
        for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
            LIBRARY.impl(name, _autocast_rule(op, autocast, key, device), key)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not plain_eager(args):
            return op(*args)
        _refuse_forward_mode(name, args)
        if autocast and torch.is_autocast_enabled(args[0].device.type):
            return op(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(None, *args)
        return implementation(*args)

    return call


def plain_eager(args: tuple[Any, ...]) -> bool:
    """Whether nothing wants to see the op: no mode, no transform, no trace, no tensor subclass."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for a in args:  # a generator expression would cost as much as all the rest
        kind = type(a)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if a.is_neg():  # a view with the sign in a flag, which the dispatcher resolves
                return False
        elif isinstance(a, torch.Tensor):
            return False
    return True


def _refuse_forward_mode(name: str, args: tuple[Any, ...]) -> None:
    if forward_ad._current_level < 0:
        return
    for a in args:
        if isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None:
            raise RuntimeError(f"gptfast: {name} has no forward-mode derivative")


def _below_autograd(op: torch._ops.OpOverload, keyset: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autograd_function(
    op: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> Any:
    """What `torch.library.register_autograd` makes, at half the cost per call."""

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        output = implementation(*args) if keyset is None else _below_autograd(op, keyset, args)
        ctx.set_materialize_grads(False)  # no zeros for statistics, which have no gradient
        ctx.inputs = 1 + len(args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    def run_backward(ctx: Any, grad: torch.Tensor | None, *grads: Any) -> Any:
        if grad is None and all(g is None for g in grads):
            return (None,) * ctx.inputs
        return backward(ctx, grad, *grads)

    return type(
        f"{op._opname}_autograd",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(run_backward)},
    )


def _autocast_rule(
    op: torch._ops.OpOverload, names: Collection[str], key: str, device: str
) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    is_cast = [argument.name in names for argument in op._schema.arguments]

    def rule(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = [
            a.to(dtype)
            if chosen and a is not None and a.is_floating_point() and a.dtype != torch.float64
            else a
            for a, chosen in zip(args, is_cast, strict=False)
        ]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast)

    return rule


def _vmap_rule(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """One call for each element of the batch: right for every op, whatever its arguments mean."""
    written = [
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in op._schema.arguments
    ]

    def element(i: int, arg: Any, dim: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [element(i, a, d) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        if not info.batch_size:
            raise RuntimeError(f"gptfast: vmap of {op._opname} needs at least one element, got 0")
        for is_written, arg, dim in zip(written, args, in_dims, strict=False):
            dims = dim if isinstance(arg, (list, tuple)) else (dim,)
            if is_written and arg is not None and None in dims:
                raise RuntimeError(
                    f"gptfast: vmap of {op._opname} would write to a tensor that is not batched"
                )
        results = [
            op(*(element(i, arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], (tuple, list)):
            return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
        return (None, None) if results[0] is None else (torch.stack(results), 0)

    return rule


def check_dtypes(op: str, expected: torch.dtype, **tensors: torch.Tensor | None) -> None:
    """Raise TypeError naming the first tensor whose dtype is not `expected`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != expected:
            raise TypeError(f"{op}: {name} must be {expected}, got {tensor.dtype}")


def check_floating(op: str, name: str, x: torch.Tensor) -> None:
    """Raise TypeError unless `x` is a floating-point tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")


def check_shape(op: str, name: str, x: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `x` is None or has exactly this shape."""
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} must be {shape}, got {tuple(x.shape)}")


def check_device(op: str, expected: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError naming the first tensor that is not on the device `expected`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != expected:
            raise RuntimeError(f"{op}: {name} must be on {expected}, got {tensor.device}")


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics and accumulators: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fp32_parameter(w: torch.Tensor | None) -> torch.Tensor | None:
    """A weight as the CPU kernels take it: contiguous fp32, or absent."""
    if w is None or (w.dtype is torch.float32 and w.is_contiguous()):
        return w
    return w.to(torch.float32).contiguous()


def cuda_room(x: torch.Tensor) -> int:
    """Bytes of shared memory that a CUDA kernel may ask for in its launch, on x's device.

    512 are left for what it declares itself: `benchmarks/cuda_report.json` has how much that is.
    """
    return target_of(x.device).shared_memory - 512


def cuda_parameter(w: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """A weight as the CUDA kernels take it, contiguous or absent, and the code of its dtype."""
    if w is not None:
        w = (w if w.dtype in backend.DTYPE_CODES else w.to(torch.float32)).contiguous()
    return w, 0 if w is None else backend.DTYPE_CODES[w.dtype]


def pointer(t: torch.Tensor | None) -> int:
    """The address of a tensor's data; 0 for None."""
    return 0 if t is None else t.data_ptr()


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What x's numbers are when they are multiplied: autocast leaves float64 alone."""
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype is not torch.float64
    return torch.get_autocast_dtype(kind) if cast else x.dtype


@torch.compiler.assume_constant_result
def has_tiles() -> bool:
    """Whether the kernels made of tiles (AMX) may be called here."""
    extension = None if backend.missing("cpu") else backend.extension()
    may = backend.forced_backend() in (None, "cpu")
    return may and extension is not None and extension.cpu_isa() == "amx"


def in_tiles(x: torch.Tensor) -> bool:
    """Whether the tile unit of this processor multiplies such numbers."""
    return x.dtype is torch.bfloat16 and x.numel() > 0 and has_tiles()


def call_in_tiles(kernel: Any, *args: Any) -> None:
    """Call a kernel that says itself how much workspace it wants."""
    memory = torch.empty(kernel(*args, 0), dtype=torch.uint8, device="cpu")
    kernel(*args, memory.data_ptr())
