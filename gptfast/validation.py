"""The loss of a whole split, each token predicted once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gptfast.data.shards import Tokens
from gptfast.distributed import Ranks

__all__ = ["validation_loss"]

ALONE = Ranks()


@torch.no_grad()
def validation_loss(
    model: Callable[..., tuple[Any, torch.Tensor | None]],
    tokens: Tokens,
    batch_size: int,
    block_size: int,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Mean loss over all tokens but the first, each predicted once, in windows that do not overlap.

    Args:
        model: a `GPT` in evaluation mode, or anything that is called like one.
        tokens: (N,) token ids, N >= 2.
        batch_size: windows at a time.
        block_size: tokens in a window; the last one may be shorter.
        device: where the model is.
        ranks: the processes that share the windows.
        on_done: told at first and after every batch how many tokens are done, and of how many.

    Raises:
        ValueError: fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"validation: expected at least 2 tokens, got {len(tokens)}")
    count = len(tokens) - 1  # targets
    batches = []  # first token, rows, length
    start = 0
    while start < count:
        rows = max(1, min(batch_size, (count - start) // block_size))
        length = min(block_size, count - start)
        batches.append((start, rows, length))
        start += rows * length
    on_done(0, count)
    total = torch.zeros((), dtype=torch.float64, device=device)
    # As many batches for each process, since fsdp needs all of them in each forward.
    for n in range(
        ranks.rank, math.ceil(len(batches) / ranks.world_size) * ranks.world_size, ranks.world_size
    ):
        start, rows, length = batches[n % len(batches)]
        window = np.asarray(tokens[start : start + rows * length + 1]).astype(np.int64)
        both = torch.from_numpy(window).to(device)
        x, y = both[:-1].view(rows, length), both[1:].view(rows, length)
        loss = model(x, y)[1]
        if loss is not None and n < len(batches):
            total += loss.double() * y.numel()
            on_done(start + rows * length, count)
    return ranks.total(total.item()) / count
