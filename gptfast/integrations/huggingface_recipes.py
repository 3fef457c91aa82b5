"""What `gptfast.patch` replaces in transformers' models: which classes, by which mixin.

Classes are named, not imported: a model that is there has imported its own. Left as they are:
rotary embeddings, which every model applies in the midst of its attention's forward through a
function of its file; ReLU; and heads for other tasks than the next token.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from gptfast.nn.hooks import has_hooks
from gptfast.ops import gelu, linear_cross_entropy, rms_norm
from gptfast.ops.linear_cross_entropy import is_faster
from gptfast.patching.recognise import ACTIVATIONS
from gptfast.patching.registry import Patched, register


def _classes(name: str, *families: str) -> list[str]:
    """transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm, from RMSNorm and gemma2:Gemma2."""
    pairs = (family.split(":") for family in families)
    return [f"transformers.models.{m}.modeling_{m}.{prefix}{name}" for m, prefix in pairs]


LLAMA_LIKE = (
    "llama:Llama",
    "mistral:Mistral",
    "qwen2:Qwen2",
    "qwen3:Qwen3",
)
GEMMA = ("gemma:Gemma", "gemma2:Gemma2", "gemma3:Gemma3")


# ---- Norms ---------------------------------------------------------------------------------------


class FastRMSNorm(Patched):
    """y = x / rms(x) weight."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        if hidden_states.dtype != self.weight.dtype:
            self.fell_back("input and weight differ in dtype: the original's result has the wider")
        elif self.worth(hidden_states):
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class FastGemmaRMSNorm(Patched):
    """y = x / rms(x) (1 + weight), the sum in fp32."""

    weight: torch.Tensor
    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        if self.worth(x):
            return rms_norm(x, 1.0 + self.weight.float(), self.eps)
        return super().forward(x)


@register(*_classes("RMSNorm", *LLAMA_LIKE, "phi3:Phi3"), op="rms_norm")
def _rms_norm(module: Any) -> type[Patched] | str:
    return FastRMSNorm


@register(*_classes("RMSNorm", *GEMMA), op="rms_norm")
def _gemma_rms_norm(module: Any) -> type[Patched] | str:
    return FastGemmaRMSNorm


# ---- Activations ---------------------------------------------------------------------------------


class FastTanhGELU(Patched):
    """y = x Phi(x), Phi in its tanh form."""

    measured = "gelu tanh"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return gelu(input, "tanh") if self.worth(input) else super().forward(input)


class FastExactGELU(Patched):
    """y = x Phi(x), Phi with erf."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return gelu(input, "none") if self.worth(input) else super().forward(input)


@register(
    "transformers.activations.NewGELUActivation",
    "transformers.activations.FastGELUActivation",
    "transformers.activations.GELUTanh",
    op="gelu",
)
def _tanh_gelu(module: Any) -> type[Patched] | str:
    return FastTanhGELU


@register("transformers.activations.GELUActivation", op="gelu")
def _exact_gelu(module: Any) -> type[Patched] | str:
    return FastExactGELU


# ---- Gated MLPs ----------------------------------------------------------------------------------

# Whoever wrote the MLP, `gptfast.patching.recognise` knows it by its forward and its activation.
ACTIVATIONS |= {
    "transformers.activations.SiLUActivation": lambda module: "silu",
    "transformers.activations.GELUActivation": lambda module: "gelu",
    "transformers.activations.GELUTanh": lambda module: "gelu_tanh",
    "transformers.activations.NewGELUActivation": lambda module: "gelu_tanh",
    "transformers.activations.FastGELUActivation": lambda module: "gelu_tanh",
}


# ---- Attention -----------------------------------------------------------------------------------


# The attention that `patch` finds in a config, and the one that it sets. Its name tells what the
# modules of that config that are not patched keep, in copies of the config, too.
SWITCHED = {"sdpa": "gptfast_else_sdpa", "eager": "gptfast_else_eager"}
_PATCHED: weakref.WeakSet[FastAttention] = weakref.WeakSet()


class FastAttention(Patched):
    """The module's own forward, with our attention in its config.

    The config may be many modules', and of several models: it is switched for the first one that is
    patched, and back for the last.
    """

    config: Any

    def on_patch(self) -> None:
        """Choose our attention, where nobody has yet."""
        self._enter()
        chosen = self.config._attn_implementation
        self.config._attn_implementation = SWITCHED.get(chosen, chosen)

    def on_unpatch(self) -> None:
        """Choose what was chosen before, unless a module needs ours or the user chose since."""
        _PATCHED.discard(self)
        if not any(other.config is self.config for other in list(_PATCHED)):
            before = {name: before for before, name in SWITCHED.items()}
            chosen = self.config._attn_implementation
            self.config._attn_implementation = before.get(chosen, chosen)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of a pickled module, whose process may be a new one."""
        super().__setstate__(state)
        self._enter()

    def _enter(self) -> None:
        from gptfast.integrations.huggingface_attention import register

        register()
        _PATCHED.add(self)


@register(
    *_classes("Attention", *LLAMA_LIKE, "gemma:Gemma", "gemma3:Gemma3", "phi:Phi", "phi3:Phi3"),
    *_classes("Attention", "gpt2:GPT2", "gpt_neox:GPTNeoX", "opt:OPT", "vit:ViT"),
    *_classes("SelfAttention", "bert:Bert"),
    *_classes("CrossAttention", "bert:Bert"),
    op="attention",
)
def _attention(module: Any) -> type[Patched] | str:
    chosen = module.config._attn_implementation
    if chosen == "eager":
        return 'its attn_implementation is "eager", which can return the attention weights'
    return _if_among(("sdpa", SWITCHED["sdpa"], "gptfast"), chosen)


@register(*_classes("Attention", "gemma2:Gemma2"), op="attention")
def _softcapped_attention(module: Any) -> type[Patched] | str:
    # Its default is "eager", since transformers' "sdpa" has no softcap.
    chosen = module.config._attn_implementation
    if getattr(module.config, "output_attentions", False):
        return "its config asks for the attention weights"
    return _if_among(("eager", SWITCHED["eager"], "gptfast"), chosen)


def _if_among(known: tuple[str, ...], chosen: str) -> type[Patched] | str:
    return FastAttention if chosen in known else f"its attn_implementation is {chosen!r}"


# ---- Loss heads ----------------------------------------------------------------------------------


class FusedHead(Patched):
    """A causal language model that computes its loss in training without storing the logits.

    With labels, in training, the output has no logits until they are read, and compiled code has
    None. In evaluation, and wherever the original has to take the call, they are there.
    """

    sized_by_input = False
    config: Any
    _positional: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        """Give the patched class a forward with the original's signature, which Trainer reads."""
        super().__init_subclass__()
        original = super().forward
        parameters = inspect.signature(original).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        cls._positional = tuple(p.name for p in parameters if p.kind in kinds)[1:]

        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.training:
                return original(self, *args, **kwargs)
            given = {**dict(zip(cls._positional, args, strict=False)), **kwargs}
            loss = _fused(self, given)
            return original(self, *args, **kwargs) if loss is None else loss

        cls.forward = forward


def _fused(model: Any, given: dict[str, Any]) -> Any:
    """The output of a causal language model with its loss; None where the original has to do it."""
    if given.get("labels") is None:
        return None
    head = model.get_output_embeddings()
    reason = _why_not_fused(model, head, given)
    if reason is not None:
        model.fell_back(reason)
        return None
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given["inputs_embeds"][..., 0]
    if not _worth(model, head.weight, tokens.numel()):
        return None
    labels = given["labels"]
    rest = {name: x for name, x in given.items() if name not in ("labels", "logits_to_keep")}
    outputs = model.base_model(**rest)
    loss = next_token_loss(
        outputs.last_hidden_state,
        head.weight,
        labels,
        head.bias,
        softcap=getattr(model.config, "final_logit_softcapping", None),
        num_items_in_batch=given.get("num_items_in_batch"),
        ignore_index=given.get("ignore_index", -100),
        shift_labels=given.get("shift_labels"),
    )
    from transformers import modeling_outputs

    with_cross_attention = hasattr(outputs, "cross_attentions")
    kind = (
        modeling_outputs.CausalLMOutputWithCrossAttentions
        if with_cross_attention
        else modeling_outputs.CausalLMOutputWithPast
    )
    states = {name: x for name, x in outputs.items() if name != "last_hidden_state"}
    if torch.compiler.is_compiling():
        return kind(loss=loss, **states)
    output = _with_logits_when_read(kind)(loss=loss, **states)
    output.__dict__["_read"] = _Logits(model, head, outputs.last_hidden_state)
    return output


class _Logits:
    """Makes the logits that were not stored, if somebody reads them after all.

    They are those of the forward: with its autocast and its grad mode, whoever reads them first.
    """

    def __init__(self, model: Any, head: Any, hidden: torch.Tensor) -> None:
        self.head, self.hidden = head, hidden
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.softcap = getattr(model.config, "final_logit_softcapping", None)
        device = hidden.device.type
        self.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        self.weights = (head.weight, head.bias)  # kept, so that no other one gets their id
        self.state = self._state()

    def _state(self) -> list[tuple[int, ...]]:
        """What a write to the head's weights changes, unless it is in place and through `.data`."""
        weights = (p for p in (self.head.weight, self.head.bias) if p is not None)
        return [(id(p), _address(p), 0 if p.is_inference() else p._version) for p in weights]

    def __call__(self) -> torch.Tensor:
        if self._state() != self.state:
            raise RuntimeError(
                "logits: expected to be read before the head's weights are written to, since in "
                "training they are computed when they are read; got new weights. Read them before "
                "the optimiser's step, or patch without linear_cross_entropy"
            )
        with (
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.grad),
            self.autocast,
        ):
            logits: torch.Tensor = self.head(self.hidden)
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def _address(x: torch.Tensor) -> int:
    try:
        return x.data_ptr()
    except RuntimeError:  # a tensor of torch.func, which has no memory of its own
        return 0


class LogitsWhenRead:
    """An output of transformers whose logits are computed when they are first read.

    They are read as an attribute, by their name, and in a tuple. Who walks through keys and values,
    as wrappers do, finds none; in a copy that is made so they cannot be read.
    """

    _kind: ClassVar[type]  # transformers' class
    _read: _Logits | None = None
    _logits: torch.Tensor | None = None

    if TYPE_CHECKING:  # an output is an OrderedDict

        def __getattr__(self, name: str) -> Any: ...
        def __setitem__(self, name: str, value: Any) -> None: ...

    @property
    def logits(self) -> torch.Tensor | None:
        """What the head makes of the last hidden states."""
        if self._logits is None:
            if self._read is None:
                raise AttributeError(
                    "logits: not stored in training, and this output is a copy that a wrapper made "
                    "(accelerate, in mixed precision); patch without linear_cross_entropy to have "
                    "them"
                )
            self["logits"] = self._read()
        return self._logits

    @logits.setter
    def logits(self, value: torch.Tensor | None) -> None:
        self.__dict__["_logits"] = value
        for name in list(self.keys()):  # the loss, logits, and the rest
            if name not in ("loss", "logits"):
                self.move_to_end(name)

    def __getitem__(self, key: Any) -> Any:
        if key == 0:
            return self.loss
        return self.logits if key == "logits" else super().__getitem__(key)  # type: ignore[misc]

    def get(self, key: str, default: Any = None) -> Any:
        """As `self[key]`, but `default` where there is no such key."""
        return self.logits if key == "logits" else super().get(key, default)  # type: ignore[misc]

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.items())
        return f"{self._kind.__name__}({values})"

    def to_tuple(self) -> Any:
        """The values, logits among them."""
        _ = self.logits
        return super().to_tuple()  # type: ignore[misc]

    def __reduce__(self) -> Any:
        names = [field.name for field in dataclasses.fields(self._kind)]
        return self._kind, tuple(getattr(self, name, None) for name in names)


@functools.cache
def _with_logits_when_read(kind: Any) -> Any:
    return type(kind)(kind.__name__, (LogitsWhenRead, kind), {"_kind": kind})


def _why_not_fused(model: Any, head: Any, given: dict[str, Any]) -> str | None:
    keep = given.get("logits_to_keep", 0)
    if isinstance(keep, torch.Tensor) or keep:
        return "logits of some tokens only"
    if given.get("return_dict", getattr(model.config, "return_dict", True)) is False:
        return "a tuple is asked for"
    # Not `model.loss_function`, which warns of None, and so breaks a graph that is compiled.
    kind = getattr(model, "loss_type", None)  # None for classes named otherwise, as GPT-2's
    if hasattr(model, "_loss_function") or kind not in (None, "ForCausalLM"):
        return "it has a loss function of its own"
    if type(head) is not nn.Linear or "forward" in vars(head) or has_hooks(head):
        return "its head is no plain nn.Linear: an adapter, quantised, or hooked"
    return None


def _worth(model: Any, weight: torch.Tensor, tokens: int) -> bool:
    """Whether to fuse, asked with the kind of hidden states that the model is about to make."""
    device = weight.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else weight.dtype
    hidden = torch.empty(1, dtype=dtype, device=weight.device).expand(tokens, weight.shape[1])
    worth: bool = model.worth(hidden) and (model._gptfast_forced or is_faster(hidden))
    return worth


def next_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """transformers' `ForCausalLMLoss` of the logits hidden weight^T + bias, which are not stored.

    Args:
        hidden: (B, T, C).
        weight: (V, C).
        labels: (B, T): token t + 1 is predicted from hidden state t.
        bias: (V,) or None.
        softcap: of the logits.
        num_items_in_batch: what to divide the sum by, if not the number of labels here: that of all
            batches whose gradients are accumulated.
        ignore_index: labels that do not count.
        shift_labels: (B, T), to be predicted from the hidden state at their own place; labels do
            not count then.

    Returns:
        Scalar, float32.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = linear_cross_entropy(
        hidden,
        weight,
        shift_labels.to(hidden.device),
        bias,
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        softcap=softcap,
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


@register(
    *_classes("ForCausalLM", *LLAMA_LIKE, *GEMMA, "phi:Phi", "phi3:Phi3"),
    *_classes("ForCausalLM", "gpt_neox:GPTNeoX", "opt:OPT"),
    *_classes("LMHeadModel", "gpt2:GPT2"),
    op="linear_cross_entropy",
)
def _causal_lm(module: Any) -> type[Patched] | str:
    return FusedHead
