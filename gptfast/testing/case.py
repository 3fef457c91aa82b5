"""What a test is made of: kinds of input, and how an op is tested."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gptfast.testing.judge import Magnitude

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Inputs = Mapping[str, Any]  # tensors by argument name; None: an optional one is absent
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One kind of input to one op.

    Args:
        op: key of `OPS`.
        shape: of x or of the logits; (B, H, H_kv, T, S, D) for attention,
            (H, H_kv, D) for attention_varlen.
        values: key of `VALUES`.
        layout: of every input, one of `LAYOUTS`; for attention also "packed": q, k and v are views
            of one (B, T, 3, H, D) tensor.
        grad_layout: of the incoming gradient.
        options: what `OPS[op]` understands.
    """

    op: str
    shape: tuple[int, ...]
    values: str = "normal"
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    options: Options = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.op, "x".join(map(str, self.shape)), self.values, self.layout]
        parts += [f"dy_{self.grad_layout}", *(f"{k}={v}" for k, v in self.options.items())]
        plain = ("normal", "contiguous", "dy_contiguous")
        return "-".join(part for part in parts if part not in plain)


def _spread(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    decades = 3 if dtype == torch.float16 else 15
    return x * 10 ** torch.linspace(-decades, decades, x.shape[-1])


def _first_rows(*specials: float) -> Callable[[torch.Tensor, torch.dtype], torch.Tensor]:
    def values(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = x.clone()
        for row, special in zip(x.view(-1, x.shape[-1]), specials, strict=False):
            row[x.shape[-1] // 2] = special
        return x

    return values


# (standard normal x, dtype) -> values
VALUES: Mapping[str, Callable[[torch.Tensor, torch.dtype], torch.Tensor]] = {
    "normal": lambda x, dtype: x,
    "large": lambda x, dtype: x * 8,
    "offset": lambda x, dtype: x + 1000,  # a mean far above the deviation
    "spread": _spread,  # thirty decades in each row
    "tiny": lambda x, dtype: x * (1e-6 if dtype == torch.float16 else 1e-30),
    "constant": lambda x, dtype: x[..., :1].expand(x.shape),  # rows without deviation
    "nan": _first_rows(math.nan),
    "nonfinite": _first_rows(math.nan, math.inf, -math.inf),
    "masked": lambda x, dtype: x.masked_fill(x > 0.3, -math.inf),
}


@dataclass(frozen=True)
class OpRow:
    """How one op is tested.

    Args:
        inputs: (case, dtype, draw) to tensors by name, where draw(shape, values) is random.
        call: gptfast's function on (inputs, options): a tensor, or a tuple as `results` names it.
        peer: PyTorch's.
        magnitudes: of every result and every gradient, from (fp64 inputs, options, dy of each
            result ...).
        gradients: names of the inputs that get one; none where the op has a forward only.
        cases: what the op is judged on.
        examples: plain cases, one for each way in which the op is registered or traced. The first
            returns something in which no element is a mean over rows.
        gradchecks: tiny cases for fp64.
        many: a case with work for several threads or programs.
        tail: n to a small case whose innermost loops run n times; n from 1 to 65 sees every tail.
        results: names of what `call` returns; none may be the name of an input.
        matrix_units: whether kernels may multiply in the storage dtype. PyTorch is then run in that
            dtype; otherwise in fp32, since every backend's elementwise arithmetic is fp32.
        float32_result: whether results are float32 whatever the inputs are; or the names of those
            that are.
        like: results that have the dtype of an input, each with that input's name.
        reports: what the static report compiles for every target and executes to count bytes: real
            widths, head dims and vocabularies, with so few rows that each takes seconds.
    """

    inputs: Callable[[Case, torch.dtype, Callable[..., torch.Tensor]], dict[str, Any]]
    call: Callable[[Inputs, Options], Any]
    peer: Callable[[Inputs, Options], Any]
    magnitudes: Callable[..., dict[str, Magnitude]]
    gradients: tuple[str, ...]
    cases: tuple[Case, ...]
    examples: tuple[Case, ...]
    gradchecks: tuple[Case, ...]
    many: Case
    tail: Callable[[int], Case]
    results: tuple[str, ...] = ("result",)
    matrix_units: bool = False
    float32_result: bool | tuple[str, ...] = False
    like: Mapping[str, str] = field(default_factory=dict)
    reports: tuple[Case, ...] = ()
