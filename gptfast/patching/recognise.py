"""Recipes for classes that nobody registered, by what their forward does.

A small module is traced by `torch.fx`: if its whole forward is one call of `F.layer_norm` on its
own parameters, it is a LayerNorm, whoever wrote it. Nothing is guessed: what does not match node by
node, in training and out of it, is left alone. Code that writes to attributes is not traced, since
tracing runs it.
"""

from __future__ import annotations

import dis
import operator
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from gptfast.patching.registry import Patched, Recipe, Replacement, class_name
from gptfast.patching.torch_modules import (
    FastErfGatedMLP,
    FastFunctionalAttention,
    FastFunctionalGELU,
    FastFunctionalNorm,
    FastFunctionalTanhGELU,
    FastFunctions,
    FastGatedMLP,
)

WRITES = ("STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "DELETE_ATTR", "DELETE_SUBSCR")
FUNCTIONS: dict[str, tuple[str, type[Patched]]] = {
    "attention": ("scaled_dot_product_attention", FastFunctionalAttention),
    "cross_entropy": ("cross_entropy", FastFunctions),
}
# Modules that a gated MLP may have for its activation, by class: "silu", "gelu" or "gelu_tanh".
ACTIVATIONS: dict[str, Callable[[Any], str]] = {
    class_name(nn.SiLU): lambda module: "silu",
    class_name(nn.GELU): lambda module: "gelu" if module.approximate == "none" else "gelu_tanh",
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
    elif len(children) <= 5 and ({"silu", "gelu"} & called or any(map(_activation, children))):
        found["glu"] = _gated_mlp
    return found


def _calls(function: str, mixin: type[Patched]) -> Recipe:
    def recipe(module: nn.Module) -> Replacement:
        sizes = (size for p in module.parameters() for size in p.shape)
        return mixin, {"function": function, "widest": max(sizes, default=1)}

    return recipe


def _trace(module: nn.Module) -> fx.Graph | str:
    """The graph of a module's forward, the same in training and out of it; or why there is none."""
    code = type(module).forward.__code__
    if any(instruction.opname in WRITES for instruction in dis.get_instructions(code)):
        return "its forward writes to attributes or elements"
    graphs, training = [], module.training
    try:
        for module.training in (True, False):
            graphs.append(_Tracer(param_shapes_constant=True).trace(module))
    except Exception as error:  # whatever the forward of others raises when it is given a proxy
        return f"its forward cannot be traced: {error}".splitlines()[0]
    finally:
        module.training = training
    if str(graphs[0]) != str(graphs[1]):
        return "its forward differs between training and evaluation"
    return graphs[0]


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
        if node is not None and not (isinstance(node, fx.Node) and node.op == "get_attr"):
            return f"its {name} is computed"
        state[name] = None if node is None else node.target
    if not all(isinstance(size, int) for size in state["shape"]):
        return "its normalized_shape depends on the input"
    return FastFunctionalNorm, state


def _functional_gelu(module: nn.Module) -> Replacement | str:
    call = _only_call(module, F.gelu)
    if isinstance(call, str):
        return call
    form = call.kwargs.get("approximate", "none")
    mixin = FastFunctionalTanhGELU if form == "tanh" else FastFunctionalGELU
    return mixin, {"approximate": form}


LEAVES: dict[str, Recipe] = {
    "layer_norm": _functional_norm,
    "rms_norm": _functional_norm,
    "gelu": _functional_gelu,
}

# ---- Gated MLPs ----------------------------------------------------------------------------------


def _activation(module: nn.Module) -> str | None:
    """Which activation a module is, if any."""
    name = ACTIVATIONS.get(class_name(getattr(module, "_gptfast_base", type(module))))
    return None if name is None else name(module)


def _gated_mlp(module: nn.Module) -> Replacement | None:
    """Matches after(act(gate(x)) * up(x)), and the same with the halves of one product."""
    graph = _trace(module)
    if isinstance(graph, str):
        return None
    inputs: list[Any] = [n for n in graph.nodes if n.op == "placeholder"]
    products: list[Any] = [n for n in graph.nodes if n.target in (operator.mul, torch.mul)]
    if len(inputs) != 1 or len(products) != 1:
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
            return mixin, {**parts, "after": after}
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
        name = _activation(module.get_submodule(str(node.target)))
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
