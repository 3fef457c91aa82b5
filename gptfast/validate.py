"""Our GPT-2 held against Hugging Face's on the same weights: logits, loss and greedy text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gptfast.backend import dtype_name
from gptfast.data import read_text
from gptfast.generate import generate
from gptfast.integrations.huggingface import load_gpt2, save_gpt2
from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import GPT2Tokenizer, Tokenizer

# fp32 logits of two programs that do the same sums in other orders: what issue trackers of both
# report for GPT-2 is 1e-5 to 1e-4, and a wrong transpose or epsilon is off by 1e-2 and more.
LOGITS_TOLERANCE = {torch.float32: 1e-4}


@dataclass(frozen=True)
class Validation:
    """What the comparison found.

    Args:
        dtype: of the weights in both.
        parameters: how many both have.
        logits_error: largest absolute difference of the logits, over (B, T, V).
        logits_scale: largest absolute logit.
        loss, their_loss: mean cross-entropy of the same text.
        tokens: the greedy continuation, ours.
        same_tokens: how many of them equal theirs, from the first on.
        text, their_text: the continuations as text, where there is a tokenizer.
    """

    dtype: torch.dtype
    parameters: int
    logits_error: float
    logits_scale: float
    loss: float
    their_loss: float
    tokens: tuple[int, ...]
    same_tokens: int
    text: str | None
    their_text: str | None

    @property
    def passed(self) -> bool:
        """Whether fp32 logits agree to 1e-4 and the greedy text is the same to its end.

        In half precision logits must agree as far as the dtype resolves the largest of them, times
        4 for the roundings on the way; the text may part where two logits are equally large.
        """
        if self.dtype in LOGITS_TOLERANCE:
            return self.logits_error <= LOGITS_TOLERANCE[self.dtype] and self.same_tokens == len(
                self.tokens
            )
        return self.logits_error <= 4 * torch.finfo(self.dtype).eps * self.logits_scale


def validate(
    source: Path | GPT | GPTConfig,
    *,
    new_tokens: int = 200,
    batch: tuple[int, int] = (2, 64),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    on_step: Callable[[str], None] = lambda _: None,
) -> Validation:
    """Compare with transformers' GPT2LMHeadModel.

    Args:
        source: a folder of Hugging Face's format; or a model, or sizes for seeded random weights,
            which go through such a folder in both directions.
        new_tokens: length of the greedy continuation.
        batch: (B, T) of the tokens whose logits and loss are compared; T at most block_size.
        dtype: of the weights in both.
        seed: of random weights.
        on_step: told what comes next.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError, ValueError: as `load_gpt2`.
    """
    if isinstance(source, Path):
        return _compare(source, new_tokens, batch, dtype, on_step)
    with tempfile.TemporaryDirectory() as folder:
        on_step("writing the weights")
        if isinstance(source, GPTConfig):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                source = GPT(source).to(dtype)
        path = save_gpt2(source, Path(folder) / "gpt2", GPT2Tokenizer())
        del source
        return _compare(path, new_tokens, batch, dtype, on_step)


@torch.inference_mode()
def _compare(
    path: Path,
    new_tokens: int,
    batch: tuple[int, int],
    dtype: torch.dtype,
    on_step: Callable[[str], None],
) -> Validation:
    theirs = _transformers().from_pretrained(path, dtype=dtype).eval()
    on_step("loading")
    ours, tokenizer = load_gpt2(path)
    ours.to(dtype)
    config = ours.config
    B, T = batch[0], min(batch[1], config.block_size)
    idx = _text(tokenizer, config.vocab_size, B, T)
    on_step("comparing logits and loss")
    our_logits = ours(idx)[0]
    their_logits = theirs(idx, labels=idx)
    x, y = our_logits[:, :-1].float().flatten(0, 1), idx[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(x, y).item()
    difference = (our_logits.float() - their_logits.logits.float()).abs().max().item()

    on_step("generating")
    prompt = idx[:1, : min(8, T // 2 + 1)]
    n = min(new_tokens, config.block_size - prompt.shape[1])
    tokens = generate(ours, prompt, n, temperature=0.0)[0, prompt.shape[1] :].tolist()
    their_tokens = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=n,
        eos_token_id=None,
        pad_token_id=0,
    )[0, prompt.shape[1] :].tolist()
    same = next((i for i, (a, b) in enumerate(zip(tokens, their_tokens, strict=True)) if a != b), n)
    known = tokenizer is not None and max(tokens + their_tokens) < tokenizer.vocab_size
    return Validation(
        dtype=dtype,
        parameters=ours.num_parameters(),
        logits_error=difference,
        logits_scale=our_logits.abs().max().item(),
        loss=loss,
        their_loss=float(their_logits.loss),
        tokens=tuple(tokens),
        same_tokens=same,
        text=tokenizer.decode(tokens) if tokenizer and known else None,
        their_text=tokenizer.decode(their_tokens) if tokenizer and known else None,
    )


def print_validation(result: Validation, name: str, console: Console) -> None:
    """The comparison as a table for people."""
    table = Table(title=f"{name}, {result.parameters:,} parameters, {dtype_name(result.dtype)}")
    table.add_column("")
    for column in ("gptfast", "transformers", "difference"):
        table.add_column(column, justify="right")
    table.add_row("logits, largest", f"{result.logits_scale:.4f}", "", f"{result.logits_error:.1e}")
    loss, theirs = result.loss, result.their_loss
    table.add_row("loss", f"{loss:.6f}", f"{theirs:.6f}", f"{abs(loss - theirs):.1e}")
    n = len(result.tokens)
    same = "none" if result.same_tokens == n else f"from token {result.same_tokens} on"
    table.add_row("greedy text", f"{n} tokens", f"{n} tokens", same)
    console.print(table)
    if result.text is not None and result.their_text is not None:
        console.print("gptfast:     ", repr(result.text[:160]), markup=False, highlight=False)
        console.print("transformers:", repr(result.their_text[:160]), markup=False, highlight=False)
    console.print("equal" if result.passed else "[bold red]different")


def _transformers() -> Any:
    try:
        from transformers import GPT2LMHeadModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "gptfast validate needs transformers: pip install 'gptfast-kernels[hf]'"
        ) from error
    return GPT2LMHeadModel


def _text(tokenizer: Tokenizer | None, vocab_size: int, B: int, T: int) -> torch.Tensor:
    """Tokens (B, T) of packaged Shakespeare, or random ones for an unknown vocabulary."""
    if not isinstance(tokenizer, GPT2Tokenizer):
        return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
    ids = tokenizer.encode(read_text()[: 16 * B * T])  # a token has four characters or so
    return torch.tensor(ids[: B * T]).view(B, T)
