"""One HTML file to look into a model with: attention of every layer and head, and the logit lens.

The file holds its data and its script, and asks the network for nothing: a policy in it forbids
that. Attention is kept as round(255 sqrt(p)), a byte each, so that p is exact to 0.004 sqrt(p).
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch

from gptfast.inspect.attention import attention_maps, one_sequence
from gptfast.inspect.lens import logit_lens
from gptfast.models import GPT


def write_page(
    model: GPT,
    idx: torch.Tensor,
    decode: Callable[[list[int]], str],
    path: str | os.PathLike[str],
    title: str = "attention",
    k: int = 5,
) -> Path:
    """Write the page of a text.

    Args:
        model: the model.
        idx: (T,) or (1, T) int64 tokens. The file has n_layer H T^2 4/3 bytes and a little more.
        decode: the text of some tokens, as `Tokenizer.decode`.
        path: where the file goes.
        title: over the page.
        k: likeliest tokens in the lens.

    Raises:
        ValueError, IndexError: as `attention_maps`.
        OSError: the file cannot be written.
    """
    idx = one_sequence(idx)
    maps, lens = attention_maps(model, idx), logit_lens(model, idx, k)
    L, H = maps.shape[:2]
    shades = (255 * maps.sqrt()).round().to(torch.uint8)
    data = {
        "title": title,
        "layers": L,
        "heads": H,
        "tokens": [decode([token]) for token in idx[0].tolist()],
        "attention": base64.b64encode(shades.numpy().tobytes()).decode(),
        "lens": [
            [[[decode([token]), round(p, 4)] for token, p in zip(*at, strict=True)] for at in row]
            for row in (
                list(zip(tokens, ps, strict=True))
                for tokens, ps in zip(lens.tokens.tolist(), lens.p.tolist(), strict=True)
            )
        ],
    }
    # "</" would end the script in the middle of a string; U+2028 does no harm inside JSON.
    embedded = json.dumps(data, ensure_ascii=True).replace("</", "<\\/").replace("<!", "<\\u0021")
    template = (resources.files("gptfast.inspect") / "page.html").read_text("utf-8")
    page = template.replace("{{TITLE}}", html.escape(title)).replace("{{DATA}}", embedded)
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path
