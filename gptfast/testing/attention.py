"""How attention is tested.

Options: causal, scale, dropout_p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from gptfast.ops import attention
from gptfast.ops.philox import dropout_factors
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.judge import UNDERFLOW, Magnitude
from gptfast.testing.memory import LAYOUTS


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    B, H, H_kv, T, S, D = case.shape
    if case.layout == "packed":
        qkv = draw((B, T, 3, H, D), case.values).to(dtype).permute(2, 0, 3, 1, 4)
    else:
        shapes = ((B, H, T, D), (B, H_kv, S, D), (B, H_kv, S, D))
        qkv = [draw(shape, case.values).to(dtype) for shape in shapes]
    seed = torch.tensor(-(2**62) + 12345) if case.options.get("dropout_p") else None
    return {"q": qkv[0], "k": qkv[1], "v": qkv[2], "seed": seed}


def _call(i: Inputs, options: Options) -> torch.Tensor:
    return attention(i["q"], i["k"], i["v"], seed=i["seed"], **options)


def _mask(T: int, S: int, device: torch.device) -> torch.Tensor:
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def _factors(i: Inputs, options: Options, dtype: torch.dtype) -> torch.Tensor:
    B, H, T, _ = i["q"].shape
    row, column, head = (torch.arange(n, device=i["q"].device) for n in (T, i["k"].shape[2], B * H))
    factors = dropout_factors(
        i["seed"], head[:, None, None], row[:, None], column, options["dropout_p"], dtype
    )
    return factors.view(B, H, T, -1)


def _peer(i: Inputs, options: Options) -> torch.Tensor:
    q, k, v = i["q"], i["k"], i["v"]
    causal, scale = options.get("causal", False), options.get("scale")
    mask = _mask(q.shape[2], k.shape[2], q.device) if causal else None
    if not options.get("dropout_p"):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    # PyTorch draws other masks, so its product of softmax and factors is spelled out, in fp32 at
    # least.
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q.to(dtype) @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (torch.softmax(scores, -1) * _factors(i, options, dtype) @ v).to(q.dtype)


def _magnitudes(i: Inputs, options: Options, do: torch.Tensor) -> dict[str, Magnitude]:
    q, do = i["q"], do.abs()
    (_, H, T, D), H_kv, S = q.shape, i["k"].shape[1], i["k"].shape[2]
    k, v = (i[name].repeat_interleave(H // H_kv, 1) for name in ("k", "v"))
    scale = options.get("scale")
    scale = 1 / math.sqrt(D) if scale is None else scale
    scores = q @ k.mT * scale
    if options.get("causal", False):
        scores = scores.masked_fill(~_mask(T, S, q.device), -math.inf)
    lse = torch.logsumexp(scores, -1, keepdim=True).nan_to_num(neginf=0)
    p = torch.exp(scores - lse) + UNDERFLOW
    z = _factors(i, options, q.dtype) if options.get("dropout_p") else 1.0
    q, k, v, scale = q.abs(), k.abs(), v.abs(), abs(scale)
    size = q @ k.mT * scale  # of the terms of a score
    # p moves by u times this, relatively: as s and lse move.
    moves = size + (p * size).sum(-1, keepdim=True) + lse.abs()
    pz = p * z
    o, o_moves = pz @ v, (pz * moves) @ v
    delta, delta_moves = ((do * x).sum(-1, keepdim=True) for x in (o, o_moves))
    ds = p * (z * (do @ v.mT) + delta)
    ds_moves = ds * moves + p * delta_moves

    def of_key_heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (H_kv, H // H_kv)).sum(2)

    key_length = T * H // H_kv + max(S, D)
    return {
        "result": Magnitude(o, o_moves, max(S, D)),
        "q": Magnitude(scale * ds @ k, scale * ds_moves @ k, max(S, D)),
        "k": Magnitude(
            of_key_heads(scale * ds.mT @ q), of_key_heads(scale * ds_moves.mT @ q), key_length
        ),
        "v": Magnitude(of_key_heads(pz.mT @ do), of_key_heads((pz * moves).mT @ do), key_length),
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
            options = {"causal": causal}
            yield Case("attention", (2, 2, 2, 20, 20, 9), layout=layout, options=options)
            yield Case("attention", (2, 2, 2, 3, 3, 9), layout=layout, options=options)
        for layout in LAYOUTS[1:]:
            yield Case(
                "attention", (2, 2, 2, 20, 20, 9), grad_layout=layout, options={"causal": causal}
            )
    yield Case("attention", (0, 2, 1, 5, 5, 8))
    for T in (3, 33):
        yield Case("attention", (1, 2, 2, T, 33, 8), "nan")
    # Many keys: sums that must not lose small terms.
    yield Case("attention", (1, 1, 1, 1, 10_000, 16))
    yield Case("attention", (1, 1, 1, 6, 2_000, 16))


ROW = OpRow(
    inputs=_inputs,
    call=_call,
    peer=_peer,
    magnitudes=_magnitudes,
    gradients=("q", "k", "v"),
    matrix_units=True,
    cases=tuple(_cases()),
    examples=(
        Case("attention", (2, 4, 2, 70, 90, 16), options={"causal": True}),
        Case("attention", (1, 2, 2, 9, 9, 8), options={"causal": True, "dropout_p": 0.2}),
    ),
    gradchecks=(
        Case("attention", (2, 4, 2, 6, 9, 3)),
        Case("attention", (1, 4, 2, 9, 6, 3), options={"causal": True}),
        Case("attention", (1, 4, 2, 6, 9, 3), options={"causal": True, "dropout_p": 0.4}),
    ),
    tail=lambda n: Case("attention", (1, 2, 1, n, n + 2, n), options={"causal": n % 2 == 0}),
    many=Case("attention", (2, 4, 2, 200, 260, 32), options={"causal": True, "dropout_p": 0.1}),
    reports=(
        *(
            Case("attention", (1, 4, 2, 512, 512, D), options={"causal": True})
            for D in (64, 80, 128)
        ),
        Case("attention", (1, 2, 2, 512, 512, 256), options={"causal": True}),
        Case("attention", (1, 4, 4, 300, 512, 64)),
        Case("attention", (1, 2, 2, 256, 256, 64), options={"causal": True, "dropout_p": 0.1}),
    ),
)
