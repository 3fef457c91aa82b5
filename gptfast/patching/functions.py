"""Functions of `torch.nn.functional` on gptfast's ops, and code of others that is to use them.

`sdpa` and `cross_entropy` take what their originals take. Where the kernel cannot do what is asked,
or a tensor is not one that it has a kernel for, they call the original and count it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from gptfast.backend import DTYPE_CODES
from gptfast.backend import OPS as KERNELS
from gptfast.ops.attention import MAX_HEAD_DIM, attention
from gptfast.ops.cross_entropy import cross_entropy as fused_cross_entropy

ORIGINALS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "cross_entropy": F.cross_entropy,
}
Count = Callable[[str], None]


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    count: Count | None = None,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` on `gptfast.attention`, where that has a kernel for it.

    Args:
        query, key, value, dropout_p, scale, enable_gqa: as there. Dropout draws another mask.
        attn_mask: goes to the original.
        is_causal: as there: the triangle begins at the first key. (`gptfast.attention` ends it at
            the last.)
        count: called with the reason, where the original takes the call.

    Limits: no double backward.
    """
    reason = _why_not_sdpa(query, key, value, attn_mask, dropout_p, enable_gqa)
    if reason is not None:
        if count is not None:
            count(reason)
        options = {"enable_gqa": True} if enable_gqa else {}
        return ORIGINALS["scaled_dot_product_attention"](
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options
        )
    T, S = query.shape[-2], key.shape[-2]
    window = None
    if is_causal and S > T:  # no query sees the keys behind the T-th
        key, value = key[..., :T, :], value[..., :T, :]
    elif is_causal and S < T:  # the last T - S queries see every key
        is_causal, window = False, (-1, T - S)
    if query.dim() == 3:  # (B, T, D): a head for each
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        o = attention(
            query, key, value, causal=is_causal, scale=scale, dropout_p=dropout_p, window=window
        )
        return o.squeeze(1)
    return attention(
        query, key, value, causal=is_causal, scale=scale, dropout_p=dropout_p, window=window
    )


def _why_not_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
) -> str | None:
    """Why the kernel cannot take the call."""
    if attn_mask is not None:
        return "attn_mask"
    if q.is_nested or k.is_nested or v.is_nested:
        return "nested tensors"
    if q.dtype not in DTYPE_CODES or not q.dtype == k.dtype == v.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}"
    if q.dim() not in (3, 4) or k.dim() != q.dim() or v.dim() != q.dim():
        return f"{q.dim()} dimensions"
    heads_fit = k.shape[-3] == v.shape[-3] and q.shape[-3] == k.shape[-3]
    if enable_gqa and q.dim() == 4 and k.shape[1] == v.shape[1] and k.shape[1]:
        heads_fit = q.shape[1] % k.shape[1] == 0
    if not heads_fit or q.shape[0] != k.shape[0] or k.shape[:-1] != v.shape[:-1]:
        return "shapes that are broadcast"
    if q.shape[-1] != k.shape[-1] or 0 in (*q.shape, *k.shape, *v.shape) or not 0 <= dropout_p < 1:
        return "sizes of zero, or an argument out of range"
    if q.device.type != "cpu" and max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return f"head dim over {MAX_HEAD_DIM}"
    if not torch.compiler.is_compiling() and not KERNELS["attention"].has_kernel(q):
        return f"no kernel on {q.device.type}"
    return None


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    count: Count | None = None,
) -> torch.Tensor:
    """`F.cross_entropy` on `gptfast.cross_entropy`, where that has a kernel for it.

    Args:
        input, target, weight, ignore_index, reduction, label_smoothing: as there.
        size_average, reduce: deprecated there; given, they go to the original. So do class
            probabilities.
        count: called with the reason, where the original takes the call.

    Returns:
        The loss, in input's dtype as there; with autocast, float32.
    """
    reason = None
    if size_average is not None or reduce is not None:
        reason = "size_average or reduce"
    elif target.dtype != torch.int64:
        reason = f"targets in {target.dtype}"
    elif (
        weight is not None
        and weight.dtype != input.dtype
        and not torch.is_autocast_enabled(input.device.type)
    ):
        reason = "mixed dtypes"
    elif input.dtype not in DTYPE_CODES or input.dim() == 0 or input.numel() == 0:
        reason = f"{input.dim()} dimensions in {input.dtype}"
    elif not torch.compiler.is_compiling() and not KERNELS["cross_entropy"].has_kernel(input):
        reason = f"no kernel on {input.device.type}"
    if reason is not None:
        if count is not None:
            count(reason)
        return ORIGINALS["cross_entropy"](
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    logits = input.movedim(1, -1) if input.dim() > 2 else input
    loss = fused_cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing)
    return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": sdpa,
    "cross_entropy": cross_entropy,
}


class _User(NamedTuple):
    """Who overrides a function: what counts its calls to the original, and what prevents them."""

    on_fallback: Count
    worth: Callable[[torch.Tensor], bool] | None
    caller: CodeType | None


class _Active(threading.local):
    """What this thread has overridden, by name: for whom, the innermost block first."""

    def __init__(self) -> None:
        self.users: dict[str, tuple[_User, ...]] = {}


_active = _Active()
_lock = threading.Lock()
_blocks: Counter[str] = Counter()  # how many `override` blocks of a name are open, in all threads


class _Dispatcher:
    """What stands in `torch.nn.functional` while any thread overrides `name`.

    Whoever has got hold of it may keep it, or put it back later: outside of a block it is what it
    was put in the place of. So is compiled code.
    """

    def __init__(self, name: str, original: Callable[..., Any]) -> None:
        self.name, self.original = name, original
        functools.update_wrapper(self, ORIGINALS[name])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        users = () if torch.compiler.is_compiling() else _active.users.get(self.name, ())
        for user in users:
            if user.caller not in (None, sys._getframe(1).f_code):
                continue
            x: Any = args[0] if args else kwargs.get("query", kwargs.get("input"))
            if user.worth is not None and not user.worth(x):
                continue
            if self.original is ORIGINALS[self.name]:
                return REPLACEMENTS[self.name](*args, **kwargs, count=user.on_fallback)
            user.on_fallback(f"F.{self.name} is somebody else's")
            break
        return self.original(*args, **kwargs)


_dispatchers: dict[str, _Dispatcher] = {}  # the last of each name


class override:  # noqa: N801 - used like a function
    """Let this thread's calls of `torch.nn.functional.<name>` take ours, inside a `with` block.

    Args:
        name: of the function.
        count: called with the reason, where ours cannot take a call.
        worth: whether ours should, by the first tensor of the call; None: always.
        caller: the code that has to make the call; None: any. A function that gets
            `torch.nn.functional.<name>` as an argument may call it again when the block has ended,
            as a checkpoint does, and has to find the same then.
    """

    def __init__(
        self,
        name: str,
        count: Count,
        worth: Callable[[torch.Tensor], bool] | None = None,
        caller: CodeType | None = None,
    ) -> None:
        self.name, self.user = name, _User(count, worth, caller)

    def __enter__(self) -> None:
        name = self.name
        with _lock:
            _blocks[name] += 1
            if _blocks[name] == 1:
                found = getattr(F, name)
                if isinstance(found, _Dispatcher):  # that somebody put back after its block
                    found = found.original
                if name not in _dispatchers or _dispatchers[name].original is not found:
                    _dispatchers[name] = _Dispatcher(name, found)
                setattr(F, name, _dispatchers[name])
        self.before = _active.users
        _active.users = {**self.before, name: (self.user, *self.before.get(name, ()))}

    def __exit__(self, *error: Any) -> None:
        name = self.name
        _active.users = self.before
        with _lock:
            _blocks[name] -= 1
            if not _blocks[name] and getattr(F, name) is _dispatchers[name]:
                setattr(F, name, _dispatchers[name].original)


class _Open(threading.local):
    """The blocks that this thread has open, of one `sdpa_override`, which threads may share."""

    def __init__(self) -> None:
        self.blocks: list[override] = []


class sdpa_override(contextlib.ContextDecorator):  # noqa: N801 - used like a function
    """Let code that calls `F.scaled_dot_product_attention` run on `gptfast.attention`.

        with gptfast.sdpa_override() as overridden:
            y = model(x)
        print(overridden.fallbacks)

    It may also decorate a function. Each thread has its own; another thread is not affected. The
    function is found as `torch.nn.functional.scaled_dot_product_attention`: code that has imported
    it under a name of its own before is not reached. Code under `torch.compile` keeps PyTorch's.
    A backward that computes a forward anew (checkpointing) belongs into the block, too.

    Attributes:
        fallbacks: reasons for which calls went to the original, and how many.
    """

    def __init__(self) -> None:
        self.fallbacks: Counter[str] = Counter()
        self._open = _Open()

    def __enter__(self) -> sdpa_override:
        block = override("scaled_dot_product_attention", self._count)
        block.__enter__()
        self._open.blocks.append(block)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.blocks.pop().__exit__(*error)

    def _count(self, reason: str) -> None:
        self.fallbacks[reason] += 1
