"""The lecture's path on Shakespeare, character by character: from a bigram to a Transformer.

    python examples/train_shakespeare_char.py --quick     # a minute
    python examples/train_shakespeare_char.py             # nanoGPT's recipe for a CPU, some minutes
    python examples/train_shakespeare_char.py --big       # the lecture's 10.65M parameters, hours

First a table of which character follows which, trained by a loop as short as can be; then a GPT on
the same text. What the second gains over the first is what attention to the characters before is
worth. `--file tinyshakespeare` takes the lecture's text, which is fetched once; without it there
are nine packaged plays.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, cast

import torch

from gptfast.data import Dataset, read_text, resolve_source
from gptfast.generate import generate
from gptfast.models import Bigram, BigramConfig
from gptfast.optim import AdamW
from gptfast.train import TrainConfig, train


def train_bigram(dataset: Dataset, steps: int, batch_size: int = 32, T: int = 64) -> Bigram:
    """The whole of training, in a few lines."""
    torch.manual_seed(1337)
    generator = torch.Generator().manual_seed(1337)
    model = Bigram(BigramConfig(dataset.vocab_size))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        x, y = dataset.batch("train", batch_size, T, generator)
        loss = model(x, y, loss_only=True)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def validation_loss(model: Bigram, dataset: Dataset) -> float:
    tokens = torch.from_numpy(dataset.val[:].astype("int64"))[None]
    return model(tokens[:, :-1], tokens[:, 1:], loss_only=True)[1].item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", help="a text, or tinyshakespeare; by default packaged plays")
    parser.add_argument("--out", default="out/shakespeare-example", help="folder of the run")
    parser.add_argument("--big", action="store_true", help="the lecture's final model")
    parser.add_argument("--steps", type=int, help="of the GPT's training")
    parser.add_argument("--quick", action="store_true", help="a minute's model")
    args = parser.parse_args(argv)

    dataset = Dataset.in_memory(read_text(resolve_source(args.file)), "char")
    print(f"{len(dataset.train):,} characters to train on, {dataset.vocab_size} different ones")
    bigram = train_bigram(dataset, 100 if args.quick else 1000)
    start = torch.zeros(1, 1, dtype=torch.int64)
    text = generate(cast(Any, bigram), start, 150, generator=torch.Generator().manual_seed(1))
    print(f"bigram, validation loss {validation_loss(bigram, dataset):.3f}:")
    print(dataset.tokenizer.decode(text[0].tolist()), "\n")

    preset = "demo" if args.quick else "shakespeare-char" if args.big else "shakespeare-char-cpu"
    changes: dict[str, Any] = {"out": args.out, "file": args.file}
    steps = args.steps or (400 if args.quick else None)
    if steps is not None:
        changes |= {"max_iters": steps, "warmup_iters": steps // 10}
    result = train(TrainConfig.preset(preset, **changes))
    print(
        f"validation loss of the bigram {validation_loss(bigram, dataset):.3f}, "
        f"of the GPT {result.val_loss:.3f}"
    )


if __name__ == "__main__":
    main()
