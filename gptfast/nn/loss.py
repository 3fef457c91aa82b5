"""Cross-entropy loss as a module."""

from __future__ import annotations

import torch

from gptfast.ops import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Cross-entropy of logits with class indices; replaces `torch.nn.CrossEntropyLoss`.

    Args:
        weight, ignore_index, reduction, label_smoothing: as in torch (and its deprecated
            size_average and reduce).

    Shape: logits (V), (N, V) or (N, V, d1, ...) with class indices (), (N) or (N, d1, ...), as in
    torch. The loss is float32 also for half-precision logits. Targets must be class indices: for
    class probabilities keep `torch.nn.CrossEntropyLoss`.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of `input` against the class indices `target`."""
        if target.is_floating_point():
            raise TypeError(
                "CrossEntropyLoss: target must be int64 class indices, got class probabilities "
                f"({target.dtype}); use torch.nn.CrossEntropyLoss for those"
            )
        logits = input.movedim(1, -1) if input.dim() > 2 else input
        return cross_entropy(
            logits,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
        )
