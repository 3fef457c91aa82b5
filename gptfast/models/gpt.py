"""GPT-2: token and position embeddings, n_layer pre-norm blocks, a tied output head.

    x = wte[idx] + wpe[pos]
    for each block:  x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))
    logits = ln_f(x) wte^T

Shapes: B batch, T tokens, C = n_embd channels, H = n_head heads, D = C / H, V = vocab_size.
Parameters bear the names of the published checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import torch
from torch import nn

from gptfast.nn import CausalSelfAttention, KVCache, LayerNorm
from gptfast.nn.quantized_linear import QuantizedLinear, product
from gptfast.ops import add_layer_norm, bias_gelu, cross_entropy, gelu, linear_cross_entropy
from gptfast.ops.linear_cross_entropy import is_faster


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT.

    Raises:
        ValueError: a size below 1, n_head not dividing n_embd, or dropout outside [0, 1).
    """

    block_size: int = 1024  # longest sequence, T
    vocab_size: int = 50257  # V
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # C
    dropout: float = 0.0  # of embeddings, attention scores and residual branches
    bias: bool = True  # in linear layers and LayerNorms

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"GPTConfig: {name} must be a positive integer, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: n_head must divide n_embd {self.n_embd}, got {self.n_head}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTConfig: dropout must be in [0, 1), got {self.dropout}")

    @classmethod
    def preset(cls, name: str, **changes: int | float | bool) -> GPTConfig:
        """A published size by name: gpt2, gpt2-medium, gpt2-large or gpt2-xl.

        Raises:
            ValueError: unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown model preset {name!r}; known: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})  # type: ignore[arg-type]


PRESETS = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124,439,808 parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 354,823,168
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774,030,080
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1,557,611,200
}


class MLP(nn.Module):
    """y = W_2 gelu(W_1 x + b_1) + b_2, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) to (B, T, C), without b_2."""
        h = product(self.c_fc, x)
        h = gelu(h) if self.c_fc.bias is None else bias_gelu(h, self.c_fc.bias)
        return product(self.c_proj, h)


class Block(nn.Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x)), with dropout of what is added.

    Each sum is made in one pass with the norm behind it; that of the second is the next block's.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(
            config.n_embd, config.n_head, dropout=config.dropout, bias=config.bias
        )
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        following: nn.Module,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y = ln_1(x) to the new x and `following` of it; all are (B, T, C)."""
        x, y = self._add(x, self.attn.branch(y, cache, layer), self.attn.c_proj, self.ln_2)
        return self._add(x, self.mlp.branch(y), self.mlp.c_proj, following)

    def _add(
        self, x: torch.Tensor, branch: torch.Tensor, last: nn.Linear, norm: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + dropout(branch + bias of its last layer), and the norm of that."""
        y, x = add_layer_norm(
            branch,
            x,
            norm.weight,
            norm.bias,
            norm.eps,
            x_bias=last.bias,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return x, y


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
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = cast(nn.Embedding, self.transformer["wte"]).weight
        self.apply(self._initialise)
        # 2 n_layer branches are added to the residual stream: keep its variance at one.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

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
        """An empty cache for `batch_size` sequences of up to `max_length` tokens."""
        c = self.config
        weight = cast(nn.Embedding, self.transformer["wte"]).weight
        return KVCache(
            c.n_layer,
            batch_size,
            c.n_head,
            max_length or c.block_size,
            c.n_embd // c.n_head,
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
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits of the next token at every position, and the loss where targets are given.

        Args:
            idx: (B, T) int64 tokens in [0, V).
            targets: (B, T) int64 tokens; -100 is ignored.
            cache: keys and values of the tokens before idx; it is extended by idx.
            loss_only: whether the loss is all that is wanted: see `fused_loss`.

        Returns:
            logits (B, T, V), or (B, 1, V) of the last position when a cache is given, or None with
            loss_only; and the mean cross-entropy, a float32 scalar, or None.

        Raises:
            ValueError: idx is not (B, T), is empty, or is longer than block_size allows; or the
                loss alone is wanted of no targets.
            IndexError: a token outside [0, V) (on a CPU, when not compiled).
        """
        self._check(idx, cache)
        if loss_only and targets is None:
            raise ValueError("GPT: the loss needs targets, got None")
        start = cache.length if cache is not None else 0
        T = idx.shape[1]
        t: Any = self.transformer
        positions = t["wpe"].weight
        if self.config.block_size > T:  # else the gradient needs no copy
            positions = positions[start : start + T]
        x = t["drop"](t["wte"](idx) + positions)
        y = t["h"][0].ln_1(x)
        norms = [*(block.ln_1 for block in t["h"]), t["ln_f"]]
        for layer, block in enumerate(t["h"]):
            x, y = block(x, y, norms[layer + 1], cache, layer)
        if cache is not None:
            cache.advance(T)
            y = y[:, -1:]
        if loss_only and targets is not None:
            fused = is_faster(y) if self.fused_loss is None else self.fused_loss
            if fused and not isinstance(self.lm_head, QuantizedLinear):
                return None, linear_cross_entropy(y, self.lm_head.weight, targets)
            return None, cross_entropy(product(self.lm_head, y), targets)
        logits = product(self.lm_head, y)
        return logits, None if targets is None else cross_entropy(logits, targets)

    def _check(self, idx: torch.Tensor, cache: KVCache | None) -> None:
        if idx.dim() != 2 or idx.numel() == 0:
            raise ValueError(f"GPT: idx must be (B, T) with tokens in it, got {tuple(idx.shape)}")
        length = idx.shape[1] + (cache.length if cache is not None else 0)
        if length > self.config.block_size:
            raise ValueError(
                f"GPT: a sequence has at most block_size {self.config.block_size} tokens, "
                f"got {length}"
            )
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = idx.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise IndexError(
                    f"GPT: tokens must be in [0, {self.config.vocab_size}), got {int(bad)}"
                )
