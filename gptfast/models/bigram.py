"""The simplest language model: what comes next depends on the last token alone.

    logits = table[token]

A baseline: what a GPT's attention is worth is what it beats this by. Trained to its end, it has the
entropy of pairs of tokens as its loss.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from gptfast.nn import Embedding, KVCache
from gptfast.ops import cross_entropy

__all__ = ["Bigram", "BigramConfig"]


@dataclasses.dataclass(frozen=True)
class BigramConfig:
    """Size of a bigram model.

    Raises:
        ValueError: vocab_size below 1.
    """

    vocab_size: int  # V
    block_size: int = dataclasses.field(default=1, init=False)  # tokens that it looks at

    def __post_init__(self) -> None:
        if not isinstance(self.vocab_size, int) or self.vocab_size < 1:
            raise ValueError(
                f"BigramConfig: vocab_size must be a positive integer, got {self.vocab_size!r}"
            )


class Bigram(nn.Module):
    """A (V, V) table of logits, called like `GPT`; `gptfast.generate.generate` takes it, too.

    Args:
        config: its size.
    """

    def __init__(self, config: BigramConfig) -> None:
        super().__init__()
        self.config = config
        self.table = Embedding(config.vocab_size, config.vocab_size)
        nn.init.normal_(self.table.weight, std=0.02)

    def num_parameters(self) -> int:
        """V^2."""
        return self.table.weight.numel()

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache, in which nothing is kept but a number of tokens."""
        return KVCache(0, batch_size, 1, max_length or 1, 1, device=self.table.weight.device)

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        loss_only: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits (B, T, V) of idx (B, T), or (B, 1, V) with a cache, and the loss; see `GPT`.

        Raises:
            ValueError: idx is not (B, T), or the loss alone is wanted of no targets.
            IndexError: a token outside [0, V) (on a CPU).
        """
        if idx.dim() != 2 or idx.numel() == 0:
            raise ValueError(
                f"Bigram: idx must be (B, T) with tokens in it, got {tuple(idx.shape)}"
            )
        if loss_only and targets is None:
            raise ValueError("Bigram: the loss needs targets, got None")
        logits = self.table(idx)
        if cache is not None:
            cache.advance(idx.shape[1])
            logits = logits[:, -1:]
        loss = None if targets is None else cross_entropy(logits, targets)
        return (None if loss_only else logits), loss
