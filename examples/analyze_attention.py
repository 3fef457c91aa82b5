"""What the heads of a model look at: pictures, and three numbers for each head.

    python examples/analyze_attention.py --checkpoint out/tiny-stories --text "The cat sat."
    python examples/analyze_attention.py --quick       # trains its own small model first

Writes `attention.html` (open it in a browser, pick a head, point at a token), `attention.png` and
`lens.png` into --out, and prints for each head how much of its attention goes to the token before,
to the first token, and to how many tokens it spreads: exp of its entropy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gptfast import checkpoint
from gptfast.data import read_text
from gptfast.inspect import attention_maps, draw
from gptfast.train import TrainConfig, train


def print_heads(maps: torch.Tensor, console: Console) -> None:
    """A line for each head of maps (n_layer, H, T, T)."""
    table = Table(title="where the heads look, on average over the text")
    for name in ("layer", "head", "token before", "first token", "spread, tokens"):
        table.add_column(name, justify="right")
    rows = maps[:, :, 1:]  # the first token has nothing but itself
    before = maps.diagonal(-1, 2, 3).mean(-1)
    first = rows[..., 0].mean(-1)
    spread = torch.special.entr(rows).sum(-1).exp().mean(-1)
    for layer in range(maps.shape[0]):
        for head in range(maps.shape[1]):
            at = (layer, head)
            table.add_row(
                *map(str, at), f"{before[at]:.1%}", f"{first[at]:.1%}", f"{spread[at]:.1f}"
            )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="folder of a run")
    parser.add_argument("--text", help="what to read; by default the beginning of a play")
    parser.add_argument("--out", default="out/attention", help="folder of the pictures")
    parser.add_argument("--steps", type=int, default=300, help="of --quick's training")
    parser.add_argument("--quick", action="store_true", help="train a small model first")
    args = parser.parse_args(argv)
    if args.quick and args.checkpoint is None:
        args.checkpoint = f"{args.out}-run"
        if not Path(args.checkpoint).exists():
            train(TrainConfig.preset("demo", out=args.checkpoint, max_iters=args.steps), quiet=True)
    if args.checkpoint is None:
        parser.error("expected --checkpoint or --quick, got neither")

    loaded = checkpoint.load(args.checkpoint)
    model, tokenizer = loaded.model, loaded.tokenizer
    text = args.text or read_text()[:200]
    ids = tokenizer.encode(text)[: model.config.block_size]
    text = tokenizer.decode(ids)
    print_heads(attention_maps(model, torch.tensor(ids)), Console())
    try:
        for path in draw(model, tokenizer, text, args.out, title=loaded.path.name):
            print(path)
    except ModuleNotFoundError as error:
        print(f"{Path(args.out) / 'attention.html'}\nno pictures: {error}")


if __name__ == "__main__":
    main()
