"""The command line: `gptfast prepare`, `train`, `curve`, `generate`, `evaluate`, `inspect`,
`export`, `validate`, `plan` and `doctor`.

Errors that a user can cause end as one line on standard error and exit status 2.

Longer than 500 lines: every option of ten commands stands here, with its help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import secrets
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress, TaskID
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, UseAppendAction, arg, subcommand

from gptfast import checkpoint
from gptfast._version import __version__
from gptfast.backend import use_backend
from gptfast.data import prepare, read_text
from gptfast.data.preparation import SHARD_TOKENS
from gptfast.distributed import ProcessLostError
from gptfast.evaluate import evaluate, print_scores, read_hellaswag, read_lambada
from gptfast.generate import generate_text, pick_device
from gptfast.integrations.huggingface import download, is_gpt2_folder, load_gpt2, save_gpt2
from gptfast.models import GPTConfig
from gptfast.models.gpt import PRESETS as MODEL_PRESETS
from gptfast.nn import quantize
from gptfast.plan import make_plan, parse_gpus, parse_tokens, print_plan
from gptfast.trackers import draw_curves
from gptfast.train import PRESETS, TrainConfig, read_settings, train

DEFAULT_PRESET = "shakespeare-char-cpu"
DESCRIPTION = """Fused kernels for GPT models, and a complete GPT-2.

A first run: gptfast train --preset demo

--version prints the version; --debug, anywhere, shows the traceback of an error."""
# What a user's arguments, files and machine can cause. Anything else is a bug: traceback.
USER_ERRORS = (
    ValueError,
    TypeError,
    IndexError,
    ArithmeticError,
    OSError,
    RuntimeError,
    ImportError,
    MemoryError,
)


@dataclass
class Prepare:
    """Turn texts, JSON lines or Parquet files into a folder of tokens for `gptfast train --data`.

    Run again, it goes on where it was stopped.
    """

    out: str
    """Folder to make, or to go on with."""
    file: Annotated[tuple[str, ...], arg(metavar="FILE ...")] = ()
    """Texts, .jsonl, .parquet, folders of them, or a name: tinyshakespeare, tinystories,
    fineweb-edu, openwebtext (fetched once). None is nine packaged plays."""
    val_file: Annotated[tuple[str, ...], arg(metavar="FILE ...")] = ()
    """Files to validate on, instead of the last part of each --file."""
    tokenizer: Literal["char", "gpt2"] = "char"
    """Tokens: the text's characters, or GPT-2's byte pairs."""
    val_fraction: float = 0.1
    """Last part of each file that is kept for validation."""
    field: str = "text"
    """Field of JSON lines, or column of Parquet files, with the text."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens in a shard: what is lost at most when it is stopped."""
    workers: Annotated[int | None, arg(metavar="INT")] = None
    """Processes that encode. None: one for each core, fewer for small files."""

    def run(self) -> int:
        """Prepare the files and say what came of it."""
        dataset = prepare(
            self.file,
            self.out,
            self.tokenizer,
            self.val_fraction,
            val_file=self.val_file,
            field=self.field,
            shard_tokens=self.shard_tokens,
            workers=self.workers,
        )
        print(
            f"{self.out}: {len(dataset.train):,} tokens to train on, {len(dataset.val):,} to "
            f"validate, vocabulary of {dataset.vocab_size:,}"
        )
        print(f"train with: gptfast train --data {shlex.quote(self.out)}")
        return 0


@dataclass
class Train:
    """Train a GPT on a text."""

    preset: Annotated[str, arg(metavar=f"{{{','.join(PRESETS)}}}")] = DEFAULT_PRESET
    """Defaults of all other options: nanoGPT's for a CPU or a GPU, GPT-2, or a minute's demo."""
    training: OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)

    def run(self) -> int:
        """Train; the exit status of an interrupted run is 128 + the signal, as the shell's."""
        result = train(self.training)
        return 0 if result.interrupted is None else 128 + result.interrupted


@dataclass
class Generate:
    """Continue a prompt with a trained model."""

    checkpoint: str
    """Run (its best checkpoint is taken), step_* folder, folder of Hugging Face's, or hf:NAME."""
    prompt: str = ""
    """Text to continue."""
    max_new_tokens: int = 200
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Below 1 for likelier text, above for wilder text; 0 takes the likeliest token."""
    greedy: FlagCreatePairsOff[bool] = False
    """Same as --temperature 0."""
    top_k: Annotated[int | None, arg(metavar="INT")] = None
    """Draw from this many likeliest tokens. None: from all."""
    top_p: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Draw from the likeliest tokens that together have this probability. None: from all."""
    min_p: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Draw from tokens with this fraction of the largest probability. None: from all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that are there already become less likely."""
    seed: Annotated[int | None, arg(metavar="INT")] = None
    """The same seed gives the same text. None: a random one, which is printed."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """String that ends the text and is not printed; may be repeated."""
    quantize: Annotated[Literal["int8", "int4"] | None, arg(metavar="{int8,int4}")] = None
    """Round the weights of linear layers: int8 or int4. None: as they are stored."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    backend: Literal["auto", "torch", "cpu", "triton", "cuda"] = "auto"
    """Kernels of gptfast to use."""

    def run(self) -> int:
        """Print the prompt and what follows, and the speed on standard error."""
        loaded = _load(self.checkpoint, pick_device(self.device))
        if self.quantize is not None:
            quantize(loaded.model, self.quantize)
        seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        pieces = generate_text(
            loaded.model,
            loaded.tokenizer,
            self.prompt,
            self.max_new_tokens,
            temperature=0.0 if self.greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            generator=torch.Generator().manual_seed(seed),
            stop=self.stop,
        )
        backend = use_backend(self.backend) if self.backend != "auto" else contextlib.nullcontext()
        tokens = -1  # the last piece is no token
        started = time.perf_counter()
        with backend:
            for piece in itertools.chain([self.prompt + next(pieces)], pieces):
                print(piece, end="", flush=True)
                tokens += 1
        seconds = time.perf_counter() - started
        print(flush=True)
        print(
            f"{tokens} tokens, {tokens / seconds:,.0f} tok/s, seed {seed}, {loaded.path}",
            file=sys.stderr,
        )
        return 0


@dataclass
class Evaluate:
    """Score a model on a text, HellaSwag and LAMBADA."""

    checkpoint: str
    """Run (its best checkpoint is taken), step_* folder, folder of Hugging Face's, or hf:NAME."""
    text: Annotated[str | None, arg(metavar="FILE")] = None
    """Text: loss, perplexity and bits per byte."""
    stride: Annotated[int | None, arg(metavar="INT")] = None
    """Tokens that the window over the text moves on by; fewer give each more context. None: all."""
    hellaswag: Annotated[str | None, arg(metavar="FILE")] = None
    """HellaSwag: JSON lines, or six lines an item; or hellaswag, the published one, fetched."""
    lambada: Annotated[str | None, arg(metavar="FILE")] = None
    """LAMBADA: JSON lines, or a passage a line; or lambada, OpenAI's one, fetched."""
    limit: Annotated[int | None, arg(metavar="INT")] = None
    """Only so many items of HellaSwag and LAMBADA. None: all."""
    quantize: Annotated[Literal["int8", "int4"] | None, arg(metavar="{int8,int4}")] = None
    """Round the weights of linear layers: int8 or int4. None: as they are stored."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the scores to this file."""

    def run(self) -> int:
        """Evaluate, with a progress bar, and print a table."""
        if self.text is None and self.hellaswag is None and self.lambada is None:
            raise ValueError("evaluate: expected --text, --hellaswag or --lambada, got none")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"evaluate: --limit must be at least 1, got {self.limit}")
        # The files come first: what is wrong with them is known before a model is loaded.
        text = None if self.text is None else read_text(self.text)
        items = [] if self.hellaswag is None else read_hellaswag(self.hellaswag, self.limit)
        passages = [] if self.lambada is None else read_lambada(self.lambada, self.limit)
        loaded = _load(self.checkpoint, pick_device(self.device))
        if self.quantize is not None:
            quantize(loaded.model, self.quantize)
        console = Console()
        scores = evaluate(
            loaded.model,
            loaded.tokenizer,
            text=text,
            stride=self.stride,
            hellaswag_items=items,
            lambada_passages=passages,
            console=console,
        )
        print_scores(scores, str(loaded.path), console)
        if self.json is not None:
            rows = [dataclasses.asdict(score) for score in scores]
            self.json.write_text(json.dumps(rows, indent=1) + "\n")
        return 0


@dataclass
class Inspect:
    """Look into a model: attention, what each layer would say, embeddings, parameters."""

    checkpoint: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Run (its best checkpoint is taken), step_* folder, folder of Hugging Face's, or hf:NAME."""
    preset: Annotated[str, arg(metavar=f"{{{','.join(MODEL_PRESETS)}}}")] = "gpt2"
    """Sizes whose parameters and FLOPs are counted, where no --checkpoint is given."""
    text: Annotated[str | None, arg(metavar="TEXT")] = None
    """Text whose attention and logit lens are drawn."""
    out: str = "out/inspect"
    """Folder of what is drawn: attention.html, attention.png, lens.png."""
    layer: Annotated[int | None, arg(metavar="INT")] = None
    """With --head: also draw this layer's, with its tokens."""
    head: Annotated[int | None, arg(metavar="INT")] = None
    """With --layer: also draw this head."""
    neighbours: UseAppendAction[tuple[str, ...]] = ()
    """Word, one token long, whose nearest tokens are listed; may be repeated."""
    analogy: Annotated[tuple[str, str, str] | None, arg(metavar="A B C")] = None
    """Three words, each a token: A is to B as C is to what?"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def run(self) -> int:
        """Draw and list what was asked for; with nothing asked, count parameters."""
        from gptfast import inspect

        asked = self.text is not None or self.neighbours or self.analogy is not None
        if asked and self.checkpoint is None:
            raise ValueError("inspect: text and words need a --checkpoint, got none")
        if (self.layer is None) != (self.head is None):
            raise ValueError("inspect: expected --layer and --head, got one of them")
        console = Console()
        if self.checkpoint is None:
            inspect.print_parameters(GPTConfig.preset(self.preset), self.preset, console)
            return 0
        loaded = _load(self.checkpoint, pick_device(self.device))
        if not asked:
            inspect.print_parameters(loaded.model.config, str(loaded.path), console)
        if self.text is not None:
            chosen = None if self.layer is None or self.head is None else (self.layer, self.head)
            name = _name(str(self.checkpoint), loaded.path)
            for path in inspect.draw(
                loaded.model, loaded.tokenizer, self.text, self.out, name, chosen
            ):
                print(path)
        if self.neighbours or self.analogy is not None:
            inspect.print_similar(
                loaded.model, loaded.tokenizer, self.neighbours, self.analogy, console
            )
        return 0


@dataclass
class Export:
    """Write a model as a folder that Hugging Face's transformers loads."""

    checkpoint: str
    """Run, whose best checkpoint is taken, or one step_* folder in it."""
    out: str
    """Folder to make."""

    def run(self) -> int:
        """Export it and say how to load it."""
        loaded = _load(self.checkpoint, torch.device("cpu"))
        path = save_gpt2(loaded.model, self.out, loaded.tokenizer)
        print(f"{path}: {loaded.model.num_parameters():,} parameters")
        print(f'load with: transformers.AutoModelForCausalLM.from_pretrained("{path}")')
        return 0


@dataclass
class Validate:
    """Compare logits, loss and greedy text with transformers on the same weights."""

    preset: Annotated[str, arg(metavar=f"{{{','.join(MODEL_PRESETS)}}}")] = "gpt2"
    """Sizes of a model with seeded random weights, where no --checkpoint is given."""
    checkpoint: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Run, step_* folder, folder of Hugging Face's, or hf:NAME from the hub."""
    new_tokens: int = 200
    """Length of the greedy continuation."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights in both. In 16 bits both are held against float32."""
    seed: int = 0
    """Of random weights."""

    def run(self) -> int:
        """Validate; the exit status is 1 where the models differ."""
        from gptfast.validate import print_validation, validate

        source: Path | GPTConfig = GPTConfig.preset(self.preset)
        if self.checkpoint is not None:
            source = _hf_folder(self.checkpoint) or Path(self.checkpoint)
        console = Console()
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            tasks: dict[str, TaskID] = {}

            def on_progress(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage)
                bar.update(tasks[stage], completed=done, total=total)

            result = validate(
                source,
                new_tokens=self.new_tokens,
                dtype=getattr(torch, self.dtype),
                seed=self.seed,
                on_progress=on_progress,
            )
        print_validation(result, self.checkpoint or self.preset, console)
        return 0 if result.passed else 1


def _load(source: str, device: torch.device) -> checkpoint.Checkpoint:
    """A checkpoint of ours, or a GPT-2 of Hugging Face's."""
    folder = _hf_folder(source)
    if folder is None:
        return checkpoint.load(source, device)
    model, tokenizer = load_gpt2(folder, device)
    if tokenizer is None:
        raise ValueError(f"{folder}: expected GPT-2's vocabulary, got another one")
    return checkpoint.Checkpoint(folder, 0, None, model, tokenizer)


def _name(source: str, path: Path) -> str:
    """A checkpoint's name over a picture: Hugging Face's, or the run and its step."""
    return source if source.startswith("hf:") else "/".join(path.resolve().parts[-2:])


def _hf_folder(source: str) -> Path | None:
    """The folder of Hugging Face's that is meant; None where it is none."""
    if source.startswith("hf:"):
        return download(source.removeprefix("hf:"))
    return Path(source) if is_gpt2_folder(Path(source)) else None


@dataclass
class Plan:
    """Plan a training run on paper: memory, throughput, time, checkpoint size."""

    preset: Annotated[str, arg(metavar=f"{{{','.join(MODEL_PRESETS)}}}")] = "gpt2"
    """Sizes of the model."""
    gpus: Annotated[str, arg(metavar="NxCARD")] = "1xH100"
    """Cards: 8xH100, 4xA100-40, RTX4090, ..."""
    tokens: Annotated[str, arg(metavar="NUMBER")] = "10B"
    """Tokens to train on; k, M, B and T stand for powers of a thousand."""
    block_size: Annotated[int | None, arg(metavar="INT")] = None
    """Tokens in a sequence. None: the preset's."""
    batch_size: int = 8
    """Sequences that one card takes at once."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Everything on every card, or weights, gradients and optimizer split among them."""
    recompute: FlagCreatePairsOff[bool] = False
    """Keep only the input of each block for backward."""
    mfu: float = 0.4
    """Assumed share of the cards' peak rate; 0.3 to 0.5 is what people report."""

    def run(self) -> int:
        """Print the plan."""
        changes = {} if self.block_size is None else {"block_size": self.block_size}
        gpus, card = parse_gpus(self.gpus)
        plan = make_plan(
            GPTConfig.preset(self.preset, **changes),
            card,
            gpus,
            tokens=parse_tokens(self.tokens),
            batch_size=self.batch_size,
            strategy=self.strategy,
            recompute=self.recompute,
            mfu=self.mfu,
        )
        print_plan(plan, Console())
        return 0


@dataclass
class Curve:
    """Draw the losses of runs over their steps as a picture."""

    runs: Annotated[tuple[str, ...], arg(metavar="RUN ...")]
    """Folders of runs."""
    out: str = "curve.png"
    """File to write; its suffix says the format."""

    def run(self) -> int:
        """Draw them."""
        if not self.runs:
            raise ValueError("curve: expected --runs and a folder, got none")
        draw_curves([Path(run) for run in self.runs], Path(self.out))
        print(self.out)
        return 0


@dataclass
class Doctor:
    """Show what this machine and this installation can do."""

    json: FlagCreatePairsOff[bool] = False
    """Print JSON instead of tables."""
    selftest: FlagCreatePairsOff[bool] = False
    """Also run every kernel against PyTorch."""

    def run(self) -> int:
        """Run the examination."""
        from gptfast.doctor import doctor

        return doctor(json=self.json, selftest=self.selftest)


Command = (
    Prepare | Train | Curve | Generate | Evaluate | Inspect | Export | Validate | Plan | Doctor
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if args == ["--version"]:
        print(f"gptfast {__version__}")
        return 0
    try:
        return _parse(args).run()
    except KeyboardInterrupt:
        print("\ngptfast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read standard output has gone. Python must not complain of it when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a process that SIGPIPE ended
    except USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"gptfast: error: {message}", file=sys.stderr)
        if isinstance(error, ProcessLostError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
        return 2


def _parse(args: list[str]) -> Command:
    """The command that the arguments ask for.

    Raises:
        ValueError: they ask for none.
        SystemExit: they ask for help.
    """
    training = args[:1] == ["train"]
    default = _train_defaults(args) if training else Train()
    commands = (
        Annotated[Prepare, subcommand("prepare")]
        | Annotated[Train, subcommand("train", default=default)]
        | Annotated[Curve, subcommand("curve")]
        | Annotated[Generate, subcommand("generate")]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Inspect, subcommand("inspect")]
        | Annotated[Export, subcommand("export")]
        | Annotated[Validate, subcommand("validate")]
        | Annotated[Plan, subcommand("plan")]
        | Annotated[Doctor, subcommand("doctor")]
    )
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(
                commands,
                prog="gptfast",
                description=DESCRIPTION,
                args=args,
            )
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
    raise ValueError(_unboxed(boxed.getvalue()))


def _train_defaults(args: list[str]) -> Train:
    """A preset's settings, or with --resume those of the run itself."""
    preset = _option("--preset", args)
    config = TrainConfig.preset(preset or DEFAULT_PRESET)
    if "--resume" in args and preset is None:
        out = _option("--out", args) or config.out
        run = read_settings(out)
        config = dataclasses.replace(run or config, out=out, resume=False)  # the flag sets it
    return Train(preset or DEFAULT_PRESET, config)


def _option(name: str, args: list[str]) -> str | None:
    """The value that an option has on the command line."""
    value = None
    for arg_, following in zip(args, [*args[1:], None], strict=True):
        if arg_ == name:
            value = following
        elif arg_.startswith(f"{name}="):
            value = arg_.removeprefix(f"{name}=")
    return value


def _unboxed(box: str) -> str:
    """tyro's boxed message as one line: title, lines of the message, rule, lines of help."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    is_text = [bool(line.strip("─-╰╯")) for line in lines]
    # Where standard output is not UTF-8, there is a rule below the title as well.
    start = is_text.index(True) if True in is_text else 0
    end = is_text.index(False, start) if False in is_text[start:] else len(lines)
    message = re.sub(r" \.$", ".", " ".join(lines[start:end]))
    return re.sub(r"^Error parsing __tyro\S+: ", "", message)  # a dataclass refused its values
