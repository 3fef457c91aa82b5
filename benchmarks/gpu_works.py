"""What `benchmarks/gpu.py` times: each op with its peers, at the sizes of real models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gptfast
from benchmarks.timing import EAGER
from gptfast.ops.philox import row_factors

DEVICE = "cuda"
Tensors = Sequence[torch.Tensor]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Work:
    """One op at one size.

    Args:
        op: its name.
        shape: for people.
        inputs: makes a set of random inputs; those that are floating point get gradients.
        ours: gptfast's call.
        peers: others, by name; EAGER is compiled, too.
        bytes: least that forward, and backward, must move.
        flops: of the matrix products in forward, and in backward.
        passes: which are timed.
        exact: like `ours`, of inputs in fp64; None: EAGER.
        small: a set of inputs for the check, where a full one is too large for fp64.
        constant: numbers of the inputs that get no gradient although they are floating point.
    """

    op: str
    shape: str
    inputs: Callable[[], Tensors]
    ours: Function
    peers: Mapping[str, Function]
    bytes: tuple[float, float]
    flops: tuple[float, float] = (0.0, 0.0)
    passes: tuple[str, ...] = ("fwd", "bwd")
    exact: Function | None = None
    small: Callable[[], Tensors] | None = None
    constant: tuple[int, ...] = field(default=())


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, device=DEVICE)


def norms(M: int, N: int) -> Iterator[Work]:
    size = 2.0 * M * N
    shape = f"{M} x {N}"
    yield Work(
        "layer_norm",
        shape,
        lambda: (random(M, N), random(N), random(N)),
        lambda x, w, b: gptfast.layer_norm(x, w, b),
        {EAGER: lambda x, w, b: F.layer_norm(x, (N,), w, b)},
        (2 * size, 3 * size),
    )
    yield Work(
        "rms_norm",
        shape,
        lambda: (random(M, N), random(N)),
        lambda x, w: gptfast.rms_norm(x, w, eps=1e-5),
        {EAGER: lambda x, w: F.rms_norm(x, (N,), w, eps=1e-5)},
        (2 * size, 3 * size),
    )

    def add_layer_norm(
        x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r = residual + x
        return F.layer_norm(r, (N,), w, b), r

    yield Work(
        "add_layer_norm",
        shape,
        lambda: (random(M, N), random(M, N), random(N), random(N)),
        gptfast.add_layer_norm,
        {EAGER: add_layer_norm},
        (4 * size, 4 * size),
    )
    yield Work(
        "dropout_add",
        f"{shape}, p 0.1",
        lambda: (random(M, N), random(M, N)),
        lambda x, residual: gptfast.dropout_add(x, residual, 0.1, seed()),
        {EAGER: lambda x, residual: residual + F.dropout(x, 0.1)},
        (3 * size, 2 * size),
        # PyTorch draws another mask.
        exact=lambda x, residual: residual + dropped(x),
    )


@functools.cache
def seed() -> torch.Tensor:
    """That of every dropout mask of ours."""
    return torch.tensor(12345, device=DEVICE)


def dropped(x: torch.Tensor) -> torch.Tensor:
    """Our dropout of x, as a formula of PyTorch."""
    return x * row_factors(seed(), x.shape, 0.1, x.dtype)


def elementwise(M: int, N: int) -> Iterator[Work]:
    size, shape = 2.0 * M * N, f"{M} x {N}"
    yield Work(
        "gelu, tanh",
        shape,
        lambda: (random(M, N),),
        lambda x: gptfast.gelu(x, "tanh"),
        {EAGER: lambda x: F.gelu(x, approximate="tanh")},
        (2 * size, 3 * size),
    )
    yield Work(
        "bias_gelu, tanh",
        shape,
        lambda: (random(M, N), random(N)),
        lambda x, b: gptfast.bias_gelu(x, b, "tanh"),
        {EAGER: lambda x, b: F.gelu(x + b, approximate="tanh")},
        (2 * size, 3 * size),
    )
    yield Work(
        "swiglu",
        shape,
        lambda: (random(M, N), random(M, N)),
        gptfast.swiglu,
        {EAGER: lambda gate, up: F.silu(gate) * up},
        (3 * size, 5 * size),
    )


def losses(M: int, V: int, C: int) -> Iterator[Work]:
    size = 2.0 * M * V
    yield Work(
        "cross_entropy",
        f"{M} x {V}",
        lambda: (random(M, V), integers(V, M)),
        gptfast.cross_entropy,
        {EAGER: F.cross_entropy},
        (size, 2 * size),
    )
    if not C:
        return

    def linear(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x @ w.T, target)

    read = 2.0 * (M * C + V * C)
    yield Work(
        "linear_cross_entropy",
        f"{M} x {C} to {V}",
        lambda: (random(M, C), random(V, C) / C**0.5, integers(V, M)),
        gptfast.linear_cross_entropy,
        {EAGER: linear},
        (read, 2 * read),
        (2.0 * M * V * C, 4.0 * M * V * C),  # of the peer: recomputed logits are no useful work
        # fp64 sums over a tenth of the rows.
        small=lambda: (random(M // 8, C), random(V, C) / C**0.5, integers(V, M // 8)),
    )


def sdpa(backend: SDPBackend) -> Function:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def attentions(B: int, H: int, T: int, D: int) -> Iterator[Work]:
    size, flops = 2.0 * B * H * T * D, 2.0 * B * H * T * T * D  # half of the scores are masked
    yield Work(
        "attention, causal",
        f"B {B} H {H} T {T} D {D}",
        lambda: tuple(random(B, H, T, D) for _ in range(3)),
        lambda q, k, v: gptfast.attention(q, k, v, causal=True),
        {
            "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
            "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
            "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        },
        (4 * size, 8 * size),
        (flops, 2.5 * flops),
        exact=sdpa(SDPBackend.MATH),
        small=lambda: tuple(random(1, H, T, D) for _ in range(3)),
    )


def decodes(B: int, H: int, H_kv: int, S: int, D: int) -> Iterator[Work]:
    def inputs() -> Tensors:
        lengths = torch.full((B,), S, dtype=torch.int32, device=DEVICE)
        return (random(B, H, 1, D), random(B, S, H_kv, D), random(B, S, H_kv, D), lengths)

    def peer(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=H_kv != H)

    yield Work(
        "attention_decode",
        f"B {B} H {H} H_kv {H_kv} S {S} D {D}",
        inputs,
        gptfast.attention_decode,
        {EAGER: peer},
        (4.0 * B * S * H_kv * D, 0.0),
        passes=("fwd",),
    )


def ropes(B: int, H: int, T: int, D: int) -> Iterator[Work]:
    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, -1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(x.dtype)

    def peer(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return turned(q, cos, sin), turned(k, cos, sin)

    yield Work(
        "rope",
        f"B {B} H {H} T {T} D {D}",
        # As projections leave them: (B, T, H, D), transposed.
        lambda: (
            random(B, T, H, D).transpose(1, 2),
            random(B, T, H, D).transpose(1, 2),
            *(x.to(DEVICE) for x in gptfast.rope_cache(T, D)),
        ),
        gptfast.rope,
        {EAGER: peer},
        (8.0 * B * H * T * D, 8.0 * B * H * T * D),
        constant=(2, 3),
    )


def embeddings(M: int, V: int, C: int) -> Iterator[Work]:
    yield Work(
        "embedding",
        f"{M} of {V} x {C}",
        lambda: (integers(V, M), random(V, C)),
        gptfast.embedding,
        {EAGER: F.embedding},
        (4.0 * M * C, 2.0 * M * C + 2.0 * V * C),
        passes=("bwd",),
    )


def works() -> Iterator[Work]:
    """All, with the sizes of GPT-2 124M and of models of some billions of parameters."""
    yield from norms(65536, 64)  # of heads
    yield from norms(16384, 768)
    yield from norms(8192, 4096)
    yield from elementwise(16384, 3072)
    yield from losses(8192, 50257, 768)
    yield from losses(4096, 128256, 0)
    yield from losses(8192, 32000, 4096)
    for B, H, T, D in ((16, 12, 1024, 64), (4, 12, 4096, 64), (8, 16, 1024, 128)):
        yield from attentions(B, H, T, D)
    yield from attentions(2, 16, 4096, 128)
    for sizes in ((8, 12, 12, 1024, 64), (32, 32, 8, 4096, 128), (1, 32, 8, 32768, 128)):
        yield from decodes(*sizes)
    yield from ropes(4, 32, 2048, 128)
    yield from embeddings(16384, 50257, 768)
