"""Flash attention: o = dropout(softmax(s + mask)) v, never holding the T x S scores.

d_ij = j - (i + S - T)                        the distance of a key: 0 on the diagonal, bottom right
x_ij = scale q_i . k_j
s_ij = softcap tanh(x_ij / softcap) - slope |d_ij|    (without softcap: s_ij = x_ij - slope |d_ij|)
visible: -left <= d_ij <= right,  where causal makes right 0
lse_i = log sum_j exp(s_ij),  p_ij = exp(s_ij - lse_i),  o_i = sum_j p_ij z_ij v_j

z_ij is 1, or with dropout keep_ij / (1 - p). Rows that may see no key have o = 0 and lse = -inf.
Backward, with delta_i = do_i . o_i - dlse_i:

dv_j = sum_i p_ij z_ij do_i
dx_ij = p_ij (z_ij do_i . v_j - delta_i) / cosh^2(x_ij / softcap)
dq_i = scale sum_j dx_ij k_j,  dk_j = scale sum_i dx_ij q_i

The mask of dropout is that of `gptfast/ops/philox.py`, with the index of (batch, head) as head.

Longer than 500 lines: four backends take the same options, and `attention_varlen` and
`attention_qkv` share their calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from gptfast import backend
from gptfast.ops.layout import empty_output, heads_of, unit_stride
from gptfast.ops.library import (
    check_device,
    check_dtypes,
    check_floating,
    define,
    statistics_dtype,
)
from gptfast.ops.philox import checked_seed, dropout_factors, dropout_threshold

Tensors2 = tuple[torch.Tensor, torch.Tensor]
Tensors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
REFERENCE_ROWS = 128  # queries that the reference handles at a time: scores take B H 128 S elements
MAX_CUDA_TOKENS = 2**30  # queries and keys of one sequence: their indices and sums are 32-bit
MAX_HEAD_DIM = 256  # of the Triton kernels, which hold whole rows: see kernels/attention.py


class Options(NamedTuple):
    """What `attention_fwd` takes behind its tensors, in this order.

    Args:
        seed: int64 scalar tensor, or None without dropout.
        alibi_slopes: (H,) or (B, H) fp32, or None.
        scale: factor of q . k.
        left: how many keys before its diagonal a query sees; -1: all.
        right: how many behind it; -1: all.
        softcap: 0: none.
        dropout_p: in [0, 1).
    """

    seed: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    scale: float
    left: int
    right: int
    softcap: float
    dropout_p: float


SCHEMA = (  # of `Options`
    "Tensor? seed, Tensor? alibi_slopes, float scale, int left, int right, float softcap,"
    " float dropout_p"
)


def reference_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any, first_head: int = 0
) -> Tensors2:
    """The formula in PyTorch; `first_head` counts the heads before these, for dropout."""
    dtype = statistics_dtype(q.dtype)
    B, H, T, _ = q.shape
    kf, vf = (x.to(dtype).repeat_interleave(H // k.shape[1], 1) for x in (k, v))
    o = empty_output(q, v.shape[-1])
    lse = q.new_empty(B, H, T, dtype=dtype)
    for rows, scores, _, z in _score_rows(q, kf, Options(*options), first_head):
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
    dlse: torch.Tensor | None,
    *rest: Any,
    first_head: int = 0,
) -> Tensors3:
    """The gradient formulas in PyTorch. `rest`: `Options`, which gradients are needed, and `into`.

    into: (dq, dk, dv) to write to, all of them, as `attention_qkv` wants it; None: fresh ones.
    """
    *options, needs, into = rest
    scale = Options(*options).scale
    dtype = statistics_dtype(q.dtype)
    G = q.shape[1] // k.shape[1]
    kf, vf = (x.to(dtype).repeat_interleave(G, 1) for x in (k, v))
    dof = do.to(dtype)
    delta = (dof * o.to(dtype)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.unsqueeze(-1)
    dq, dk, dv = empty_output(q), torch.zeros_like(kf), torch.zeros_like(vf)
    for rows, scores, damping, z in _score_rows(q, kf, Options(*options), first_head):
        p = _probabilities(scores, lse[:, :, rows])
        pz = p if z is None else p * z
        dv += pz.transpose(-1, -2) @ dof[:, :, rows]
        dp = dof[:, :, rows] @ vf.transpose(-1, -2)
        dx = p * ((dp if z is None else dp * z) - delta[:, :, rows])
        if damping is not None:
            dx = dx * damping
        dq[:, :, rows] = (dx @ kf * scale).to(q.dtype)
        dk += dx.transpose(-1, -2) @ q[:, :, rows].to(dtype) * scale
    dk, dv = (
        _like_output(g.unflatten(1, (k.shape[1], G)).sum(2).to(x.dtype))
        for g, x in ((dk, k), (dv, v))
    )
    if into is not None:
        for g, out in zip((dq, dk, dv), into, strict=True):
            out.copy_(g)
        return into
    return tuple(  # type: ignore[return-value]
        g if need else g.new_empty(0) for g, need in zip((dq, dk, dv), needs, strict=True)
    )


def _score_rows(
    q: torch.Tensor, kf: torch.Tensor, options: Options, first_head: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
    """Blocks of query rows with their masked scores (B, H, rows, S), ds/dx and dropout factors."""
    seed, slopes, scale, left, right, softcap, dropout_p = options
    B, H, T, _ = q.shape
    S = kf.shape[2]
    j = torch.arange(S, device=q.device)
    for start in range(0, T, REFERENCE_ROWS):
        rows = slice(start, min(start + REFERENCE_ROWS, T))
        i = torch.arange(rows.start, rows.stop, device=q.device)
        distance = j - (i[:, None] + S - T)
        scores = q[:, :, rows].to(kf.dtype) @ kf.transpose(-1, -2) * scale
        damping = z = None
        if softcap:
            # Not 1 - tanh^2, which has no digits left where the cap is reached.
            damping = torch.cosh(scores / softcap).square().reciprocal()
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes.to(kf.dtype)[..., None, None] * distance.abs()
        if right >= 0:
            scores = scores.masked_fill(distance > right, -math.inf)
        if left >= 0:
            scores = scores.masked_fill(distance < -left, -math.inf)
        if dropout_p > 0 and seed is not None:
            head = first_head + torch.arange(B * H, device=q.device)
            z = dropout_factors(seed, head[:, None, None], i[:, None], j, dropout_p, kf.dtype)
            z = z.reshape(B, H, len(i), S)
        yield rows, scores, damping, z


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, math.inf).unsqueeze(-1))


def _like_output(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def cpu_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Tensors2:
    """The `cpu` backend of the forward op."""
    o = empty_output(q, v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    run_cpu_fwd(q, k, v, o, lse, Options(*options))
    return o, lse


def run_cpu_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    ends: Tensors2 | None = None,
) -> None:
    """Fill o and lse; also of `attention_varlen`, whose `ends` are cu_seqlens of q and of k."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    backend.extension().attention_fwd(  # type: ignore[union-attr]
        *(heads_of(x) for x in (q, k, v, o)),
        lse.data_ptr(),
        _cpu_shape(q, k, v, lse, ends),
        cpu_options(options),
        backend.DTYPE_CODES[q.dtype],
    )


def cpu_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    *rest: Any,
) -> Tensors3:
    """The `cpu` backend of the backward op; see `reference_bwd`."""
    *options, needs, into = rest
    return run_cpu_bwd(do, q, k, v, o, lse, dlse, Options(*options), needs, empty_output, into)


def run_cpu_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    options: Options,
    needs: Sequence[bool],
    empty: Callable[[torch.Tensor], torch.Tensor],
    into: Tensors3 | None = None,
    ends: Tensors2 | None = None,
) -> Tensors3:
    """The gradients of q, k and v that are needed; also of `attention_varlen`, see `run_cpu_fwd`.

    empty: makes the memory for the gradient of what it gets; into: has it already, for all of them.
    """
    pair = needs[1] or needs[2]  # the kernel makes dk and dv together
    grads = into or tuple(
        empty(x) if want else None
        for x, want in zip((q, k, v), (needs[0], pair, pair), strict=True)
    )
    do, q, k, v, o = (unit_stride(x) for x in (do, q, k, v, o))
    lse = lse.contiguous()
    dlse = dlse if dlse is None else dlse.contiguous()
    if q.numel() == 0:  # no queries, perhaps not even a head for the kernel to divide by
        for g in grads:
            if g is not None:
                g.zero_()
    else:
        backend.extension().attention_bwd(  # type: ignore[union-attr]
            *(heads_of(x) for x in (do, q, k, v, o)),
            lse.data_ptr(),
            0 if dlse is None else dlse.data_ptr(),
            *((0, 0, 0, 0) if g is None else heads_of(g) for g in grads),
            _cpu_shape(q, k, v, lse, ends),
            cpu_options(options),
            backend.DTYPE_CODES[q.dtype],
        )
    return tuple(  # type: ignore[return-value]
        q.new_empty(0) if g is None or not need else g for g, need in zip(grads, needs, strict=True)
    )


def _cpu_shape(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, ends: Tensors2 | None
) -> tuple[int, ...]:
    D, Dv = q.shape[-1], v.shape[-1]
    if ends is None:
        B, H, T = lse.shape
        return B, H, k.shape[1], T, k.shape[2], D, Dv, 0, 0, H * T, T
    H, N = lse.shape
    addresses = (x.data_ptr() for x in ends)
    return ends[0].shape[0] - 1, H, k.shape[1], N, k.shape[0], D, Dv, *addresses, 0, N


def cpu_options(options: Options) -> tuple[float, int, int, float, tuple[int, ...], int, int]:
    """The kernels' AttentionOptions; also of `attention_decode`."""
    slopes = options.alibi_slopes
    address_and_strides: tuple[int, ...] = (0, 0, 0)
    if slopes is not None:
        address_and_strides = (slopes.data_ptr(), *(0, *slopes.stride())[-2:])
    return (
        options.scale,
        options.left,
        options.right,
        options.softcap,
        address_and_strides,
        dropout_threshold(options.dropout_p),
        0 if options.seed is None else int(options.seed),
    )


def why_not_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options | None = None
) -> str | None:
    """Why the Triton kernels cannot take these heads, or None."""
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MAX_HEAD_DIM:
        return f"its head dim must be at most {MAX_HEAD_DIM}, got {widest}"
    p = 0.0 if options is None else options.dropout_p
    if q.dtype == torch.float16 and dropout_threshold(p) == 1:
        # Probabilities are multiplied by 2^16 in v's dtype, which ends below that.
        return f"float16 has no factor for a dropout_p of {p}"
    return None


def cuda_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Tensors2:
    """The `cuda` backend of the forward op."""
    o = empty_output(q, v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    run_cuda_fwd(q, k, v, o, lse, Options(*options), (None, None), q.shape[2], k.shape[2])
    return o, lse


def run_cuda_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    ends: tuple[torch.Tensor | None, torch.Tensor | None],
    T: int,
    S: int,
) -> None:
    """Fill o and lse; also of `attention_varlen`, see `run_cpu_fwd`, whose longest T and S are."""
    B = q.shape[0] if ends[0] is None else ends[0].shape[0] - 1
    heads, key_heads, D, Dv = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
    backend.launch_cuda(
        "attention_fwd",
        q,
        *(heads_of(x) for x in (q, k, v, o)),
        (lse.data_ptr(), *(0, *lse.stride())[-3:-1]),
        *ends,
        *(B, heads, key_heads, T, S, D, Dv, options.scale, options.left, options.right),
    )


def why_not_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options | None = None
) -> str | None:
    """Why the CUDA kernel cannot take this call, or None: it copies 16 bytes at a time."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"its tensors must be bfloat16 or float16, got {backend.dtype_name(q.dtype)}"
    if reason := why_not_triton(q, k, v):
        return reason
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] % 8:
            return f"its head dims must be multiples of 8, got {x.shape[-1]} for {name}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.numel() and (x.stride(-1) != 1 or any(stride % 8 for stride in x.stride()[:-1])):
            strides = "contiguous rows and other strides that are multiples of 8"
            return f"its tensors must have {strides}, got {tuple(x.stride())} for {name}"
        if x.data_ptr() % 16:
            return f"its tensors must begin at multiples of 16 bytes, {name} does not"
    if q.shape[-2] + k.shape[-2] >= MAX_CUDA_TOKENS:
        return f"it takes fewer than 2^30 tokens, got {q.shape[-2]} and {k.shape[-2]}"
    if options is not None:
        has_slopes = options.alibi_slopes is not None
        for name, given in (
            ("dropout_p", options.dropout_p),
            ("softcap", options.softcap),
            ("alibi_slopes", has_slopes),
        ):
            if given:
                return f"it has no {name}"
    return None


OP = backend.Op(
    "attention",
    {
        "torch": backend.Implementation(reference_fwd, reference_bwd),
        "cpu": backend.Implementation(cpu_fwd, cpu_bwd),
        "triton": backend.triton_implementation("attention", why_not=why_not_triton),
        "cuda": backend.Implementation(cuda_fwd, why_not=why_not_cuda),
    },
)


def _fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Tensors2:
    return OP.choose(q, k, v, Options(*options)).fwd(q, k, v, *options)


def _bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    *rest: Any,
) -> Tensors3:
    implementation = OP.choose_bwd(q, k, v, Options(*rest[:-1]))
    return implementation.bwd(do, q, k, v, o, lse, dlse, *rest, None)


def _fake_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Tensors2:
    lse = q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))
    return empty_output(q, v.shape[-1]), lse


def _fake_bwd(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> Tensors3:
    needs = rest[-1]
    return tuple(  # type: ignore[return-value]
        empty_output(x) if need else x.new_empty(0)
        for x, need in zip((q, k, v), needs, strict=True)
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors2) -> None:
    """For q, k, v, then tensors and numbers that have no gradient; also of `attention_varlen`."""
    q, k, v, *rest = inputs
    ctx.is_tensor = [isinstance(x, torch.Tensor) for x in rest]
    ctx.numbers = [x for x in rest if not isinstance(x, torch.Tensor)]
    ctx.save_for_backward(q, k, v, *output, *(x for x in rest if isinstance(x, torch.Tensor)))


def run_backward(
    bwd: Any, ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[Any, ...]:
    """The autograd formula from the op `bwd`; also of `attention_varlen`."""
    q, k, v, o, lse, *tensors = ctx.saved_tensors
    saved, numbers = iter(tensors), iter(ctx.numbers)
    rest = [next(saved if is_tensor else numbers) for is_tensor in ctx.is_tensor]
    needs = list(ctx.needs_input_grad[1:4])
    do = torch.zeros_like(o) if do is None else do
    grads = bwd(do, q, k, v, o, lse, dlse, *rest, needs)
    dq, dk, dv = (g if need else None for g, need in zip(grads, needs, strict=True))
    return None, dq, dk, dv, *(None for _ in rest)


attention_bwd = define(
    "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? dlse,"
    f" {SCHEMA}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
attention_fwd = define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)",
    _fwd,
    _fake_fwd,
    backward=lambda ctx, do, dlse: run_backward(attention_bwd, ctx, do, dlse),
    setup_context=setup_context,
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
    window: Sequence[int] | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """o = softmax(scale q k^T) v for each head, without storing the scores.

    Args:
        q: (B, H, T, D), any strides; float32, bfloat16, float16 (float64 on the torch backend).
        k: (B, H_kv, S, D), in q's dtype. H_kv divides H: each key head serves H / H_kv query heads.
        v: (B, H_kv, S, Dv), in q's dtype.
        causal: query i sees the keys j <= i + S - T. With T = S that is the usual triangle; with a
            KV cache (T < S) the last query sees every key. Note that PyTorch's `is_causal` aligns
            the triangle to the first key instead.
        scale: factor of the scores; None means 1 / sqrt(D).
        dropout_p: probability of dropping a score, in [0, 1).
        seed: int64 scalar tensor that determines the dropout mask; None draws one from PyTorch's
            generator, so `torch.manual_seed` decides.
        window: (left, right): query i sees the keys i + S - T - left <= j <= i + S - T + right;
            -1 sets no limit on its side. With `causal`, right is 0. (0, 0) is the diagonal alone:
            a window of n tokens that ends at the query's own is (n - 1, 0).
        softcap: scores become softcap tanh(score / softcap), before masks and ALiBi; positive.
        alibi_slopes: float32 (H,) or (B, H): slope |i + S - T - j| is taken from each score. They
            get no gradient.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        o (B, H, T, Dv) in q's dtype, laid out as (B, T, H, Dv) so that merging the heads copies
        nothing. A query that may see no key gets zeros. Under autocast q, k and v are cast to its
        dtype. With return_lse a tuple (o, lse): lse is (B, H, T), float32, of the scores before
        dropout, -inf where a query sees no key, and differentiable.

    Raises:
        TypeError: not floating point, or dtypes differ.
        ValueError: shapes that do not fit, or an option outside its range.
        RuntimeError: tensors on different devices; a backend is forced that cannot run the call.

    Limits:
        Head dims over 256 run on the PyTorch reference on a GPU. Extra memory is O(B H T) for the
        log-sum-exp; backward on a CPU takes up to 4 T D H / H_kv bytes a thread, which the thread
        keeps for its next call. On a CPU, products of bfloat16 run on the tiles of AMX where there
        are any, with p and ds rounded to bfloat16; other dtypes, and bfloat16 elsewhere, are
        computed in fp32.

    Source: Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023; Press et al., "Train
    short, test long" (ALiBi), 2022; Beltagy et al., "Longformer" (window), 2020; Gemma Team,
    "Gemma 2" (softcap), 2024.
    """
    check_heads("attention", ("B, H, T", "B, H_kv, S"), q, k, v)
    if k.shape[0] != q.shape[0] or k.shape[:-1] != v.shape[:-1] or k.shape[-1] != q.shape[-1]:
        B, D = q.shape[0], q.shape[-1]
        raise ValueError(
            f"attention: k must be ({B}, H_kv, S, {D}) and v ({B}, H_kv, S, Dv), "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    options = make_options(
        "attention", q.shape[0], q, causal, scale, dropout_p, seed, window, softcap, alibi_slopes
    )
    o, lse = attention_fwd(q, k, v, *options)
    return (o, lse) if return_lse else o


def check_heads(
    op: str, letters: tuple[str, str], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Raise unless dtypes, devices, dimensions and numbers of heads fit; (B, H, ...) or (N, H, D).

    letters: the dimensions before the head dim, of q and of k and v.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(op, name, x)
        expected = letters[0 if name == "q" else 1]
        if x.dim() != expected.count(",") + 2:
            D = "Dv" if name == "v" else "D"
            raise ValueError(f"{op}: {name} must be ({expected}, {D}), got {tuple(x.shape)}")
    # Autocast makes one dtype of several, but leaves float64 alone, as PyTorch's own does.
    casts = torch.is_autocast_enabled(q.device.type)
    if not casts or torch.float64 in (q.dtype, k.dtype, v.dtype):
        check_dtypes(op, q.dtype, k=k, v=v)
    check_device(op, q.device, k=k, v=v)
    H, H_kv = q.shape[1], k.shape[1]
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"{op}: key heads must divide {H} query heads, got {H_kv}")
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] == 0:
            raise ValueError(f"{op}: head dim of {name} must be at least 1, got 0")


def make_options(
    op: str,
    B: int,
    q: torch.Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    window: Sequence[int] | None,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
) -> Options:
    """Checks what `attention` and `attention_varlen` are given as options, and fills in defaults.

    Raises:
        TypeError: seed or slopes of another dtype.
        ValueError: an option outside its range.
        RuntimeError: seed or slopes on another device.
    """
    seed = checked_seed(op, seed, dropout_p, q.device)
    if alibi_slopes is not None:
        check_dtypes(op, torch.float32, alibi_slopes=alibi_slopes)
        H = q.shape[1]
        shape = tuple(alibi_slopes.shape)
        if shape not in ((H,), (B, H)):
            raise ValueError(f"{op}: alibi_slopes must be ({H},) or ({B}, {H}), got {shape}")
    check_device(op, q.device, alibi_slopes=alibi_slopes)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be positive and finite, got {softcap}")
    if window is not None and any(isinstance(n, (float, torch.Tensor)) for n in window):
        raise TypeError(f"{op}: window must be two integers, got {window}")
    if window is not None and (len(window) != 2 or min(window) < -1):
        raise ValueError(f"{op}: window must be (left, right), each at least -1, got {window}")
    left, right = (-1, -1) if window is None else window
    return Options(
        seed,
        alibi_slopes,
        1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        left,
        0 if causal else right,
        softcap or 0.0,
        dropout_p,
    )
