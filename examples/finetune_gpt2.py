"""Fine-tune GPT-2 on a text, with a training loop of one's own, and save it for transformers.

    python examples/finetune_gpt2.py --model hf:openai-community/gpt2 --file my.txt
    python examples/finetune_gpt2.py --quick     # offline: a small random model stands in for GPT-2

The loop is plain PyTorch: the model is an `nn.Module` that returns its loss, the optimizer one of
`torch.optim`'s kind. Only as many weights move as the learning rate lets: it is a tenth of that of
training from scratch, since the model knows the language already.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from gptfast.data import Dataset, read_text
from gptfast.evaluate import score_text
from gptfast.generate import generate_text
from gptfast.integrations.huggingface import download, load_gpt2, save_gpt2
from gptfast.models import GPT, GPTConfig
from gptfast.optim import AdamW
from gptfast.tokenizer import GPT2Tokenizer


def stand_in(folder: Path) -> Path:
    """A small GPT-2 with random weights, in the format of the hub's."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=64))
    return save_gpt2(model, folder / "gpt2", GPT2Tokenizer())


def parameter_groups(model: GPT, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases and norms do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="hf:openai-community/gpt2", help="folder, or hf:NAME")
    parser.add_argument("--file", help="a text; by default the packaged plays")
    parser.add_argument("--out", default="out/finetuned", help="folder to save, which is new")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=256, help="tokens in a window")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--quick", action="store_true", help="a minute, with random weights")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as temporary:
        source = args.model
        if args.quick and source.startswith("hf:"):
            source, args.learning_rate = str(stand_in(Path(temporary))), 1e-3
        folder = download(source[3:]) if source.startswith("hf:") else Path(source)
        model, tokenizer = load_gpt2(folder, dropout=0.1)
    tokenizer = tokenizer or GPT2Tokenizer()
    text = read_text(args.file)
    if args.quick:
        text = text[:200_000]
    dataset = Dataset.in_memory(text, tokenizer)
    block_size = min(args.block_size, model.config.block_size)
    held_out = text[int(0.9 * len(text)) :][: 4000 if args.quick else 40_000]
    print(f"before: perplexity {score_text(model, tokenizer, held_out).perplexity:,.1f}")

    optimizer = AdamW(
        parameter_groups(model, 0.1), lr=args.learning_rate, betas=(0.9, 0.95), max_norm=1.0
    )
    generator = torch.Generator().manual_seed(1337)
    model.train()
    for step in range(1, args.steps + 1):
        x, y = dataset.batch("train", args.batch_size, block_size, generator)
        loss = model(x, y, loss_only=True)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, args.steps // 10) == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}")
    model.eval()

    print(f"after: perplexity {score_text(model, tokenizer, held_out).perplexity:,.1f}")
    print("".join(generate_text(model, tokenizer, "ROMEO:", 40, temperature=0.8)))
    path = save_gpt2(model, args.out, tokenizer if isinstance(tokenizer, GPT2Tokenizer) else None)
    print(f'saved; transformers.AutoModelForCausalLM.from_pretrained("{path}") loads it')


if __name__ == "__main__":
    main()
