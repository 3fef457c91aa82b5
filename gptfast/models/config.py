"""What a GPT is made of: sizes, options, and presets of both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal

GPT2_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
CHOICES = {
    "positions": ("learned", "sinusoidal", "rotary", "none"),
    "norm": ("layer", "rms"),
    "mlp": ("gelu", "relu", "relu2", "swiglu"),
}


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and options of a GPT; the defaults are GPT-2's.

    Raises:
        ValueError: a size below 1, one that does not divide another, an unknown option, or options
            that exclude each other; names the field, what was expected and what was given.
    """

    block_size: int = 1024  # longest sequence, T
    vocab_size: int = 50257  # V
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # C
    dropout: float = 0.0  # of embeddings, attention scores and residual branches
    bias: bool = True  # in linear layers and LayerNorms

    positions: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"
    rope_base: float = 10000.0  # of rotary positions
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    norm_affine: bool = True  # whether norms have weights
    pre_norm: bool = True  # x + f(norm(x)); False: norm(x + f(x)), as in 2017
    embedding_norm: bool = False  # a norm of the embeddings
    mlp: Literal["gelu", "relu", "relu2", "swiglu"] = "gelu"  # gelu in its tanh form
    n_inner: int | None = None  # width inside the MLP; None: see `inner`
    n_kv_head: int | None = None  # heads of keys and values; None: n_head; 1 is multi-query
    qk_norm: bool = False  # RMS norm of each head's query and key
    window: int | None = None  # tokens that a token sees, itself counted; None: all
    logit_softcap: float | None = None  # logits become cap tanh(logits / cap)
    tied: bool = True  # whether the head is the token embedding
    causal: bool = True  # False: an encoder, in which every token sees all
    cross_attention: bool = False  # whether blocks attend to an encoder's output, too

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            self._positive(name, getattr(self, name))
        for name in ("n_inner", "n_kv_head", "window"):
            if getattr(self, name) is not None:
                self._positive(name, getattr(self, name))
        for name, known in CHOICES.items():
            self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        n_head, n_embd = self.n_head, self.n_embd
        self._require("n_head", n_embd % n_head == 0, f"divide n_embd {n_embd}", "must")
        self._require("n_kv_head", n_head % self.kv_heads == 0, f"divide n_head {n_head}", "must")
        self._require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        for name in ("rope_base", "norm_eps"):
            self._require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        if self.logit_softcap is not None:
            self._require("logit_softcap", 0 < self.logit_softcap < math.inf, "positive and finite")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"GPTConfig: n_embd / n_head must be even for rotary positions, got {self.head_dim}"
            )
        if self.positions == "sinusoidal" and n_embd % 2:
            raise ValueError(
                f"GPTConfig: n_embd must be even for sinusoidal positions, got {n_embd}"
            )

    def _positive(self, name: str, value: Any) -> None:
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"GPTConfig: {name} must be a positive integer, got {value!r}")

    def _require(self, name: str, holds: bool, expected: str, verb: str = "must be") -> None:
        if not holds:
            raise ValueError(f"GPTConfig: {name} {verb} {expected}, got {getattr(self, name)!r}")

    @property
    def head_dim(self) -> int:
        """D."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """H_kv, heads of keys and values."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def inner(self) -> int:
        """Width inside the MLP: 4 C by default.

        A gated MLP has three matrices instead of two: 8/3 C, rounded up to a multiple of 64, give
        it as many weights.
        """
        if self.n_inner is not None:
            return self.n_inner
        return 4 * self.n_embd if self.mlp != "swiglu" else -(-8 * self.n_embd // 192) * 64

    def unlike_gpt2(self, besides: Collection[str] = ()) -> str | None:
        """The first option, but those in `besides`, that GPT-2 does not have: "norm = 'rms'".

        Returns:
            None where there is none.
        """
        as_in_gpt2 = {"n_kv_head": self.n_head, "n_inner": 4 * self.n_embd}
        for name, default in GPT2_OPTIONS.items():
            value = getattr(self, name)
            if name not in besides and value not in (default, as_in_gpt2.get(name, default)):
                return f"{name} = {value!r}"
        return None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """Published sizes by name, with changes; `PRESETS` lists them.

        Raises:
            ValueError: unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown model preset {name!r}; known: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})


GPT2_OPTIONS: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(GPTConfig)
    if field.name not in GPT2_SIZES
}
# Options that go together.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"bias": False, "positions": "rotary", "norm": "rms", "mlp": "swiglu"},
    "nanochat": {
        "bias": False,
        "positions": "rotary",
        "norm": "rms",
        "norm_eps": 2.0**-23,  # float32's, which F.rms_norm takes where none is given
        "norm_affine": False,
        "embedding_norm": True,
        "mlp": "relu2",
        "qk_norm": True,
        "logit_softcap": 15.0,
        "tied": False,
    },
}
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124,439,808 parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 354,823,168
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774,030,080
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1,557,611,200
    # The lecture's, as nanoGPT trains it: 10.65M without the position embeddings.
    "shakespeare-char": {
        "block_size": 256,
        "vocab_size": 65,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "dropout": 0.2,
        "bias": False,
    },
    # SmolLM-135M: Llama's architecture with the head tied; 134,515,008.
    "llama-135m": {
        **ARCHITECTURES["llama"],
        "block_size": 2048,
        "vocab_size": 49152,
        "n_layer": 30,
        "n_head": 9,
        "n_kv_head": 3,
        "n_embd": 576,
        "n_inner": 1536,
    },
    # TinyLlama-1.1B; 1,100,048,384.
    "llama-1.1b": {
        **ARCHITECTURES["llama"],
        "block_size": 2048,
        "vocab_size": 32000,
        "n_layer": 22,
        "n_head": 32,
        "n_kv_head": 4,
        "n_embd": 2048,
        "n_inner": 5632,
        "tied": False,
    },
    # nanochat at depth 20, as first published; 560,988,160.
    "nanochat-d20": {
        **ARCHITECTURES["nanochat"],
        "block_size": 2048,
        "vocab_size": 65536,
        "n_layer": 20,
        "n_head": 10,
        "n_embd": 1280,
    },
}
