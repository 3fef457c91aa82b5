"""Embedding: y_m = w_t, the row of the weight that token t = idx_m names.

Backward, dw_v = sum of the dy_m with idx_m = v, in fp32 and rounded once; the row `padding_idx`
gets none.
"""

from __future__ import annotations

from typing import Any

import torch

from gptfast import backend
from gptfast.ops.library import check_device, check_floating, define, statistics_dtype

NO_PADDING = -1  # padding_idx of the registered ops, where none is given


def reference_fwd(weight: torch.Tensor, idx: torch.Tensor, padding_idx: int) -> torch.Tensor:
    """The formula in PyTorch."""
    check_tokens(idx, weight.shape[0])
    return weight.index_select(0, idx.reshape(-1)).view(*idx.shape, weight.shape[1])


def reference_bwd(dy: torch.Tensor, idx: torch.Tensor, V: int, padding_idx: int) -> torch.Tensor:
    """The gradient formula in PyTorch, by the one sum over tokens that is always deterministic."""
    if not dy.numel():  # with no columns, PyTorch's kernel for GPUs writes to what is not there
        return dy.new_zeros(V, dy.shape[-1])
    dyf = dy.to(statistics_dtype(dy.dtype))
    dw = torch.ops.aten.embedding_dense_backward(dyf, idx, V, padding_idx, False)
    return dw.to(dy.dtype)


def check_tokens(idx: torch.Tensor, V: int) -> None:
    """On a CPU, raise IndexError naming the first token outside [0, V).

    Elsewhere the look would wait for the device; kernels make such a token's row NaN.
    """
    if idx.device.type != "cpu" or idx.numel() == 0:
        return
    low, high = idx.aminmax()
    if low < 0 or high >= V:
        flat = idx.reshape(-1)
        at = int(((flat < 0) | (flat >= V)).nonzero()[0])
        raise IndexError(
            f"embedding: tokens must be in [0, {V}), got {int(flat[at])} at position {at}"
        )


def cpu_fwd(weight: torch.Tensor, idx: torch.Tensor, padding_idx: int) -> torch.Tensor:
    """The `cpu` backend of the forward op."""
    weight, tokens = weight.contiguous(), idx.to(torch.int64).contiguous()
    V, C = weight.shape
    y = weight.new_empty(*idx.shape, C)
    first_wrong = backend.extension().embedding_fwd(  # type: ignore[union-attr]
        weight.data_ptr(),
        tokens.data_ptr(),
        y.data_ptr(),
        tokens.numel(),
        V,
        C * weight.element_size(),
    )
    if first_wrong < tokens.numel():
        check_tokens(idx, V)
    return y


def cpu_bwd(dy: torch.Tensor, idx: torch.Tensor, V: int, padding_idx: int) -> torch.Tensor:
    """The `cpu` backend of the backward op."""
    dy, idx = dy.contiguous(), idx.to(torch.int64).contiguous()
    C = dy.shape[-1]
    dw = dy.new_empty(V, C)
    backend.extension().embedding_bwd(  # type: ignore[union-attr]
        dy.data_ptr(),
        idx.data_ptr(),
        dw.data_ptr(),
        idx.numel(),
        C,
        V,
        padding_idx,
        backend.DTYPE_CODES[dy.dtype],
    )
    return dw


OP = backend.Op(
    "embedding",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("embedding"),
    },
)


def _fwd(weight: torch.Tensor, idx: torch.Tensor, padding_idx: int) -> torch.Tensor:
    return OP.choose(weight).fwd(weight, idx, padding_idx)


def _bwd(dy: torch.Tensor, idx: torch.Tensor, V: int, padding_idx: int) -> torch.Tensor:
    return OP.choose(dy).bwd(dy, idx, V, padding_idx)


def _fake_fwd(weight: torch.Tensor, idx: torch.Tensor, padding_idx: int) -> torch.Tensor:
    return weight.new_empty(*idx.shape, weight.shape[1])


def _fake_bwd(dy: torch.Tensor, idx: torch.Tensor, V: int, padding_idx: int) -> torch.Tensor:
    return dy.new_empty(V, dy.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    weight, idx, ctx.padding_idx = inputs
    ctx.V = weight.shape[0]
    ctx.save_for_backward(idx)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    (idx,) = ctx.saved_tensors
    return None, embedding_bwd(dy, idx, ctx.V, ctx.padding_idx), None, None


embedding_bwd = define(
    "embedding_bwd(Tensor dy, Tensor idx, SymInt V, int padding_idx) -> Tensor", _bwd, _fake_bwd
)
embedding_fwd = define(
    "embedding_fwd(Tensor weight, Tensor idx, int padding_idx) -> Tensor",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
)


def embedding(
    idx: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None
) -> torch.Tensor:
    """y = weight[idx]: one row of the weight per token.

    Args:
        idx: tokens in [0, V), any shape and strides; int64 or int32.
        weight: (V, C); float32, bfloat16, float16 (float64 on the torch backend).
        padding_idx: a row that gets no gradient, in [-V, V); None for no such row.

    Returns:
        (*idx.shape, C) in weight's dtype, contiguous.

    Raises:
        TypeError: idx is not int64 or int32, or weight is not floating point.
        ValueError: weight is not (V, C), or padding_idx is outside [-V, V).
        RuntimeError: idx is on another device than weight.
        IndexError: a token outside [0, V), on a CPU. On a GPU, where a look would wait for the
            card, its row of y is NaN, and backward leaves it out.

    Limits:
        The weight's gradient is dense, (V, C). It is summed without atomics, in the same order
        every time, for which the tokens are sorted. On a CPU a weight that is not contiguous, such
        as a slice of wider rows, is copied whole in forward.
    """
    check_floating("embedding", "weight", weight)
    if not isinstance(idx, torch.Tensor):
        raise TypeError(f"embedding: idx must be a torch.Tensor, got {type(idx).__name__}")
    if idx.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding: idx must be int64 or int32 tokens, got {idx.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight must be (V, C), got {tuple(weight.shape)}")
    check_device("embedding", weight.device, idx=idx)
    if padding_idx is None:
        return embedding_fwd(weight, idx, NO_PADDING)
    V = weight.shape[0]
    if not -V <= padding_idx < V:
        raise ValueError(f"embedding: padding_idx must be in [{-V}, {V}), got {padding_idx}")
    return embedding_fwd(weight, idx, padding_idx % V)
