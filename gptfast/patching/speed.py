"""Where each op was measured to be no slower than PyTorch's; `patch` leaves it alone elsewhere.

On a CPU (two cores of a Xeon with AVX-512 and AMX, torch 2.13.0): whole modules, forward alone and
with backward, patched against unpatched, in turns, on inputs of 256 to 1,048,576 elements in rows
of 256, by `python -m benchmarks.patched --modules`; `benchmarks/results/patched_modules.json` has
the rows. A call from Python costs the same for a small tensor as for a large one, so that an op
pays from some size on. On a GPU (an H100, bfloat16): kernels alone, `docs/gpu.md`; below the sizes
that were measured nothing is known. The 0.99 of two compiled forwards is taken for equal.

What is not in the table is left alone. No op is in it for compiled code on a CPU: inductor fuses
norms, activations and losses into their neighbours, where an op of ours stands alone.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch


class Speed(NamedTuple):
    """What was measured.

    Args:
        at_least: elements of the input from which the op is at least 10 % faster on its own, on a
            CPU, both forward and with backward: less is what two runs differ by, and was seen to
            make a whole model slower, where memory is cold. None: it is so at no size.
        reason: the figures.
        in_training: the same for modules in training, where a backward follows, if it is less.
            Not by whether gradients are recorded: a checkpoint has them only the second time, and
            has to draw the same dropout.
    """

    at_least: int | None
    reason: str
    in_training: int | None = None


FP32, BF16 = torch.float32, torch.bfloat16

# (what, device, dtype, compiled). `gelu` is the form with erf, `glu` SwiGLU, and GEGLU in its tanh
# form, whose peer is slower. The figures are ratios, forward and with backward: above 1, ours is
# faster.
SPEED: dict[tuple[str, str, torch.dtype, bool], Speed] = {
    # 262,144 elements in fp32: 1.19 for the module, but 0.96 and 0.97 for the forward of models.
    ("attention", "cpu", FP32, False): Speed(1_048_576, "1.62, 1.36; below 0.96 in models"),
    # In bf16 1.25, 2.98, but in the forward of a script's GPT 0.97; 1.38 in its training step.
    ("attention", "cpu", BF16, False): Speed(1_048_576, "2.65, 2.77; below 0.97", 262_144),
    ("layer_norm", "cpu", FP32, False): Speed(1_048_576, "1.20, 1.27; below 1.16, 1.01"),
    # 262,144 elements in bf16: 1.54, 1.51, but 0.94 and 1.00 for a script's GPT.
    ("layer_norm", "cpu", BF16, False): Speed(1_048_576, "1.44, 1.96; below 0.94 in models"),
    ("rms_norm", "cpu", FP32, False): Speed(65_536, "1.14, 2.02; below 0.83, 1.18"),
    ("rms_norm", "cpu", BF16, False): Speed(65_536, "1.46, 2.54; below 0.91, 1.55"),
    ("gelu", "cpu", FP32, False): Speed(None, "0.66, 0.89 with 1,048,576 elements"),
    ("gelu", "cpu", BF16, False): Speed(None, "0.62, 0.90 with 1,048,576 elements"),
    ("gelu tanh", "cpu", FP32, False): Speed(16_384, "2.35, 1.38; below 0.97, 0.76"),
    ("gelu tanh", "cpu", BF16, False): Speed(16_384, "2.34, 1.39; below 1.13, 0.62"),
    ("glu", "cpu", FP32, False): Speed(262_144, "1.23, 1.10; below 0.78, 0.78"),
    ("glu", "cpu", BF16, False): Speed(262_144, "1.20, 1.12; below 0.91, 0.81"),
    ("cross_entropy", "cpu", FP32, False): Speed(1_048_576, "1.50, 1.73; below 1.11, 1.06"),
    ("cross_entropy", "cpu", BF16, False): Speed(1_048_576, "1.61, 1.50; below 1.12, 0.97"),
    ("linear_cross_entropy", "cpu", FP32, False): Speed(65_536, "1.14, 1.26; below 0.95, 0.96"),
    ("linear_cross_entropy", "cpu", BF16, False): Speed(65_536, "1.37, 1.12; below 0.82, 0.71"),
    ("layer_norm", "cuda", BF16, False): Speed(16384 * 768, "1.85, 2.09 (backward alone)"),
    ("layer_norm", "cuda", BF16, True): Speed(16384 * 768, "0.99, 1.03 (backward alone)"),
    ("rms_norm", "cuda", BF16, False): Speed(16384 * 768, "1.21, 2.29 (backward alone)"),
    ("rms_norm", "cuda", BF16, True): Speed(16384 * 768, "0.99, 1.04 (backward alone)"),
    ("glu", "cuda", BF16, False): Speed(16384 * 3072, "1.67, 1.79 (backward alone)"),
    ("cross_entropy", "cuda", BF16, False): Speed(8192 * 32000, "2.68, 2.22 (backward alone)"),
    ("cross_entropy", "cuda", BF16, True): Speed(8192 * 32000, "1.79, 1.04 (backward alone)"),
    ("attention", "cuda", BF16, False): Speed(None, "0.61 to 1.0 of cuDNN's"),
    ("gelu tanh", "cuda", BF16, False): Speed(None, "1.00, 0.97 (backward alone)"),
}


def is_worth(what: str, x: torch.Tensor, compiled: bool, training: bool) -> bool:
    """Whether `what` is not slower than PyTorch on x, in compiled code or outside of it."""
    speed = SPEED.get((what, x.device.type, x.dtype, compiled))
    if speed is None or speed.at_least is None:
        return False
    least = speed.in_training if training and speed.in_training else speed.at_least
    return x.numel() >= least


def smallest(what: str, training: bool) -> int:
    """Elements below which `what` is worth it on no device and in no dtype."""
    known = [speed for key, speed in SPEED.items() if key[0] == what]
    sizes = [(training and speed.in_training) or speed.at_least for speed in known]
    return min((size for size in sizes if size is not None), default=sys.maxsize)


def why_not(what: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `what` is not worth it on this device and dtype at any size; None where it is."""
    measured = [SPEED.get((what, device, dtype, compiled)) for compiled in (False, True)]
    known = [speed for speed in measured if speed is not None]
    if not known:
        return f"not measured on {device} in {str(dtype).removeprefix('torch.')}"
    if all(speed.at_least is None for speed in known):
        return f"slower: {known[0].reason}"
    return None
