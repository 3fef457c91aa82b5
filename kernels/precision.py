"""How products of fp32 are taken: as `torch.backends.cuda.matmul` says."""

from __future__ import annotations

import torch


def fp32_precision() -> str:
    """`input_precision` of `tl.dot`: full precision, unless TF32 is allowed."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
