"""Whether a module may be passed by: what stands in for its call must do all that its call does."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _module


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether `module` is of exactly one of these classes, and its call is its class's forward."""
    return type(module) in classes and "forward" not in vars(module) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs anything besides its forward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_backward_pre_hooks
        or _module._global_backward_hooks
    )
