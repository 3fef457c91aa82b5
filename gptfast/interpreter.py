"""Makes Triton's interpreter (`TRITON_INTERPRET=1`) compute bfloat16 correctly.

The interpreter keeps bfloat16 as the 16-bit integers of its bit pattern and does arithmetic,
reductions and products on those integers; its casts to bfloat16 truncate (triton issues 10945,
11584, 11604). `install()` widens every bfloat16 operand to fp32 before the operation and rounds the
result back to nearest even, which is what the hardware does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

TensorHandle = interpreter.TensorHandle
ARITHMETIC = (  # noqa: SIM905 - a list of fifty quotes reads worse
    "fadd fsub fmul fdiv frem fneg fma fabs precise_divf approx_divf clampf "
    "minimumf maximumf minnumf maxnumf exp exp2 log log2 sqrt rsqrt sin cos erf floor ceil"
).split()


def widen(handle: Any) -> Any:
    """A bfloat16 handle as fp32."""
    bits = handle.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def narrow(handle: Any) -> Any:
    """An fp32 handle rounded to bfloat16, to nearest even."""
    bits = np.ascontiguousarray(handle.data, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(handle.data), np.uint16(0x7FFF), rounded), tl.bfloat16)


def is_bfloat16(value: Any) -> bool:
    """Whether a value is a handle of bfloat16 data."""
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _in_fp32(operation: Callable[..., Any], round_result: bool) -> Callable[..., Any]:
    def repaired(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(is_bfloat16(a) for a in args):
            return operation(self, *args, **kwargs)
        result = operation(self, *(widen(a) if is_bfloat16(a) else a for a in args), **kwargs)
        is_fp32 = isinstance(result, TensorHandle) and result.dtype.scalar == tl.float32
        return narrow(result) if round_result and is_fp32 else result

    return repaired


def _repair_casts(builder: Any) -> None:
    cast = builder.cast_impl

    def repaired(self: Any, src: Any, dst: Any, *args: Any, **kwargs: Any) -> Any:
        source, target = src.dtype.scalar, dst.scalar
        if source == target:
            return cast(self, src, dst)
        if source == tl.bfloat16:
            wide = widen(src)
            return wide if target == tl.float32 else cast(self, wide, dst)
        if target == tl.bfloat16:
            return narrow(TensorHandle(src.data.astype(np.float32), tl.float32))
        return cast(self, src, dst)

    builder.cast_impl = repaired
    builder.create_fp_to_fp = repaired


def _repair_reductions(reduce_ops: Any) -> None:
    reduce = reduce_ops.apply_impl

    def widened(value: Any) -> Any:
        if isinstance(value, tl.tensor) and is_bfloat16(value.handle):
            shape = list(value.handle.data.shape)
            return tl.tensor(widen(value.handle), tl.block_type(tl.float32, shape))
        return value

    def repaired(self: Any, values: Any) -> Any:
        if isinstance(values, tuple):
            return reduce(self, tuple(widened(v) for v in values))
        return reduce(self, widened(values))

    reduce_ops.apply_impl = repaired


def _repair_index() -> None:
    """A number that was loaded is an array of one element, which NumPy 2.4 takes for no index."""
    patch = interpreter._patch_lang_tensor

    def repaired(tensor: Any, *args: Any) -> None:
        patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = repaired


def install() -> None:
    """Repair the interpreter of this process; calling it again changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "gptfast_bfloat16", False):
        return
    builder.gptfast_bfloat16 = True
    for name in dir(builder):
        if name.removeprefix("create_") in ARITHMETIC:
            setattr(builder, name, _in_fp32(getattr(builder, name), round_result=True))
        elif name.startswith("create_fcmp"):
            setattr(builder, name, _in_fp32(getattr(builder, name), round_result=False))
    builder.create_dot = _in_fp32(builder.create_dot, round_result=False)
    _repair_casts(builder)
    _repair_reductions(interpreter.ReduceOps)
    _repair_index()
