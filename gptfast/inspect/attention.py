"""Attention maps: p = softmax(scale q k^T + mask) of every layer and head, for one text.

The kernels never store p. It is computed again from the queries and keys of one forward pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from gptfast.evaluate import evaluating
from gptfast.models import GPT
from gptfast.nn import SelfAttention


@torch.inference_mode()
def attention_maps(
    model: GPT, idx: torch.Tensor, memory: torch.Tensor | None = None
) -> torch.Tensor:
    """How much each token attends to each other one.

    Args:
        model: the model; dropout is off while this looks at it.
        idx: (T,) or (1, T) int64 tokens.
        memory: (1, S, C), what an encoder returned, for a model with cross attention. The maps are
            those of self-attention.

    Returns:
        p (n_layer, H, T, T), float32, on the CPU: layer, head, query, key. Rows sum to one.

    Raises:
        ValueError: as `GPT.forward`, or more than one sequence.
        IndexError: a token outside the vocabulary.
    """
    idx = one_sequence(idx)
    blocks: Any = model.transformer["h"]
    layers = [block.attn for block in blocks]
    with evaluating(model), _projections(layers) as qkv:
        model.hidden(idx, memory=memory)
        rotation = model.rotation(0, idx.shape[1])
        maps = [probabilities(layer, qkv[layer], rotation)[0] for layer in layers]
    return torch.stack([p.float().cpu() for p in maps])


def one_sequence(idx: torch.Tensor) -> torch.Tensor:
    """(T,) or (1, T) as (1, T)."""
    if idx.dim() == 1:
        return idx.unsqueeze(0)
    if idx.dim() != 2 or idx.shape[0] != 1:
        raise ValueError(f"inspect: idx must be (T,) or (1, T), got {tuple(idx.shape)}")
    return idx


@contextlib.contextmanager
def _projections(layers: list[SelfAttention]) -> Iterator[dict[SelfAttention, torch.Tensor]]:
    """What `c_attn` of each layer returns, once a forward pass has run."""
    kept: dict[SelfAttention, torch.Tensor] = {}

    def keep(layer: SelfAttention) -> Any:
        return lambda module, inputs, output: kept.update({layer: output})

    hooks = [layer.c_attn.register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def probabilities(layer: SelfAttention, qkv: torch.Tensor, rotation: Any) -> torch.Tensor:
    """(B, H, T, T) attention of a layer from its projections (B, T, (H + 2 H_kv) D)."""
    q, k, _ = layer.heads(qkv, rotation)
    k = k.repeat_interleave(layer.n_head // layer.n_kv_head, dim=1)
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(layer.head_dim)
    T = q.shape[2]
    distance = torch.arange(T, device=q.device) - torch.arange(T, device=q.device)[:, None]
    left, right = layer.window or (T, 0 if layer.causal else T)
    hidden = (distance < -left) | (distance > right)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)
