"""The geometry of token embeddings: which are near each other, and what differences mean.

    similarity(a, b) = e_a . e_b / (|e_a| |e_b|)
    a is to b as c is to d:  d = argmax similarity(e_b - e_a + e_c, e_d), with e of length one

Source: Mikolov et al., "Linguistic Regularities in Continuous Space Word Representations", 2013.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from gptfast.models import GPT
from gptfast.tokenizer import Tokenizer

Similar = list[tuple[int, float]]  # tokens and their cosines, the largest first


def one_token(tokenizer: Tokenizer, word: str) -> int:
    """The token of a word, which in the middle of a text has a space before it.

    Raises:
        ValueError: it is several tokens, or none.
    """
    for text in (" " + word, word):
        try:
            ids = tokenizer.encode(text)
        except ValueError:  # characters have no token for the space, perhaps
            continue
        if len(ids) == 1:
            return ids[0]
    parts = [tokenizer.decode([i]) for i in tokenizer.encode(word)]
    raise ValueError(f"inspect: {word!r} must be one token, got {len(parts)}: {parts}")


def neighbours(model: GPT, token: int, k: int = 10, vocab_size: int | None = None) -> Similar:
    """The k tokens whose embeddings point most nearly where that of `token` does.

    Args:
        model: the model.
        token: in [0, V).
        k: how many.
        vocab_size: tokens from here on are left out (a padded vocabulary); None: V.

    Raises:
        IndexError: a token outside the vocabulary.
    """
    e = _directions(model, vocab_size)
    _check(e, token)
    return _nearest(e, e[token], k, {token})


def analogy(
    model: GPT, a: int, b: int, c: int, k: int = 10, vocab_size: int | None = None
) -> Similar:
    """The k best d in "a is to b as c is to d", none of which is a, b or c.

    Args and Raises: as `neighbours`.
    """
    e = _directions(model, vocab_size)
    for token in (a, b, c):
        _check(e, token)
    return _nearest(e, e[b] - e[a] + e[c], k, {a, b, c})


def _directions(model: GPT, vocab_size: int | None) -> torch.Tensor:
    """(V, C) token embeddings of length one, in fp32."""
    wte: Any = model.transformer["wte"]
    return F.normalize(wte.weight.detach()[:vocab_size].float(), dim=-1)


def _check(e: torch.Tensor, token: int) -> None:
    if not 0 <= token < len(e):
        raise IndexError(f"inspect: tokens must be in [0, {len(e)}), got {token}")


def _nearest(e: torch.Tensor, to: torch.Tensor, k: int, without: Collection[int]) -> Similar:
    cosines = e @ F.normalize(to, dim=0)
    cosines[list(without)] = -2
    values, tokens = cosines.topk(min(k, len(e) - len(set(without))))
    return list(zip(tokens.tolist(), values.tolist(), strict=True))


def print_similar(
    model: GPT,
    tokenizer: Tokenizer,
    words: Sequence[str],
    analogy_of: tuple[str, str, str] | None,
    console: Console,
) -> None:
    """The neighbours of words, and the end of an analogy, as a table of columns.

    Raises:
        ValueError: a word that is not one token.
    """
    columns = {word: neighbours(model, one_token(tokenizer, word), 10, tokenizer.vocab_size)
               for word in words}  # fmt: skip
    if analogy_of is not None:
        a, b, c = (one_token(tokenizer, word) for word in analogy_of)
        title = "{} : {} = {} : ?".format(*analogy_of)
        columns[title] = analogy(model, a, b, c, 10, tokenizer.vocab_size)
    table = Table(title="nearest embeddings, and cosines")
    for name in columns:
        table.add_column(name)
        table.add_column("", justify="right")
    for row in zip(*columns.values(), strict=True):
        cells = ((repr(tokenizer.decode([token])), f"{cosine:.3f}") for token, cosine in row)
        table.add_row(*(cell for pair in cells for cell in pair))
    console.print(table, markup=False)
