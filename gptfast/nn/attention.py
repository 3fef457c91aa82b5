"""Multi-head attention with GPT-2's parameters, and the cache of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gptfast.nn.quantized_linear import product
from gptfast.nn.rms_norm import RMSNorm
from gptfast.ops import attention, attention_qkv, attention_varlen, rope
from gptfast.ops.attention_qkv import split_heads

Rotation = tuple[torch.Tensor, torch.Tensor]  # cos and sin of `rope_cache`


class KVCache:
    """Keys and values of the tokens seen so far, for every layer; room for `max_length` of them.

    For inference: no gradient flows through a cache.

    Args:
        n_layer, batch_size, n_kv_head, max_length, head_dim: sizes.
        dtype, device: of the keys and values.

    Raises:
        ValueError: from `append`, when the tokens do not fit any more.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        n_kv_head: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (n_layer, 2, batch_size, n_kv_head, max_length, head_dim)
        self.data = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.max_length = max_length
        # By layer, keys and values of an encoder's output: they are the same for every token.
        self.of_memory: dict[int, tuple[torch.Tensor, ...]] = {}

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k and v (B, H_kv, T, D) behind the tokens of `layer`; return them all."""
        start, end = self.length, self.length + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"KVCache: room for {self.max_length} tokens, got {end}")
        keys, values = self.data[layer, 0], self.data[layer, 1]
        with torch.no_grad():
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` as seen, after every layer has appended them."""
        self.length += tokens

    def reset(self) -> None:
        """Forget all tokens, and the encoder's output."""
        self.length = 0
        self.of_memory.clear()


class SelfAttention(nn.Module):
    """y = W_o concat_h(attention(x W_q, x W_k, x W_v)) + b_o.

    Parameters are GPT-2's: `c_attn` holds W_q, W_k, W_v side by side, `c_proj` is the output. With
    qk_norm each head's query and key is first divided by its root mean square, and may have a
    weight for each of its dimensions (`q_norm`, `k_norm`); then `rotation` turns both.

    Args:
        n_embd: C, width of the residual stream.
        n_head: H, number of heads; divides n_embd.
        n_kv_head: number of key and value heads; divides n_head; None means n_head.
        dropout: probability for the scores and for the output, in training.
        bias: whether the two linear layers have one.
        causal: whether a token sees those up to itself, rather than all.
        window: how many tokens it sees on a side, itself counted; None: no limit.
        qk_norm: whether queries and keys are normalised.
        norm_affine, norm_eps: whether those norms have weights; what they add to the mean square.

    Shape: (B, T, C) to (B, T, C).

    Raises:
        ValueError: sizes that do not divide, or a window below 1.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        n_kv_head: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        causal: bool = False,
        window: int | None = None,
        qk_norm: bool = False,
        norm_affine: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        n_kv_head = _checked_kv_heads(n_embd, n_head, n_kv_head, dropout)
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, n_embd // n_head
        self.dropout, self.causal = dropout, causal
        self.window = None if window is None else (window - 1, 0 if causal else window - 1)
        self.c_attn = nn.Linear(n_embd, (n_head + 2 * n_kv_head) * self.head_dim, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = RMSNorm(self.head_dim, norm_eps, norm_affine)
            self.k_norm = RMSNorm(self.head_dim, norm_eps, norm_affine)

    def forward(
        self,
        x: torch.Tensor,
        cache: KVCache | None = None,
        layer: int = 0,
        rotation: Rotation | None = None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from x to itself, and with a cache to the tokens before it as well.

        Args:
            x: (B, T, C).
            cache: extended by the keys and values of x.
            layer: whose keys and values they are.
            rotation: cos and sin for the positions of the T tokens, from `gptfast.rope_cache`.
            documents: (S + 1,) int32, where documents begin when the rows of x are laid end to end,
                and B T: tokens see none of another document. Every row begins one.
        """
        return self.resid_dropout(self.c_proj(self._attend(x, cache, layer, rotation, documents)))

    def branch(
        self,
        x: torch.Tensor,
        cache: KVCache | None = None,
        layer: int = 0,
        rotation: Rotation | None = None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output without the last bias and dropout, which `add_layer_norm` can add."""
        return product(self.c_proj, self._attend(x, cache, layer, rotation, documents))

    def heads(
        self, qkv: torch.Tensor, rotation: Rotation | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (B, H, T, D), k and v (B, H_kv, T, D) from `c_attn`'s output, normalised and turned."""
        q, k, v = split_heads(qkv, self.n_head, self.n_kv_head)
        if self.qk_norm:
            # Rows of D lie side by side in (B, T, H, D).
            q = self.q_norm(q.transpose(1, 2)).transpose(1, 2)
            k = self.k_norm(k.transpose(1, 2)).transpose(1, 2)
        if rotation is not None:
            q, k = rope(q, k, *rotation)  # type: ignore[assignment]
        return q, k, v

    def _attend(
        self,
        x: torch.Tensor,
        cache: KVCache | None,
        layer: int,
        rotation: Rotation | None,
        documents: torch.Tensor | None,
    ) -> torch.Tensor:
        qkv, dropout_p = self.c_attn(x), self.dropout if self.training else 0.0
        options: Any = {"causal": self.causal, "dropout_p": dropout_p, "window": self.window}
        if cache is None and rotation is None and documents is None and not self.qk_norm:
            return attention_qkv(qkv, self.n_head, self.n_kv_head, **options)
        q, k, v = self.heads(qkv, rotation)
        if documents is not None:
            T = x.shape[1]
            q, k, v = (h.transpose(1, 2).flatten(0, 1) for h in (q, k, v))
            y = attention_varlen(q, k, v, documents, documents, T, T, **options)
            return y.flatten(1).unflatten(0, x.shape[:2])
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return attention(q, k, v, **options).transpose(1, 2).flatten(2)


class CausalSelfAttention(SelfAttention):
    """`SelfAttention` in which each token sees those up to itself, as in GPT-2.

    Args: those of `SelfAttention`, but for `causal`.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        n_kv_head: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(n_embd, n_head, n_kv_head, dropout, bias, causal=True, **options)


class CrossAttention(nn.Module):
    """y = W_o concat_h(attention(x W_q, memory W_k, memory W_v)) + b_o: a decoder reads an encoder.

    `c_q` makes queries of x, `c_kv` keys and values of the memory, side by side. Every token sees
    all of the memory.

    Args: those of `SelfAttention` up to `bias`.

    Shape: x (B, T, C) and memory (B, S, C) to (B, T, C).

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        n_kv_head: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        n_kv_head = _checked_kv_heads(n_embd, n_head, n_kv_head, dropout)
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, n_embd // n_head
        self.dropout = dropout
        self.c_q = nn.Linear(n_embd, n_embd, bias=bias)
        self.c_kv = nn.Linear(n_embd, 2 * n_kv_head * self.head_dim, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> torch.Tensor:
        """Attend from x to the memory."""
        return self.resid_dropout(self.c_proj(self._attend(x, memory, cache, layer)))

    def branch(
        self, x: torch.Tensor, memory: torch.Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> torch.Tensor:
        """The output without the last bias and dropout."""
        return product(self.c_proj, self._attend(x, memory, cache, layer))

    def _attend(
        self, x: torch.Tensor, memory: torch.Tensor, cache: KVCache | None, layer: int
    ) -> torch.Tensor:
        q = self.c_q(x).unflatten(-1, (self.n_head, self.head_dim)).transpose(1, 2)
        kv = None if cache is None else cache.of_memory.get(layer)
        if kv is None:
            joined = self.c_kv(memory).unflatten(-1, (2 * self.n_kv_head, self.head_dim))
            kv = joined.transpose(1, 2).split(self.n_kv_head, dim=1)
            if cache is not None:
                cache.of_memory[layer] = kv
        y = attention(q, *kv, dropout_p=self.dropout if self.training else 0.0)
        return y.transpose(1, 2).flatten(2)


def _checked_kv_heads(n_embd: int, n_head: int, n_kv_head: int | None, dropout: float) -> int:
    n_kv_head = n_head if n_kv_head is None else n_kv_head
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if n_head < 1 or n_embd % n_head:
        raise ValueError(f"n_head must divide n_embd {n_embd}, got {n_head}")
    if n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(f"n_kv_head must divide n_head {n_head}, got {n_kv_head}")
    return n_kv_head
