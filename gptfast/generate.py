"""Generation: tokens and text from a model, one at a time, with a cache of keys and values.

A token is drawn by `gptfast.sample`: from softmax(logits / temperature), cut by top_k, top_p and
min_p. Temperature 0 takes the most likely token.

The cache holds block_size tokens. When it is full, it starts again from the last block_size // 2
tokens: positions are absolute, so that keys cannot just move up, and to compute the whole window
anew for every token would cost block_size times as much.

On a CPU a token goes through `gptfast.decoder` where that can take the model: one call for all of
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from gptfast import backend, decoder
from gptfast.models import GPT
from gptfast.ops.sample import check_sampling, sample
from gptfast.tokenizer import GPT2Tokenizer, StreamDecoder, Tokenizer

__all__ = ["generate", "generate_text", "pick_device", "stream"]


def stream(
    model: GPT,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    stop_tokens: Collection[int] = (),
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Draw tokens one after another, each given those before it.

    Args:
        model: the model.
        ids: T >= 1 tokens to continue; the model sees the last block_size of them.
        max_new_tokens: how many to draw at most.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the most likely tokens that together have this probability; None keeps all.
        min_p: keep tokens with this fraction of the largest probability; None keeps all.
        repetition_penalty: divides positive logits of tokens that are there already, multiplies
            negative ones; 1 changes nothing.
        generator: the seed of the draws comes from it; None is PyTorch's own of the CPU.
        stop_tokens: tokens that end the text; they are not returned.
        vocab_size: tokens from here on are never drawn (a padded vocabulary); None allows all.

    Returns:
        An iterator of the new tokens. The model is in evaluation mode until it ends.

    Raises:
        ValueError: no ids, an argument out of range, or logits that are not numbers.
        IndexError: a token outside the vocabulary.
    """
    if not ids:
        raise ValueError("stream: expected at least one token to continue, got none")
    idx = torch.tensor([list(ids)], device=next(model.parameters()).device)
    options = _checked(idx, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    return _until_stop(
        _steps(model, idx, max_new_tokens, options, generator, vocab_size), stop_tokens
    )


def generate(
    model: GPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    memory: torch.Tensor | None = None,
) -> torch.Tensor:
    """Continue a batch of sequences of one length.

    Args:
        model: the model.
        idx: (B, T) int64 tokens, on the model's device.
        max_new_tokens: n, how many to draw for each.
        temperature, top_k, top_p, min_p, repetition_penalty, generator, vocab_size: as in
            `stream`.
        memory: (B, S, C), what an encoder returned, for a model with cross attention.

    Returns:
        (B, T + n): idx and the new tokens.

    Raises:
        ValueError: idx is not (B, T) or is empty, an argument is out of range, or logits are not
            numbers.
        IndexError: a token outside the vocabulary.
    """
    options = _checked(idx, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    new = list(_steps(model, idx, max_new_tokens, options, generator, vocab_size, memory))
    return torch.cat([idx, *new], dim=1)


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Continue a text, piece by piece; the prompt is not repeated.

    Args:
        model: the model.
        tokenizer: its tokenizer. GPT-2's `<|endoftext|>` ends the text.
        prompt: text, or its tokens; may be empty: the text then starts after `<|endoftext|>`, or
            with characters after a newline (token 0 where there is none).
        max_new_tokens: how many tokens to draw at most.
        temperature, top_k, top_p, min_p, repetition_penalty, generator: as in `stream`.
        stop: strings that end the text, wherever their characters come from; they are not returned.

    Returns:
        An iterator of pieces: one per token, empty while a character or what may become a stop
        string is incomplete, and then the rest.

    Raises:
        ValueError: a character of the prompt is not in the vocabulary, an empty stop string, or an
            argument out of range.
    """
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"generate: stop must be strings that are not empty, got {stop!r}")
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    tokens = stream(
        model,
        ids or [start_token(tokenizer)],
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        generator=generator,
        stop_tokens=(tokenizer.end_of_text,) if isinstance(tokenizer, GPT2Tokenizer) else (),
        vocab_size=tokenizer.vocab_size,
    )
    return _text(tokens, tokenizer, stop)


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU where there is one, else the CPU.

    Raises:
        ValueError: unknown name.
        RuntimeError: this machine, or this PyTorch, has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"device {name!r} is not there: PyTorch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs"
        )
    return device


def _checked(
    idx: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
) -> dict[str, Any]:
    """The options of `sample`."""
    if idx.dim() != 2 or idx.numel() == 0:
        raise ValueError(f"generate: idx must be (B, T) with tokens in it, got {tuple(idx.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    check_sampling("generate", **options)
    return options


@torch.inference_mode()
def _steps(
    model: GPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    options: dict[str, Any],
    generator: torch.Generator | None,
    vocab_size: int | None,
    memory: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Yield (B, 1) new tokens, max_new_tokens times."""
    block_size = model.config.block_size
    seen = idx[:, -block_size:]
    previous = None if options["repetition_penalty"] == 1 else idx
    cache = model.new_cache(idx.shape[0])
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    with _evaluating(model):
        fast = None
        if decoder.why_not(model, idx.shape[0]) is None:
            fast = decoder.Decoder(model, cache)
        for step in range(max_new_tokens):
            if cache.length == block_size:
                cache.reset()
                seen = seen[:, -max(1, block_size // 2) :]
            new = seen[:, cache.length :]
            if fast is not None and fast.takes(new.shape[1]):
                logits = fast(new)
            else:
                inputs = {} if memory is None else {"memory": memory}
                logits = model(new, cache=cache, **inputs)[0]
            with _a_backend_that_draws():
                token = sample(
                    logits[:, -1, :vocab_size], **options, previous=previous, seed=seed, offset=step
                )[:, None]
            if not token.is_cuda and [-1] in token.tolist():  # a GPU is not waited for
                raise ValueError("generate: logits must be finite numbers, got NaN or infinity")
            yield token
            seen = torch.cat([seen, token], dim=1)
            if previous is not None:
                previous = torch.cat([previous, token], dim=1)


def _a_backend_that_draws() -> contextlib.AbstractContextManager[None]:
    """Leaves triton, which has no kernel for it, where that is forced: all draw the same token."""
    forced = backend.forced_backend()
    return backend.use_backend("auto") if forced == "triton" else contextlib.nullcontext()


@contextlib.contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _until_stop(steps: Iterator[torch.Tensor], stop_tokens: Collection[int]) -> Iterator[int]:
    for step in steps:
        token = int(step)
        if token in stop_tokens:
            return
        yield token


def _text(tokens: Iterator[int], tokenizer: Tokenizer, stop: Sequence[str]) -> Iterator[str]:
    decoder = StreamDecoder(tokenizer)
    held = ""
    for token in tokens:
        held += decoder.push(token)
        end = _first_stop(held, stop)
        if end is not None:
            yield held[:end]
            return
        ready = len(held) - _stop_prefix(held, stop)
        yield held[:ready]
        held = held[ready:]
    held += decoder.flush()
    yield held[: _first_stop(held, stop)]


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    return min((at for at in (text.find(s) for s in stop) if at >= 0), default=None)


def _stop_prefix(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = max((len(s) - 1 for s in stop), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0


def start_token(tokenizer: Tokenizer) -> int:
    """What stands before a text that has nothing before it; see `generate_text`."""
    if isinstance(tokenizer, GPT2Tokenizer):
        return tokenizer.end_of_text
    try:
        return tokenizer.encode("\n")[0]
    except ValueError:
        return 0
