"""EleutherAI's evaluation harness on models of ours: hundreds of tasks.

    from lm_eval import simple_evaluate
    from gptfast import checkpoint
    from gptfast.integrations.lm_eval import harness_model

    loaded = checkpoint.load("out/mine")
    simple_evaluate(harness_model(loaded.model, loaded.tokenizer), tasks=["lambada_openai"])

Needs the extra `lm-eval`. What the harness asks for is computed by `gptfast.evaluate` and
`gptfast.generate`; the conventions (where a context ends, what precedes a text, how a long one is
cut) are those of the harness's own model of transformers.

Source: Gao et al., "A framework for few-shot language model evaluation", 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gptfast.evaluate import BATCH_TOKENS, log_likelihoods
from gptfast.generate import generate_text, start_token
from gptfast.models import GPT
from gptfast.tokenizer import Tokenizer

__all__ = ["Answers", "harness_model"]

MAX_NEW_TOKENS = 256  # the harness's, where a task sets no limit


class Request(Protocol):
    """What the harness hands over: its `Instance`."""

    args: tuple[Any, ...]


def harness_model(model: GPT, tokenizer: Tokenizer, batch_tokens: int = BATCH_TOKENS) -> Any:
    """An `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate`.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        batch_tokens: tokens that go through the model at once, at least one request.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the harness needs lm-eval: pip install 'gptfast-kernels[lm-eval]'"
        ) from error

    class HarnessModel(Answers, LM):
        def __init__(self) -> None:
            LM.__init__(self)
            Answers.__init__(self, model, tokenizer, batch_tokens)

    return HarnessModel()


class Answers:
    """The three questions of the harness, and the answers to them.

    Args: those of `harness_model`.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.start = start_token(tokenizer)  # stands before a text that has nothing before it

    def loglikelihood(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) and whether it is the greedy one, for args of both."""
        pairs = [self._pair(*request.args) for request in requests]
        scores = log_likelihoods(self.model, pairs, batch_tokens=self.batch_tokens)
        return [(score.log_p, score.greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, in windows of block_size tokens, each token predicted once."""
        T = self.model.config.block_size
        pairs, texts = [], []
        for request in requests:
            ids = [self.start, *self.tokenizer.encode(request.args[0])]
            windows = [(ids[:at], ids[at : at + T]) for at in range(1, len(ids), T)]
            pairs += windows
            texts.append(len(windows))
        scores = iter(log_likelihoods(self.model, pairs, batch_tokens=self.batch_tokens))
        return [sum(next(scores).log_p for _ in range(n)) for n in texts]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, for args of a context and its settings.

        Settings: `until`, a string or several that end the text; `max_gen_toks`; `do_sample` and
        `temperature`, without which the likeliest token is taken.
        """
        return [self._continue(*request.args) for request in requests]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both. Spaces at the context's end are the continuation's, as for BPE."""
        if not context:
            return [self.start], self.tokenizer.encode(continuation)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        together = self.tokenizer.encode(context + continuation)
        n = len(self.tokenizer.encode(context))
        return together[:n] or [self.start], together[n:]

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        n = settings.get("max_gen_toks", MAX_NEW_TOKENS)
        room = max(1, self.model.config.block_size - n)
        sampling = settings.get("do_sample", False)
        pieces = generate_text(
            self.model,
            self.tokenizer,
            self.tokenizer.encode(context)[-room:],
            n,
            temperature=settings.get("temperature", 1.0) if sampling else 0.0,
            top_k=settings.get("top_k") if sampling else None,
            top_p=settings.get("top_p") if sampling else None,
            stop=until,
        )
        return "".join(pieces)
