"""Write with a trained model, in the ways that there are to pick the next token.

python examples/generate_text.py --checkpoint out/tiny-stories --prompt "Once upon a time"
python examples/generate_text.py --checkpoint hf:openai-community/gpt2    # needs a network
python examples/generate_text.py --quick                                  # trains its own first
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from gptfast import checkpoint
from gptfast.generate import generate_text
from gptfast.integrations.huggingface import download, load_gpt2
from gptfast.models import GPT
from gptfast.tokenizer import GPT2Tokenizer, Tokenizer
from gptfast.train import TrainConfig, train

WAYS = {
    "greedy: always the likeliest token": {"temperature": 0.0},
    "temperature 0.7: likelier tokens more often": {"temperature": 0.7},
    "temperature 1.2: wilder": {"temperature": 1.2},
    "top-k 40: from the 40 likeliest": {"top_k": 40},
    "top-p 0.9: from those that have nine tenths of the probability": {"top_p": 0.9},
}


def load(source: str) -> tuple[GPT, Tokenizer]:
    """A run of ours, or GPT-2 from the hub."""
    if source.startswith("hf:"):
        model, tokenizer = load_gpt2(download(source.removeprefix("hf:")))
        return model, tokenizer or GPT2Tokenizer()
    loaded = checkpoint.load(source)
    return loaded.model, loaded.tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="folder of a run, or hf:NAME")
    parser.add_argument("--prompt", default="\n", help="text to continue")
    parser.add_argument("--tokens", type=int, default=120, help="how many to generate")
    parser.add_argument("--temperature", type=float, help="only with this one")
    parser.add_argument("--top-k", type=int, help="only from so many likeliest")
    parser.add_argument("--top-p", type=float, help="only from the likeliest of this probability")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed, the same text")
    parser.add_argument("--out", default="out/generate-quick", help="folder of --quick's run")
    parser.add_argument("--steps", type=int, default=300, help="of --quick's training")
    parser.add_argument("--quick", action="store_true", help="train a small model first")
    args = parser.parse_args(argv)
    if args.quick and args.checkpoint is None:
        if not Path(args.out).exists():
            train(TrainConfig.preset("demo", out=args.out, max_iters=args.steps), quiet=True)
        args.checkpoint = args.out
    if args.checkpoint is None:
        parser.error("expected --checkpoint or --quick, got neither")

    model, tokenizer = load(args.checkpoint)
    given = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    given = {name: value for name, value in given.items() if value is not None}
    for name, way in ({str(given): given} if given else WAYS).items():
        print(f"--- {name}")
        print(args.prompt, end="")
        generator = torch.Generator().manual_seed(args.seed)
        for piece in generate_text(
            model, tokenizer, args.prompt, args.tokens, generator=generator, **way
        ):
            print(piece, end="", flush=True)
        print("\n")


if __name__ == "__main__":
    main()
