"""A GPT: embeddings, n_layer blocks, and a head. By default it is GPT-2:

    x = wte[idx] + wpe[pos]
    for each block:  x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))
    logits = ln_f(x) wte^T

`GPTConfig` has the options that make it another one: its norms and where they stand, how it knows
positions, its MLP, its heads, what a token sees. With cross attention a block has a third branch,
x + cross(ln_cross(x), memory), between the two.

Shapes: B batch, T tokens, C = n_embd channels, H = n_head heads, D = C / H, V = vocab_size.
Parameters bear the names of the published checkpoints.

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2);
Vaswani et al., "Attention Is All You Need", 2017 (post-norm, sinusoidal positions, cross
attention); Touvron et al., "LLaMA", 2023; So et al., "Primer", 2021 (squared ReLU); Henry et al.,
"Query-Key Normalization for Transformers", 2020; Gemma Team, "Gemma 2", 2024 (softcap).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from gptfast.models.config import PRESETS, GPTConfig
from gptfast.nn import (
    CausalSelfAttention,
    CrossAttention,
    KVCache,
    LayerNorm,
    RMSNorm,
    SelfAttention,
)
from gptfast.nn.attention import Rotation
from gptfast.nn.hooks import is_plain
from gptfast.nn.quantized_linear import late_bias, product
from gptfast.ops import (
    add_layer_norm,
    add_rms_norm,
    bias_gelu,
    cross_entropy,
    dropout_add,
    gelu,
    linear_cross_entropy,
    linear_gelu,
    rope_cache,
    swiglu,
)
from gptfast.ops.linear_cross_entropy import is_faster
from gptfast.ops.linear_gelu import is_faster as linear_gelu_is_faster

__all__ = ["GPT", "MLP", "PRESETS", "Block", "GPTConfig"]


class MLP(nn.Module):
    """y = W_2 f(W_1 x + b_1) + b_2, wider inside.

    f is GELU in its tanh form, ReLU, or its square; or silu(g) u with g and u the two halves of
    W_1 x + b_1.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        columns = config.inner * (2 if config.mlp == "swiglu" else 1)
        self.c_fc = nn.Linear(config.n_embd, columns, bias=config.bias)
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) to (B, T, C), with dropout."""
        return self.resid_dropout(self.c_proj(self._hidden(x)))

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """The same without b_2 and dropout, which `add_layer_norm` can add."""
        return product(self.c_proj, self._hidden(x))

    def _hidden(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind != "gelu":
            return ACTIVATIONS[self.kind](self.c_fc(x))
        b = late_bias(self.c_fc)
        if (
            b is not None
            and is_plain(self.c_fc, nn.Linear)
            and linear_gelu_is_faster(x, self.c_fc.weight)
        ):
            return linear_gelu(x, self.c_fc.weight, b)
        h = product(self.c_fc, x)
        return gelu(h) if b is None else bias_gelu(h, b)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "swiglu": swiglu,
}


class Block(nn.Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x)), with dropout of what is added.

    Each sum is made in one pass with the norm behind it; that of the last is the next block's. With
    post-norm it is ln_1(x + attn(x)), then ln_2(x + mlp(x)). Parts that have hooks, or that others
    have replaced, are called one by one.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.pre_norm = config.pre_norm
        self.ln_1 = new_norm(config)
        attention = CausalSelfAttention if config.causal else SelfAttention
        heads = (config.n_embd, config.n_head, config.n_kv_head, config.dropout, config.bias)
        self.attn = attention(
            *heads,
            window=config.window,
            qk_norm=config.qk_norm,
            norm_affine=config.norm_affine,
            norm_eps=config.norm_eps,
        )
        self.cross = CrossAttention(*heads) if config.cross_attention else None
        self.ln_cross = new_norm(config) if config.cross_attention else None
        self.ln_2 = new_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        following: nn.Module | None,
        cache: KVCache | None = None,
        layer: int = 0,
        rotation: Rotation | None = None,
        memory: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y = ln_1(x) to the new x and `following` of it; all are (B, T, C).

        With post-norm y is x, before and after, and nothing follows.
        """
        after_attn, after_cross, after_mlp = self._norms(following)
        x, y = self._add(x, after_attn, self.attn, y, cache, layer, rotation, documents)
        if self.cross is not None:
            x, y = self._add(x, after_cross, self.cross, y, memory, cache, layer)
        return self._add(x, after_mlp, self.mlp, y)

    def _norms(self, following: nn.Module | None) -> tuple[nn.Module | None, ...]:
        """The norm behind each sum."""
        if not self.pre_norm:
            return self.ln_1, self.ln_cross, self.ln_2
        return (self.ln_2 if self.cross is None else self.ln_cross), self.ln_2, following

    def _add(
        self, x: torch.Tensor, norm: Any, part: Any, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + part(*args), and the norm of that."""
        if is_plain(part, *PARTS) and is_plain(part.resid_dropout, nn.Dropout):
            branch, bias = part.branch(*args), late_bias(part.c_proj)
            dropout_p = self.dropout if self.training else 0.0
        else:
            branch, bias, dropout_p = part(*args), None, 0.0
        options: Any = {"x_bias": bias, "dropout_p": dropout_p}
        if is_plain(norm, RMSNorm):
            y, x = add_rms_norm(branch, x, norm.weight, norm.eps, **options)
        elif is_plain(norm, LayerNorm):
            y, x = add_layer_norm(branch, x, norm.weight, norm.bias, norm.eps, **options)
        else:
            x = dropout_add(branch if bias is None else branch + bias, x, dropout_p)
            y = norm(x)
        return (x if self.pre_norm else y), y


# What a block adds to the stream, in classes whose `branch` leaves the bias and dropout to it.
PARTS = (CausalSelfAttention, SelfAttention, CrossAttention, MLP)


def new_norm(config: GPTConfig) -> nn.Module:
    """The norm of a residual stream."""
    if config.norm == "rms":
        return RMSNorm(config.n_embd, config.norm_eps, config.norm_affine)
    return LayerNorm(config.n_embd, config.norm_eps, config.norm_affine, config.bias)


class PositionTables(nn.Module):
    """Constants of each position, for rotary or sinusoidal ones; no parameters.

    rotary: `cos` and `sin` (T, D/2), see `gptfast.rope`.
    sinusoidal: `wave` (T, C): sin(pos / 10000^(2i / C)) in column 2i, the cosine in column 2i + 1.

    They are float32 whatever the model is cast to, and there after `to_empty`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        for name, table in self._tables(None).items():
            self.register_buffer(name, table, persistent=False)

    def _tables(self, device: torch.device | None) -> dict[str, torch.Tensor]:
        c = self.config
        if c.positions == "rotary":
            cos, sin = rope_cache(c.block_size, c.head_dim, c.rope_base, device=device)
            return {"cos": cos, "sin": sin}
        cos, sin = rope_cache(c.block_size, c.n_embd, 10000.0, device=device)
        return {"wave": torch.stack((sin, cos), dim=-1).flatten(1)}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name, table in self._tables(next(self.buffers()).device).items():
            setattr(self, name, table)
        return self


class GPT(nn.Module):
    """The language model.

    Args:
        config: sizes; `GPTConfig.preset("gpt2")` for the published ones.
        fused_loss: whether `loss_only` takes the loss from `linear_cross_entropy`, which never
            stores the logits. None: where that is faster.
    """

    def __init__(self, config: GPTConfig, fused_loss: bool | None = None) -> None:
        super().__init__()
        self.config = config
        self.fused_loss = fused_loss
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd)})
        if config.positions == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer["drop"] = nn.Dropout(config.dropout)
        if config.embedding_norm:
            self.transformer["ln_emb"] = new_norm(config)
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        if config.pre_norm:
            self.transformer["ln_f"] = new_norm(config)
        has_tables = config.positions in ("rotary", "sinusoidal")
        self.tables: Any = PositionTables(config) if has_tables else None
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = cast(nn.Embedding, self.transformer["wte"]).weight
        self.apply(self._initialise)
        # So many branches are added to the residual stream: keep its variance at one.
        branches = (3 if config.cross_attention else 2) * config.n_layer
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(branches))

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def num_parameters(self) -> int:
        """Number of parameters; the tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache for `batch_size` sequences of up to `max_length` tokens.

        Raises:
            ValueError: the model is an encoder, whose tokens see those behind them.
        """
        c = self.config
        if not c.causal:
            raise ValueError("GPT: a cache needs a model with causal=True, got causal=False")
        weight = cast(nn.Embedding, self.transformer["wte"]).weight
        return KVCache(
            c.n_layer,
            batch_size,
            c.kv_heads,
            max_length or c.block_size,
            c.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        loss_only: bool = False,
        memory: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits of the next token at every position, and the loss where targets are given.

        Args:
            idx: (B, T) int64 tokens in [0, V).
            targets: (B, T) int64 tokens; -100 is ignored.
            cache: keys and values of the tokens before idx; it is extended by idx.
            loss_only: whether the loss is all that is wanted: see `fused_loss`.
            memory: (B, S, C), what an encoder returned, for a model with cross attention.
            documents: (S + 1,) int32, where documents begin when the rows of idx are laid end to
                end, and B T: tokens see none of another document. Every row begins one.

        Returns:
            logits (B, T, V), or (B, 1, V) of the last position when a cache is given, or None with
            loss_only; and the mean cross-entropy, a float32 scalar, or None.

        Raises:
            ValueError: idx is not (B, T), is empty, or is longer than block_size allows; the loss
                alone is wanted of no targets; a memory is missing, of another shape, or given to a
                model without cross attention; or there are both documents and a cache.
            IndexError: a token outside [0, V) (on a CPU, when not compiled).
        """
        if loss_only and targets is None:
            raise ValueError("GPT: the loss needs targets, got None")
        y = self.hidden(idx, cache, memory, documents)
        if cache is not None:
            y = y[:, -1:]
        cap = self.config.logit_softcap
        if loss_only and targets is not None:
            fused = is_faster(y) if self.fused_loss is None else self.fused_loss
            if fused and is_plain(self.lm_head, nn.Linear):
                return None, linear_cross_entropy(y, self.lm_head.weight, targets, softcap=cap)
            return None, cross_entropy(product(self.lm_head, y), targets, softcap=cap)
        logits = product(self.lm_head, y)
        loss = None if targets is None else cross_entropy(logits, targets, softcap=cap)
        return self.capped(logits), loss

    def hidden(
        self,
        idx: torch.Tensor,
        cache: KVCache | None = None,
        memory: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the head reads, (B, T, C), of the arguments of `forward`."""
        self._check(idx, cache, memory)
        if documents is not None and cache is not None:
            raise ValueError("GPT: documents must be None with a cache, got both")
        t: Any = self.transformer
        start, T = (0 if cache is None else cache.length), idx.shape[1]
        x = t["drop"](self._embedded(idx, start))
        y = t["h"][0].ln_1(x) if self.config.pre_norm else x
        norms = [*(block.ln_1 for block in t["h"]), t["ln_f"] if self.config.pre_norm else None]
        rotation = self.rotation(start, T)
        for layer, block in enumerate(t["h"]):
            x, y = block(x, y, norms[layer + 1], cache, layer, rotation, memory, documents)
        if cache is not None:
            cache.advance(T)
        return y

    def _embedded(self, idx: torch.Tensor, start: int) -> torch.Tensor:
        """Token embeddings of idx (B, T) with their positions, the first of which is `start`."""
        T, c, t = idx.shape[1], self.config, cast(Any, self.transformer)
        x = t["wte"](idx)
        if c.positions == "learned":
            positions = t["wpe"].weight
            if c.block_size > T:  # else the gradient needs no copy
                positions = positions[start : start + T]
            x = x + positions
        elif c.positions == "sinusoidal":  # as in 2017, embeddings of about the waves' size
            x = math.sqrt(c.n_embd) * x + self.tables.wave[start : start + T].to(x.dtype)
        return t["ln_emb"](x) if c.embedding_norm else x

    def rotation(self, start: int, T: int) -> Rotation | None:
        """cos and sin (T, D/2) of the positions from `start` on; None unless they are rotary."""
        if self.config.positions != "rotary":
            return None
        return self.tables.cos[start : start + T], self.tables.sin[start : start + T]

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """cap tanh(logits / cap) with the configured cap, or the logits themselves."""
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _check(self, idx: torch.Tensor, cache: KVCache | None, memory: torch.Tensor | None) -> None:
        c = self.config
        if idx.dim() != 2 or idx.numel() == 0:
            raise ValueError(f"GPT: idx must be (B, T) with tokens in it, got {tuple(idx.shape)}")
        length = idx.shape[1] + (cache.length if cache is not None else 0)
        if length > c.block_size:
            raise ValueError(
                f"GPT: a sequence has at most block_size {c.block_size} tokens, got {length}"
            )
        if (memory is not None) != c.cross_attention:
            given = None if memory is None else tuple(memory.shape)
            expected = (
                f"(B, S, {c.n_embd})" if c.cross_attention else "None without cross attention"
            )
            raise ValueError(f"GPT: memory must be {expected}, got {given}")
        if memory is not None and (memory.dim() != 3 or memory.shape[::2] != (len(idx), c.n_embd)):
            expected = f"({len(idx)}, S, {c.n_embd})"
            raise ValueError(f"GPT: memory must be {expected}, got {tuple(memory.shape)}")
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = idx.aminmax()
            if low < 0 or high >= c.vocab_size:
                bad = low if low < 0 else high
                raise IndexError(f"GPT: tokens must be in [0, {c.vocab_size}), got {int(bad)}")
