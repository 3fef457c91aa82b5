"""GPT-2 in Hugging Face's folder format, both ways.

    FOLDER/config.json            sizes, with "model_type": "gpt2"
           model.safetensors      weights; or model.safetensors.index.json and its shards,
                                  or pytorch_model.bin (read without running code in it)
           vocab.json merges.txt  the tokenizer, as text

Names differ in a prefix ("transformer." or none), the four matrices of a block are stored
transposed, and old files hold the causal mask as buffers. Weights are read one at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gptfast.checkpoint import (
    MAX_JSON_BYTES,
    UNPICKLING_ERRORS,
    build_model,
    open_weights,
    synchronise,
    unpickling_reason,
)
from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import END_OF_TEXT, GPT2Tokenizer, Tokenizer, load_tokenizer, tokenizer_json

__all__ = [
    "download",
    "is_gpt2_folder",
    "load_gpt2",
    "read_gpt2_sizes",
    "save_gpt2",
    "stored_equally",
]

PREFIX = "transformer."
TRANSPOSED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
OWN_TOKENIZER = "gptfast_tokenizer.json"  # of a tokenizer that transformers does not have
# What a config.json may say beside the sizes, if it says it: our model computes just this.
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
SIZES = {
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
PATTERNS = ["config.json", "*.safetensors", "*.safetensors.index.json", "vocab.json", "merges.txt"]


def is_gpt2_folder(path: Path) -> bool:
    """Whether a folder's `config.json` says that it holds a GPT-2 of Hugging Face's format."""
    file = path / "config.json"
    return file.is_file() and _read_json(file).get("model_type") == "gpt2"


def download(name: str) -> Path:
    """Fetch a model's files from the Hugging Face hub, or find them in its cache.

    Args:
        name: "openai-community/gpt2", or another repository of a GPT-2.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        OSError: no network, no such repository, or no permission.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the hub needs huggingface_hub: pip install 'gptfast-kernels[hf]'"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(
            f"cannot fetch {name!r} from the hub: {reason:.200}; give a folder on the disk, "
            "or set HF_HOME to a cache that has it"
        ) from error


def load_gpt2(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[GPT, Tokenizer | None]:
    """Read a GPT-2 that Hugging Face's transformers, or `save_gpt2`, has written.

    Args:
        path: the folder.
        device: where the model goes.
        dropout: of the model, which is in evaluation mode; the folder's own is not taken.
        dtype: of the model's weights, to which the stored ones are rounded.

    Returns:
        The model and its tokenizer: None where the folder's vocabulary is
        neither GPT-2's nor one of ours.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ValueError: not a GPT-2, one with options that this model does not have, weights that are
            damaged or disagree with the sizes, or a pickle with code in it; names the file, what
            was expected and what was given.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder with config.json, got no such folder")
    config = dataclasses.replace(_read_config(path / "config.json"), dropout=dropout)
    with ExitStack() as files:
        source, shapes, read = _weights(path, files)
        renamed = dict(_renamed(source, shapes))
        head = shapes.get("lm_head.weight")
        if head is not None and not torch.equal(
            read("lm_head.weight"), read(renamed["transformer.wte.weight"])
        ):
            raise ValueError(f"{source}: expected lm_head.weight to be wte.weight, got another one")
        model = build_model(
            config,
            {ours: _turned(ours, shapes[theirs]) for ours, theirs in renamed.items()},
            lambda name: _transpose(name, read(renamed[name])),
            source,
            device,
            dtype,
        )
    return model, _read_tokenizer(path, config.vocab_size)


def save_gpt2(model: GPT, path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> Path:
    """Write a model as a folder that Hugging Face's transformers loads as a GPT-2.

    A model without biases gets biases of zero, which transformers' GPT-2 always has.

    Args:
        model: the model; weights are stored in their dtype.
        path: the folder to make.
        tokenizer: GPT-2's becomes vocab.json and merges.txt, which `AutoTokenizer` reads; any other
            one is kept for `load_gpt2` only.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not GPT-2's architecture.
        FileExistsError: there is something at `path`.
        OSError: it cannot be written; nothing stays behind.
    """
    option = model.config.unlike_gpt2()
    if option is not None:
        raise ValueError(f"export: expected the architecture of GPT-2, got {option}")
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path}: expected no such file or folder, got one")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_file(_hf_weights(model), temporary / "model.safetensors", {"format": "pt"})
        _write_json(temporary / "config.json", _hf_config(model))
        if isinstance(tokenizer, GPT2Tokenizer):
            _write_bpe(temporary, tokenizer, model.config.block_size)
        elif tokenizer is not None:
            (temporary / OWN_TOKENIZER).write_bytes(tokenizer_json(tokenizer))
        # safetensors lets nobody but the owner read it; the umask has decided for the others.
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")
        for file in (*temporary.iterdir(), temporary):
            synchronise(file)
        temporary.rename(path)
        synchronise(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def read_gpt2_sizes(path: Path) -> tuple[GPTConfig, Tokenizer | None]:
    """The sizes and the tokenizer of a folder, as `load_gpt2`, without its weights."""
    config = _read_config(path / "config.json")
    return config, _read_tokenizer(path, config.vocab_size)


def stored_equally(path: Path, other: Path, dtype: torch.dtype) -> bool:
    """Whether two folders hold the same weights, bit by bit, once rounded to a dtype.

    Masks and a tied head, which one of them may hold besides, do not count. Weights are read one at
    a time.
    """
    with ExitStack() as files:
        (a, shapes_a, read_a), (b, shapes_b, read_b) = (_weights(p, files) for p in (path, other))
        names_a, names_b = dict(_renamed(a, shapes_a)), dict(_renamed(b, shapes_b))
        return names_a.keys() == names_b.keys() and all(
            torch.equal(
                _bits(read_a(names_a[name]).to(dtype)), _bits(read_b(names_b[name]).to(dtype))
            )
            for name in names_a
        )


def _bits(x: torch.Tensor) -> torch.Tensor:
    """As integers: two zeros differ in their sign, and a NaN is equal to itself."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


# ---- Reading -------------------------------------------------------------------------------------


def _read_config(file: Path) -> GPTConfig:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected a model's sizes, got no such file")
    given = _read_json(file)
    if given.get("model_type") != "gpt2":
        raise ValueError(f"{file}: model_type must be 'gpt2', got {given.get('model_type')!r:.80}")
    for name, known in FIXED.items():
        if given.get(name, known[0]) not in known:
            expected = " or ".join(map(repr, known))
            raise ValueError(f"{file}: {name} must be {expected}, got {given[name]!r:.80}")
    for theirs in SIZES.values():
        if type(given.get(theirs)) is not int:
            raise ValueError(f"{file}: {theirs} must be an integer, got {given.get(theirs)!r:.80}")
    inner, expected_inner = given.get("n_inner"), 4 * given["n_embd"]
    if inner not in (None, expected_inner):
        raise ValueError(f"{file}: n_inner must be {expected_inner} or null, got {inner!r:.80}")
    try:
        return GPTConfig(**{ours: given[theirs] for ours, theirs in SIZES.items()})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        data = opened.read(16 * MAX_JSON_BYTES)  # an index names every tensor, a vocabulary more
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got {data[:40]!r}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {value!r:.80}")
    return value


Weights = tuple[Path, Mapping[str, tuple[int, ...]], Callable[[str], torch.Tensor]]


def _weights(path: Path, files: ExitStack) -> Weights:
    """The file to name in errors, and every tensor's shape and reader, by the names in the file."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    pickled = path / "pytorch_model.bin"
    if single.is_file():
        return (single, *_safetensors([single], files))
    if index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ValueError(f"{index}: expected a weight_map of file names, got {names!r:.80}")
        shards = sorted(set(names.values()))
        for shard in shards:
            if Path(shard).name != shard or not (path / shard).is_file():
                raise ValueError(f"{index}: expected a file beside it, got {shard!r:.80}")
        return (index, *_safetensors([path / shard for shard in shards], files))
    if pickled.is_file():
        return (pickled, *_pickle(pickled))
    raise FileNotFoundError(
        f"{path}: expected model.safetensors, model.safetensors.index.json or pytorch_model.bin, "
        "got none of them"
    )


def _safetensors(
    paths: list[Path], files: ExitStack
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    shapes: dict[str, tuple[int, ...]] = {}
    owner: dict[str, Any] = {}
    for file in paths:
        weights = files.enter_context(open_weights(file))
        for name in weights.keys():  # noqa: SIM118 - no mapping
            shapes[name] = tuple(weights.get_slice(name).get_shape())
            owner[name] = weights
    return shapes, lambda name: owner[name].get_tensor(name)


def _pickle(file: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except UNPICKLING_ERRORS as error:
        raise ValueError(
            f"{file}: expected tensors without code: {unpickling_reason(error)}"
        ) from error
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in weights.items()
    ):
        raise ValueError(f"{file}: expected a dict of tensors, got {type(weights).__name__}")
    return {name: tuple(x.shape) for name, x in weights.items()}, weights.__getitem__


def _renamed(source: Path, names: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Our name and theirs, of every weight but the tied head; masks are left out."""
    for theirs in names:
        bare = theirs.removeprefix(PREFIX)
        if theirs != "lm_head.weight" and not MASKS.fullmatch(bare):
            yield PREFIX + bare, theirs
    if not {"wte.weight", PREFIX + "wte.weight"} & names.keys():
        raise ValueError(f"{source}: expected a tensor wte.weight, got none")


def _transpose(name: str, x: torch.Tensor) -> torch.Tensor:
    return x.T if TRANSPOSED.fullmatch(name.removeprefix(PREFIX)) else x


def _turned(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if TRANSPOSED.fullmatch(name.removeprefix(PREFIX)) else shape


def _read_tokenizer(path: Path, vocab_size: int) -> Tokenizer | None:
    own = path / OWN_TOKENIZER
    if own.is_file():
        tokenizer = load_tokenizer(own)
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"{own}: expected at most vocab_size {vocab_size} tokens as in config.json, "
                f"got {tokenizer.vocab_size}"
            )
        return tokenizer
    gpt2 = GPT2Tokenizer()
    if vocab_size < gpt2.vocab_size:
        return None
    vocabulary = path / "vocab.json"
    if vocabulary.is_file() and _read_json(vocabulary) != _bpe_vocabulary(gpt2):
        return None
    return gpt2


# ---- Writing -------------------------------------------------------------------------------------


def _hf_config(model: GPT) -> dict[str, Any]:
    config = model.config
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    end = GPT2Tokenizer().end_of_text
    ends = {"bos_token_id": end, "eos_token_id": end} if end < config.vocab_size else {}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        **{name: known[0] for name, known in FIXED.items()},
        **dropout,
        "bos_token_id": None,
        "eos_token_id": None,
        **ends,
    }


def _hf_weights(model: GPT) -> dict[str, torch.Tensor]:
    weights = {
        name: _transpose(name, p.detach()).contiguous() for name, p in model.named_parameters()
    }
    if not model.config.bias:
        for name in [n for n in weights if not n.endswith(("wte.weight", "wpe.weight"))]:
            # The stored matrices are (in, out): the bias has the size of the last dimension.
            weights[name.removesuffix("weight") + "bias"] = weights[name].new_zeros(
                weights[name].shape[-1]
            )
    return weights


def _write_bpe(path: Path, tokenizer: GPT2Tokenizer, block_size: int) -> None:
    _write_json(path / "vocab.json", _bpe_vocabulary(tokenizer))
    merges = "".join(f"{a} {b}\n" for a, b in _bpe_merges(tokenizer))
    (path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, **special}
    _write_json(path / "tokenizer_config.json", settings)


def _byte_characters() -> dict[int, str]:
    """The visible character that stands for each byte in GPT-2's vocabulary files."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def _bpe_vocabulary(tokenizer: GPT2Tokenizer) -> dict[str, int]:
    spelled = _byte_characters()
    words = {
        "".join(spelled[b] for b in tokenizer.token_bytes(i)): i
        for i in range(tokenizer.end_of_text)
    }
    return {**words, END_OF_TEXT: tokenizer.end_of_text}


def _bpe_merges(tokenizer: GPT2Tokenizer) -> Iterator[tuple[str, str]]:
    """The merges in their order: token n is what its bytes become, without n, before the last one.

    A token's rank is its place among the merges, so merging its bytes by lower ranks alone leaves
    the two parts that it was made of.
    """
    spelled = _byte_characters()
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.end_of_text)}
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            a, b = ("".join(spelled[byte] for byte in part) for part in parts)
            yield a, b


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
