"""How attention is tested.

Options: causal, scale, dropout_p, window, softcap; alibi ("shared": a slope per head, "own": per
sequence and head); lse (bool: it is returned); Dv (if not D).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptfast.ops import attention
from gptfast.ops.philox import dropout_factors
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.judge import UNDERFLOW, Magnitude
from gptfast.testing.memory import LAYOUTS


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    B, H, H_kv, T, S, D = case.shape
    Dv = case.options.get("Dv", D)
    if case.layout == "packed":
        qkv = draw((B, T, 3, H, D), case.values).to(dtype).permute(2, 0, 3, 1, 4)
    else:
        shapes = ((B, H, T, D), (B, H_kv, S, D), (B, H_kv, S, Dv))
        qkv = [draw(shape, case.values).to(dtype) for shape in shapes]
    return {"q": qkv[0], "k": qkv[1], "v": qkv[2], **score_inputs(case, B, H)}


def score_inputs(case: Case, B: int, H: int) -> dict[str, Any]:
    """The seed and the slopes; powers of two, which are the same number in every dtype."""
    alibi = case.options.get("alibi")
    shape = (B, H) if alibi == "own" else (H,)
    slopes = 2.0 ** -(torch.arange(math.prod(shape)) % 5).view(shape) if alibi else None
    seed = torch.tensor(-(2**62) + 12345) if case.options.get("dropout_p") else None
    return {"seed": seed, "alibi_slopes": slopes}


def keywords(i: Inputs, options: Options) -> dict[str, Any]:
    """What `attention` and `attention_varlen` get by keyword."""
    given = {name: x for name, x in options.items() if name in KEYWORDS}
    slopes = i["alibi_slopes"]  # of fp64 where the formulas are tried in fp64
    return {
        **given,
        "seed": i["seed"],
        "alibi_slopes": slopes if slopes is None else slopes.float(),
    }


# Not cuDNN, whose backward takes a gradient that is not aligned for one that is, and crashes.
PEERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
KEYWORDS = ("causal", "scale", "dropout_p", "window", "softcap")


def _call(i: Inputs, options: Options) -> torch.Tensor:
    q, k, v = i["q"], i["k"], i["v"]
    if not options.get("lse"):
        return attention(q, k, v, **keywords(i, options))
    return beside(*attention(q, k, v, **keywords(i, options), return_lse=True))


def beside(o: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """lse as one more column of o, so that both are judged, and their gradients."""
    return torch.cat((o, lse.unsqueeze(-1).to(o.dtype)), -1)


def _distance(T: int, S: int, device: torch.device) -> torch.Tensor:
    i, j = torch.arange(T, device=device), torch.arange(S, device=device)
    return j - i[:, None] - (S - T)


def _mask(T: int, S: int, options: Options, device: torch.device) -> torch.Tensor | None:
    """Which keys a query sees, or None: all."""
    left, right = options.get("window") or (-1, -1)
    if options.get("causal"):
        right = 0
    if left < 0 and right < 0:
        return None
    d = _distance(T, S, device)
    return (d <= (right if right >= 0 else S)) & (d >= -(left if left >= 0 else T + S))


def _factors(i: Inputs, options: Options, dtype: torch.dtype) -> torch.Tensor:
    B, H, T, _ = i["q"].shape
    row, column, head = (torch.arange(n, device=i["q"].device) for n in (T, i["k"].shape[2], B * H))
    head = head[:, None, None] + i.get("first_head", 0)
    factors = dropout_factors(i["seed"], head, row[:, None], column, options["dropout_p"], dtype)
    return factors.view(B, H, T, i["k"].shape[2])


def _scale(i: Inputs, options: Options) -> float:
    scale = options.get("scale")
    return 1 / math.sqrt(i["q"].shape[-1]) if scale is None else scale


def _bias(i: Inputs, S: int) -> torch.Tensor | float:
    if i["alibi_slopes"] is None:
        return 0.0
    q = i["q"]
    return i["alibi_slopes"].to(q)[..., None, None] * _distance(q.shape[2], S, q.device).abs()


def peer(i: Inputs, options: Options) -> torch.Tensor:
    """PyTorch's own attention, or where it lacks an option, spelled out."""
    q, k, v = i["q"], i["k"], i["v"]
    mask = _mask(q.shape[2], k.shape[2], options, q.device)
    spelled_out = ("dropout_p", "softcap", "alibi", "lse")
    if len(q) and not any(options.get(name) for name in spelled_out):  # of no sequences it is None
        scale = options.get("scale")
        with sdpa_kernel(PEERS):
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    # In fp32 at least. (PyTorch has dropout, but draws other masks.)
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide = {**i, "q": q.to(dtype)}
    k, v = (x.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = wide["q"] @ k.mT * _scale(i, options)
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores - _bias(wide, k.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1))
    o = (p * _factors(i, options, dtype) if options.get("dropout_p") else p) @ v
    return beside(o.to(q.dtype), lse) if options.get("lse") else o.to(q.dtype)


def magnitudes(i: Inputs, options: Options, dy: torch.Tensor) -> dict[str, Magnitude]:
    """See `Magnitude`: of o (and lse) and the gradients of q, k and v."""
    q, do = i["q"], dy.abs()
    (_, H, T, D), H_kv, S = q.shape, i["k"].shape[1], i["k"].shape[2]
    k, v = (i[name].repeat_interleave(H // H_kv, 1) for name in ("k", "v"))
    scale, softcap = _scale(i, options), options.get("softcap")
    scores = q @ k.mT * scale
    q, k, v, scale = q.abs(), k.abs(), v.abs(), abs(scale)
    size = q @ k.mT * scale  # of the terms of a score
    damping, damping_moves = torch.ones_like(scores), torch.zeros_like(scores)
    if softcap:
        # 1 / cosh^2(x / c) moves by 2 tanh times as much, relatively, as x / c does.
        damping, damping_moves = torch.cosh(scores / softcap) ** -2, 2 * size / softcap
        scores = softcap * torch.tanh(scores / softcap)
        size = damping * size + scores.abs()
    bias = _bias(i, S)
    scores, size = scores - bias, size + bias
    mask = _mask(T, S, options, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1, keepdim=True).nan_to_num(neginf=0)
    p = torch.exp(scores - lse) + UNDERFLOW
    seen = torch.ones_like(p) if mask is None else mask.to(p.dtype).expand_as(p)
    z = _factors(i, options, q.dtype) if options.get("dropout_p") else 1.0
    # p moves by u times this, relatively: as s and lse move.
    lse_moves = (p * size).sum(-1, keepdim=True) + lse.abs()
    moves = size + lse_moves
    pz = p * z
    o, o_moves = pz @ v, (pz * moves) @ v
    dlse: torch.Tensor | float = 0.0
    result, result_moves, result_factors = o, o_moves, seen @ v
    if options.get("lse"):
        do, dlse = do[..., :-1], do[..., -1:]
        # top + log(sum), of which top may be the larger one
        top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0) if S else lse
        result = torch.cat((o, top.abs() + (lse - top).abs()), -1)
        result_moves = torch.cat((o_moves, lse_moves), -1)
        result_factors = torch.cat((result_factors, torch.zeros_like(lse)), -1)
    delta, delta_moves = ((do * x).sum(-1, keepdim=True) for x in (o, o_moves))
    ds = p * (z * (do @ v.mT) + delta + dlse)
    dx_moves = (ds * (moves + damping_moves) + p * delta_moves) * damping
    dx = ds * damping

    def of_key_heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (H_kv, H // H_kv)).sum(2)

    length = max(S, D, v.shape[-1])
    key_length = T * H // H_kv + length
    return {
        # p and ds are rounded to the storage dtype before they are multiplied.
        "result": Magnitude(result, result_moves, length, factors=result_factors),
        "q": Magnitude(scale * dx @ k, scale * dx_moves @ k, length, factors=scale * seen @ k),
        "k": Magnitude(
            of_key_heads(scale * dx.mT @ q),
            of_key_heads(scale * dx_moves.mT @ q),
            key_length,
            factors=of_key_heads(scale * seen.mT @ q),
        ),
        "v": Magnitude(
            of_key_heads(pz.mT @ do),
            of_key_heads((pz * moves).mT @ do),
            key_length,
            factors=of_key_heads(seen.mT @ do),
        ),
    }


# One of everything.
EVERYTHING: dict[str, Any] = {
    "causal": True,
    "window": (9, 0),
    "softcap": 3.0,
    "alibi": "own",
    "dropout_p": 0.2,
    "scale": 0.4,
    "lse": True,
}


def _cases() -> Iterator[Case]:
    # (T, S): one query block of 64 and its neighbours, decoding with up to four queries, prefill
    # behind a cache, more queries than keys (rows without any key), nothing.
    lengths = (
        *((16, 16), (64, 64), (65, 65), (63, 64), (130, 129), (1, 1), (1, 97), (2, 70), (4, 131)),
        *((5, 70), (64, 200), (80, 3), (3, 1), (131, 65), (0, 5), (5, 0), (0, 0)),
    )
    for causal in (True, False):
        for T, S in lengths:
            yield Case("attention", (1, 2, 2, T, S, 16), options={"causal": causal})
        for D in (1, 8, 40, 64, 80, 96, 111, 128, 256):
            yield Case("attention", (1, 2, 1, 67, 67, D), options={"causal": causal})
        for H_kv in (1, 2, 3):
            yield Case("attention", (2, 6, H_kv, 33, 40, 8), options={"causal": causal})
            yield Case("attention", (2, 6, H_kv, 3, 40, 8), options={"causal": causal})
        for scale in (0.0, -0.3, 2.0):
            yield Case(
                "attention", (1, 2, 2, 40, 40, 8), options={"causal": causal, "scale": scale}
            )
        for p in (0.1, 0.5, 0.999):
            for shape in ((2, 2, 1, 70, 90, 16), (1, 2, 2, 2, 40, 16)):
                yield Case("attention", shape, options={"causal": causal, "dropout_p": p})
        for values in ("large", "tiny", "constant"):
            yield Case("attention", (1, 2, 2, 70, 70, 24), values, options={"causal": causal})
        for layout in (*LAYOUTS[1:], "packed"):
            for T in (20, 3):
                shape = (2, 2, 2, T, T, 9)
                yield Case("attention", shape, layout=layout, options={"causal": causal})
        for layout in LAYOUTS[1:]:
            yield Case(
                "attention", (2, 2, 2, 20, 20, 9), grad_layout=layout, options={"causal": causal}
            )
    # Windows narrower than a block and wider, on one side and on both, around the diagonal.
    for window in ((0, 0), (-1, 2), (5, -1), (3, 4), (70, 0)):
        yield Case("attention", (1, 1, 1, 130, 129, 16), options={"window": window})
        yield Case("attention", (1, 2, 1, 20, 45, 8), options={"window": window})
        yield Case("attention", (1, 2, 1, 45, 20, 8), options={"window": window, "causal": True})
    more: tuple[dict[str, Any], ...] = (
        *({"softcap": 2.0}, {"softcap": 50.0}, {"alibi": "shared"}, {"alibi": "own"}),
        *({"lse": True}, {"lse": True, "dropout_p": 0.3}, {"Dv": 40}, {"Dv": 3}),
    )
    for n, options in enumerate(more):
        for shape in ((2, 4, 2, 33, 40, 8), (2, 2, 2, 40, 33, 12)):
            yield Case("attention", shape, options={**options, "causal": n % 2 == 0})
    for values in ("normal", "large"):  # of which many ds are below fp16's least step
        yield Case("attention", (1, 2, 2, 33, 40, 8), values, options={"lse": True})
    yield Case("attention", (1, 2, 2, 33, 40, 8), "nan", options={"softcap": 4.0})
    for shape in ((2, 4, 2, 33, 40, 8), (2, 2, 2, 40, 33, 12)):
        yield Case("attention", shape, options={**EVERYTHING, "Dv": 20})
    yield Case("attention", (0, 2, 1, 5, 5, 8))
    for T in (3, 33):
        yield Case("attention", (1, 2, 2, T, 33, 8), "nan")
    # Several chunks of 512 keys, several blocks of queries to a task.
    for options in ({"causal": True}, {"window": (600, 5)}, {**EVERYTHING, "window": (70, 0)}):
        yield Case("attention", (1, 4, 2, 300, 1100, 20), options=options)
    yield Case("attention", (2, 8, 8, 520, 130, 8), options={"causal": True})
    # Many keys: sums that must not lose small terms.
    yield Case("attention", (1, 1, 1, 1, 10_000, 16))
    yield Case("attention", (1, 1, 1, 6, 2_000, 16))


ROW = OpRow(
    inputs=_inputs,
    call=_call,
    peer=peer,
    magnitudes=magnitudes,
    gradients=("q", "k", "v"),
    matrix_units=True,
    cases=tuple(_cases()),
    examples=(
        Case("attention", (2, 4, 2, 70, 90, 16), options={"causal": True}),
        Case("attention", (1, 2, 2, 9, 9, 8), options={"causal": True, "dropout_p": 0.2}),
        Case("attention", (1, 2, 2, 9, 9, 8), options=EVERYTHING),
    ),
    gradchecks=(
        Case("attention", (2, 4, 2, 6, 9, 3)),
        Case("attention", (1, 4, 2, 9, 6, 3), options={"causal": True}),
        Case("attention", (1, 4, 2, 6, 9, 3), options={"causal": True, "dropout_p": 0.4}),
        Case("attention", (2, 2, 1, 6, 9, 3), options={**EVERYTHING, "window": (2, 1), "Dv": 2}),
    ),
    tail=lambda n: Case("attention", (1, 2, 1, n, n + 2, n), options={"causal": n % 2 == 0}),
    many=Case("attention", (2, 4, 2, 200, 260, 32), options={"causal": True, "dropout_p": 0.1}),
    reports=(
        *(
            Case("attention", (1, 4, 2, 512, 512, D), options={"causal": True})
            for D in (64, 80, 128)
        ),
        *(
            Case("attention", (1, 2, 1, 256, 256, D), options={"causal": True})
            for D in (16, 32, 40, 96)
        ),
        Case("attention", (1, 2, 2, 256, 256, 256), options={"causal": True}),
        Case("attention", (1, 2, 2, 150, 256, 64)),
        Case("attention", (1, 2, 2, 256, 256, 64), options={"causal": True, "dropout_p": 0.1}),
        Case("attention", (1, 2, 1, 128, 128, 128), options={"causal": True, "dropout_p": 0.1}),
        Case(
            "attention",
            (1, 2, 1, 256, 256, 64),
            options={"causal": True, "window": (63, 0), "softcap": 30.0, "alibi": "shared"},
        ),
    ),
)
