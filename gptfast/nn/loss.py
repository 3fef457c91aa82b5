"""Cross-entropy losses as modules."""

from __future__ import annotations

from typing import Any

import torch

from gptfast.ops import cross_entropy, linear_cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Cross-entropy of logits with class indices; replaces `torch.nn.CrossEntropyLoss`.

    Args:
        weight, ignore_index, reduction, label_smoothing: as in torch (and its deprecated
            size_average and reduce).
        z_loss, softcap, inplace_backward: as in `gptfast.cross_entropy`.

    Shape: logits (V), (N, V) or (N, V, d1, ...) with class indices (), (N) or (N, d1, ...), as in
    torch. The loss is float32 also for half-precision logits. Targets must be class indices: for
    class probabilities keep `torch.nn.CrossEntropyLoss`.
    """

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.inplace_backward = inplace_backward

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of `input` against the class indices `target`."""
        _refuse_probabilities("CrossEntropyLoss", target)
        logits = input.movedim(1, -1) if input.dim() > 2 else input
        return cross_entropy(
            logits,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            inplace_backward=self.inplace_backward,
        )


class LinearCrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """A linear layer and the cross-entropy of its logits, which are never stored.

    Parameters and `state_dict` are those of `torch.nn.LinearCrossEntropyLoss` (PyTorch 2.13), whose
    `out_features` and `options` it does not have.

    Args:
        in_features: C.
        num_classes: V.
        bias: whether the layer has one.
        device, dtype: of its parameters.
        reduction, weight, ignore_index, label_smoothing: as in `torch.nn.CrossEntropyLoss`.
        z_loss, softcap: as in `gptfast.linear_cross_entropy`.

    Shape: input (..., C) with class indices (...).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        self.z_loss = z_loss
        self.softcap = softcap
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of the layer's logits for `input` against the class indices `target`."""
        _refuse_probabilities("LinearCrossEntropyLoss", target)
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            self.linear.bias,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )


def _refuse_probabilities(name: str, target: torch.Tensor) -> None:
    if target.is_floating_point():
        raise TypeError(
            f"{name}: target must be int64 class indices, got class probabilities "
            f"({target.dtype}); use torch.nn.{name} for those"
        )
