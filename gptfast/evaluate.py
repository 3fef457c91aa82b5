"""Evaluation: loss and perplexity of a text, HellaSwag and LAMBADA.

Everything rests on the log-likelihood of a continuation w after a context c,

    log p(w | c) = sum_t log p(w_t | c, w_<t)

HellaSwag: of four endings, the likeliest is chosen. `acc` compares log p(w | c); `acc_norm` divides
it by the bytes of w, as EleutherAI's harness does, `acc_per_token` by its tokens, as llm.c does.
LAMBADA: the last word of a passage counts when every token of it is the likeliest one; `ppl` is
exp of the mean of -log p(word | passage).

Sources: Zellers et al., "HellaSwag: Can a machine really finish your sentence?", 2019; Paperno et
al., "The LAMBADA dataset", 2016.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, cast

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import nn

from gptfast.evaluation_sets import evaluation_file
from gptfast.models import GPT
from gptfast.ops import cross_entropy
from gptfast.tokenizer import Tokenizer

__all__ = [
    "HellaSwagItem",
    "Likelihood",
    "Score",
    "TextScore",
    "evaluate",
    "hellaswag",
    "lambada",
    "log_likelihoods",
    "print_scores",
    "read_hellaswag",
    "read_lambada",
    "score_text",
]

BATCH_TOKENS = 2048  # with V = 50257 logits take 400 MB in fp32
BRACKETS = re.compile(r"\[[^\]]*\]")
OnDone = Callable[[int], None]  # told how many more items are done


class Likelihood(NamedTuple):
    """Of one continuation: sum of log p over its tokens, and whether each was the likeliest."""

    log_p: float
    greedy: bool


@torch.inference_mode()
def log_likelihoods(
    model: GPT,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_done: OnDone = lambda n: None,
) -> list[Likelihood]:
    """log p(continuation | context) for many pairs of token sequences.

    Args:
        model: the model.
        pairs: context (at least one token) and continuation. Of a context that is too long for
            block_size the last tokens count.
        batch_tokens: tokens that go through the model at once, at least one pair.
        on_done: told of every pair that is done.

    Returns:
        In the order of `pairs`.

    Raises:
        ValueError: an empty context or continuation, or a continuation longer than block_size.
        IndexError: a token outside the vocabulary.
    """
    block_size = model.config.block_size
    for i, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(f"evaluate: pair {i} needs a context and a continuation, got none")
        if len(continuation) > block_size:
            raise ValueError(
                f"evaluate: a continuation has at most block_size {block_size} tokens, "
                f"got {len(continuation)} in pair {i}"
            )
    device = next(model.parameters()).device
    results: list[Likelihood | None] = [None] * len(pairs)
    with evaluating(model):
        for batch in _batches([len(c) + len(w) for c, w in pairs], block_size, batch_tokens):
            # Token t is predicted from those before it: the last one is no input.
            rows = [[*pairs[i][0], *pairs[i][1]][-block_size - 1 :] for i in batch]
            width = max(map(len, rows)) - 1
            idx = torch.zeros(len(batch), width, dtype=torch.int64)
            target = torch.full_like(idx, -100)
            for n, (i, row) in enumerate(zip(batch, rows, strict=True)):
                idx[n, : len(row) - 1] = torch.tensor(row[:-1])
                first = len(row) - len(pairs[i][1]) - 1
                target[n, first : len(row) - 1] = torch.tensor(row[first + 1 :])
            idx, target = idx.to(device), target.to(device)
            logits = model(idx)[0]
            log_p = -cross_entropy(logits, target, reduction="none").double().sum(1)
            greedy = ((logits.argmax(-1) == target) | (target == -100)).all(1)
            for i, *values in zip(batch, log_p.tolist(), greedy.tolist(), strict=True):
                results[i] = Likelihood(*values)
            on_done(len(batch))
    return cast(list[Likelihood], results)


def _batches(lengths: list[int], block_size: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences of like length, so that little is padded."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * min(lengths[i], block_size) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and then in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# ---- Texts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text: mean loss in nats, and what follows from it."""

    tokens: int
    bytes: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers: bits that the predicted tokens cost, over their bytes."""
        return self.loss * self.tokens / math.log(2) / self.bytes


def score_text(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    *,
    stride: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    on_done: OnDone = lambda n: None,
) -> TextScore:
    """Loss over all tokens of a text but the first.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        text: at least two tokens.
        stride: tokens by which the window of block_size moves on; each token is predicted once,
            with at least block_size - stride tokens before it (but at the start). None: block_size,
            the cheapest.
        batch_tokens: tokens that go through the model at once, at least one window.
        on_done: told of tokens that are done.

    Raises:
        ValueError: a text of fewer than two tokens, or a stride outside [1, block_size].
    """
    T = model.config.block_size
    stride = T if stride is None else stride
    if not 1 <= stride <= T:
        raise ValueError(f"evaluate: stride must be in [1, block_size {T}], got {stride}")
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError(f"evaluate: a text needs at least two tokens, got {len(ids)}")
    pairs = []
    done = 1
    while done < len(ids):
        end = min(done + (stride if done > 1 else T), len(ids))
        pairs.append((ids[max(0, end - T - 1) : done], ids[done:end]))
        done = end
    scores = log_likelihoods(
        model, pairs, batch_tokens=batch_tokens, on_done=lambda n: on_done(n * stride)
    )
    n = len(ids) - 1
    predicted = sum(len(tokenizer.token_bytes(i)) for i in ids[1:])
    return TextScore(n, predicted, -sum(s.log_p for s in scores) / n)


# ---- HellaSwag -----------------------------------------------------------------------------------


class HellaSwagItem(NamedTuple):
    """A context, four endings, and which of them is right."""

    context: str
    endings: tuple[str, ...]
    label: int


def read_hellaswag(path: str | os.PathLike[str], limit: int | None = None) -> list[HellaSwagItem]:
    """Read HellaSwag from a file.

    Args:
        path: the published JSON lines (`activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`), or
            six lines an item: context, label, four endings. Either may be compressed: .gz, .bz2.
            "hellaswag" is the published validation set, see `gptfast.evaluation_sets`.
        limit: take the first items only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not what it should be; names file, line and content.
    """
    items: list[HellaSwagItem] = []
    path = evaluation_file(path)
    with _open(path) as lines:
        numbered = enumerate((line.rstrip("\n") for line in lines), 1)
        for number, line in numbered:
            if limit is not None and len(items) >= limit:
                break
            if line.startswith("{"):
                items.append(_hellaswag_json(path, number, line))
                continue
            rest = [text for _, (_, text) in zip(range(5), numbered, strict=False)]
            if len(rest) < 5 or rest[0] not in ("0", "1", "2", "3"):
                raise ValueError(
                    f"{path}: expected a context, a label from 0 to 3 and four endings from line "
                    f"{number} on, got {[line, *rest]!r:.120}"
                )
            items.append(HellaSwagItem(line, tuple(rest[1:]), int(rest[0])))
    if not items:
        raise ValueError(f"{path}: expected HellaSwag items, got none")
    return items


def _hellaswag_json(path: Path, number: int, line: str) -> HellaSwagItem:
    try:
        given = json.loads(line)
        context = f"{given['activity_label']}: {given['ctx_a']} {given['ctx_b'].capitalize()}"
        endings = tuple(_plain(ending) for ending in given["endings"])
        item = HellaSwagItem(_plain(context), endings, int(given["label"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a HellaSwag item in line {number}, got {line!r:.80} "
            f"({type(error).__name__}: {error})"
        ) from error
    if len(item.endings) != 4 or not 0 <= item.label < 4:
        raise ValueError(f"{path}: expected four endings and a label in line {number}")
    return item


def _plain(text: str) -> str:
    """Without WikiHow's marks: a "[title]" ends a sentence, other brackets are notes."""
    text = BRACKETS.sub("", text.strip().replace(" [title]", ". "))
    return re.sub(" {2,}", " ", text).strip()


def hellaswag(
    model: GPT,
    tokenizer: Tokenizer,
    items: Sequence[HellaSwagItem],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_done: OnDone = lambda n: None,
) -> dict[str, float]:
    """Accuracies on HellaSwag, as the module says: `acc`, `acc_norm`, `acc_per_token`.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        items: at least one.
        batch_tokens: tokens that go through the model at once, at least one ending.
        on_done: told of every ending that is done.

    Raises:
        ValueError: no items, or an ending that does not fit into block_size.
    """
    if not items:
        raise ValueError("evaluate: expected HellaSwag items, got none")
    pairs = []
    for item in items:
        context = tokenizer.encode(item.context)
        pairs += [(context, tokenizer.encode(" " + ending)) for ending in item.endings]
    scores = log_likelihoods(model, pairs, batch_tokens=batch_tokens, on_done=on_done)
    right = {"acc": 0, "acc_norm": 0, "acc_per_token": 0}
    for n, item in enumerate(items):
        of_item = slice(4 * n, 4 * n + 4)
        log_p = [score.log_p for score in scores[of_item]]
        lengths = {
            "acc": [1] * 4,
            "acc_norm": [len(ending.encode()) for ending in item.endings],
            "acc_per_token": [len(tokens) for _, tokens in pairs[of_item]],
        }
        for name, sizes in lengths.items():
            normalised = [p / size for p, size in zip(log_p, sizes, strict=True)]
            right[name] += normalised.index(max(normalised)) == item.label
    return {name: count / len(items) for name, count in right.items()}


# ---- LAMBADA -------------------------------------------------------------------------------------


def read_lambada(path: str | os.PathLike[str], limit: int | None = None) -> list[str]:
    """Read LAMBADA's passages from a file.

    Args:
        path: JSON lines with a `text` each, or a passage a line; may be compressed: .gz, .bz2.
            "lambada" is OpenAI's test set, see `gptfast.evaluation_sets`.
        limit: take the first passages only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line without two words; names file, line and content.
    """
    passages: list[str] = []
    path = evaluation_file(path)
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(passages) >= limit:
                break
            text = line.strip()
            if text.startswith("{"):
                try:
                    text = json.loads(text)["text"].strip()
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f'{path}: expected {{"text": ...}} in line {number}, got {line!r:.80}'
                    ) from error
            if " " not in text:
                raise ValueError(f"{path}: expected two words in line {number}, got {line!r:.80}")
            passages.append(text)
    if not passages:
        raise ValueError(f"{path}: expected passages, got none")
    return passages


def lambada(
    model: GPT,
    tokenizer: Tokenizer,
    passages: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_done: OnDone = lambda n: None,
) -> dict[str, float]:
    """`acc` and `ppl` of the last word of each passage.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        passages: at least one, of two words or more.
        batch_tokens: tokens that go through the model at once, at least one passage.
        on_done: told of every passage that is done.

    Raises:
        ValueError: no passages.
    """
    if not passages:
        raise ValueError("evaluate: expected passages of LAMBADA, got none")
    pairs = []
    for passage in passages:
        context, word = passage.rsplit(" ", 1)
        pairs.append((tokenizer.encode(context), tokenizer.encode(" " + word)))
    scores = log_likelihoods(model, pairs, batch_tokens=batch_tokens, on_done=on_done)
    loss = -sum(score.log_p for score in scores) / len(scores)
    return {
        "acc": sum(score.greedy for score in scores) / len(scores),
        "ppl": math.exp(min(loss, 700.0)),
    }


# ---- All together --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A line of the table; `items` are tokens, items of HellaSwag or passages of LAMBADA."""

    task: str
    metric: str
    value: float
    items: int


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    *,
    text: str | None = None,
    stride: int | None = None,
    hellaswag_items: Sequence[HellaSwagItem] = (),
    lambada_passages: Sequence[str] = (),
    console: Console | None = None,
) -> list[Score]:
    """Every score that there is something for, with a progress bar on `console`."""
    scores: list[Score] = []
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    hidden = console is None or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:

        def task(name: str, total: int) -> OnDone:
            number = bar.add_task(name, total=total)
            return lambda n: bar.advance(number, n)

        if text is not None:
            on_done = task("text", len(tokenizer.encode(text)))
            of_text = score_text(model, tokenizer, text, stride=stride, on_done=on_done)
            scores += [
                Score("text", "loss", of_text.loss, of_text.tokens),
                Score("text", "perplexity", of_text.perplexity, of_text.tokens),
                Score("text", "bits per byte", of_text.bits_per_byte, of_text.tokens),
            ]
        if hellaswag_items:
            on_done = task("hellaswag", 4 * len(hellaswag_items))
            values = hellaswag(model, tokenizer, hellaswag_items, on_done=on_done)
            scores += [Score("hellaswag", k, v, len(hellaswag_items)) for k, v in values.items()]
        if lambada_passages:
            on_done = task("lambada", len(lambada_passages))
            values = lambada(model, tokenizer, lambada_passages, on_done=on_done)
            scores += [Score("lambada", k, v, len(lambada_passages)) for k, v in values.items()]
    return scores


def print_scores(scores: Sequence[Score], title: str, console: Console) -> None:
    """The scores as a table; an accuracy with its standard error."""
    table = Table(title=title)
    for column in ("task", "metric"):
        table.add_column(column)
    for column in ("score", "standard error", "items"):
        table.add_column(column, justify="right")
    for score in scores:
        error = ""
        if score.metric.startswith("acc"):
            error = f"{math.sqrt(score.value * (1 - score.value) / score.items):.4f}"
        table.add_row(score.task, score.metric, f"{score.value:,.4f}", error, f"{score.items:,}")
    console.print(table)


def _open(path: Path) -> IO[str]:
    """A text file, decompressed by its ending."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
    return cast(IO[str], opener(path, "rt", encoding="utf-8"))  # type: ignore[operator]
