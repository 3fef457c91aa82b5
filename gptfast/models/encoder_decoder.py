"""Encoder and decoder, as in "Attention Is All You Need": one text is read, another one written.

    memory = encoder(source)        every token of the source sees all of it
    logits = decoder(idx, memory)   every token of idx sees those up to itself, and the memory

Both are `GPT`s of the same options, over one vocabulary and with one embedding, which is the head's
weight, too, unless that is not tied. The paper's own model is
`GPTConfig(positions="sinusoidal", pre_norm=False, mlp="relu", n_layer=6, n_head=8, n_embd=512)`.

Limits: sources of one batch have one length, since attention has no mask for padding.

Source: Vaswani et al., "Attention Is All You Need", 2017.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from gptfast.models.config import GPTConfig
from gptfast.models.gpt import GPT

__all__ = ["EncoderDecoder"]


class EncoderDecoder(nn.Module):
    """A sequence-to-sequence model.

    `gptfast.generate.generate(model.decoder, idx, n, memory=model.encode(source))` continues idx.

    Args:
        config: sizes and options of both halves, each n_layer deep; `causal` and `cross_attention`
            are set here.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        # The encoder's head is never asked: tied, it is no parameter of its own.
        self.encoder = GPT(
            dataclasses.replace(config, causal=False, cross_attention=False, tied=True)
        )
        self.decoder = GPT(dataclasses.replace(config, causal=True, cross_attention=True))
        self.share_embeddings()

    def share_embeddings(self) -> None:
        """Give the encoder the decoder's embeddings; again after `to_empty`, which parts them."""
        wte = self.decoder.transformer["wte"]
        self.encoder.transformer["wte"] = wte
        self.encoder.lm_head.weight = wte.weight  # type: ignore[assignment]

    def num_parameters(self) -> int:
        """Number of parameters; what is shared counts once."""
        return sum(p.numel() for p in self.parameters())

    def encode(self, source: torch.Tensor) -> torch.Tensor:
        """(B, S) tokens to the memory (B, S, C); raises as `GPT.forward`."""
        return self.encoder.hidden(source)

    def forward(
        self,
        source: torch.Tensor,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        loss_only: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits of the next token at every position of idx, given the source, and the loss.

        Args:
            source: (B, S) int64 tokens.
            idx, targets, loss_only: as in `GPT.forward`.
        """
        return self.decoder(idx, targets, loss_only=loss_only, memory=self.encode(source))
