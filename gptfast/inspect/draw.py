"""Everything that can be drawn of one text, into a folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gptfast.inspect.attention import attention_maps
from gptfast.inspect.lens import logit_lens
from gptfast.inspect.page import write_page
from gptfast.inspect.plot import MAX_LENS_TOKENS, plot_head, plot_lens, plot_maps
from gptfast.models import GPT
from gptfast.tokenizer import Tokenizer

TITLE_CHARS = 60  # of the text, over a picture


def draw(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    out: str | os.PathLike[str],
    title: str = "",
    head: tuple[int, int] | None = None,
) -> list[Path]:
    """Write `attention.html`, `attention.png` and `lens.png`, and one head's map where it is asked.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        text: at most block_size tokens. The picture of the lens shows the last few of them.
        out: the folder; it is made, and files of these names in it are replaced.
        title: over the pictures, before the beginning of the text.
        head: (layer, head) for `attention_LAYER_HEAD.png`.

    Returns:
        The files.

    Raises:
        ValueError: no token or too many, a character without a token, or no such head.
        ModuleNotFoundError: matplotlib is not installed; the page is written before that.
        OSError: a file cannot be written.
    """
    ids = tokenizer.encode(text)
    device = next(model.parameters()).device
    idx = torch.tensor([ids], device=device)
    L, H = model.config.n_layer, model.config.n_head
    if head is not None and not (0 <= head[0] < L and 0 <= head[1] < H):
        raise ValueError(f"inspect: head must be below ({L}, {H}), got {head}")
    maps, lens = attention_maps(model, idx), logit_lens(model, idx)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    start = text if len(text) <= TITLE_CHARS else f"{text[:TITLE_CHARS]}..."
    over = f"{title}: {start}" if title else start
    tokens = [tokenizer.decode([token]) for token in ids]
    shown = slice(-MAX_LENS_TOKENS, None)
    likeliest = [[tokenizer.decode([t]) for t in row] for row in lens.tokens[:, shown, 0].tolist()]
    written = [
        write_page(model, idx, tokenizer.decode, folder / "attention.html", title),
        plot_maps(maps, folder / "attention.png", over),
        plot_lens(
            type(lens)(lens.tokens[:, shown], lens.p[:, shown]),
            idx[0, shown].cpu(),
            likeliest,
            tokens[shown],
            folder / "lens.png",
            over,
        ),
    ]
    if head is not None:
        layer, number = head
        path = folder / f"attention_{layer}_{number}.png"
        written.append(
            plot_head(maps[layer, number], tokens, path, f"layer {layer}, head {number}")
        )
    return written
