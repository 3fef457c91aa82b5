"""Our GPT-2 held against Hugging Face's on the same weights: logits, loss and greedy text.

In half precision two right programs differ, and a text parts where two tokens are as good as
equally likely. There both are held against transformers in float32, with the weights rounded as
they are: our error may be at most twice that of transformers.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gptfast import checkpoint
from gptfast.backend import dtype_name
from gptfast.data import read_text
from gptfast.decoder import Decoder, why_not
from gptfast.generate import stream
from gptfast.integrations.huggingface import (
    is_gpt2_folder,
    load_gpt2,
    read_gpt2_sizes,
    save_gpt2,
    stored_equally,
)
from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import GPT2Tokenizer, Tokenizer

# fp32 logits of two programs that do the same sums in other orders: what issue trackers of both
# report for GPT-2 is 1e-5 to 1e-4, and a wrong transpose or epsilon is off by 1e-2 and more.
LOGITS_TOLERANCE = 1e-4
# The rule for kernels, for a whole model: its error may be twice that of PyTorch's own kernels.
HALF_PRECISION_FACTOR = 2.0

# Of the first 60 greedy tokens of gpt2 with seed 0, 46 differ with it, and 2 without.
WPE_SCALE = 5.0
OnProgress = Callable[[str, int, int], None]  # told of a stage, how much of it is done, and of what


@dataclass(frozen=True)
class Errors:
    """Of logits in half precision, against transformers' in float32 on the same rounded weights.

    Args:
        largest, their_largest: absolute, over all logits.
        rms, their_rms: root of the mean square.
    """

    largest: float
    their_largest: float
    rms: float
    their_rms: float

    @property
    def passed(self) -> bool:
        """Whether ours are at most twice theirs."""
        return (
            self.largest <= HALF_PRECISION_FACTOR * self.their_largest
            and self.rms <= HALF_PRECISION_FACTOR * self.their_rms
        )


@dataclass(frozen=True)
class HalfPrecision:
    """How far both models are from float32, where their own dtype has too few digits to agree in.

    Args:
        text: of the logits (B, T, V) of the compared text.
        decoding: of the logits (n, V) of next tokens, made one at a time with a cache, along the
            continuation that transformers chose.
        agreeing: how many of these n tokens are ours as well.
        margin: where they are not, how far the float32 logits of the two tokens are apart at most.
            It cannot exceed twice the larger error: the choice between them is a tie to half
            precision.
        greedy: whether our continuation takes tokens of the largest of our logits, for as long as
            it has transformers' before it.
    """

    text: Errors
    decoding: Errors
    agreeing: int
    margin: float
    greedy: bool

    @property
    def passed(self) -> bool:
        """Whether neither error is more than twice that of transformers, and the text is greedy."""
        return self.text.passed and self.decoding.passed and self.greedy


@dataclass(frozen=True)
class Validation:
    """What the comparison found.

    Args:
        dtype: of the weights in both.
        parameters: how many both have.
        same_weights: whether the weights, written again, are the same bits.
        logits_error: largest absolute difference of the logits, over (B, T, V).
        logits_scale: largest absolute logit.
        loss, their_loss: mean cross-entropy of the same text.
        tokens: the greedy continuation, ours.
        same_tokens: how many of them equal theirs, from the first on.
        text, their_text: the continuations as text, where there is a tokenizer.
        half: both against float32, where the dtype is another one.
    """

    dtype: torch.dtype
    parameters: int
    same_weights: bool
    logits_error: float
    logits_scale: float
    loss: float
    their_loss: float
    tokens: tuple[int, ...]
    same_tokens: int
    text: str | None
    their_text: str | None
    half: HalfPrecision | None = None

    @property
    def passed(self) -> bool:
        """Whether fp32 logits agree to 1e-4 and the greedy text is the same to its end.

        In half precision both models are held against float32, and the text may part where two
        logits are as good as equal: see `HalfPrecision`.
        """
        if not self.same_weights:
            return False
        if self.half is not None:
            return self.half.passed
        return self.logits_error <= LOGITS_TOLERANCE and self.same_tokens == len(self.tokens)


def validate(
    source: Path | GPT | GPTConfig,
    *,
    new_tokens: int = 200,
    batch: tuple[int, int] = (2, 64),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Validation:
    """Compare with transformers' GPT2LMHeadModel, one model in memory besides a given one.

    Args:
        source: a folder of Hugging Face's format; or a checkpoint of ours, a model, or sizes for
            seeded random weights, which go through such a folder in both directions.
        new_tokens: length of the greedy continuation.
        batch: (B, T) of the tokens whose logits and loss are compared; T at most block_size.
        dtype: of the weights in both.
        seed: of random weights.
        on_progress: told of every stage.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError, ValueError: as `load_gpt2`; or nothing to compare.
        OSError: no room for two copies of the weights among temporary files.
    """
    if new_tokens < 1 or batch[0] < 1 or batch[1] < 2:
        raise ValueError(
            "validate: expected at least one new token, and a text of two, "
            f"got new_tokens {new_tokens}, batch {batch}"
        )
    _transformers()  # before work that would be in vain without it
    comparison = _Comparison(new_tokens, batch, dtype, on_progress)
    with tempfile.TemporaryDirectory() as name, _quiet_transformers():
        folder = Path(name)
        if isinstance(source, Path) and is_gpt2_folder(source):
            return comparison.of(source, folder)
        on_progress("writing the weights", 0, 1)
        return comparison.of(_written(source, folder / "gpt2", dtype, seed), folder)


def _written(source: Path | GPT | GPTConfig, path: Path, dtype: torch.dtype, seed: int) -> Path:
    """The weights as a folder of Hugging Face's; a model that is made for it is let go of."""
    if isinstance(source, Path):
        source = checkpoint.load(source).model
    config = source if isinstance(source, GPTConfig) else source.config
    option = config.unlike_gpt2()
    if option is not None:
        raise ValueError(f"validate: expected the architecture of GPT-2, got {option}")
    model = _random_model(source, seed).to(dtype) if isinstance(source, GPTConfig) else source
    return save_gpt2(model, path, GPT2Tokenizer())


def _random_model(config: GPTConfig, seed: int) -> GPT:
    """Weights in which no two parts could be mistaken for each other.

    As they are initialised, biases are zero and norms one, and the greedy text is one token again
    and again. Here these differ, too, and positions matter as much as in a trained model.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = GPT(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
            elif name.endswith("wpe.weight"):
                parameter.mul_(WPE_SCALE)
    return model


@dataclass(frozen=True)
class _Made:
    """What one of the models made of the text: logits are float32."""

    logits: torch.Tensor  # (B, T, V)
    loss: float
    tokens: list[int]  # n, the greedy continuation
    next_logits: torch.Tensor  # (n, V), along transformers' continuation


@dataclass(frozen=True)
class _Comparison:
    """The stages of a comparison. Each loads the model that it needs, and lets go of it."""

    new_tokens: int
    batch: tuple[int, int]
    dtype: torch.dtype
    on_progress: OnProgress

    @torch.inference_mode()
    def of(self, path: Path, folder: Path) -> Validation:
        """Compare on the weights in `path`; `folder` is for temporary files."""
        config, tokenizer = read_gpt2_sizes(path)
        if config.block_size < 2:
            raise ValueError("validate: expected a block_size of at least 2, got 1")
        B, T = self.batch[0], min(self.batch[1], config.block_size)
        idx = _text(tokenizer, config.vocab_size, B, T)
        prompt = idx[:1, : min(8, T // 2)]
        n = min(self.new_tokens, config.block_size - prompt.shape[1])

        theirs = self._theirs(path, idx, prompt, n)
        ours, parameters, same_weights = self._ours(path, idx, prompt, theirs.tokens, folder)
        same = sum(1 for _ in itertools.takewhile(_equal, zip(ours.tokens, theirs.tokens)))  # noqa: B905 - both have n
        half = None
        if self.dtype != torch.float32:
            half = self._half(path, idx, prompt, ours, theirs, same)
        known = tokenizer is not None and max(ours.tokens + theirs.tokens) < tokenizer.vocab_size
        return Validation(
            dtype=self.dtype,
            parameters=parameters,
            same_weights=same_weights,
            logits_error=(ours.logits - theirs.logits).abs().max().item(),
            logits_scale=ours.logits.abs().max().item(),
            loss=ours.loss,
            their_loss=theirs.loss,
            tokens=tuple(ours.tokens),
            same_tokens=same,
            text=tokenizer.decode(ours.tokens) if tokenizer and known else None,
            their_text=tokenizer.decode(theirs.tokens) if tokenizer and known else None,
            half=half,
        )

    def _theirs(self, path: Path, idx: torch.Tensor, prompt: torch.Tensor, n: int) -> _Made:
        stage = "transformers"
        self.on_progress(stage, 0, n)
        model = _transformers().from_pretrained(path, dtype=self.dtype).eval()
        # Without what a folder asks for, such as a penalty of repetitions.
        model.generation_config = type(model.generation_config)()
        out = model(idx, labels=idx)
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=n,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            streamer=_Counter(lambda done: self.on_progress(stage, done, n)),
        )
        tokens = made.sequences[0, prompt.shape[1] :].tolist()
        return _Made(out.logits.float(), float(out.loss), tokens, torch.cat(made.logits).float())

    def _ours(
        self, path: Path, idx: torch.Tensor, prompt: torch.Tensor, along: list[int], folder: Path
    ) -> tuple[_Made, int, bool]:
        stage, n = "gptfast", len(along)
        self.on_progress(stage, 0, n)
        model, _ = load_gpt2(path, dtype=self.dtype)
        logits = model(idx)[0].float()
        x, y = logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(x, y).item()
        tokens = []
        for token in stream(model, prompt[0].tolist(), n, temperature=0.0):
            tokens.append(token)
            self.on_progress(stage, len(tokens), n)
        next_logits = torch.empty(0)
        if self.dtype != torch.float32:
            next_logits = self._next_logits(model, prompt, along)
        self.on_progress("writing them again", 0, 1)
        same_weights = stored_equally(path, save_gpt2(model, folder / "again"), self.dtype)
        made = _Made(logits, loss, tokens, next_logits)
        return made, model.num_parameters(), same_weights

    def _next_logits(self, model: GPT, prompt: torch.Tensor, along: list[int]) -> torch.Tensor:
        """(n, V): what the model would say next, at each token of a given continuation."""
        stage, n = "gptfast, along transformers' text", len(along)
        cache = model.new_cache(1)
        fast = Decoder(model, cache) if why_not(model, 1) is None else None
        rows = []
        for new in (prompt, *torch.tensor(along)[:-1, None, None]):
            takes = fast is not None and fast.takes(new.shape[1])
            logits = fast(new) if fast and takes else model(new, cache=cache)[0]
            rows.append(logits[:, -1].float())
            self.on_progress(stage, len(rows), n)
        return torch.cat(rows)

    def _half(
        self,
        path: Path,
        idx: torch.Tensor,
        prompt: torch.Tensor,
        ours: _Made,
        theirs: _Made,
        same: int,
    ) -> HalfPrecision:
        self.on_progress("transformers in float32", 0, 1)
        # Rounded first, as both have them.
        model = _transformers().from_pretrained(path, dtype=self.dtype).eval().float()
        logits = model(idx).logits
        tokens = torch.tensor([[*prompt[0].tolist(), *theirs.tokens[:-1]]])
        next_logits = model(tokens).logits[0, prompt.shape[1] - 1 :]
        mine, yours = (made.next_logits.argmax(1, keepdim=True) for made in (ours, theirs))
        margins = (next_logits.gather(1, mine) - next_logits.gather(1, yours)).abs()
        # Up to the token in which the texts part, our logits are those that our text was made of.
        along = ours.next_logits[: same + 1]
        taken = along.gather(1, torch.tensor(ours.tokens[: same + 1])[:, None])
        return HalfPrecision(
            _errors(logits, ours.logits, theirs.logits),
            _errors(next_logits, ours.next_logits, theirs.next_logits),
            agreeing=int((mine == yours).sum()),
            margin=margins.max().item(),
            greedy=torch.equal(taken, along.amax(1, keepdim=True)),
        )


class _Counter:
    """A streamer of transformers that tells how many tokens there are."""

    def __init__(self, on_tokens: Callable[[int], None]) -> None:
        self.on_tokens = on_tokens
        self.tokens = -1  # the prompt is streamed, too

    def put(self, _: torch.Tensor) -> None:
        self.tokens += 1
        self.on_tokens(self.tokens)

    def end(self) -> None:
        pass


def _equal(pair: tuple[int, int]) -> bool:
    return pair[0] == pair[1]


def _errors(exact: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> Errors:
    largest = [(x - exact).abs().max().item() for x in (ours, theirs)]
    rms = [(x - exact).square().mean().sqrt().item() for x in (ours, theirs)]
    return Errors(*largest, *rms)


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
    table.add_row("weights, written again", "", "", "none" if result.same_weights else "some")
    if result.half is not None:
        _add_half(table, result.half, n)
    console.print(table)
    if result.text is not None and result.their_text is not None:
        console.print("gptfast:     ", repr(result.text[:160]), markup=False, highlight=False)
        console.print("transformers:", repr(result.their_text[:160]), markup=False, highlight=False)
    console.print("equal" if result.passed else "[bold red]different")


def _add_half(table: Table, half: HalfPrecision, n: int) -> None:
    table.add_section()
    for name, errors in (("text", half.text), ("token by token", half.decoding)):
        for kind in ("largest", "rms"):
            ours, theirs = getattr(errors, kind), getattr(errors, f"their_{kind}")
            ratio = f"{ours / theirs:.2f} times" if theirs else ""
            label = f"error to float32, {name}, {kind}"
            table.add_row(label, f"{ours:.1e}", f"{theirs:.1e}", ratio)
    parting = f"{n - half.agreeing} of {n}"
    if half.agreeing < n:
        parting += f", ties to {half.margin:.1e}"
    table.add_row("next tokens along transformers' text", "", "", parting)
    if not half.greedy:
        table.add_row("greedy text, from these logits", "", "", "some")


def _transformers() -> Any:
    try:
        from transformers import GPT2LMHeadModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "gptfast validate needs transformers: pip install 'gptfast-kernels[hf]'"
        ) from error
    return GPT2LMHeadModel


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its bars and remarks, between which ours would be lost."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _text(tokenizer: Tokenizer | None, vocab_size: int, B: int, T: int) -> torch.Tensor:
    """Tokens (B, T) of packaged Shakespeare, or random ones for an unknown vocabulary."""
    if not isinstance(tokenizer, GPT2Tokenizer):
        return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
    ids = tokenizer.encode(read_text()[: 16 * B * T])  # a token has four characters or so
    return torch.tensor(ids[: B * T]).view(B, T)
