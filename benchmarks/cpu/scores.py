"""Attention, plain and with the options that PyTorch can only say with a mask or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import gptfast
from benchmarks.cpu.differentiated import built, example_cases
from benchmarks.cpu.works import Built, Limit, Work

B, H, T, D = 4, 12, 1024, 64
WINDOW, SOFTCAP, DROPOUT = 255, 30.0, 0.1
LENGTHS = (1024, 700, 512, 1000, 860)  # 4096 tokens
SHAPE = f"B{B} H{H} T{T} D{D}"
# Products of the scores forward, and backward.
PRODUCTS = {"fwd": 2, "bwd": 5, "fwd+bwd": 7}


def _limits(*passes: str, seen: float = T * T / 2) -> dict[str, Limit]:
    """`seen`: pairs of a query and a key that it sees, in each head."""
    return {name: Limit(flops=PRODUCTS[name] * 2 * B * H * seen * D) for name in passes}


def _qkv(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, B, H, T, D).to(dtype).unbind(0)


def _causal(dtype: torch.dtype, compile: bool) -> Built:
    return built(
        _qkv(dtype),
        lambda q, k, v: gptfast.attention(q, k, v, causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        _limits("fwd", "bwd"),
        example_cases("attention"),
        dtype,
        compile,
    )


def _with(
    ours: dict[str, Any], peer: Callable[..., Any], seen: float = T * T / 2
) -> Callable[[torch.dtype, bool], Built]:
    def build(dtype: torch.dtype, compile: bool) -> Built:
        return built(
            _qkv(dtype),
            lambda q, k, v: gptfast.attention(q, k, v, causal=True, **ours),
            peer,
            _limits("fwd+bwd", seen=seen),
            example_cases("attention"),
            dtype,
            compile,
        )

    return build


def _distance() -> torch.Tensor:
    position = torch.arange(T)
    return position[:, None] - position


def _windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    distance = _distance()
    seen = (distance >= 0) & (distance <= WINDOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _slopes() -> torch.Tensor:
    return 2.0 ** (-8 * torch.arange(1, H + 1) / H)


def _alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    distance = _distance()
    bias = -_slopes()[:, None, None] * distance.abs()
    bias = bias.masked_fill(distance < 0, float("-inf")).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _softcapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = SOFTCAP * torch.tanh(q @ k.mT / D**0.5 / SOFTCAP)
    scores = scores.masked_fill(_distance() < 0, float("-inf"))
    return torch.softmax(scores, -1) @ v


def _dropped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=DROPOUT)


def _dropout(dtype: torch.dtype, compile: bool) -> Built:
    """Masks are drawn by other generators: only the cases, which know ours, can judge it."""
    q, k, v = _qkv(dtype)
    seed = torch.tensor(1)
    return built(
        (q, k, v),
        lambda q, k, v: gptfast.attention(q, k, v, causal=True, dropout_p=DROPOUT, seed=seed),
        _dropped,
        _limits("fwd+bwd"),
        example_cases("attention"),
        dtype,
        compile,
        alike=False,
    )


def _varlen(dtype: torch.dtype, compile: bool) -> Built:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    q, k, v = torch.randn(3, sum(LENGTHS), H, D).to(dtype).unbind(0)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        longest = max(LENGTHS)
        return gptfast.attention_varlen(q, k, v, ends, ends, longest, longest, causal=True)

    def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = []
        for parts in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True):
            q1, k1, v1 = (x.transpose(0, 1)[None] for x in parts)
            y = F.scaled_dot_product_attention(q1, k1, v1, is_causal=True)
            rows.append(y[0].transpose(0, 1))
        return torch.cat(rows)

    flops = PRODUCTS["fwd+bwd"] * H * D * sum(n * n for n in LENGTHS)
    return built(
        (q, k, v),
        ours,
        one_by_one,
        {"fwd+bwd": Limit(flops=flops)},
        example_cases("attention_varlen"),
        dtype,
        compile,
    )


def _option(name: str, build: Callable[[torch.dtype, bool], Built]) -> Work:
    return Work(f"attention_{name}", "attention", f"{SHAPE} {name}", build, seconds=0.5)


WORKS = (
    Work("attention", "attention", f"{SHAPE} causal", _causal, seconds=0.1),
    _option("dropout", _dropout),
    _option("window", _with({"window": (WINDOW, 0)}, _windowed, T * WINDOW)),
    _option("alibi", _with({"alibi_slopes": _slopes()}, _alibi)),
    _option("softcap", _with({"softcap": SOFTCAP}, _softcapped)),
    Work("attention_varlen", "attention_varlen", f"{LENGTHS} H{H} D{D}", _varlen, seconds=0.2),
)
