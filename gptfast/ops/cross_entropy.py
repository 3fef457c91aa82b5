"""Cross-entropy of logits x (M, V) with target classes t (M,), a loss per row.

z = x, or k tanh(x / k) with a softcap k;   lse = log sum_c exp(z_c)
loss = (1 - s) w_t (lse - z_t) + (s / V) sum_c w_c (lse - z_c) + zeta lse^2

with class weights w (1 where none are given), label smoothing s and z-loss zeta; 0 where t is
`ignore_index`. A class that does not exist, which only a wait could refuse on a GPU, makes the loss
and the row of dx NaN. Backward, for an incoming gradient g per row and
a = (1 - s) w_t + (s / V) sum_c w_c + 2 zeta lse:

dz_c = g (a exp(z_c - lse) - (1 - s) w_t [c = t] - (s / V) w_c),   dx_c = dz_c / cosh(x_c / k)^2

Sums and means over rows are left to PyTorch: they cost M reads next to M V.

Where g is known before the loss, one read of x is enough for both: `cross_entropy_with_gradient`.

Longer than 500 lines: forward, backward and both in one, each also in place, share their checks.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from gptfast import backend
from gptfast.ops.library import (
    check_device,
    check_floating,
    check_shape,
    cuda_parameter,
    cuda_room,
    define,
    fp32_parameter,
    pointer,
    statistics_dtype,
)

REDUCTIONS = ("none", "mean", "sum")
Tensors2 = tuple[torch.Tensor, torch.Tensor]


def _softcapped(x: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def reference_fwd(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensors2:
    """The formula in PyTorch."""
    V = x.shape[-1]
    z = _softcapped(x.to(statistics_dtype(x.dtype)), softcap)
    ignored = target == ignore_index
    if x.device.type == "cpu":
        check_targets("cross_entropy", target, V, ignore_index)
    known = _known(target, V)
    t = target.masked_fill(~known, 0)
    lse = z.new_zeros(x.shape[0])
    if V:  # not torch.logsumexp: an infinite logit is to make the loss NaN, as in PyTorch's own
        top = z.amax(-1)
        lse = top + (z - top[:, None]).exp().sum(-1).log()
    lse = lse.masked_fill(~known, math.nan)
    w = z.new_ones(V) if weight is None else weight.to(z.dtype)
    hit = (lse - z.gather(1, t[:, None])[:, 0]) * w[t] if V else lse
    loss = (1 - label_smoothing) * hit
    if label_smoothing:
        loss = loss + label_smoothing / V * ((lse[:, None] - z) * w).sum(-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.masked_fill(ignored, 0), lse.masked_fill(ignored, 0)


def reference_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    inplace: bool = False,
) -> torch.Tensor:
    """The gradient formulas in PyTorch."""
    M, V = x.shape
    xf = x.to(statistics_dtype(x.dtype))
    z = _softcapped(xf, softcap)
    ignored = target == ignore_index
    t = target.masked_fill(~_known(target, V), 0)
    w = z.new_ones(V) if weight is None else weight.to(z.dtype)
    hit = (1 - label_smoothing) * (w[t] if V else z.new_zeros(M))
    a = hit + label_smoothing / max(V, 1) * w.sum() + 2 * z_loss * lse
    dx = a[:, None] * torch.exp(z - lse[:, None]) - label_smoothing / max(V, 1) * w
    if V:
        dx.scatter_add_(1, t[:, None], -hit[:, None])
    if softcap is not None:  # not 1 - (z / k)^2, which cancels where z is close to k
        dx = dx * torch.cosh(xf / softcap).square().reciprocal()
    dx = (dx * dloss[:, None]).masked_fill(ignored[:, None], 0)
    return x.copy_(dx) if inplace else dx.to(x.dtype).contiguous()


def cpu_fwd(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensors2:
    """The `cpu` backend of the forward op."""
    x, target, weight = x.contiguous(), target.contiguous(), fp32_parameter(weight)
    M, V = x.shape
    loss = torch.empty(M, dtype=torch.float32, device=x.device)
    lse = torch.empty_like(loss)
    bad_row = backend.extension().cross_entropy_fwd(  # type: ignore[union-attr]
        x.data_ptr(),
        target.data_ptr(),
        pointer(weight),
        loss.data_ptr(),
        lse.data_ptr(),
        M,
        V,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap or 0.0,
        backend.DTYPE_CODES[x.dtype],
    )
    if bad_row >= 0:
        _raise_bad_target("cross_entropy", target, bad_row, V, ignore_index)
    return loss, lse


def cpu_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    inplace: bool = False,
) -> torch.Tensor:
    """The `cpu` backend of the backward op."""
    x, target, weight = x.contiguous(), target.contiguous(), fp32_parameter(weight)
    dloss, lse = dloss.contiguous(), lse.contiguous()
    dx = x if inplace else torch.empty_like(x)
    backend.extension().cross_entropy_bwd(  # type: ignore[union-attr]
        dloss.data_ptr(),
        x.data_ptr(),
        target.data_ptr(),
        pointer(weight),
        lse.data_ptr(),
        dx.data_ptr(),
        x.shape[0],
        x.shape[1],
        ignore_index,
        label_smoothing,
        z_loss,
        softcap or 0.0,
        backend.DTYPE_CODES[x.dtype],
    )
    return dx


def cuda_fwd(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensors2:
    """The `cuda` backend of the forward op."""
    x, target = x.contiguous(), target.contiguous()
    M, V = x.shape
    if x.device.type == "cpu":  # the host runner; on a GPU the look would wait for the device
        check_targets("cross_entropy", target, V, ignore_index)
    loss = torch.empty(M, dtype=torch.float32, device=x.device)
    lse = torch.empty_like(loss)
    given = x, target, *cuda_parameter(weight)
    options = ignore_index, label_smoothing, z_loss, softcap or 0.0
    backend.launch_cuda("cross_entropy_fwd", x, *given, loss, lse, M, V, *options)
    return loss, lse


def cuda_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    inplace: bool = False,
) -> torch.Tensor:
    """The `cuda` backend of the backward op."""
    x, target, dloss, lse = (t.contiguous() for t in (x, target, dloss, lse))
    dx = x if inplace else torch.empty_like(x)
    w_sum = None if weight is None else weight.sum(dtype=torch.float32)
    given = dloss, x, target, *cuda_parameter(weight), w_sum, lse, dx
    options = ignore_index, label_smoothing, z_loss, softcap or 0.0
    backend.launch_cuda("cross_entropy_bwd", x, *given, *x.shape, *options)
    return dx


def _in_two(losses: backend.Implementation) -> backend.Implementation:
    """Loss and gradient by the two passes of a backend."""

    def fused(
        x: torch.Tensor,
        dloss: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        inplace: bool,
    ) -> Tensors2:
        options = ignore_index, label_smoothing, z_loss, softcap
        loss, lse = losses.fwd(x, target, weight, *options)
        return loss, losses.bwd(dloss, x, target, weight, lse, *options, inplace)

    return backend.Implementation(fused)


def cuda_fused(
    x: torch.Tensor,
    dloss: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    inplace: bool,
) -> Tensors2:
    """Loss and gradient by one kernel of the `cuda` backend."""
    x, target, dloss = (t.contiguous() for t in (x, target, dloss))
    M, V = x.shape
    loss = torch.empty(M, dtype=torch.float32, device=x.device)
    dx = x if inplace else torch.empty_like(x)
    given = dloss, x, target, *cuda_parameter(weight), loss, dx, M, V
    options = ignore_index, label_smoothing, z_loss, softcap or 0.0
    backend.launch_cuda("cross_entropy_fused", x, *given, *options, cuda_room(x))
    return loss, dx


def _known(target: torch.Tensor, V: int) -> torch.Tensor:
    return (target >= 0) & (target < V)


def check_targets(op: str, target: torch.Tensor, V: int, ignore_index: int) -> None:
    """Raise IndexError naming the first target outside [0, V) that is not ignored (it waits)."""
    bad = ~_known(target, V) & (target != ignore_index)
    if bad.any():
        _raise_bad_target(op, target, int(bad.nonzero()[0]), V, ignore_index)


def _raise_bad_target(op: str, target: torch.Tensor, row: int, V: int, ignore_index: int) -> None:
    raise IndexError(
        f"{op}: target must be in [0, {V}) or ignore_index {ignore_index}, "
        f"got {int(target[row])} at position {row}"
    )


OP = backend.Op(
    "cross_entropy",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("cross_entropy"),
        "cuda": backend.Implementation(cuda_fwd, cuda_bwd),
    },
)
FUSED = backend.Op(
    "cross_entropy_with_gradient",
    {
        **{name: _in_two(OP.implementations[name]) for name in ("torch", "cpu", "triton")},
        "cuda": backend.Implementation(cuda_fused),
    },
    listed=False,
)


def _fwd(x: torch.Tensor, *args: Any) -> Tensors2:
    return OP.choose(x).fwd(x, *args[:-1])  # inplace_backward is for _setup_context


def _bwd(dloss: torch.Tensor, x: torch.Tensor, *args: Any) -> torch.Tensor:
    return OP.choose(x).bwd(dloss, x, *args)


def _bwd_inplace(dloss: torch.Tensor, x: torch.Tensor, *args: Any) -> None:
    if not x.is_contiguous():
        raise RuntimeError(f"cross_entropy_bwd_: x must be contiguous, got strides {x.stride()}")
    OP.choose(x).bwd(dloss, x, *args, True)
    # Kernels write through a pointer, unseen by autograd: a second backward must be refused.
    torch.autograd.graph.increment_version(x)


def _fake_fwd(x: torch.Tensor, *_: Any) -> Tensors2:
    loss = x.new_empty(x.shape[0], dtype=statistics_dtype(x.dtype))
    return loss, torch.empty_like(loss)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors2) -> None:
    x, target, weight, *ctx.options, ctx.inplace = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(x, target, weight, lse)


def _backward(ctx: Any, dloss: torch.Tensor, _: Any) -> tuple[Any, ...]:
    x, target, weight, lse = ctx.saved_tensors
    # Under create_graph the gradient must say that it has no derivative, which x cannot.
    if ctx.inplace and not torch.is_grad_enabled():
        cross_entropy_bwd_(dloss, x, target, weight, lse, *ctx.options)
        dx = x
    else:
        dx = cross_entropy_bwd(dloss, x, target, weight, lse, *ctx.options)
    return (None, dx, *(None,) * 7)


BACKWARD_ARGUMENTS = (
    "Tensor target, Tensor? weight, Tensor lse, SymInt ignore_index, float label_smoothing,"
    " float z_loss, float? softcap"
)
cross_entropy_bwd = define(
    f"cross_entropy_bwd(Tensor dloss, Tensor x, {BACKWARD_ARGUMENTS}) -> Tensor",
    _bwd,
    lambda dloss, x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
)
cross_entropy_bwd_ = define(  # x becomes dx
    f"cross_entropy_bwd_(Tensor dloss, Tensor(a!) x, {BACKWARD_ARGUMENTS}) -> ()",
    _bwd_inplace,
    lambda *_: None,
)
cross_entropy_fwd = define(
    "cross_entropy_fwd(Tensor x, Tensor target, Tensor? weight, SymInt ignore_index,"
    " float label_smoothing, float z_loss, float? softcap, bool inplace_backward)"
    " -> (Tensor, Tensor)",
    _fwd,
    _fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
)


def _run_fused(
    x: torch.Tensor,
    dloss: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    *options: Any,
) -> Tensors2:
    implementation = FUSED.choose(x)
    if x.device.type == "cpu":  # before anything is overwritten
        check_targets(FUSED.name, target, x.shape[1], ignore_index)
    return implementation.fwd(x, dloss, target, weight, ignore_index, *options)


def _fused(x: torch.Tensor, *args: Any) -> Tensors2:
    return _run_fused(x, *args, False)


def _fused_inplace(x: torch.Tensor, *args: Any) -> torch.Tensor:
    if not x.is_contiguous():
        raise RuntimeError(f"cross_entropy_fused_: x must be contiguous, got strides {x.stride()}")
    loss, _ = _run_fused(x, *args, True)
    torch.autograd.graph.increment_version(x)  # as in _bwd_inplace
    return loss


FUSED_ARGUMENTS = (
    "Tensor dloss, Tensor target, Tensor? weight, SymInt ignore_index, float label_smoothing,"
    " float z_loss, float? softcap"
)
cross_entropy_fused = define(
    f"cross_entropy_fused(Tensor x, {FUSED_ARGUMENTS}) -> (Tensor, Tensor)",
    _fused,
    lambda x, *_: (
        x.new_empty(x.shape[0], dtype=statistics_dtype(x.dtype)),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    ),
)
cross_entropy_fused_ = define(  # x becomes dx
    f"cross_entropy_fused_(Tensor(a!) x, {FUSED_ARGUMENTS}) -> Tensor",
    _fused_inplace,
    lambda x, *_: x.new_empty(x.shape[0], dtype=statistics_dtype(x.dtype)),
)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> torch.Tensor:
    """loss = -log softmax(logits)[target], averaged over the targets that are not ignored.

    Args:
        logits: (..., V), any strides; float32, bfloat16, float16 (float64 on the torch backend).
        target: (...), int64 class indices in [0, V), or `ignore_index`.
        weight: (V,) class weights, or None for 1. They get no gradient.
        ignore_index: rows with this target contribute no loss and no gradient.
        reduction: "mean" (divides by the sum of the targets' weights), "sum" or "none".
        label_smoothing: in [0, 1], the share of the target spread evenly over all classes.
        z_loss: adds z_loss * logsumexp(logits)^2 to every row that is not ignored, whatever its
            class weight; the returned loss includes it.
        softcap: k replaces the logits by k tanh(logits / k) before everything else (which makes
            logits of -inf finite); None leaves them.
        inplace_backward: backward overwrites the logits with their gradient instead of allocating
            as much again. Whoever needs the logits after backward must not ask for it; autograd
            raises where another backward needs them, and at a second backward. With
            `create_graph=True` nothing is overwritten. Compiled code overwrites what it is given,
            and is not asked whose memory that is.

    Returns:
        Scalar, or (...) for "none"; float32 whatever the dtype of the logits (float64 for float64).
        The mean of no rows is NaN, as in PyTorch.

    Raises:
        TypeError: logits not floating point, or target not int64.
        ValueError: shapes that do not fit, unknown reduction, label_smoothing outside [0, 1],
            z_loss negative, softcap not positive.
        IndexError: a target outside [0, V), on a CPU; the first one is named. On a GPU its loss and
            its row of the gradient are NaN.
        RuntimeError: tensors on different devices; inplace_backward for logits that require grad
            and do not fill contiguous memory of their own, or that are a leaf or a view of one.

    Source: Szegedy et al., "Rethinking the Inception Architecture", 2015, for label smoothing;
        Chowdhery et al., "PaLM", 2022, for the z-loss; Gemma Team, "Gemma 2", 2024, for softcap.
    """
    check_floating("cross_entropy", "logits", logits)
    if logits.dim() == 0:
        raise ValueError("cross_entropy: logits must be (..., V), got a scalar")
    V = logits.shape[-1]
    weight = checked_loss_arguments(
        "cross_entropy", logits, V, target, weight, reduction, label_smoothing, z_loss, softcap
    )
    if inplace_backward and logits.requires_grad and torch.is_grad_enabled():
        _check_overwritable(logits)
    rows = target.reshape(-1)
    loss, _ = cross_entropy_fwd(
        logits.reshape(rows.shape[0], V),
        rows,
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        inplace_backward,
    )
    return reduced(loss, target, weight, ignore_index, reduction)


def cross_entropy_with_gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    dloss: float | torch.Tensor = 1.0,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss = cross_entropy(logits, target, ...) and dloss * d loss / d logits, without autograd.

    For training loops that know dloss before the loss (1, or a factor of scaling or accumulation)::

        loss, dlogits = cross_entropy_with_gradient(logits.detach(), target, inplace=True)
        logits.backward(dlogits)

    The CUDA kernel reads the logits once for both, where a row fits into shared memory, instead of
    once in each pass. Other backends run their two passes, also Triton's, which `auto` takes on a
    GPU.

    Args:
        logits: as in `cross_entropy`, and so are target to softcap.
        dloss: what comes from behind the loss: a tensor of its shape; or a number or scalar tensor,
            which with "none" counts for every row.
        inplace: whether to overwrite the logits, which must be contiguous, with the gradient.

    Returns:
        The loss, as `cross_entropy` returns it, and the gradient in the logits' shape and dtype.

    Raises:
        TypeError: as in `cross_entropy`.
        ValueError: as there, or dloss of another shape.
        IndexError: as there; nothing is overwritten then.
        RuntimeError: tensors on different devices; logits or dloss that require grad, where it is
            enabled, since the results have no graph; `inplace` for logits that are not contiguous.

    Source: the "fused classifier" of Karpathy's llm.c, 2024.
    """
    op = "cross_entropy_with_gradient"
    check_floating(op, "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"{op}: logits must be (..., V), got a scalar")
    for name, given in (("logits", logits), ("dloss", dloss)):
        if isinstance(given, torch.Tensor) and given.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{op}: {name} must not require grad: pass {name}.detach()")
    if inplace and not logits.is_contiguous():
        raise RuntimeError(
            f"{op}: with inplace the logits must be contiguous, got strides {logits.stride()}"
        )
    V = logits.shape[-1]
    weight = checked_loss_arguments(
        op, logits, V, target, weight, reduction, label_smoothing, z_loss, softcap
    )
    rows = target.reshape(-1)
    if isinstance(dloss, torch.Tensor):
        check_device(op, logits.device, dloss=dloss)
        scale = dloss.to(statistics_dtype(logits.dtype))
    else:
        scale = logits.new_full((), dloss, dtype=statistics_dtype(logits.dtype))
    if reduction == "mean":
        scale = scale / counted(target, weight, ignore_index)
    if scale.dim():
        check_shape(op, "dloss", scale, tuple(target.shape) if reduction == "none" else ())
    x = logits.reshape(rows.shape[0], V)
    args = scale.expand(target.shape).reshape(-1), rows, weight
    options = ignore_index, label_smoothing, z_loss, softcap
    if inplace:
        loss, dlogits = cross_entropy_fused_(x, *args, *options), logits
    else:
        loss, dx = cross_entropy_fused(x, *args, *options)
        dlogits = dx.view(logits.shape)
    return reduced(loss, target, weight, ignore_index, reduction), dlogits


def checked_loss_arguments(
    op: str,
    x: torch.Tensor,
    V: int,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> torch.Tensor | None:
    """Check what `cross_entropy` and `linear_cross_entropy` share, x being (..., columns).

    Returns:
        The class weights, detached.
    """
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{op}: target must be an int64 tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64 class indices, got {target.dtype}")
    check_shape(op, "target", target, tuple(x.shape[:-1]))
    if weight is not None:
        weight = weight.detach()
        check_floating(op, "weight", weight)
        check_shape(op, "weight", weight, (V,))
    check_device(op, x.device, target=target, weight=weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{op}: z_loss must be finite and not negative, got {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be finite and positive, or None; got {softcap}")
    return weight


def _check_overwritable(logits: torch.Tensor) -> None:
    """Raise unless a backward may put the gradient of the logits into their memory."""
    problem = None
    if not logits.is_contiguous():
        problem = f"strides {logits.stride()} for shape {tuple(logits.shape)}"
    elif logits.is_leaf:
        problem = "a leaf"
    elif not torch.compiler.is_compiling():  # where neither question can be asked
        base = logits._base if logits._is_view() else None
        if logits.untyped_storage().nbytes() != logits.numel() * logits.element_size():
            problem = "a part of a larger tensor"
        elif base is not None and base.is_leaf and base.requires_grad:
            problem = "a view of a leaf"
    if problem:
        raise RuntimeError(
            "cross_entropy: with inplace_backward the logits must be contiguous, fill their memory "
            f"and be computed from something else, got {problem}"
        )


def reduced(
    loss: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    """The losses of all rows, (M,), in target's shape, or their sum or mean."""
    if reduction == "none":
        return loss.reshape(target.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / counted(target, weight, ignore_index)


def counted(target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """What a mean divides by: the rows that are not ignored, or the sum of their weights."""
    rows = target.reshape(-1)
    counts = rows != ignore_index
    if weight is None:
        return counts.sum()
    weight = weight.to(statistics_dtype(weight.dtype))
    counts = counts & _known(rows, len(weight))  # the loss of any other row is NaN, and the mean
    return (weight[rows.masked_fill(~counts, 0)] * counts).sum()
