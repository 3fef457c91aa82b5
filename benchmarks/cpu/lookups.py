"""rope, embedding and attention_decode: what reads a table or a cache by position or token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

import gptfast
from benchmarks.ceiling import Sweep
from benchmarks.cpu.differentiated import built, example_cases
from benchmarks.cpu.works import Built, Limit, Work

B, H, T, D = 4, 12, 1024, 64
V, CHANNELS = 50304, 768
READ = Sweep(1, 0)


def _rope(dtype: torch.dtype, compile: bool) -> Built:
    """The peer turns halves as Hugging Face's models do; heads are views of one projection."""
    q, k = (x.transpose(1, 2) for x in torch.randn(B, T, 2 * H, D).to(dtype).split(H, 2))
    cos, sin = gptfast.rope_cache(T, D)

    def turned(x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, -1)
        wide = (torch.cat((t, t), -1).to(dtype) for t in (cos, sin))
        c, s = wide
        return x * c + torch.cat((-x2, x1), -1) * s

    def ours(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gptfast.rope(q, k, cos, sin)  # type: ignore[return-value]

    limit = Limit(2 * 2 * q.numel() * dtype.itemsize, Sweep(1, 1))
    return built(
        (q, k),
        ours,
        lambda q, k: (turned(q), turned(k)),
        {"fwd": limit, "bwd": limit},
        example_cases("rope"),
        dtype,
        compile,
    )


def _embedding(dtype: torch.dtype, compile: bool) -> Built:
    """Tokens as frequent as words are: every rank has a share of about 1 / rank."""
    generator = torch.Generator().manual_seed(0)
    ranks = V ** torch.rand(B * T, generator=generator)
    idx = ranks.long().clamp(max=V - 1)
    weight = torch.randn(V, CHANNELS).to(dtype)
    size = CHANNELS * dtype.itemsize
    return built(
        (idx, weight),
        gptfast.embedding,
        F.embedding,
        {
            "fwd": Limit(2 * B * T * size, Sweep(1, 1)),
            "bwd": Limit((B * T + V) * size, Sweep(0, 1)),  # most of it is the dense gradient
        },
        example_cases("embedding"),
        dtype,
        compile,
    )


def _decode(B: int, H: int, H_kv: int, S: int, D: int) -> Callable[[torch.dtype, bool], Built]:
    def build(dtype: torch.dtype, compile: bool) -> Built:
        q = torch.randn(B, H, 1, D).to(dtype)
        k, v = torch.randn(2, B, S, H_kv, D).to(dtype)
        lengths = torch.full((B,), S, dtype=torch.int32)

        def peer(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor
        ) -> torch.Tensor:
            heads = k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q, *heads, enable_gqa=True)

        return built(
            (q, k, v, lengths),
            gptfast.attention_decode,
            peer,
            {"fwd": Limit((k.numel() + v.numel()) * dtype.itemsize, READ)},
            example_cases("attention_decode"),
            dtype,
            compile,
            differentiable=False,
        )

    return build


def _decode_work(name: str, B: int, H: int, H_kv: int, S: int, D: int) -> Work:
    shape = f"B{B} H{H} H_kv{H_kv} S{S} D{D}"
    return Work(name, "attention_decode", shape, _decode(B, H, H_kv, S, D))


WORKS = (
    Work("rope", "rope", f"B{B} H{H} T{T} D{D}", _rope),
    Work("embedding", "embedding", f"{B * T} tokens V{V} C{CHANNELS}", _embedding, seconds=0.1),
    _decode_work("attention_decode", 1, 12, 12, 1024, 64),
    _decode_work("attention_decode_grouped", 4, 32, 8, 2048, 128),
)
