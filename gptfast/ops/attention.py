"""Flash attention: o = dropout(softmax(scale q k^T + mask)) v, never holding the T x S scores.

s_ij = scale q_i . k_j,  causal: j <= i + S - T (the last query sees every key)
lse_i = log sum_j exp(s_ij),  p_ij = exp(s_ij - lse_i),  o_i = sum_j p_ij z_ij v_j

z_ij is 1, or with dropout keep_ij / (1 - p). Rows that may see no key have o = 0 and lse = -inf.
Backward, with delta_i = do_i . o_i:

dv_j = sum_i p_ij z_ij do_i
ds_ij = p_ij (z_ij do_i . v_j - delta_i)
dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i

The mask of dropout is that of `gptfast/ops/philox.py`, with the index of (batch, head) as head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from gptfast import backend
from gptfast.ops.library import (
    check_device,
    check_dtypes,
    check_floating,
    check_shape,
    define,
    statistics_dtype,
)
from gptfast.ops.philox import dropout_factors, dropout_threshold

Tensors2 = tuple[torch.Tensor, torch.Tensor]
Tensors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
REFERENCE_ROWS = 128  # queries that the reference handles at a time: scores take B H 128 S elements


def reference_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensors2:
    """The formula in PyTorch."""
    dtype = statistics_dtype(q.dtype)
    B, H, T, _ = q.shape
    kf, vf = (x.to(dtype).repeat_interleave(H // k.shape[1], 1) for x in (k, v))
    o = empty_output(q)
    lse = q.new_empty(B, H, T, dtype=dtype)
    for rows, scores, z in _score_rows(q, kf, seed, causal, scale, dropout_p):
        lse[:, :, rows] = torch.logsumexp(scores, -1)
        p = _probabilities(scores, lse[:, :, rows])
        o[:, :, rows] = ((p if z is None else p * z) @ vf).to(q.dtype)
    return o, lse


def reference_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> Tensors3:
    """The gradient formulas in PyTorch."""
    dtype = statistics_dtype(q.dtype)
    G = q.shape[1] // k.shape[1]
    kf, vf = (x.to(dtype).repeat_interleave(G, 1) for x in (k, v))
    dof = do.to(dtype)
    delta = (dof * o.to(dtype)).sum(-1, keepdim=True)
    dq, dk, dv = empty_output(q), torch.zeros_like(kf), torch.zeros_like(vf)
    for rows, scores, z in _score_rows(q, kf, seed, causal, scale, dropout_p):
        p = _probabilities(scores, lse[:, :, rows])
        pz = p if z is None else p * z
        dv += pz.transpose(-1, -2) @ dof[:, :, rows]
        dp = dof[:, :, rows] @ vf.transpose(-1, -2)
        ds = p * ((dp if z is None else dp * z) - delta[:, :, rows])
        dq[:, :, rows] = (ds @ kf * scale).to(q.dtype)
        dk += ds.transpose(-1, -2) @ q[:, :, rows].to(dtype) * scale
    dk, dv = (
        _like_output(g.unflatten(1, (k.shape[1], G)).sum(2).to(x.dtype))
        for g, x in ((dk, k), (dv, v))
    )
    return tuple(  # type: ignore[return-value]
        g if need else g.new_empty(0) for g, need in zip((dq, dk, dv), needs, strict=True)
    )


def _score_rows(
    q: torch.Tensor,
    kf: torch.Tensor,
    seed: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """Blocks of query rows with their masked scores (B, H, rows, S) and dropout factors."""
    B, H, T, _ = q.shape
    S = kf.shape[2]
    j = torch.arange(S, device=q.device)
    for start in range(0, T, REFERENCE_ROWS):
        rows = slice(start, min(start + REFERENCE_ROWS, T))
        i = torch.arange(rows.start, rows.stop, device=q.device)
        scores = q[:, :, rows].to(kf.dtype) @ kf.transpose(-1, -2) * scale
        if causal:
            scores = scores.masked_fill(j > i[:, None] + S - T, -math.inf)
        z = None
        if dropout_p > 0 and seed is not None:
            head = torch.arange(B * H, device=q.device)
            z = dropout_factors(seed, head[:, None, None], i[:, None], j, dropout_p, kf.dtype)
            z = z.reshape(B, H, len(i), S)
        yield rows, scores, z


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, math.inf).unsqueeze(-1))


def empty_output(q: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) lying in memory as (B, T, H, D): merging the heads afterwards copies nothing."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def _like_output(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def cpu_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensors2:
    """The `cpu` backend of the forward op."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    B, H, T, D = q.shape
    o = empty_output(q)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    backend.extension().attention_fwd(  # type: ignore[union-attr]
        _heads(q),
        _heads(k),
        _heads(v),
        _heads(o),
        lse.data_ptr(),
        (B, H, k.shape[1], T, k.shape[2], D),
        (causal, scale, dropout_threshold(dropout_p), 0 if seed is None else int(seed)),
        backend.DTYPE_CODES[q.dtype],
    )
    return o, lse


def cpu_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> Tensors3:
    """The `cpu` backend of the backward op."""
    do, q, k, v, o = (unit_stride(x) for x in (do, q, k, v, o))
    lse = lse.contiguous()
    B, H, T, D = q.shape
    empty = q.new_empty(0)
    dq = empty_output(q) if needs[0] else empty
    dk, dv = (empty_output(k), empty_output(v)) if needs[1] or needs[2] else (empty, empty)
    nothing = (0, 0, 0, 0)
    backend.extension().attention_bwd(  # type: ignore[union-attr]
        _heads(do),
        _heads(q),
        _heads(k),
        _heads(v),
        _heads(o),
        lse.data_ptr(),
        _heads(dq) if needs[0] else nothing,
        _heads(dk) if needs[1] or needs[2] else nothing,
        _heads(dv) if needs[1] or needs[2] else nothing,
        (B, H, k.shape[1], T, k.shape[2], D),
        (causal, scale, dropout_threshold(dropout_p), 0 if seed is None else int(seed)),
        backend.DTYPE_CODES[q.dtype],
    )
    return dq, dk if needs[1] else empty, dv if needs[2] else empty


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x with a contiguous last dimension, the only one whose stride kernels do not take."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _heads(x: torch.Tensor) -> tuple[int, int, int, int]:
    return (x.data_ptr(), *x.stride()[:3])  # type: ignore[return-value]


OP = backend.Op(
    "attention",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("attention"),
    },
)


def _fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Tensors2:
    return OP.choose(q, k, v).fwd(q, k, v, *options)


def _bwd(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> Tensors3:
    return OP.choose(q, k, v).bwd(do, q, k, v, *rest)


def _fake_fwd(q: torch.Tensor, *_: Any) -> Tensors2:
    return empty_output(q), q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))


def _fake_bwd(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> Tensors3:
    needs = rest[-1]
    return tuple(  # type: ignore[return-value]
        empty_output(x) if need else x.new_empty(0)
        for x, need in zip((q, k, v), needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors2) -> None:
    q, k, v, seed, *ctx.options = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse, seed)


def _backward(ctx: Any, do: torch.Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, o, lse, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1:4])
    grads = attention_bwd(do, q, k, v, o, lse, seed, *ctx.options, needs)
    dq, dk, dv = (g if need else None for g, need in zip(grads, needs, strict=True))
    return None, dq, dk, dv, None, None, None, None


attention_bwd = define(
    "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? seed,"
    " bool causal, float scale, float dropout_p, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
attention_fwd = define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? seed, bool causal, float scale,"
    " float dropout_p) -> (Tensor, Tensor)",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
    autocast=("q", "k", "v"),
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """o = softmax(scale q k^T) v for each head, without storing the scores.

    Args:
        q: (B, H, T, D), any strides; float32, bfloat16, float16 (float64 on the torch backend).
        k: (B, H_kv, S, D), in q's dtype. H_kv divides H: each key head serves H / H_kv query heads.
        v: (B, H_kv, S, D).
        causal: query i sees the keys j <= i + S - T. With T = S that is the usual triangle; with a
            KV cache (T < S) the last query sees every key. Note that PyTorch's `is_causal` aligns
            the triangle to the first key instead.
        scale: factor of the scores; None means 1 / sqrt(D).
        dropout_p: probability of dropping a score, in [0, 1).
        seed: int64 scalar tensor that determines the dropout mask; None draws one from PyTorch's
            generator, so `torch.manual_seed` decides.

    Returns:
        (B, H, T, D) in q's dtype, laid out as (B, T, H, D) so that merging the heads copies
        nothing. A query that may see no key gets zeros. Under autocast q, k and v are cast to its
        dtype.

    Raises:
        TypeError: not floating point, or dtypes differ.
        ValueError: shapes that do not fit, or dropout_p outside [0, 1).
        RuntimeError: tensors on different devices.

    Limits:
        Extra memory is O(B H T) for the log-sum-exp; backward on a CPU takes 16 S D bytes a thread,
        which the thread keeps for its next call.

    Source: Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating("attention", name, x)
        if x.dim() != 4:
            raise ValueError(f"attention: {name} must be (B, H, T, D), got {tuple(x.shape)}")
    # Autocast makes one dtype of several, but leaves float64 alone, as PyTorch's own does.
    casts = torch.is_autocast_enabled(q.device.type)
    if not casts or torch.float64 in (q.dtype, k.dtype, v.dtype):
        check_dtypes("attention", q.dtype, k=k, v=v)
    if seed is not None and (not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64):
        given = seed.dtype if isinstance(seed, torch.Tensor) else type(seed).__name__
        raise TypeError(f"attention: seed must be an int64 scalar tensor, got {given}")
    check_shape("attention", "seed", seed, ())
    check_device("attention", q.device, k=k, v=v, seed=seed)
    B, H, _, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    if tuple(k.shape) != (B, H_kv, S, D) or k.shape != v.shape:
        raise ValueError(
            f"attention: k and v must both be ({B}, H_kv, S, {D}), "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"attention: key heads must divide {H} query heads, got {H_kv}")
    if D == 0:
        raise ValueError("attention: head dim must be at least 1, got 0")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0 and seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)
    scale = 1 / math.sqrt(D) if scale is None else scale
    return attention_fwd(q, k, v, seed if dropout_p > 0 else None, causal, scale, dropout_p)[0]
