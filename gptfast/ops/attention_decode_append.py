"""A decoding step's attention in one: rotate, append to the cache, attend to it.

q', k' = rope(q, k; cos, sin)                    (without cos and sin: q, k)
kv_cache_append(k', v, k_cache, v_cache)
o, lse = attention_decode(q', k_cache, v_cache)

The maths of each stands in its own file. k', and so q', is rounded to the storage dtype, since that
is what a cache holds. The CUDA kernel does all three in one launch, in two where keys are visited
in parts; other backends run their kernels one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gptfast import backend
from gptfast.ops.attention import make_options
from gptfast.ops.attention import why_not_cuda as why_not_cuda_heads
from gptfast.ops.attention_decode import OP as DECODE
from gptfast.ops.attention_decode import (
    Tensors2,
    capacity,
    check_caches,
    check_entries,
    check_queries,
    run_cuda_fwd,
)
from gptfast.ops.attention_decode import why_not_cuda as why_not_cuda_decode
from gptfast.ops.kv_cache_append import OP as APPEND
from gptfast.ops.kv_cache_append import check_new_tokens
from gptfast.ops.layout import empty_output, heads_of
from gptfast.ops.library import check_device, define, statistics_dtype
from gptfast.ops.rope import OP as ROPE
from gptfast.ops.rope import check_tables


def _in_turns(name: str) -> Callable[..., Tensors2]:
    """The forward op as the kernels of three ops of one backend."""

    def fwd(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        cache_seqlens: torch.Tensor,
        block_table: torch.Tensor | None,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None,
        interleaved: bool,
        *options: Any,
    ) -> Tensors2:
        rope, append, decode = (op.implementations[name].fwd for op in (ROPE, APPEND, DECODE))
        where = cache_seqlens, block_table
        if cos is not None:
            q, k = rope(q, k, cos, sin, interleaved)
        if k.numel() and k_cache.numel() and capacity(k_cache, block_table):
            append(k, v, k_cache, v_cache, *where)
        return decode(q, k_cache, v_cache, *where, alibi_slopes, *options)

    return fwd


def cuda_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    interleaved: bool,
    *options: Any,
) -> Tensors2:
    """The `cuda` backend of the forward op."""
    turns: tuple[Any, ...] = (0, 0, 0, 0, False)
    if cos is not None and sin is not None:
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        stride_b = cos.stride(0) if cos.dim() == 3 else 0
        turns = cos.data_ptr(), sin.data_ptr(), stride_b, cos.shape[-1], interleaved
    new_tokens = (heads_of(k), heads_of(v), *turns)
    where = cache_seqlens, block_table, alibi_slopes
    return run_cuda_fwd(q, k_cache, v_cache, new_tokens, *where, *options)


def why_not_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    refuses = DECODE.implementations["triton"].why_not
    return refuses and refuses(q, k_cache, v_cache)


def why_not_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> str | None:
    """Why the CUDA kernel cannot take this call, or None: see that of `attention`."""
    return why_not_cuda_heads(q, k, v) or why_not_cuda_decode(q, k_cache, v_cache)


OP = backend.Op(
    "attention_decode_append",
    {
        "torch": backend.Implementation(_in_turns("torch")),
        "cpu": backend.Implementation(_in_turns("cpu")),
        "triton": backend.Implementation(_in_turns("triton"), why_not=why_not_triton),
        "cuda": backend.Implementation(cuda_fwd, why_not=why_not_cuda),
    },
)


def _fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    interleaved: bool,
    scale: float,
    left: int,
    softcap: float,
) -> Tensors2:
    used = None if left < 0 else left + q.shape[2]
    check_entries("attention_decode_append", k_cache, cache_seqlens, block_table, used)
    results = OP.choose(q, k, v, k_cache, v_cache).fwd(
        *(q, k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin, alibi_slopes),
        *(interleaved, scale, left, softcap),
    )
    torch.autograd.graph.increment_version((k_cache, v_cache))
    return results


def _fake_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: torch.Tensor | None
) -> Tensors2:
    o = empty_output(q, v.shape[-1])
    return o, q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))


attention_decode_append_fwd = define(
    "attention_decode_append_fwd(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache,"
    " Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? block_table, Tensor? cos, Tensor? sin,"
    " Tensor? alibi_slopes, bool interleaved, float scale, int left, float softcap)"
    " -> (Tensor, Tensor)",
    _fwd,
    _fake_fwd,
)


def attention_decode_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
    scale: float | None = None,
    window: Sequence[int] | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """o = softmax(scale q' k'^T) v of 1 to 16 new tokens a sequence, which join the cache first.

    Args:
        q: (B, H, T, D), as in `attention_decode`.
        k: (B, H_kv, T, D), the keys of the new tokens, any strides, in q's dtype.
        v: (B, H_kv, T, Dv), their values.
        k_cache: as in `attention_decode`. Written to: token t of sequence b becomes its token
            cache_seqlens[b] - T + t, see `kv_cache_append`.
        v_cache: the same but for its head dim Dv.
        cache_seqlens: int32 (B,), how many keys of each sequence are valid, the new ones included.
        block_table: as in `attention_decode`. The pages written to must differ among sequences.
        cos: (T, R/2), or (B, T, R/2), of the new tokens' positions, to turn q and k by, see `rope`;
            None: they are not turned.
        sin: of cos's shape, or None as cos.
        interleaved: as in `rope`.
        scale: as in `attention_decode`.
        window: as in `attention_decode`.
        softcap: as in `attention_decode`.
        alibi_slopes: as in `attention_decode`.
        return_lse: as in `attention_decode`.

    Returns:
        As `attention_decode`.

    Raises:
        TypeError: as in `attention_decode`, `kv_cache_append` and `rope`.
        ValueError: as there, or one of cos and sin without the other.
        IndexError: as there.
        RuntimeError: tensors on different devices; a backend is forced that cannot run the call;
            differentiation, or a cache that requires gradients, since this is for inference.

    Limits:
        As `attention_decode` and `kv_cache_append`.

    Source: as `attention_decode` and `rope`.
    """
    op = "attention_decode_append"
    check_caches(op, q, "q", k_cache, v_cache, cache_seqlens, block_table)
    check_queries(op, q, k_cache)
    check_new_tokens(op, k, v, k_cache, v_cache, q.shape[0], q.shape[2])
    check_device(op, q.device, k=k, v=v)
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: cos and sin must be given together, or neither")
    if cos is not None and sin is not None:
        check_tables(op, q, cos, sin)
    options = make_options(op, q.shape[0], q, True, scale, 0.0, None, window, softcap, alibi_slopes)
    o, lse = attention_decode_append_fwd(
        *(q, k.detach(), v.detach(), k_cache, v_cache, cache_seqlens, block_table, cos, sin),
        *(options.alibi_slopes, interleaved, options.scale, options.left, options.softcap),
    )
    return (o, lse) if return_lse else o
