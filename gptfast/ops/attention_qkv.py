"""Self-attention on packed projections: y = merge(attention(q, k, v)) with [q | k | v] = qkv.

qkv (B, T, (H + 2 H_kv) D) holds a token's query heads, then its key heads, then its value heads, as
one linear layer makes them; y is (B, T, H D). Maths and kernels are those of `attention`. What is
gained is in backward: the kernels write dq, dk and dv where they lie in dqkv, so that no pass over
memory joins them; and q, k and v are no tensors that autograd has to follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gptfast import backend
from gptfast.ops.attention import OP as ATTENTION
from gptfast.ops.attention import SCHEMA, Options, Tensors2, Tensors3, make_options
from gptfast.ops.library import check_floating, define, statistics_dtype


def split_heads(qkv: torch.Tensor, n_head: int, n_kv_head: int) -> Tensors3:
    """q (B, H, T, D), k and v (B, H_kv, T, D): views of qkv."""
    joined = _by_head(qkv, n_head + 2 * n_kv_head)
    return joined.split((n_head, n_kv_head, n_kv_head), dim=1)


def _by_head(x: torch.Tensor, n_head: int) -> torch.Tensor:
    """(B, T, H D) as (B, H, T, D)."""
    return x.unflatten(-1, (n_head, x.shape[-1] // n_head)).transpose(1, 2)


def _packed(implementation: backend.Implementation) -> backend.Implementation:
    """An implementation of `attention`, which takes q, k and v with any strides, on qkv."""

    def fwd(qkv: torch.Tensor, n_head: int, n_kv_head: int, *options: Any) -> Tensors2:
        o, lse = implementation.fwd(*split_heads(qkv, n_head, n_kv_head), *options)
        return o.transpose(1, 2).flatten(2), lse

    def bwd(
        dy: torch.Tensor,
        qkv: torch.Tensor,
        y: torch.Tensor,
        lse: torch.Tensor,
        n_head: int,
        n_kv_head: int,
        *options: Any,
    ) -> torch.Tensor:
        dqkv = qkv.new_empty(qkv.shape)
        implementation.bwd(
            _by_head(dy, n_head),
            *split_heads(qkv, n_head, n_kv_head),
            _by_head(y, n_head),
            lse,
            None,
            *options,
            [True, True, True],
            split_heads(dqkv, n_head, n_kv_head),
        )
        return dqkv

    def why_not(
        qkv: torch.Tensor, n_head: int = 1, n_kv_head: int = 1, options: Options | None = None
    ) -> str | None:
        refuses = implementation.why_not
        return refuses and refuses(*split_heads(qkv, n_head, n_kv_head), options)

    if implementation.bwd is backend.no_backward:
        return backend.Implementation(fwd, why_not=why_not)
    return backend.Implementation(fwd, bwd, why_not)


OP = backend.Op(
    "attention_qkv", {name: _packed(of) for name, of in ATTENTION.implementations.items()}
)


def _fwd(qkv: torch.Tensor, n_head: int, n_kv_head: int, *options: Any) -> Tensors2:
    implementation = OP.choose(qkv, n_head, n_kv_head, Options(*options))
    return implementation.fwd(qkv, n_head, n_kv_head, *options)


def _bwd(
    dy: torch.Tensor,
    qkv: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    n_head: int,
    n_kv_head: int,
    *options: Any,
) -> torch.Tensor:
    implementation = OP.choose_bwd(qkv, n_head, n_kv_head, Options(*options))
    return implementation.bwd(dy, qkv, y, lse, n_head, n_kv_head, *options)


def _fake_fwd(qkv: torch.Tensor, n_head: int, n_kv_head: int, *_: Any) -> Tensors2:
    B, T, columns = qkv.shape
    D = columns // (n_head + 2 * n_kv_head)
    lse = qkv.new_empty(B, n_head, T, dtype=statistics_dtype(qkv.dtype))
    return qkv.new_empty(B, T, n_head * D), lse


def _fake_bwd(dy: torch.Tensor, qkv: torch.Tensor, *_: Any) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors2) -> None:
    qkv, n_head, n_kv_head, seed, alibi_slopes, *numbers = inputs
    ctx.heads, ctx.numbers = (n_head, n_kv_head), numbers
    ctx.save_for_backward(qkv, *output, seed, alibi_slopes)


def _backward(ctx: Any, dy: torch.Tensor, _: torch.Tensor | None) -> tuple[Any, ...]:
    qkv, y, lse, seed, slopes = ctx.saved_tensors
    dqkv = attention_qkv_bwd(dy, qkv, y, lse, *ctx.heads, seed, slopes, *ctx.numbers)
    return None, dqkv, None, None, *(None for _ in Options._fields)


attention_qkv_bwd = define(
    "attention_qkv_bwd(Tensor dy, Tensor qkv, Tensor y, Tensor lse, int n_head, int n_kv_head,"
    f" {SCHEMA}) -> Tensor",
    _bwd,
    _fake_bwd,
)
attention_qkv_fwd = define(
    f"attention_qkv_fwd(Tensor qkv, int n_head, int n_kv_head, {SCHEMA}) -> (Tensor, Tensor)",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
    autocast=("qkv",),
)


def attention_qkv(
    qkv: torch.Tensor,
    n_head: int,
    n_kv_head: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    window: Sequence[int] | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_h = softmax(scale q_h k_h^T) v_h for each head h of qkv = [q | k | v], side by side in y.

    Args:
        qkv: (B, T, (H + 2 H_kv) D), any strides; float32, bfloat16, float16 (float64 on the torch
            backend).
        n_head: H, how many query heads.
        n_kv_head: H_kv, how many key heads, and value heads; divides H. None means H.
        causal, scale, dropout_p, seed, window, softcap, alibi_slopes: as in `attention`.

    Returns:
        y (B, T, H D), contiguous, in qkv's dtype, or in autocast's.

    Raises:
        TypeError: not floating point.
        ValueError: shapes that do not fit, or an option outside its range.
        RuntimeError: tensors on different devices; a backend is forced that cannot run the call.

    Limits:
        Those of `attention`. On a GPU the gradients of head dims that are no multiple of 16 bytes
        are made apart and then copied into that of qkv.

    Source: as `attention`.
    """
    op = "attention_qkv"
    n_kv_head = n_head if n_kv_head is None else n_kv_head
    check_floating(op, "qkv", qkv)
    if n_head < 1 or n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(f"{op}: key heads must divide {n_head} query heads, got {n_kv_head}")
    count = n_head + 2 * n_kv_head
    if qkv.dim() != 3 or not qkv.shape[-1] or qkv.shape[-1] % count:
        raise ValueError(f"{op}: qkv must be (B, T, {count} D), got {tuple(qkv.shape)}")
    q = split_heads(qkv, n_head, n_kv_head)[0]
    options = make_options(
        op, qkv.shape[0], q, causal, scale, dropout_p, seed, window, softcap, alibi_slopes
    )
    return attention_qkv_fwd(qkv, n_head, n_kv_head, *options)[0]
