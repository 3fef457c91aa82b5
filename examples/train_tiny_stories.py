"""Train a GPT on TinyStories from scratch: data, training, checkpoints, samples.

    python examples/train_tiny_stories.py --epochs 1
    python examples/train_tiny_stories.py --quick          # a minute, on the packaged plays
    python examples/train_tiny_stories.py --file my.txt    # a text of your own

TinyStories is fetched once from Hugging Face's hub. Where there is no network, the packaged plays
of Shakespeare are used, and the script says so. The run's folder has settings, metrics and
checkpoints; `python examples/generate_text.py --checkpoint OUT` writes with the best of them.

Source: Eldan and Li, "TinyStories: How Small Can Language Models Be", 2023.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from gptfast.data import Dataset, prepare
from gptfast.train import TrainConfig, train


def open_data(name: str | None, folder: Path) -> Dataset:
    """Tokens of the stories, or of the packaged plays where they cannot be had."""
    if folder.exists():
        return Dataset.open(folder)
    try:
        return prepare(name, folder, tokenizer="gpt2")
    except (ConnectionError, ImportError) as error:
        print(f"{error}\nso the packaged plays are used instead")
        return prepare(None, folder, tokenizer="gpt2")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", default="tinystories", help="a text, or a data set by name")
    parser.add_argument("--out", default="out/tiny-stories", help="folder of the run")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the data")
    parser.add_argument("--context-length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--quick", action="store_true", help="a small model, for a minute")
    args = parser.parse_args(argv)

    name = None if args.quick and args.file == "tinystories" else args.file
    folder = Path(f"{args.out}-data")
    dataset = open_data(name, folder)
    # A text shorter than the window has no window: take what there is.
    context = min(args.context_length, len(dataset.train) - 1, max(1, len(dataset.val) - 1))
    if context < args.context_length:
        print(f"context length {context}, since the text has only {len(dataset.train):,} tokens")

    sizes = {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 32}
    if args.quick:
        context, sizes = (
            min(context, 64),
            {"n_layer": 2, "n_head": 2, "n_embd": 64, "batch_size": 8},
        )
    steps = math.ceil(args.epochs * len(dataset.train) / (sizes["batch_size"] * context))
    steps = args.steps or (100 if args.quick else steps)
    interval = max(1, min(500, steps // 4))
    result = train(
        TrainConfig(
            out=args.out,
            data=str(folder),
            block_size=context,
            max_iters=steps,
            learning_rate=1e-3,
            warmup_iters=min(100, steps // 10),
            eval_interval=interval,
            eval_iters=10,
            checkpoint_interval=interval,
            **sizes,
        )
    )
    print(f"\nvalidation loss {result.val_loss:.3f}, perplexity {math.exp(result.val_loss):.1f}")
    print(f"to write: python examples/generate_text.py --checkpoint {args.out}")


if __name__ == "__main__":
    main()
