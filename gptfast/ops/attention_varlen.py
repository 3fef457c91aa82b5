"""Flash attention over sequences packed one behind the other, each attending to itself alone.

Sequence b has the queries cu_seqlens_q[b] <= i < cu_seqlens_q[b + 1] and likewise its keys. The
maths of each stands in `gptfast/ops/attention.py`; its (batch, head) is (b, head).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gptfast import backend
from gptfast.ops.attention import (
    SCHEMA,
    Options,
    Tensors2,
    Tensors3,
    check_heads,
    make_options,
    reference_bwd,
    reference_fwd,
    run_backward,
    run_cpu_bwd,
    run_cpu_fwd,
    run_cuda_fwd,
    setup_context,
    why_not_cuda,
    why_not_triton,
)
from gptfast.ops.library import check_device, check_dtypes, define, statistics_dtype


def varlen_reference_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> Tensors2:
    """`attention`'s reference, sequence by sequence."""
    N, H, _ = q.shape
    o = q.new_empty(N, H, v.shape[-1])
    lse = q.new_empty(H, N, dtype=statistics_dtype(q.dtype))
    for b, rows, keys, own in _sequences(cu_seqlens_q, cu_seqlens_k, options):
        sequence = (_heads(q[rows]), _heads(k[keys]), _heads(v[keys]))
        part, part_lse = reference_fwd(*sequence, *own, first_head=b * H)
        o[rows] = part[0].transpose(0, 1)
        lse[:, rows] = part_lse[0]
    return o, lse


def varlen_reference_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *rest: Any,
) -> Tensors3:
    """`attention`'s reference backward, sequence by sequence."""
    *options, needs = rest
    grads = tuple(
        x.new_empty(x.shape if need else 0) for x, need in zip((q, k, v), needs, strict=True)
    )
    for b, rows, keys, own in _sequences(cu_seqlens_q, cu_seqlens_k, options):
        part = reference_bwd(
            *(_heads(x[at]) for x, at in ((do, rows), (q, rows), (k, keys), (v, keys), (o, rows))),
            lse[None, :, rows],
            None if dlse is None else dlse[None, :, rows],
            *own,
            needs,
            None,
            first_head=b * q.shape[1],
        )
        for grad, own_grad, at, need in zip(grads, part, (rows, keys, keys), needs, strict=True):
            if need:
                grad[at] = own_grad[0].transpose(0, 1)
    return grads  # type: ignore[return-value]


def _heads(x: torch.Tensor) -> torch.Tensor:
    """One sequence, (T, H, D), as (1, H, T, D)."""
    return x.transpose(0, 1).unsqueeze(0)


def _sequences(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, options: Sequence[Any]
) -> Iterator[tuple[int, slice, slice, Options]]:
    """Each sequence's index, queries, keys, and options with its own slopes."""
    given = Options(*options)
    slopes = given.alibi_slopes
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(ends_q) - 1):
        own = given
        if slopes is not None and slopes.dim() == 2:
            own = given._replace(alibi_slopes=slopes[b])
        yield b, slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1]), own


def varlen_cpu_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> Tensors2:
    """The `cpu` backend of the forward op."""
    N, H, _ = q.shape
    o = q.new_empty(N, H, v.shape[-1])
    lse = q.new_empty(H, N, dtype=torch.float32)
    ends = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    run_cpu_fwd(q, k, v, o, lse, Options(*options), ends)
    return o, lse


def varlen_cpu_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *rest: Any,
) -> Tensors3:
    """The `cpu` backend of the backward op."""
    *options, needs = rest
    ends = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return run_cpu_bwd(
        *(do, q, k, v, o, lse, dlse, Options(*options), needs),
        lambda x: x.new_empty(x.shape),
        ends=ends,
    )


def varlen_cuda_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> Tensors2:
    """The `cuda` backend of the forward op."""
    N, H, _ = q.shape
    o = q.new_empty(N, H, v.shape[-1])
    lse = q.new_empty(H, N, dtype=torch.float32)
    ends = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    run_cuda_fwd(q, k, v, o, lse, Options(*options), ends, max_seqlen_q, max_seqlen_k)
    return o, lse


OP = backend.Op(
    "attention_varlen",
    {
        "torch": backend.Implementation(varlen_reference_fwd, varlen_reference_bwd),
        "cpu": backend.Implementation(varlen_cpu_fwd, varlen_cpu_bwd),
        "triton": backend.triton_implementation(
            "attention_varlen", "attention", why_not=why_not_triton
        ),
        "cuda": backend.Implementation(varlen_cuda_fwd, why_not=why_not_cuda),
    },
)


def _fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> Tensors2:
    if q.device.type == "cpu":  # elsewhere reading them would be a synchronisation
        _check_values("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        _check_values("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return OP.choose(q, k, v, Options(*options)).fwd(q, k, v, *sequences, *options)


def _check_values(name: str, cu_seqlens: torch.Tensor, tokens: int, longest: int) -> None:
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    op = "attention_varlen"
    if ends[0] != 0:
        raise ValueError(f"{op}: {name} must start at 0, got {ends[0]}")
    if ends[-1] != tokens:
        raise ValueError(f"{op}: {name} must end at the {tokens} tokens, got {ends[-1]}")
    if lengths and min(lengths) < 0:
        at = next(b for b, length in enumerate(lengths) if length < 0)
        pair = f"{ends[at]} before {ends[at + 1]} at position {at}"
        raise ValueError(f"{op}: {name} must not decrease, got {pair}")
    if lengths and max(lengths) > longest:
        maximum = name.replace("cu_seqlens", "max_seqlen")
        raise ValueError(f"{op}: {maximum} must be at least {max(lengths)}, got {longest}")


def _bwd(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> Tensors3:
    options = Options(*rest[-1 - len(Options._fields) : -1])
    return OP.choose_bwd(q, k, v, options).bwd(do, q, k, v, *rest)


def _fake_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Tensors2:
    N, H, _D = q.shape
    return q.new_empty(N, H, v.shape[-1]), q.new_empty(H, N, dtype=statistics_dtype(q.dtype))


def _fake_bwd(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> Tensors3:
    return tuple(  # type: ignore[return-value]
        x.new_empty(x.shape if need else 0) for x, need in zip((q, k, v), rest[-1], strict=True)
    )


SEQUENCES = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
attention_varlen_bwd = define(
    "attention_varlen_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    f" Tensor? dlse, {SEQUENCES}, {SCHEMA}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
attention_varlen_fwd = define(
    f"attention_varlen_fwd(Tensor q, Tensor k, Tensor v, {SEQUENCES}, {SCHEMA})"
    " -> (Tensor, Tensor)",
    _fwd,
    _fake_fwd,
    backward=lambda ctx, do, dlse: run_backward(attention_varlen_bwd, ctx, do, dlse),
    setup_context=setup_context,
    autocast=("q", "k", "v"),
)


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    window: Sequence[int] | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """o = softmax(scale q k^T) v for each head of each of B sequences, packed without padding.

    Args:
        q: (N, H, D), the N query tokens of all sequences, any strides; float32, bfloat16, float16
            (float64 on the torch backend).
        k: (N_k, H_kv, D), in q's dtype. H_kv divides H.
        v: (N_k, H_kv, Dv), in q's dtype.
        cu_seqlens_q: (B + 1,) int32 on q's device: sequence b has the queries cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] - 1. It starts at 0, ends at N and does not decrease.
        cu_seqlens_k: (B + 1,) int32, likewise for the keys.
        max_seqlen_q: length of the longest sequence of queries, or more.
        max_seqlen_k: of keys.
        causal: as in `attention`, with the lengths T and S of each sequence.
        scale: as in `attention`.
        dropout_p: as in `attention`.
        seed: as in `attention`.
        window: as in `attention`.
        softcap: as in `attention`.
        alibi_slopes: as in `attention`.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        o (N, H, Dv) in q's dtype, contiguous. A query that may see no key gets zeros. With
        return_lse a tuple (o, lse): lse is (H, N), float32, and differentiable.

    Raises:
        TypeError: not floating point, dtypes differ, or cu_seqlens that are not int32.
        ValueError: shapes that do not fit, or an option outside its range. On a CPU also
            cu_seqlens that do not start at 0, end at the number of tokens, or that decrease, and
            a max_seqlen that is too small.
        RuntimeError: tensors on different devices; a backend is forced that cannot run the call.

    Limits:
        On a GPU the values of cu_seqlens are not checked, which would make the host wait: with
        wrong ones, or a max_seqlen below the longest sequence, the results are undefined. Head dims
        over 256 run on the PyTorch reference on a GPU, sequence by sequence.

    Source: Dao, "FlashAttention-2", 2023.
    """
    op = "attention_varlen"
    check_heads(op, ("N, H", "N_k, H_kv"), q, k, v)
    if k.shape[:-1] != v.shape[:-1] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{op}: k must be (N_k, H_kv, {q.shape[-1]}) and v (N_k, H_kv, Dv), "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    cu_seqlens = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    check_dtypes(op, torch.int32, **cu_seqlens)
    check_device(op, q.device, **cu_seqlens)
    shapes = tuple(cu_seqlens_q.shape), tuple(cu_seqlens_k.shape)
    for name, n in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(n, (float, torch.Tensor)):
            raise TypeError(f"attention_varlen: {name} must be an integer, got {n!r}")
    if cu_seqlens_q.dim() != 1 or shapes[0] != shapes[1] or shapes[0] == (0,):
        raise ValueError(
            f"{op}: cu_seqlens_q and cu_seqlens_k must both be (B + 1,), "
            f"got {shapes[0]} and {shapes[1]}"
        )
    options = make_options(
        op, shapes[0][0] - 1, q, causal, scale, dropout_p, seed, window, softcap, alibi_slopes
    )
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    o, lse = attention_varlen_fwd(q, k, v, *sequences, *options)
    return (o, lse) if return_lse else o
