"""The logit lens: what the model would say if it stopped after each layer.

    p_l = softmax(head(ln_f(x_l)))        x_0 the embeddings, x_l the residual stream behind layer l

Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gptfast.evaluate import evaluating
from gptfast.inspect.attention import one_sequence
from gptfast.models import GPT
from gptfast.nn.quantized_linear import product


class Lens(NamedTuple):
    """The k likeliest next tokens at each layer and position, the likeliest first.

    tokens: (n_layer + 1, T, k) int64; entry 0 is before the first block.
    p: their probabilities, float32.
    """

    tokens: torch.Tensor
    p: torch.Tensor


@torch.inference_mode()
def logit_lens(
    model: GPT, idx: torch.Tensor, k: int = 5, memory: torch.Tensor | None = None
) -> Lens:
    """Read the residual stream behind every layer through the head.

    Args:
        model: the model; dropout is off while this looks at it.
        idx: (T,) or (1, T) int64 tokens.
        k: how many tokens.
        memory: as in `gptfast.inspect.attention_maps`.

    Raises:
        ValueError: as `GPT.forward`, more than one sequence, or k outside [1, V].
        IndexError: a token outside the vocabulary.
    """
    if not 1 <= k <= model.config.vocab_size:
        raise ValueError(f"inspect: k must be in [1, {model.config.vocab_size}], got {k}")
    idx, stream = one_sequence(idx), []
    blocks: Any = model.transformer["h"]
    hooks = [blocks[0].register_forward_pre_hook(lambda module, inputs: stream.append(inputs[0]))]
    hooks += [
        b.register_forward_hook(lambda module, _, output: stream.append(output[0])) for b in blocks
    ]
    try:
        with evaluating(model):
            model.hidden(idx, memory=memory)
    finally:
        for hook in hooks:
            hook.remove()
    tops = [_likeliest(model, x, k) for x in stream]
    return Lens(torch.stack([t for t, _ in tops]), torch.stack([p for _, p in tops]))


def _likeliest(model: GPT, x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, k) tokens and probabilities from the residual stream (1, T, C)."""
    y = model.transformer["ln_f"](x) if "ln_f" in model.transformer else x
    logits = model.capped(product(model.lm_head, y))[0].float()
    p, tokens = logits.softmax(-1).topk(k)
    return tokens.cpu(), p.cpu()
