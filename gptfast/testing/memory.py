"""Poisoned memory, and the memory layouts that inputs come in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


@contextlib.contextmanager
def poison_empty() -> Iterator[None]:
    """Make `torch.empty`, `torch.empty_like` and `Tensor.new_empty` return poisoned memory.

    What a kernel forgets to write is NaN (the largest integer in integer tensors), and a write past
    either end of the tensor is reported.

    Raises:
        AssertionError: on leaving, when the 64 bytes before or behind a tensor have changed.
    """
    real_empty = torch.empty
    guards: list[torch.Tensor] = []

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        if type(x) is not torch.Tensor or x.device.type == "meta":
            return x
        pad = 64 // x.element_size()
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        poison = float("nan") if x.is_floating_point() else _largest(x.dtype)
        elements = (last + 1 if x.numel() else 0) + 2 * pad
        buffer = torch.full((elements,), poison, dtype=x.dtype, device=x.device)
        guards.extend((buffer[:pad], buffer[-pad:]))
        guarded = real_empty(0, dtype=x.dtype, device=x.device)
        return guarded.set_(buffer.untyped_storage(), pad, x.shape, x.stride())

    def patched(owner: Any, name: str) -> Any:
        real = getattr(owner, name)
        return mock.patch.object(owner, name, lambda *a, **k: poisoned(real(*a, **k)))

    with patched(torch, "empty"), patched(torch, "empty_like"), patched(torch.Tensor, "new_empty"):
        yield
    for guard in guards:
        intact = guard.isnan() if guard.is_floating_point() else guard == _largest(guard.dtype)
        if not intact.all():
            raise AssertionError("a kernel wrote outside the tensor that it was given")


def _largest(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded", "scalar")


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `x` in another memory layout; what lies between them in memory is NaN.

    transposed: dimensions in reverse order. sliced: rows with a gap behind them, from an unaligned
    address on. strided: every second element of the last dimension. expanded: stride 0 along the
    last dimension but one (the values change: its first slice repeats). scalar: every stride 0, one
    value for all elements, which is what `.sum().backward()` hands on.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"lay_out: layout must be one of {LAYOUTS}, got {layout!r}")
    if x.dim() == 0 or x.numel() == 0 or layout == "contiguous":
        return x.contiguous()
    N = x.shape[-1]
    if layout == "scalar":
        return x.flatten()[:1].clone().squeeze().expand(x.shape)
    if layout == "expanded":
        dim = max(x.dim() - 2, 0)
        return x.narrow(dim, 0, 1).clone().expand(x.shape)
    if layout == "transposed":
        reverse = tuple(range(x.dim()))[::-1]
        return x.permute(reverse).contiguous().permute(reverse)
    gap = float("nan") if x.is_floating_point() else _largest(x.dtype)
    if layout == "sliced":
        memory = x.new_full((*x.shape[:-1], N + 3), gap)
        return memory[..., 1 : N + 1].copy_(x)
    memory = x.new_full((*x.shape[:-1], 2 * N), gap)
    return memory[..., ::2].copy_(x)


def all_bytes(x: torch.Tensor) -> torch.Tensor:
    """All memory of x's storage."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
