"""Recipes for classes that nobody registered, by what their forward does.

A small module is traced by `torch.fx`: if its whole forward is one call of `F.layer_norm` on its
own parameters, it is a LayerNorm, whoever wrote it. Nothing is guessed: what does not match node by
node, in training and out of it, is left alone.

Tracing runs the forward, and a graph shows neither what it wrote nor in which context it ran. So a
forward is traced only if each name in its code is known to do nothing besides: the module's own
submodules, tensors and constants, and a few functions. There is no way to `append`, to `add_`, to
`no_grad` or to a helper method but by its name.
"""

from __future__ import annotations

import dis
import inspect
import operator
from collections.abc import Callable
from types import CodeType, NoneType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from gptfast.patching.registry import Patched, Recipe, Replacement
from gptfast.patching.torch_modules import (
    ACTIVATIONS,
    KINDS,
    FastErfGatedMLP,
    FastFunctionalAttention,
    FastFunctionalGELU,
    FastFunctionalNorm,
    FastFunctionalTanhGELU,
    FastFunctions,
    FastGatedMLP,
    activation_of,
)

__all__ = ["ACTIVATIONS", "recognise"]

WRITES = {"STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "STORE_SLICE"}
WRITES |= {"DELETE_ATTR", "DELETE_GLOBAL", "DELETE_SUBSCR"}
# What a forward that is traced may find in its file, and what it may ask of that or of a tensor.
KNOWN = (torch, nn, F, F.layer_norm, F.rms_norm, F.gelu, F.silu, torch.chunk, torch.mul)
ATTRIBUTES = {"nn", "functional", "layer_norm", "rms_norm", "gelu", "silu", "chunk", "mul"}
ATTRIBUTES |= {"shape", "size"}
FUNCTIONS: dict[str, tuple[str, type[Patched]]] = {
    "attention": ("scaled_dot_product_attention", FastFunctionalAttention),
    "cross_entropy": ("cross_entropy", FastFunctions),
}


def recognise(module: nn.Module) -> dict[str, Recipe]:
    """Recipes by op for a module of a class that is not registered; none for most."""
    cls = type(module)
    if cls.__module__.partition(".")[0] in ("torch", "gptfast"):
        return {}
    code = getattr(cls.forward, "__code__", None)
    if not isinstance(code, CodeType):
        return {}
    called, children = set(code.co_names), list(module.children())
    found: dict[str, Recipe] = {
        op: _calls(name, mixin) for op, (name, mixin) in FUNCTIONS.items() if name in called
    }
    if not children:
        found |= {op: match for op, match in LEAVES.items() if op in called}
    elif len(children) <= 5 and ({"silu", "gelu"} & called or any(map(activation_of, children))):
        found["glu"] = _gated_mlp
    return found


def _calls(function: str, mixin: type[Patched]) -> Recipe:
    def recipe(module: nn.Module) -> Replacement | str:
        if any(map(is_lazy, module.parameters())):
            return "its parameters have no shape yet"
        sizes = (size for p in module.parameters() for size in p.shape)
        return mixin, {"function": function, "widest": max(sizes, default=1)}

    return recipe


def _trace(module: nn.Module) -> fx.Graph | str:
    """The graph of a module's forward, the same in training and out of it; or why there is none."""
    reason = _why_not_trace(module)
    if reason is not None:
        return reason
    graphs = []
    try:
        for training in (True, False):
            # fx may set attributes: of an object that shares the parameters and submodules alone.
            twin = object.__new__(type(module))
            twin.__dict__ = {**vars(module), "training": training}
            graphs.append(_Tracer(param_shapes_constant=True).trace(twin))
    except Exception as error:  # whatever the forward of others raises when it is given a proxy
        return f"its forward cannot be traced: {error}".splitlines()[0]
    if str(graphs[0]) != str(graphs[1]):
        return "its forward differs between training and evaluation"
    return graphs[0]


def _why_not_trace(module: nn.Module) -> str | None:
    """Why tracing might do more than to trace, or not see all that the forward does."""
    forward: Any = type(module).forward
    code: CodeType = forward.__code__
    arguments = code.co_argcount + code.co_kwonlyargcount
    if arguments != 2 or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        return "its forward takes more than one input"
    own = type(module).__getattr__, type(module).__getattribute__
    if own != (nn.Module.__getattr__, object.__getattribute__):
        return "its class looks up attributes in its own way"
    if code.co_freevars or any(isinstance(constant, CodeType) for constant in code.co_consts):
        return "its forward has functions within functions"
    instructions = list(dis.get_instructions(code))
    if any(i.opname in WRITES for i in instructions):
        return "its forward writes to attributes or elements"
    for i in instructions:
        if i.opname.startswith("INPLACE_") or (i.opname == "BINARY_OP" and i.argrepr[-1] == "="):
            return "its forward changes tensors in place"
        if i.opcode not in dis.hasname:
            continue
        if i.opname == "LOAD_GLOBAL":
            harmless = _is_known(forward.__globals__.get(i.argval))
        else:  # of the module or a tensor, by the code; of a submodule as well, for all we know
            there = [value for m in module.modules() for value in _values(m, i.argval)]
            harmless = all(map(_is_harmless, there))
            harmless &= bool(_values(module, i.argval)) or i.argval in ATTRIBUTES
        if not harmless:
            return f"its forward uses {i.argval}, which may do more than is seen"
    return None


def _is_known(value: Any) -> bool:
    return any(value is known for known in KNOWN)


def _values(module: nn.Module, name: str) -> list[Any]:
    """What an attribute of a module may be, found without running anything."""
    places = (vars(module), module._parameters, module._buffers, module._modules)
    values = [place[name] for place in places if name in place]
    of_class = inspect.getattr_static(type(module), name, inspect.Parameter.empty)
    return values if of_class is inspect.Parameter.empty else [*values, of_class]


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (bool, int, float, str)) or _is_known(value)


def _is_harmless(value: Any) -> bool:
    return isinstance(value, (nn.Module, torch.Tensor)) or _is_constant(value)


def _constants(module: nn.Module) -> dict[str, Any]:
    """The attributes that a forward read when it was traced: values, and kinds of what has none."""
    names = set(type(module).forward.__code__.co_names) - {"training"}
    constants: dict[str, Any] = {}
    for name in names:
        value = getattr(module, name) if _values(module, name) else Ellipsis
        kinds = [kind for kind in KINDS if isinstance(value, kind)]
        if kinds or _is_constant(value):
            constants[name] = kinds[0] if kinds else value
    return constants


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


# ---- One call ------------------------------------------------------------------------------------


def _only_call(module: nn.Module, function: Callable[..., Any]) -> fx.Node | str:
    """The one call of `function` that a module's forward is, with the input as first argument."""
    graph = _trace(module)
    if isinstance(graph, str):
        return graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    calls = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    output = next(n for n in graph.nodes if n.op == "output")
    if len(inputs) != 1 or len(calls) != 1 or calls[0].target is not function:
        return f"its forward is more than one call of F.{function.__name__}"
    (call,) = calls
    if output.args != (call,) or call.args[:1] != (inputs[0],):
        return f"its forward is more than one call of F.{function.__name__}"
    return call


def _functional_norm(module: nn.Module) -> Replacement | str:
    op = "layer_norm" if "layer_norm" in type(module).forward.__code__.co_names else "rms_norm"
    call = _only_call(module, getattr(F, op))
    if isinstance(call, str):
        return call
    given: dict[str, Any] = dict(call.kwargs)
    names = (
        ("normalized_shape", "weight", "bias", "eps")
        if op == "layer_norm"
        else ("normalized_shape", "weight", "eps")
    )
    given |= dict(zip(names, call.args[1:], strict=False))
    state: dict[str, Any] = {"shape": tuple(given["normalized_shape"]), "eps": given.get("eps")}
    if op == "layer_norm":
        state["eps"] = given.get("eps", 1e-5)
    for name in ("weight", "bias"):
        node = given.get(name)
        own = (
            isinstance(node, fx.Node)
            and node.op == "get_attr"
            and _values(module, str(node.target))
        )
        if node is not None and not own:
            return f"its {name} is computed"
        state[name] = None if node is None else node.target
    if not isinstance(state["eps"], (float, int, NoneType)):
        return "its eps is computed"
    if not all(isinstance(size, int) for size in state["shape"]):
        return "its normalized_shape depends on the input"
    return FastFunctionalNorm, {**state, "constants": _constants(module)}


def _functional_gelu(module: nn.Module) -> Replacement | str:
    call = _only_call(module, F.gelu)
    if isinstance(call, str):
        return call
    form = call.kwargs.get("approximate", "none")
    mixin = FastFunctionalTanhGELU if form == "tanh" else FastFunctionalGELU
    return mixin, {"approximate": form, "constants": _constants(module)}


LEAVES: dict[str, Recipe] = {
    "layer_norm": _functional_norm,
    "rms_norm": _functional_norm,
    "gelu": _functional_gelu,
}

# ---- Gated MLPs ----------------------------------------------------------------------------------


def _gated_mlp(module: nn.Module) -> Replacement | str | None:
    """Matches after(act(gate(x)) * up(x)), and the same with the halves of one product."""
    graph = _trace(module)
    if isinstance(graph, str):
        return graph
    inputs: list[Any] = [n for n in graph.nodes if n.op == "placeholder"]
    products: list[Any] = [n for n in graph.nodes if n.target in (operator.mul, torch.mul)]
    if len(inputs) != 1 or len(products) != 1 or products[0].kwargs:
        return None
    (x,), (product,) = inputs, products
    for act, other in (product.args[:2], product.args[1::-1]):
        found = _gate(module, act)
        if found is None or not isinstance(other, fx.Node):
            continue
        activation, act_module, gate = found
        parts: dict[str, Any] = {"activation": activation, "act": act_module, "gate_first": True}
        if _is_layer(gate, x) and _is_layer(other, x):
            parts |= {"gate": gate.target, "up": other.target}
            used = [x, gate, act, other, product]
        elif (halves := _halves(gate, other)) and _is_layer(halves[0].args[0], x):
            packed, gate_first = halves
            parts |= {"gate": packed.args[0].target, "up": None, "gate_first": gate_first}
            used = [x, packed.args[0], packed, gate, act, other, product]
        else:
            continue
        after, last = [], product
        while len(last.users) == 1 and _is_layer(following := next(iter(last.users)), last):
            after.append(following.target)
            last = following
            used.append(following)
        output = next(n for n in graph.nodes if n.op == "output")
        # Every node has its place in the pattern, and none is used a second time.
        if output.args == (last,) and set(used) == set(graph.nodes) - {output}:
            mixin = FastErfGatedMLP if activation == "gelu" else FastGatedMLP
            return mixin, {**parts, "after": after, "constants": _constants(module)}
    return None


def _is_layer(node: Any, x: Any) -> bool:
    """Whether a node is the call of a submodule on x alone."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and node.args == (x,)
        and not node.kwargs
    )


def _gate(module: nn.Module, node: Any) -> tuple[str, str, Any] | None:
    """(activation, the module that applies it or "", its input) of an activation's node."""
    if (
        not isinstance(node, fx.Node)
        or len(node.args) != 1
        or not isinstance(node.args[0], fx.Node)
    ):
        return None
    (x,) = node.args
    if node.op == "call_module":
        name = activation_of(module.get_submodule(str(node.target)))
        return None if name is None else (name, str(node.target), x)
    if node.target is F.silu and not node.kwargs.get("inplace"):
        return "silu", "", x
    if node.target is F.gelu:
        form = node.kwargs.get("approximate", "none")
        return ("gelu" if form == "none" else "gelu_tanh"), "", x
    return None


def _halves(gate: Any, up: Any) -> tuple[Any, bool] | None:
    """The node that splits its input in two along the last dimension; whether gate comes first."""
    for node in (gate, up):
        if node.target is not operator.getitem or node.args[1] not in (0, 1):
            return None
    split = gate.args[0]
    if split is not up.args[0] or gate.args[1] == up.args[1] or not isinstance(split, fx.Node):
        return None
    arguments = [*split.args[1:], *split.kwargs.values()]
    if split.target in ("chunk", torch.chunk) and arguments == [2, -1]:
        return split, gate.args[1] == 0
    return None
