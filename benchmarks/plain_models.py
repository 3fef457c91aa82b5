"""Language models as people write them in plain PyTorch, for tests and figures of `gptfast.patch`.

Nothing here knows of gptfast. Each is called with tokens (B, T), and with targets (B, T) to get the
loss as well: (logits, loss).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """Of a model."""

    vocab_size: int = 67
    block_size: int = 64
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.0


class OwnLayerNorm(nn.Module):
    """As scripts wrote it before `nn.LayerNorm` had `bias=False`."""

    def __init__(self, n: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.bias = nn.Parameter(torch.zeros(n)) if bias else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class FunctionalAttention(nn.Module):
    """Calls `F.scaled_dot_product_attention` itself."""

    def __init__(self, s: Sizes, n_kv_head: int | None = None) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = s.n_head, n_kv_head or s.n_head
        self.head_dim, self.dropout = s.n_embd // s.n_head, s.dropout
        self.c_attn = nn.Linear(s.n_embd, (s.n_head + 2 * self.n_kv_head) * self.head_dim)
        self.c_proj = nn.Linear(s.n_embd, s.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=self.dropout if self.training else 0,
            is_causal=True,
            enable_gqa=self.n_kv_head < self.n_head,
        )
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class GeluMLP(nn.Module):
    """`nn.GELU` between two linear layers."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.c_fc = nn.Linear(s.n_embd, 4 * s.n_embd)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * s.n_embd, s.n_embd)
        self.dropout = nn.Dropout(s.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class SwigluMLP(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        hidden = 8 * s.n_embd // 3
        self.w1 = nn.Linear(s.n_embd, hidden, bias=False)
        self.w2 = nn.Linear(hidden, s.n_embd, bias=False)
        self.w3 = nn.Linear(s.n_embd, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm."""

    def __init__(self, norm_1: nn.Module, attn: nn.Module, norm_2: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm_1, self.attn, self.norm_2, self.mlp = norm_1, attn, norm_2, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class ScriptGPT(nn.Module):
    """A GPT in one file, like nanoGPT: own LayerNorm, F's attention and loss, a tied head."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.wte = nn.Embedding(s.vocab_size, s.n_embd)
        self.wpe = nn.Embedding(s.block_size, s.n_embd)
        self.h = nn.ModuleList(self.new_block(s) for _ in range(s.n_layer))
        self.ln_f = self.new_norm(s)
        self.lm_head = nn.Linear(s.n_embd, s.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def new_norm(self, s: Sizes) -> nn.Module:
        return OwnLayerNorm(s.n_embd, bias=True)

    def new_block(self, s: Sizes) -> nn.Module:
        return Block(self.new_norm(s), FunctionalAttention(s), self.new_norm(s), GeluMLP(s))

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


class ScriptLlama(ScriptGPT):
    """The same with `nn.RMSNorm`, a SwiGLU MLP and fewer key heads."""

    def new_norm(self, s: Sizes) -> nn.Module:
        return nn.RMSNorm(s.n_embd, eps=1e-6)

    def new_block(self, s: Sizes) -> nn.Module:
        attn = FunctionalAttention(s, n_kv_head=s.n_head // 2)
        return Block(self.new_norm(s), attn, self.new_norm(s), SwigluMLP(s))


class EncoderLM(nn.Module):
    """`nn.TransformerEncoder` with a causal mask, and `nn.CrossEntropyLoss`."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(s.vocab_size, s.n_embd)
        self.position = nn.Parameter(0.02 * torch.randn(s.block_size, s.n_embd))
        options: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(
            s.n_embd, s.n_head, 4 * s.n_embd, dropout=s.dropout, **options
        )
        norm = nn.LayerNorm(s.n_embd)
        self.layers = nn.TransformerEncoder(layer, s.n_layer, norm, enable_nested_tensor=False)
        self.head = nn.Linear(s.n_embd, s.vocab_size)
        self.loss = nn.CrossEntropyLoss()

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        T = idx.size(1)
        x = self.embed(idx) + self.position[:T]
        mask = nn.Transformer.generate_square_subsequent_mask(T, x.device, x.dtype)
        logits = self.head(self.layers(x, mask=mask, is_causal=True))
        if targets is None:
            return logits, None
        return logits, self.loss(logits.flatten(0, 1), targets.flatten())


class DecoderLM(EncoderLM):
    """`nn.TransformerDecoder` that reads the first half of the tokens as its memory, unmasked."""

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        layer = nn.TransformerDecoderLayer(
            s.n_embd, s.n_head, 4 * s.n_embd, dropout=s.dropout, activation=F.gelu, batch_first=True
        )
        self.layers: Any = nn.TransformerDecoder(layer, s.n_layer)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        T = idx.size(1)
        x = self.embed(idx) + self.position[:T]
        mask = nn.Transformer.generate_square_subsequent_mask(T, x.device, x.dtype)
        memory = x[:, : (T + 1) // 2]
        logits = self.head(self.layers(x, memory, tgt_mask=mask, tgt_is_causal=True))
        if targets is None:
            return logits, None
        return logits, self.loss(logits.flatten(0, 1), targets.flatten())


PLAIN: dict[str, Callable[[Sizes], nn.Module]] = {
    "script GPT": ScriptGPT,
    "script Llama": ScriptLlama,
    "nn.TransformerEncoder": EncoderLM,
    "nn.TransformerDecoder": DecoderLM,
}
