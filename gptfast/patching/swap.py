"""`patch` and `unpatch`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from gptfast.backend import DTYPE_CODES, dtype_name
from gptfast.backend import OPS as KERNELS
from gptfast.patching.recognise import recognise
from gptfast.patching.registry import (
    OPS,
    REPORTS,
    Patched,
    Replacement,
    patched_class,
    recipes_for,
)
from gptfast.patching.report import Entry, Report
from gptfast.patching.speed import why_not


def patch(model: nn.Module, ops: str | Sequence[str] = "all", dry_run: bool = False) -> Report:
    """Let the modules of a model run on gptfast's ops where these have a kernel for them.

    A module stays the same object, with its parameters, buffers, hooks, names, `state_dict` keys
    and mode: only its class changes, to a subclass of what it was. `unpatch` changes it back.

    Args:
        model: changed in place.
        ops: which of `gptfast.patching.OPS` to use, also where they are slower; "all": each where
            it was measured to be as fast or faster (`gptfast/patching/speed.py`).
        dry_run: report what would be done, and do nothing.

    Returns:
        What was replaced, what was left alone, and why; `print` shows it as a table. It goes on to
        count the calls that a patched module has to give to the original.

    Raises:
        TypeError: `model` is no module, or `ops` no list.
        ValueError: an unknown op.

    Limits: gradients of gradients are not supported by the ops. A pickled model that is patched is
    loaded where gptfast is installed; its `state_dict` is loaded anywhere.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(ops, Iterable):
        raise TypeError(f"patch: ops must be 'all' or a list of names, got {type(ops).__name__}")
    forced = ops != "all"
    chosen = OPS if ops == "all" else (ops,) if isinstance(ops, str) else tuple(ops)
    for op in chosen:
        if op not in OPS:
            raise ValueError(f"patch: ops must be 'all' or some of {', '.join(OPS)}; got {op!r}")
    report = Report("to be replaced" if dry_run else "replaced")
    kind = _device_and_dtype(model)
    for name, module in list(model.named_modules()):
        entries, replacement = _look_at(name, module, chosen, forced, kind)
        for entry in entries:
            (report.left if entry.reason else report.replaced).append(entry)
        if replacement is not None and not dry_run:
            _swap(module, replacement, entries[0].op, forced)
            REPORTS[module] = report
    return report


def unpatch(model: nn.Module) -> Report:
    """Give every patched module in `model` its old class back.

    Returns:
        What was restored, and what could not be.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report("restored")
    for name, module in list(model.named_modules()):
        kind = type(module)
        if not issubclass(kind, Patched):
            continue
        entry = Entry(name, kind.__name__, kind._gptfast_op)
        if "_gptfast_op" not in vars(kind):  # a class that was made of the patched one since
            reason = "its class was changed after patching (parametrised, or sharded by FSDP)"
            report.left.append(dataclasses.replace(entry, reason=reason))
            continue
        kind.on_unpatch(module)
        module.__class__ = kind._gptfast_base
        module.__dict__.pop("_gptfast_state", None)
        REPORTS.pop(module, None)
        report.replaced.append(entry)
    return report


def _device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Of the first floating-point parameter, or PyTorch's default."""
    for p in model.parameters():
        if p.is_floating_point():
            return p.device, p.dtype
    return torch.get_default_device(), torch.get_default_dtype()


def _look_at(
    name: str,
    module: nn.Module,
    chosen: Sequence[str],
    forced: bool,
    kind: tuple[torch.device, torch.dtype],
) -> tuple[list[Entry], Replacement | None]:
    """What is to be said of a module, if anything, and what is to become of it.

    The first entry is of what replaces it, if that is so.
    """
    cls = type(module)
    if issubclass(cls, Patched):
        return [Entry(name, cls.__name__, cls._gptfast_op, "already patched")], None
    if cls.__module__.partition(".")[0] == "gptfast":
        return [], None
    registered, recipes = recipes_for(cls)
    if registered is None:
        recipes = recognise(module)
    refused: list[Entry] = []
    taken: list[Entry] = []
    used: Replacement | None = None
    for op in OPS:
        if op not in chosen or op not in recipes:
            continue
        replacement = recipes[op](module)
        if replacement is None:
            continue
        if not isinstance(replacement, str):
            mixin = replacement[0] if isinstance(replacement, tuple) else replacement
            replacement = _why_not_op(op, mixin, module, forced, kind) or replacement
        replacement = _why_not_swap(module, registered) or replacement
        if isinstance(replacement, str):
            refused.append(Entry(name, cls.__name__, op, replacement))
        elif not taken:
            taken, used = [Entry(name, cls.__name__, op)], replacement
        else:  # a second function that its forward calls
            reason = f"its {taken[0].op} is replaced, and one op of a module can be"
            taken.append(Entry(name, cls.__name__, op, reason))
    return (taken, used) if taken else (refused[:1], None)


def _why_not_swap(module: nn.Module, registered: type[nn.Module] | None) -> str | None:
    """Why no recipe may touch this module."""
    if registered is not None and type(module).forward is not registered.forward:
        return f"it overrides the forward of {registered.__name__}"
    if "forward" in module.__dict__:
        return "its forward is replaced on the object (by hooks of accelerate, for instance)"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule"
    if parametrize.is_parametrized(module):
        return "it is parametrised"
    for p in module.parameters(recurse=False):
        if p.dtype not in (*DTYPE_CODES, torch.float64):
            return f"its weights are {dtype_name(p.dtype)}"
    return None


def _why_not_op(
    op: str,
    mixin: type[Patched],
    module: nn.Module,
    forced: bool,
    kind: tuple[torch.device, torch.dtype],
) -> str | None:
    """Why `op` has nothing to offer for a module of a model of this kind."""
    own = next((p for p in module.parameters() if p.is_floating_point()), None)
    device, dtype = kind if own is None else (own.device, own.dtype)
    if not KERNELS[op].has_kernel(torch.empty(0, device=device, dtype=dtype)):
        return f"no kernel on {device.type} in {dtype_name(dtype)}"
    return None if forced else why_not(mixin.measured or op, device.type, dtype)


def _swap(module: nn.Module, replacement: Replacement, op: str, forced: bool) -> None:
    if isinstance(replacement, tuple):
        replacement, module.__dict__["_gptfast_state"] = replacement
    cls = patched_class(type(module), replacement, op, forced)
    module.__class__ = cls
    cls.on_patch(module)  # type: ignore[arg-type]
