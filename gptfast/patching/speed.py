"""Where each op was measured not to slow a model down; `patch` leaves it alone elsewhere.

The measurements are of whole modules, forward and backward, patched against unpatched, in turns:
`python -m benchmarks.patched --modules` prints them. A call from Python costs the same for a small
tensor as for a large one, so that an op pays from some size on; inductor fuses pointwise work into
its neighbours, where an op of ours stands alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Speed(NamedTuple):
    """What was measured.

    Args:
        at_least: elements of the input from which the op is not more than 3 % slower; None: it is
            slower at every size.
        reason: the figures.
    """

    at_least: int | None
    reason: str


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# (op, device, dtype, compiled)
SPEED: dict[tuple[str, str, torch.dtype, bool], Speed] = {}


def is_worth(op: str, x: torch.Tensor, compiled: bool) -> bool:
    """Whether `op` is not slower than PyTorch on x, in compiled code or outside of it."""
    speed = SPEED.get((op, x.device.type, x.dtype, compiled))
    return speed is not None and speed.at_least is not None and x.numel() >= speed.at_least


def why_not(op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `op` is not worth it on this device and dtype at any size; None where it is."""
    measured = [SPEED.get((op, device, dtype, compiled)) for compiled in (False, True)]
    known = [speed for speed in measured if speed is not None]
    if not known:
        return f"not measured on {device} in {str(dtype).removeprefix('torch.')}"
    if all(speed.at_least is None for speed in known):
        return f"slower: {known[0].reason}"
    return None
