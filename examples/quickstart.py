"""An untrained GPT: what it is made of, what it costs, and the nonsense that it writes.

    python examples/quickstart.py            # GPT-2's smallest size, 124M parameters
    python examples/quickstart.py --quick    # a model of a moment

Random weights know nothing: the loss is that of a guess among all tokens, log V.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from rich.console import Console

from gptfast.data import read_text
from gptfast.generate import generate_text
from gptfast.inspect import print_parameters
from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import GPT2Tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2", help="sizes: gpt2, llama-135m, ...")
    parser.add_argument("--prompt", default="Once upon a time", help="text to continue")
    parser.add_argument("--tokens", type=int, default=40, help="how many to generate")
    parser.add_argument("--quick", action="store_true", help="two narrow layers")
    args = parser.parse_args(argv)

    torch.manual_seed(1337)
    tokenizer = GPT2Tokenizer()
    config = GPTConfig.preset(args.preset)
    if args.quick:
        config = GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=64)
    model = GPT(config).eval()
    print_parameters(config, f"GPT, {model.num_parameters():,} parameters", Console())

    ids = torch.tensor([tokenizer.encode(read_text()[:2000])[: config.block_size]])
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:])[1].item()
    print(f"loss of Shakespeare: {loss:.3f}; a guess: log V = {math.log(config.vocab_size):.3f}")

    print(f"\n{args.prompt}", end="")
    for piece in generate_text(model, tokenizer, args.prompt, args.tokens):
        print(piece, end="", flush=True)
    print("\n\nGibberish, as it must be. To train a model: python examples/train_tiny_stories.py")


if __name__ == "__main__":
    main()
