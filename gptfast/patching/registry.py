"""The registry: which class is replaced by what. `register` extends it.

A module is replaced by changing its class: from C to a new class that inherits from a mixin of ours
and then from C. It stays the same object with the same parameters, buffers, hooks, names and mode,
and `super().forward` is what it did before.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from gptfast.backend import OPS as KERNELS
from gptfast.patching.report import Report
from gptfast.patching.speed import is_worth, smallest

OPS = (  # what `patch` knows, in the order in which recipes are tried
    "attention",
    "layer_norm",
    "rms_norm",
    "gelu",
    "glu",
    "linear_cross_entropy",
    "cross_entropy",
)
REPORTS: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()


class Patched(nn.Module):
    """Base of the mixins: what a patched module is besides its old self.

    A mixin is a class at the top level of its file, so that pickle finds it. Its methods stand
    before those of the module's old class, to which `super()` leads.
    """

    _gptfast_op: ClassVar[str]
    _gptfast_base: ClassVar[type[nn.Module]]  # the old class
    _gptfast_mixin: ClassVar[type[Patched]]
    _gptfast_forced: ClassVar[bool]  # whether the user named the op
    _gptfast_state: dict[str, Any]
    # Elements below which the op is never worth it, outside of training and in training.
    _gptfast_least: ClassVar[tuple[int, int]]
    measured: ClassVar[str] = ""  # under which name `speed.py` has it, if not the op's
    # Whether what the op gets has no more elements than the first input of a forward: a smaller
    # input than `_gptfast_least` then goes to the old class before anything else is asked.
    sized_by_input: ClassVar[bool] = True

    if TYPE_CHECKING:  # a mixin finds what its base has

        def __getattr__(self, name: str) -> Any: ...

    def worth(self, x: torch.Tensor) -> bool:
        """Whether the op is not slower than the original on x, or was asked for by name."""
        if x.is_nested or x.layout is not torch.strided:
            self.fell_back("nested tensors" if x.is_nested else f"layout {x.layout}")
            return False
        compiled = torch.compiler.is_compiling()
        if not self._gptfast_forced and not is_worth(
            self.measured or self._gptfast_op, x, compiled, self.training
        ):
            return False
        return compiled or KERNELS[self._gptfast_op].has_kernel(x)

    def fell_back(self, reason: str) -> None:
        """Count a call that the original has to take, in the report of `patch`."""
        if not torch.compiler.is_compiling():
            report = REPORTS.get(self)
            if report is not None:
                report.fallbacks[self._gptfast_op, reason] += 1

    def on_patch(self) -> None:
        """Called when the class has been changed."""

    def on_unpatch(self) -> None:
        """Called before the class is changed back."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As for any object, but the class is given by what it was made of."""
        kind = type(self)
        return (
            _rebuild,
            (kind._gptfast_base, kind._gptfast_mixin, kind._gptfast_op, kind._gptfast_forced),
            super().__reduce_ex__(max(protocol, 2))[2],
        )


def _rebuild(base: type[nn.Module], *made_of: Any) -> nn.Module:
    module: nn.Module = base.__new__(base)
    module.__class__ = patched_class(base, *made_of)
    return module


_classes: dict[tuple[Any, ...], type[Patched]] = {}


def patched_class(
    base: type[nn.Module], mixin: type[Patched], op: str, forced: bool
) -> type[Patched]:
    """The class of a module of class `base` once it is patched."""
    key = base, mixin, op, forced
    if key in _classes:
        return _classes[key]
    what = mixin.measured or op
    least = (0, 0) if forced else (smallest(what, False), smallest(what, True))
    attributes: dict[str, Any] = {
        "_gptfast_op": op,
        "_gptfast_base": base,
        "_gptfast_mixin": mixin,
        "_gptfast_forced": forced,
        "_gptfast_least": least,
        # Wrappers and device maps go by the names of classes.
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if not forced and mixin.sized_by_input and mixin.forward is not nn.Module.forward:
        attributes["forward"] = _unless_small(mixin, base, least)
    return _classes.setdefault(key, type(base.__name__, (mixin, base), attributes))


def _unless_small(
    mixin: type[Patched], base: type[nn.Module], least: tuple[int, int]
) -> Callable[..., Any]:
    """The mixin's forward, but of an input of less than `least` elements the old class's.

    Generation makes such a call of every module for every token: this is all that it costs then.
    Compiled code asks `worth`, which depends on no size where the op is never used: a size that is
    compared becomes a guard, and a new compilation where it changes.
    """

    is_compiling, Tensor = torch.compiler.is_compiling, torch.Tensor  # nearer than by their names

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        # Compiling first: else the size is compared all the same.
        if is_compiling() or not isinstance(x, Tensor) or x.numel() >= least[self.training]:
            return mixin.forward(self, *args, **kwargs)
        return base.forward(self, *args, **kwargs)

    return forward


# A mixin, or a mixin and what its methods find in the module's `_gptfast_state`.
Replacement = type[Patched] | tuple[type[Patched], dict[str, Any]]
# What replaces a module, or the reason to leave it alone; None where nothing is to be said.
Recipe = Callable[[Any], Replacement | str | None]
R = TypeVar("R", bound=Recipe)
_RECIPES: dict[str, dict[str, Recipe]] = {}  # "module.Class" -> op -> recipe


def register(*classes: type[nn.Module] | str, op: str) -> Callable[[R], R]:
    """A decorator: the function below says what replaces a module of one of these classes.

    It gets the module, and returns a mixin, or the reason to leave the module alone. What has to be
    remembered of the module goes beside the mixin, `(mixin, {...})`, and is then found in
    `self._gptfast_state`, until `unpatch`.

    Args:
        classes: classes, or their names as "module.Class", which need not be imported.
        op: one of `gptfast.patching.OPS`.

    Raises:
        ValueError: an unknown op.
    """
    if op not in OPS:
        raise ValueError(f"register: op must be one of {', '.join(OPS)}; got {op!r}")

    def decorator(recipe: R) -> R:
        for cls in classes:
            _RECIPES.setdefault(cls if isinstance(cls, str) else class_name(cls), {})[op] = recipe
        return recipe

    return decorator


def class_name(cls: type) -> str:
    """As `register` takes it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def recipes_for(cls: type[nn.Module]) -> tuple[type[nn.Module] | None, dict[str, Recipe]]:
    """The nearest registered class that `cls` is or inherits from, and its recipes by op."""
    ancestor: Any
    for ancestor in cls.__mro__:
        found = _RECIPES.get(class_name(ancestor))
        if found and not issubclass(ancestor, Patched):
            return ancestor, found
    return None, {}
