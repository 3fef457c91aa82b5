"""Mixins and recipes for the modules of `torch.nn`, and mixins for modules written like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gptfast.nn.hooks import has_hooks
from gptfast.nn.layer_norm import over_trailing_dimensions
from gptfast.ops import (
    attention,
    attention_qkv,
    geglu,
    gelu,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    swiglu,
)
from gptfast.patching.functions import cross_entropy, override
from gptfast.patching.registry import Patched, class_name, register

# ---- Modules that were recognised ----------------------------------------------------------------


KINDS = (nn.Module, torch.Tensor)  # what a forward may only ask whether it is there


class FastTraced(Patched):
    """A module of one input that is replaced by what its forward was seen to do.

    What the forward found in constants of the module when it was traced holds as long as these are
    what they were: the original runs otherwise.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What it was."""
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
            return super().forward(*args, **kwargs)
        if not self.worth(args[0]):
            return super().forward(*args)
        reason = self._why_not(args[0])
        if reason is not None:
            self.fell_back(reason)
            return super().forward(*args)
        return self._fast(args[0])

    def _why_not(self, x: torch.Tensor) -> str | None:
        """Why the module is no longer what was recognised, or cannot take x."""
        for name, value in self._gptfast_state["constants"].items():
            now = getattr(self, name, None)
            if value in KINDS:
                changed = not isinstance(now, value)
            else:
                changed = type(now) is not type(value) or now != value
            if changed:
                return f"its {name} was changed"
        return None

    def _fast(self, x: torch.Tensor) -> Any:
        raise NotImplementedError


# ---- Norms ---------------------------------------------------------------------------------------


def _takes(
    module: Patched, x: torch.Tensor, shape: tuple[int, ...], *parameters: torch.Tensor | None
) -> bool:
    """Whether `F.layer_norm` or `F.rms_norm`, as `module` says, raises no error for these."""
    if not 0 < len(shape) <= x.dim() or tuple(x.shape[-len(shape) :]) != tuple(shape):
        return False
    dtypes = (x.dtype, torch.float32)  # a layer norm's weights have one of these
    return all(
        p is None or (p.shape == shape and (module._gptfast_op == "rms_norm" or p.dtype in dtypes))
        for p in parameters
    )


def _as_autocast(y: torch.Tensor) -> torch.Tensor:
    """The result of a norm in the dtype that autocast gives it on a GPU, float32."""
    if y.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return y.float()
    return y


def _normalise(
    module: Patched,
    x: torch.Tensor,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
) -> torch.Tensor:
    """`F.layer_norm` or `F.rms_norm`, as `module` says, by our ops."""
    flat, weight, bias = over_trailing_dimensions(module._gptfast_op, x, shape, weight, bias)
    if module._gptfast_op == "layer_norm":
        y = layer_norm(flat, weight, bias, 1e-5 if eps is None else eps)
    else:
        y = rms_norm(flat, weight, eps)
    return _as_autocast(y if flat is x else y.view(x.shape))


class FastNorm(Patched):
    """`nn.LayerNorm` and `nn.RMSNorm`."""

    normalized_shape: tuple[int, ...]
    eps: float | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def forward(self, input: torch.Tensor) -> Any:
        """Normalise the trailing dimensions of the input."""
        if not self.worth(input):
            return super().forward(input)
        bias = self.bias if self._gptfast_op == "layer_norm" else None
        if not _takes(self, input, self.normalized_shape, self.weight, bias):
            return super().forward(input)
        return _normalise(self, input, self.normalized_shape, self.weight, bias, self.eps)


@register(nn.LayerNorm, op="layer_norm")
@register(nn.RMSNorm, op="rms_norm")
def _norm(module: nn.Module) -> type[Patched]:
    return FastNorm


class FastFunctionalNorm(FastTraced):
    """A module that is one call of `F.layer_norm` or `F.rms_norm`."""

    def _why_not(self, x: torch.Tensor) -> str | None:
        if not _takes(self, x, self._gptfast_state["shape"], *self._parameters_of_call()):
            return "shapes or dtypes that do not fit"
        return super()._why_not(x)

    def _parameters_of_call(self) -> list[torch.Tensor | None]:
        names = (self._gptfast_state[name] for name in ("weight", "bias"))
        return [None if name is None else getattr(self, name) for name in names]

    def _fast(self, x: torch.Tensor) -> Any:
        call, (weight, bias) = self._gptfast_state, self._parameters_of_call()
        return _normalise(self, x, call["shape"], weight, bias, call["eps"])


# ---- GELU ----------------------------------------------------------------------------------------


class FastGELU(Patched):
    """`nn.GELU`."""

    approximate: str

    def forward(self, input: torch.Tensor) -> Any:
        """Apply GELU elementwise."""
        if not self.worth(input):
            return super().forward(input)
        return gelu(input, self.approximate)


class FastTanhGELU(FastGELU):
    """`nn.GELU("tanh")`."""

    measured = "gelu tanh"


@register(nn.GELU, op="gelu")
def _gelu(module: nn.GELU) -> type[Patched]:
    return FastTanhGELU if module.approximate == "tanh" else FastGELU


class FastFunctionalGELU(FastTraced):
    """A module that is one call of `F.gelu`."""

    def _fast(self, x: torch.Tensor) -> Any:
        return gelu(x, self._gptfast_state["approximate"])


class FastFunctionalTanhGELU(FastFunctionalGELU):
    """A module that is one call of `F.gelu` in its tanh form."""

    measured = "gelu tanh"


class FastFeedForward(Patched):
    """The feed-forward block of `nn.TransformerEncoderLayer` and `nn.TransformerDecoderLayer`."""

    def _ff_block(self, x: torch.Tensor) -> Any:
        if self.activation is not F.gelu:
            return super()._ff_block(x)  # type: ignore[misc]
        h = self.linear1(x)
        h = gelu(h, "none") if self.worth(h) else F.gelu(h)
        last = self.dropout3 if isinstance(self, nn.TransformerDecoderLayer) else self.dropout2
        return last(self.linear2(self.dropout(h)))


@register(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, op="gelu")
def _feed_forward(module: Any) -> type[Patched] | str:
    base = (
        nn.TransformerDecoderLayer
        if isinstance(module, nn.TransformerDecoderLayer)
        else nn.TransformerEncoderLayer
    )
    if type(module)._ff_block is not base._ff_block:
        return f"it overrides _ff_block of {base.__name__}"
    if module.activation is not F.gelu:
        return "its activation is not F.gelu"
    return FastFeedForward


# ---- Gated MLPs ----------------------------------------------------------------------------------


# Modules that a gated MLP may have for its activation, by class: "silu", "gelu" or "gelu_tanh".
ACTIVATIONS: dict[str, Callable[[Any], str]] = {
    class_name(nn.SiLU): lambda module: "silu",
    class_name(nn.GELU): lambda module: "gelu" if module.approximate == "none" else "gelu_tanh",
}


def activation_of(module: nn.Module) -> str | None:
    """Which activation a module is, if any."""
    name = ACTIVATIONS.get(class_name(getattr(module, "_gptfast_base", type(module))))
    return None if name is None else name(module)


class FastGatedMLP(FastTraced):
    """y = after(act(gate(x)) * up(x)), or act and product on the halves of one product."""

    def _why_not(self, x: torch.Tensor) -> str | None:
        name = self._gptfast_state["act"]
        act = name and self.get_submodule(name)
        if act and has_hooks(act):
            return "the activation has hooks"
        if act and activation_of(act) != self._gptfast_state["activation"]:
            return "the activation was changed"
        return super()._why_not(x)

    def _fast(self, x: torch.Tensor) -> Any:
        parts = self._gptfast_state
        gate = self.get_submodule(parts["gate"])(x)
        if parts["up"] is None:
            gate, up = gate.chunk(2, -1)
            if not parts["gate_first"]:
                gate, up = up, gate
        else:
            up = self.get_submodule(parts["up"])(x)
        if parts["activation"] == "silu":
            y = swiglu(gate, up)
        else:
            y = geglu(gate, up, "tanh" if parts["activation"] == "gelu_tanh" else "none")
        for name in parts["after"]:
            y = self.get_submodule(name)(y)
        return y


class FastErfGatedMLP(FastGatedMLP):
    """GEGLU with erf."""

    measured = "geglu with erf"


# ---- Attention -----------------------------------------------------------------------------------


class FastMultiheadAttention(Patched):
    """`nn.MultiheadAttention` without weights to return and without masks, or with a causal one."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        """Attend from query to key and value."""
        reason = self._why_not(
            query, key, value, key_padding_mask, need_weights, attn_mask, is_causal
        )
        if reason is not None:
            self.fell_back(reason)
        if reason is not None or not self.worth(query):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        tokens = 1 if self.batch_first else 0  # the dimension of the tokens
        H, dropout_p = self.num_heads, self.dropout if self.training else 0.0
        if query is key and key is value:
            qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            y = attention_qkv(
                qkv if tokens == 1 else qkv.transpose(0, 1),
                H,
                causal=is_causal,
                dropout_p=dropout_p,
            )
        else:
            weights = self.in_proj_weight.chunk(3)
            biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = (
                F.linear(x if tokens == 1 else x.transpose(0, 1), w, b)
                .unflatten(-1, (H, self.head_dim))
                .transpose(1, 2)
                for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
            y = attention(q, k, v, causal=is_causal, dropout_p=dropout_p).transpose(1, 2).flatten(2)
        y = F.linear(y, self.out_proj.weight, self.out_proj.bias)
        return (y if tokens == 1 else y.transpose(0, 1)), None

    def _why_not(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        need_weights: bool,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> str | None:
        """Why the original has to take the call."""
        if query.is_nested:
            return "nested tensors"
        if need_weights:
            return "need_weights"
        if key_padding_mask is not None:
            return "key_padding_mask"
        if attn_mask is not None and not is_causal:
            return "attn_mask that is not said to be causal"
        if attn_mask is None and is_causal:
            return "is_causal without attn_mask"
        tokens = 1 if self.batch_first else 0
        if is_causal and query.dim() == 3 and query.shape[tokens] != key.shape[tokens]:
            return "a causal mask for other keys than the queries' tokens"
        if self.training and not 0 <= self.dropout < 1:
            return f"dropout of {self.dropout}"
        if query.dim() != 3 or 0 in (*query.shape, *key.shape):
            return f"query of shape {tuple(query.shape)}"
        dtypes = {x.dtype for x in (query, key, value, self.in_proj_weight)}
        if len(dtypes) > 1 and not torch.is_autocast_enabled(query.device.type):
            return "mixed dtypes"
        return None


@register(nn.MultiheadAttention, op="attention")
def _multihead_attention(module: nn.MultiheadAttention) -> type[Patched] | str:
    if not module._qkv_same_embed_dim:
        return "kdim or vdim differ from embed_dim"
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv or add_zero_attn"
    return FastMultiheadAttention


class FastFunctions(Patched):
    """A module whose forward calls a function of `torch.nn.functional` that we have, too.

    That its own code calls, and not what it hands the function to, nor its submodules.
    """

    sized_by_input = False  # a whole model may do so: tokens go in, and logits to the loss

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What it was, with that function replaced. Compiled code keeps the original.

        A row of logits is no wider than the weights: generation, which calls for a few tokens and
        for no loss, is not kept waiting.
        """
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        if torch.compiler.is_compiling() or (
            isinstance(x, torch.Tensor)
            and x.numel() * self._gptfast_state["widest"] < self._gptfast_least[self.training]
        ):
            return super().forward(*args, **kwargs)
        caller = self._gptfast_base.forward.__code__
        with override(self._gptfast_state["function"], self.fell_back, self.worth, caller):
            return super().forward(*args, **kwargs)


class FastFunctionalAttention(FastFunctions):
    """A module that attends by a function, from as many elements as go into the module."""

    sized_by_input = True


# ---- Losses --------------------------------------------------------------------------------------


class FastCrossEntropyLoss(Patched):
    """`nn.CrossEntropyLoss`."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Any:
        """The loss of the input against the targets."""
        if not self.worth(input):
            return super().forward(input, target)
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            count=self.fell_back,
        )


@register(nn.CrossEntropyLoss, op="cross_entropy")
def _cross_entropy_loss(module: nn.CrossEntropyLoss) -> type[Patched]:
    return FastCrossEntropyLoss


class FastLinearCrossEntropyLoss(Patched):
    """`nn.LinearCrossEntropyLoss` (PyTorch 2.13) of class indices."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Any:
        """The loss of the layer's logits for the input against the targets."""
        if not self.worth(input):
            return super().forward(input, target)
        if target.dtype != torch.int64 or input.shape[:-1] != target.shape or input.dim() > 2:
            self.fell_back("targets that are no class indices")
            return super().forward(input, target)
        loss = linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            self.linear.bias,
            weight=self.weight,
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
        return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)


@register("torch.nn.modules.loss.LinearCrossEntropyLoss", op="linear_cross_entropy")
def _linear_cross_entropy_loss(module: Any) -> type[Patched] | str:
    if module.out_features:
        return "out_features"
    if has_hooks(module.linear) or type(module.linear) is not nn.Linear:
        return "its linear layer was replaced, or has hooks"
    return FastLinearCrossEntropyLoss
