"""Multi-head causal self-attention with GPT-2's parameters, and the cache of keys and values."""

from __future__ import annotations

import torch
from torch import nn

from gptfast.nn.quantized_linear import product
from gptfast.ops import attention, attention_qkv
from gptfast.ops.attention_qkv import split_heads


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
        """Forget all tokens."""
        self.length = 0


class CausalSelfAttention(nn.Module):
    """y = W_o concat_h(attention(x W_q, x W_k, x W_v)) + b_o, each token seeing those up to itself.

    Parameters are GPT-2's: `c_attn` holds W_q, W_k, W_v side by side, `c_proj` is the output.

    Args:
        n_embd: C, width of the residual stream.
        n_head: H, number of heads; divides n_embd.
        n_kv_head: number of key and value heads; divides n_head; None means n_head.
        dropout: probability for the scores and for the output, in training.
        bias: whether the two linear layers have one.

    Shape: (B, T, C) to (B, T, C).

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
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if n_head < 1 or n_embd % n_head:
            raise ValueError(f"n_head must divide n_embd {n_embd}, got {n_head}")
        if n_kv_head < 1 or n_head % n_kv_head:
            raise ValueError(f"n_kv_head must divide n_head {n_head}, got {n_kv_head}")
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, n_embd // n_head
        self.dropout = dropout
        self.c_attn = nn.Linear(n_embd, (n_head + 2 * n_kv_head) * self.head_dim, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> torch.Tensor:
        """Attend from x to itself, and with a cache to the tokens before it as well."""
        return self.resid_dropout(self.c_proj(self._attend(x, cache, layer)))

    def branch(self, x: torch.Tensor, cache: KVCache | None = None, layer: int = 0) -> torch.Tensor:
        """The output without the last bias and dropout, which `add_layer_norm` can add."""
        return product(self.c_proj, self._attend(x, cache, layer))

    def _attend(self, x: torch.Tensor, cache: KVCache | None, layer: int) -> torch.Tensor:
        heads = (self.n_head, self.n_kv_head)
        qkv, dropout_p = self.c_attn(x), self.dropout if self.training else 0.0
        if cache is None:
            return attention_qkv(qkv, *heads, causal=True, dropout_p=dropout_p)
        q, k, v = split_heads(qkv, *heads)
        k, v = cache.append(layer, k, v)
        y = attention(q, k, v, causal=True, dropout_p=dropout_p)
        return y.transpose(1, 2).flatten(2)
