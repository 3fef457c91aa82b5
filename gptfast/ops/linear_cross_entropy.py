"""Cross-entropy of the logits x w^T + b, which are never stored all at once.

x (M, C), w (V, C), b (V,), target classes t (M,), a loss per row; losses and dlogits as in
`gptfast/ops/cross_entropy.py`. Backward:

dx = dlogits w,   dw = dlogits^T x,   db_j = sum_i dlogits_ij

Forward keeps the log-sum-exp of every row and nothing else; backward computes the logits again,
chunk by chunk. That is 8 M V C operations instead of 6, for 2 M V numbers less of memory.

A mean or a sum has one dloss for all rows, known but for a factor before backward. Where chunks are
products of PyTorch's in full precision, forward then makes the gradients too while it has a chunk's
logits (`_total`): 6 M V C operations, and backward only multiplies by that factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gptfast import backend
from gptfast.ops.cross_entropy import OP as CROSS_ENTROPY
from gptfast.ops.cross_entropy import check_targets, checked_loss_arguments, counted, reduced
from gptfast.ops.library import (
    call_in_tiles,
    check_device,
    check_dtypes,
    check_floating,
    check_shape,
    define,
    fp32_parameter,
    has_tiles,
    in_tiles,
    plain_eager,
    pointer,
    product_dtype,
    statistics_dtype,
)

Tensors2 = tuple[torch.Tensor, torch.Tensor]
Tensors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Tensors4 = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Logits in a chunk: 64 MiB of fp32. Of GPT-2's vocabulary that is 333 rows, which are enough for a
# product to run at the processor's full rate.
CHUNK = 2**24

FULL = (torch.float32, torch.float64)


def _chunks(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Chunks of rows and their logits, all in the same memory: the next one overwrites it."""
    M, V = x.shape[0], w.shape[0]
    size = min(M, max(1, CHUNK // max(V, 1)))
    memory = x.new_empty(size, V)
    for start in range(0, M, max(size, 1)):
        rows = slice(start, min(start + size, M))
        logits = memory[: rows.stop - start]
        if b is None:
            torch.mm(x[rows], w.mT, out=logits)
        else:
            torch.addmm(b, x[rows], w.mT, out=logits)
        yield rows, logits


class _Gradients:
    """dx, dw and db, of those that are needed, from chunks of dlogits."""

    def __init__(self, x: torch.Tensor, w: torch.Tensor, needs: list[bool]) -> None:
        self.x, self.w, self.needs = x, w, needs
        self.sums = statistics_dtype(x.dtype)
        self.dx = x.new_empty(x.shape if needs[0] else 0)
        self.dw = w.new_zeros(w.shape if needs[1] else 0, dtype=self.sums)
        self.db = w.new_zeros(w.shape[0] if needs[2] else 0, dtype=self.sums)

    def add(self, rows: slice, dlogits: torch.Tensor) -> None:
        if self.needs[0]:
            torch.mm(dlogits, self.w, out=self.dx[rows])
        if self.needs[1] and self.x.dtype == self.sums:
            self.dw.addmm_(dlogits.mT, self.x[rows])
        elif self.needs[1]:
            self.dw += dlogits.mT @ self.x[rows]
        if self.needs[2]:
            self.db += dlogits.sum(0, dtype=self.sums)

    def all(self) -> Tensors3:
        return self.dx, self.dw.to(self.w.dtype), self.db.to(self.w.dtype)


def _chunked(losses: backend.Implementation) -> backend.Implementation:
    """Both passes by PyTorch's products and one backend of cross_entropy, on chunks of rows."""

    def fwd(
        x: torch.Tensor,
        w: torch.Tensor,
        target: torch.Tensor,
        b: torch.Tensor | None,
        class_weight: torch.Tensor | None,
        ignore_index: int,
        *options: Any,
    ) -> Tensors2:
        _check_targets(x, w, target, ignore_index)
        loss = x.new_empty(x.shape[0], dtype=statistics_dtype(x.dtype))
        lse = torch.empty_like(loss)
        for rows, logits in _chunks(x, w, b):
            loss[rows], lse[rows] = losses.fwd(
                logits, target[rows], class_weight, ignore_index, *options
            )
        return loss, lse

    def bwd(
        dloss: torch.Tensor,
        x: torch.Tensor,
        w: torch.Tensor,
        target: torch.Tensor,
        b: torch.Tensor | None,
        class_weight: torch.Tensor | None,
        lse: torch.Tensor,
        *options_and_needs: Any,
    ) -> Tensors3:
        *options, needs = options_and_needs
        gradients = _Gradients(x, w, needs)
        for rows, logits in _chunks(x, w, b):
            given = dloss[rows], logits, target[rows], class_weight, lse[rows]
            gradients.add(rows, losses.bwd(*given, *options, True))
        return gradients.all()

    return backend.Implementation(fwd, bwd)


def _check_targets(
    x: torch.Tensor, w: torch.Tensor, target: torch.Tensor, ignore_index: int
) -> None:
    if x.device.type == "cpu":  # of all rows, for the chunks would name the place in the chunk
        check_targets("linear_cross_entropy", target, w.shape[0], ignore_index)


def _total(
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    mean: bool,
    needs: list[bool],
) -> Tensors4:
    """The sum or mean of all losses, and its gradients, from one product for the logits."""
    options = (ignore_index, label_smoothing, z_loss, softcap)
    _check_targets(x, w, target, ignore_index)
    losses = CROSS_ENTROPY.choose(x)
    gradients = _Gradients(x, w, needs)
    scale = x.new_ones((), dtype=gradients.sums)
    if mean:
        scale /= counted(target, class_weight, ignore_index)
    total = torch.zeros_like(scale)
    for rows, logits in _chunks(x, w, b):
        loss, lse = losses.fwd(logits, target[rows], class_weight, *options)
        total += loss.sum()
        dloss = scale.expand(loss.shape)
        given = dloss, logits, target[rows], class_weight, lse
        gradients.add(rows, losses.bwd(*given, *options, True))
    return total * scale, *gradients.all()


def cpu_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensors2:
    """The `cpu` backend of the forward op: in tiles, or else in chunks."""
    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0)
    if not in_tiles(x):
        return CHUNKED.fwd(x, w, target, b, class_weight, *options[:3], softcap)
    check_targets("linear_cross_entropy", target, w.shape[0], ignore_index)
    x, w, target = x.contiguous(), w.contiguous(), target.contiguous()
    b, class_weight = fp32_parameter(b), fp32_parameter(class_weight)
    loss = x.new_empty(x.shape[0], dtype=torch.float32)
    lse = torch.empty_like(loss)
    call_in_tiles(
        backend.extension().linear_cross_entropy_fwd,  # type: ignore[union-attr]
        *map(pointer, (x, w, b, target, class_weight, loss, lse)),
        x.shape[0],
        *w.shape,
        *options,
    )
    return loss, lse


def cpu_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    needs: list[bool],
) -> Tensors3:
    """The `cpu` backend of the backward op."""
    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0)
    if not in_tiles(x):
        given = dloss, x, w, target, b, class_weight, lse
        return CHUNKED.bwd(*given, *options[:3], softcap, needs)
    x, w, target = x.contiguous(), w.contiguous(), target.contiguous()
    dloss, lse, kept_b = dloss.contiguous(), lse.contiguous(), fp32_parameter(b)
    class_weight = fp32_parameter(class_weight)
    dx = x.new_empty(x.shape if needs[0] else 0)
    dw = w.new_empty(w.shape if needs[1] else 0)
    db = x.new_empty(w.shape[0] if needs[2] else 0, dtype=torch.float32)
    call_in_tiles(
        backend.extension().linear_cross_entropy_bwd,  # type: ignore[union-attr]
        *map(pointer, (dloss, x, w, kept_b, target, class_weight, lse)),
        *(pointer(d) if needed else 0 for d, needed in zip((dx, dw, db), needs, strict=True)),
        x.shape[0],
        *w.shape,
        *options,
    )
    return dx, dw, db.to(w.dtype)


CHUNKED = _chunked(CROSS_ENTROPY.implementations["cpu"])
OP = backend.Op(
    "linear_cross_entropy",
    {
        "torch": _chunked(CROSS_ENTROPY.implementations["torch"]),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("linear_cross_entropy"),
    },
)


def is_faster(x: torch.Tensor) -> bool:
    """Whether a model that wants the loss alone should take this op, and not store the logits.

    Not in half precision on a CPU without tiles: that costs a fourth product of the logits' size,
    where three will do.
    """
    if x.device.type != "cpu":
        return True
    dtype = product_dtype(x)
    return dtype in FULL or (dtype is torch.bfloat16 and has_tiles())


def _gradients_in_forward(x: torch.Tensor) -> bool:
    """Whether `_total` should make the gradients of a mean or a sum.

    Only where chunks are products of PyTorch's: a kernel that consumes the logits as it makes them
    has a rate worth more than a product less. And in full precision: what comes with backward, the
    factor of loss scaling for one, would otherwise be multiplied with gradients already rounded.
    """
    return x.device.type == "cpu" and product_dtype(x) in FULL and _in_chunks()


@torch.compiler.assume_constant_result
def _in_chunks() -> bool:
    return backend.forced_backend() in (None, "cpu", "torch")


def _fwd(x: torch.Tensor, *args: Any) -> Tensors2:
    return OP.choose(x).fwd(x, *args)


def _bwd(dloss: torch.Tensor, x: torch.Tensor, *args: Any) -> Tensors3:
    return OP.choose(x).bwd(dloss, x, *args)


def _fake_fwd(x: torch.Tensor, *_: Any) -> Tensors2:
    loss = x.new_empty(x.shape[0], dtype=statistics_dtype(x.dtype))
    return loss, torch.empty_like(loss)


def _fake_bwd(dloss: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *args: Any) -> Tensors3:
    needs = args[-1]
    return (
        x.new_empty(x.shape if needs[0] else 0),
        w.new_empty(w.shape if needs[1] else 0),
        w.new_empty(w.shape[0] if needs[2] else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors2) -> None:
    x, w, target, b, class_weight, *ctx.options = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(x, w, target, b, class_weight, lse)


def _backward(ctx: Any, dloss: torch.Tensor, _: Any) -> tuple[Any, ...]:
    needs = _needed(ctx)
    dx, dw, db = linear_cross_entropy_bwd(dloss, *ctx.saved_tensors, *ctx.options, needs)
    return (
        None,
        dx if needs[0] else None,
        dw if needs[1] else None,
        None,
        db if needs[2] else None,
        *(None,) * 5,
    )


def _fake_total(x: torch.Tensor, w: torch.Tensor, *args: Any) -> Tensors4:
    return x.new_empty((), dtype=statistics_dtype(x.dtype)), *_fake_bwd(x, x, w, *args)


def _total_bwd(
    dtotal: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, *ds: Any
) -> Tensors3:
    dx, dw, db = (d * dtotal.to(d.dtype) for d in ds)
    return dx, dw, db


def _fake_total_bwd(
    dtotal: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, *ds: Any
) -> Tensors3:
    dx, dw, db = map(torch.empty_like, ds)
    return dx, dw, db


def _total_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors4) -> None:
    x, w, _, b, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, w, b, *output[1:])


def _total_backward(ctx: Any, dtotal: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = ctx.saved_tensors[3:]
    again = torch._C._autograd._get_current_graph_task_keep_graph() or torch.is_grad_enabled()
    if again or not plain_eager((dtotal,)):
        gradients = linear_cross_entropy_total_bwd(dtotal, *ctx.saved_tensors)
    elif dtotal.device.type != "cpu" or dtotal != 1:  # elsewhere the look would wait for the device
        for d in gradients:
            d.mul_(dtotal)
    dx, dw, db = (d if needed else None for d, needed in zip(gradients, _needed(ctx), strict=True))
    return None, dx, dw, None, db, *(None,) * 7


def _needed(ctx: Any) -> list[bool]:
    return [ctx.needs_input_grad[i] for i in (1, 2, 4)]  # x, w, b; 0 is the keyset


OPTIONS = "SymInt ignore_index, float label_smoothing, float z_loss, float? softcap"
linear_cross_entropy_bwd = define(
    "linear_cross_entropy_bwd(Tensor dloss, Tensor x, Tensor w, Tensor target, Tensor? b,"
    f" Tensor? class_weight, Tensor lse, {OPTIONS}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
linear_cross_entropy_fwd = define(
    "linear_cross_entropy_fwd(Tensor x, Tensor w, Tensor target, Tensor? b, Tensor? class_weight,"
    f" {OPTIONS}) -> (Tensor, Tensor)",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
    autocast=("x", "w", "b"),
)
linear_cross_entropy_total_bwd = define(
    "linear_cross_entropy_total_bwd(Tensor dtotal, Tensor x, Tensor w, Tensor? b, Tensor dx,"
    " Tensor dw, Tensor db) -> (Tensor, Tensor, Tensor)",
    _total_bwd,
    _fake_total_bwd,
)
linear_cross_entropy_total = define(
    "linear_cross_entropy_total(Tensor x, Tensor w, Tensor target, Tensor? b,"
    f" Tensor? class_weight, {OPTIONS}, bool mean, bool[3] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _total,
    _fake_total,
    backward=_total_backward,
    setup_context=_total_setup_context,
    autocast=("x", "w", "b"),
)


def linear_cross_entropy(
    x: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    linear_bias: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """cross_entropy(x linear_weight^T + linear_bias, target) without storing the logits.

    The names are those of `torch.nn.functional.linear_cross_entropy`; `weight` are class weights
    there, in `cross_entropy` and here.

    Args:
        x: (..., C), any strides; float32, bfloat16, float16 (float64 on the torch backend).
        linear_weight: (V, C), in x's dtype. It may be an embedding's weight too: autograd adds up.
        target: (...), int64 class indices in [0, V), or `ignore_index`.
        linear_bias: (V,), in x's dtype, or None for 0.
        weight: (V,) class weights, or None for 1. They get no gradient.
        ignore_index: rows with this target contribute no loss and no gradient.
        reduction: "mean" (divides by the sum of the targets' weights), "sum" or "none".
        label_smoothing: in [0, 1], the share of the target spread evenly over all classes.
        z_loss: adds z_loss * logsumexp(logits)^2 to every row that is not ignored, whatever its
            class weight; the returned loss includes it.
        softcap: k replaces the logits by k tanh(logits / k) before everything else.

    Returns:
        Scalar, or (...) for "none"; float32 whatever x's dtype (float64 for float64). Under
        autocast x, linear_weight and linear_bias are cast to its dtype.

    Raises:
        TypeError: not floating point, dtypes differ, or target not int64.
        ValueError: shapes that do not fit, or an option out of its range, as in `cross_entropy`.
        IndexError: a target outside [0, V), on a CPU; the first one is named. On a GPU its loss and
            its row of x's gradient are NaN, and so are the gradients of linear_weight and
            linear_bias, to which it contributes.
        RuntimeError: tensors on different devices.

    Limits:
        Extra memory beside the gradients asked for, in bfloat16 on a CPU with AMX: forward as much
        as x takes and as 768 rows of linear_weight; backward four times x, 768 bytes for each row
        of x and as much as 1,500 rows of linear_weight. Otherwise on the torch and cpu backends:
        2^24 logits in x's dtype, or one row of them if V is larger, and the sums of linear_weight's
        gradient in float32; on torch also some float32 copies of the logits in a chunk. There a
        mean or a sum in float32 makes the gradients in forward: they exist from then on. On triton
        nothing but four floats for each row and run of the vocabulary in forward; in backward
        gradients of 2^25 logits in x's dtype, or as many as x has elements if that is more, and
        float32 sums of x's gradient. float16 needs loss scaling, as always: gradients of logits
        below 2^-24 vanish.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024.
    """
    op = "linear_cross_entropy"
    for name, tensor in (("x", x), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None:
            check_floating(op, name, tensor)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be (..., C), got a scalar")
    C = x.shape[-1]
    if linear_weight.dim() != 2 or linear_weight.shape[1] != C or not linear_weight.shape[0]:
        raise ValueError(
            f"{op}: linear_weight must be (V, {C}) with V >= 1, got {tuple(linear_weight.shape)}"
        )
    V = linear_weight.shape[0]
    check_shape(op, "linear_bias", linear_bias, (V,))
    # Autocast makes one dtype of several, but leaves float64 alone, as PyTorch's own does.
    given = [t.dtype for t in (x, linear_weight, linear_bias) if t is not None]
    if not torch.is_autocast_enabled(x.device.type) or torch.float64 in given:
        check_dtypes(op, x.dtype, linear_weight=linear_weight, linear_bias=linear_bias)
    check_device(op, x.device, linear_weight=linear_weight, linear_bias=linear_bias)
    weight = checked_loss_arguments(
        op, x, V, target, weight, reduction, label_smoothing, z_loss, softcap
    )
    rows = target.reshape(-1)
    tensors = x.reshape(rows.shape[0], C), linear_weight, rows, linear_bias, weight
    options = ignore_index, label_smoothing, z_loss, softcap
    needs = [t is not None and t.requires_grad for t in (x, linear_weight, linear_bias)]
    if reduction != "none" and torch.is_grad_enabled() and any(needs) and _gradients_in_forward(x):
        return linear_cross_entropy_total(*tensors, *options, reduction == "mean", needs)[0]
    loss, _ = linear_cross_entropy_fwd(*tensors, *options)
    return reduced(loss, target, weight, ignore_index, reduction)
