"""Writes the keys and values of new tokens into a cache, in place.

With n = L_b - T + t, where L_b = cache_seqlens_b counts the T new tokens:

k_cache[b, n] = k[b, :, t],   v_cache[b, n] = v[b, :, t]                 (contiguous)
k_cache[block_table[b, n // page_size], n % page_size] = k[b, :, t], ... (paged)

Tokens with n < 0 are left out: a sequence of length 0 is an idle one.
"""

from __future__ import annotations

import torch

from gptfast import backend
from gptfast.ops.attention_decode import (
    capacity,
    check_caches,
    check_entries,
    cpu_shape,
    pages_of,
)
from gptfast.ops.layout import heads_of
from gptfast.ops.library import check_device, check_dtypes, define


def reference_fwd(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
) -> None:
    """The formula in PyTorch."""
    B, _, T, _ = k.shape
    b = torch.arange(B, device=k.device)[:, None]
    n = cache_seqlens.long()[:, None] - T + torch.arange(T, device=k.device)
    S = capacity(k_cache, block_table)
    is_new = ((n >= 0) & (n < S)).flatten()
    # Without a synchronisation as many tokens must be written as there are: those to leave out
    # repeat the first that counts. If none does, they write what is there already.
    count = torch.arange(B * T, device=k.device)
    source = torch.where(is_new, count, is_new.int().argmax())
    n = n.clamp(0, S - 1)
    page, slot = b.expand(B, T), n
    if block_table is not None:
        page, slot = block_table.long().gather(1, n // k_cache.shape[1]), n % k_cache.shape[1]
        page = page.clamp(0, k_cache.shape[0] - 1)
    page, slot = page.flatten()[source], slot.flatten()[source]
    for x, cache in ((k, k_cache), (v, v_cache)):
        new = x.transpose(1, 2).flatten(0, 1)[source]
        cache[page, slot] = torch.where(is_new.any(), new, cache[page, slot])


def cpu_fwd(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
) -> None:
    """The `cpu` backend of the op."""
    cache_seqlens = cache_seqlens.contiguous()
    table = None if block_table is None else block_table.contiguous()
    for x, cache in ((k, k_cache), (v, v_cache)):
        backend.extension().kv_cache_append(  # type: ignore[union-attr]
            heads_of(x),
            x.stride(-1),
            pages_of(cache),
            cache.stride(-1),
            cpu_shape(x, cache, cache, cache_seqlens, table),
            backend.DTYPE_CODES[x.dtype],
        )


OP = backend.Op(
    "kv_cache_append",
    {
        "torch": backend.Implementation(reference_fwd),
        "cpu": backend.Implementation(cpu_fwd),
        "triton": backend.triton_implementation("kv_cache_append", forward_only=True),
    },
)


def _fwd(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
) -> None:
    check_entries("kv_cache_append", k_cache, cache_seqlens, block_table, k.shape[2])
    if k.numel() and k_cache.numel() and capacity(k_cache, block_table):
        OP.choose(k).fwd(k, v, k_cache, v_cache, cache_seqlens, block_table)
        torch.autograd.graph.increment_version((k_cache, v_cache))


def _fake_fwd(*_: torch.Tensor | None) -> None:
    pass


kv_cache_append_fwd = define(
    "kv_cache_append_fwd(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor cache_seqlens, Tensor? block_table) -> ()",
    _fwd,
    _fake_fwd,
)


def kv_cache_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = None,
) -> None:
    """cache[b, cache_seqlens[b] - T + t] = (k, v)[b, :, t], in place, for `attention_decode`.

    Args:
        k: (B, H_kv, T, D), any strides and any T; float32, bfloat16, float16 (float64 on the torch
            backend).
        v: (B, H_kv, T, Dv), in k's dtype.
        k_cache: (B, S_max, H_kv, D), or with a block table (num_pages, page_size, H_kv, D), in k's
            dtype, any strides. Written to; its elements must not overlap in memory.
        v_cache: the same but for its head dim Dv.
        cache_seqlens: int32 (B,), how many keys of each sequence are valid, the T new ones
            included. Where that is less than T, the first of the new tokens are left out: 0 is the
            length of an idle sequence.
        block_table: int32 (B, max_pages): token n of sequence b lies in page block_table[b, n //
            page_size], slot n % page_size. The pages written to must differ among sequences.

    Raises:
        TypeError: not floating point, dtypes differ, or the integers are not int32.
        ValueError: shapes that do not fit.
        IndexError: on a CPU, a length outside the cache or a page that is not there. On a GPU that
            would need a synchronisation: tokens behind the end of the cache are not written, and
            pages are the caller's to get right.
        RuntimeError: tensors on different devices; a cache that requires gradients.

    Limits:
        For inference: no gradient flows through a cache, k and v get none. They must not share
        memory with the caches: to copy tokens within a cache, clone them first.
    """
    op = "kv_cache_append"
    check_caches(op, k, "k", k_cache, v_cache, cache_seqlens, block_table)
    check_new_tokens(op, k, v, k_cache, v_cache, cache_seqlens.shape[0], k.shape[2])
    check_device(op, k.device, v=v)
    kv_cache_append_fwd(k.detach(), v.detach(), k_cache, v_cache, cache_seqlens, block_table)


def check_new_tokens(
    op: str,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    B: int,
    T: int,
) -> None:
    """Raise unless k and v are T tokens of B sequences that fit into the caches.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.
        RuntimeError: a cache that requires gradients.
    """
    check_dtypes(op, k_cache.dtype, k=k, v=v)
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expected = (B, cache.shape[2], T, cache.shape[3])
        if tuple(x.shape) != expected:
            raise ValueError(
                f"{op}: {name} must be {expected} as {name}_cache, got {tuple(x.shape)}"
            )
        if cache.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{op}: {name}_cache must not require gradients")
