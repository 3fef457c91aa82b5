"""The next token, drawn from logits: the same one on every backend.

With logits z of V tokens, in fp32, and the tokens that were there before:

penalty:      z_v -> z_v / penalty where z_v >= 0, z_v penalty below, for tokens v seen before
temperature:  p_v = exp((z_v - max z) / temperature), not normalised; 0 takes the largest z
top_k:        of the tokens in the order of their z, the first k are kept
top_p:        of these, those before which less than top_p of their sum of p lies
min_p:        of these, those with p_v >= min_p max p

and the token is drawn from what p is left: the steps of Hugging Face's processors, in their order.
Equal logits are ordered by index; top_k keeps exactly k. The largest of all is always kept, and of
several the first is the greedy token.

Sums decide what top_p keeps and what is drawn, and floats would add up to other sums in another
order. So weights are whole numbers,

w_v = 2^40 2^(-n / 2^24),  n = floor((max z - z_v) s),  s = 2^24 log2(e) / temperature in fp32

the power by a polynomial in fixed point, right to 2^-27, and rounded down: a token with less than
2^-40 of the largest probability is never drawn. The rest is exact: the draw is the token in which
the sum over the kept tokens, in the order of their index, passes floor(total u / 2^62). u is made
of the first 31 bits of two words of Philox-4x32-10 with key `seed` and counter (row, offset mod
2^32, offset div 2^32, 1).

Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019 (top_p); Minh et al.,
"Turning Up the Heat: Min-p Sampling", 2024; Keskar et al., "CTRL", 2019 (penalty).
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, NamedTuple

import torch

from gptfast import backend
from gptfast.ops.layout import unit_stride
from gptfast.ops.library import check_device, check_dtypes, check_floating, define
from gptfast.ops.philox import philox

MAX_TOKENS = 2**22  # of weights up to 2^40, whose sum and its products must stay below 2^63
MAX_TOKENS_CUDA = 2**18  # see csrc/cuda/sampling.cu
# 2^31 2^-f for f in [0, 1): coefficients of the powers of -f, highest first. csrc/common/sampling.h
POLYNOMIAL = (0x0003928E, 0x0029C55D, 0x0139E3FC, 0x071A5235, 0x1EBFAC0E, 0x58B90B02, 0x80000000)
LOW_31 = 2**31 - 1


class Rule(NamedTuple):
    """The options of a call as kernels take them."""

    penalty: float
    steps: float  # s; 0 for greedy
    top_k: int  # 1 to V
    share: int  # top_p in units of 2^-31
    min_weight: int  # min_p in units of the largest weight


@functools.lru_cache(maxsize=16)  # a text asks for the same one at every step
def make_rule(
    V: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
) -> Rule:
    """The rule of options that are within their range."""
    steps = 0.0
    if temperature > 0:
        # Between the smallest and the largest float: at 0 or infinity, distances would become NaN.
        steps = min(
            max(2**24 * math.log2(math.e) / temperature, 2.0**-126), (2 - 2**-23) * 2.0**127
        )
    return Rule(
        ctypes.c_float(repetition_penalty).value,
        ctypes.c_float(steps).value,
        V if top_k is None else min(top_k, V),
        2**31 if top_p is None else max(1, round(top_p * 2**31)),
        0 if min_p is None else math.ceil(min_p * 2**40),
    )


def penalised(logits: torch.Tensor, previous: torch.Tensor | None, penalty: float) -> torch.Tensor:
    """z: logits (B, V) in fp32, of the tokens in `previous` (B, P) penalised."""
    z = logits.float()
    if previous is None:
        return z
    B, V = z.shape
    known = torch.where((previous >= 0) & (previous < V), previous, V)
    seen = torch.zeros(B, V + 1, dtype=torch.bool, device=z.device).scatter_(1, known, True)
    factor = torch.full((), penalty, device=z.device)  # a tensor: by a number, GPUs multiply
    return torch.where(seen[:, :V], torch.where(z < 0, z * factor, z / factor), z)


def weights(z: torch.Tensor, steps: float) -> torch.Tensor:
    """w: (B, V) int64."""
    n = ((z.amax(-1, keepdim=True) - z) * steps).clamp(max=2.0**31 - 128).nan_to_num().long()
    f = (n << 8) & 0xFFFFFFFF
    p = torch.full_like(f, POLYNOMIAL[0])
    for c in POLYNOMIAL[1:]:
        p = c - (f * p >> 32)
    return p << 9 >> (n >> 24).clamp(max=63)


def kept_weights(z: torch.Tensor, rule: Rule) -> torch.Tensor:
    """w (B, V) of the tokens that are kept, and 0 for the others."""
    ranked, order = z.sort(dim=-1, descending=True, stable=True)
    w = weights(ranked, rule.steps)
    w[:, rule.top_k :] = 0
    total = w.sum(-1, keepdim=True)
    before = w.cumsum(-1) - w
    # share 2^-31 of the total, rounded up, without leaving 63 bits
    wanted = rule.share * (total >> 31) + ((rule.share * (total & LOW_31) + LOW_31) >> 31)
    w = torch.where((before < wanted) & (w >= rule.min_weight), w, 0)
    return torch.zeros_like(w).scatter_(-1, order, w)


def reference_fwd(
    logits: torch.Tensor, previous: torch.Tensor | None, rule: Rule, seed: int, offset: int
) -> torch.Tensor:
    """The formulas in PyTorch: (B, V) logits to (B,) tokens."""
    z = penalised(logits, previous, rule.penalty)
    B, V = z.shape
    top = z.amax(-1, keepdim=True)
    if rule.steps == 0:
        token = torch.where(z == top, torch.arange(V, device=z.device), V).amin(-1)
    else:
        sums = kept_weights(z, rule).cumsum(-1)
        row = torch.arange(B, device=z.device)
        counter = (row, *(torch.full_like(row, c) for c in (offset & 0xFFFFFFFF, offset >> 32, 1)))
        u1, u0, *_ = (word >> 1 for word in philox(seed, counter))
        high, low = sums[:, -1] >> 31, sums[:, -1] & LOW_31
        place = high * u1 + ((high * u0 + low * u1 + (low * u0 >> 31)) >> 31)
        token = (sums <= place[:, None]).sum(-1)
    return torch.where(top[:, 0].isfinite(), token, -1)


def cpu_fwd(
    logits: torch.Tensor, previous: torch.Tensor | None, rule: Rule, seed: int, offset: int
) -> torch.Tensor:
    """The `cpu` backend."""
    B, V = logits.shape
    before = (0, 0, 0)
    if previous is not None:
        before = (previous.data_ptr(), previous.stride(0), previous.shape[1])
    tokens = torch.empty(B, dtype=torch.int64)
    code = backend.DTYPE_CODES[logits.dtype]
    backend.extension().sample(  # type: ignore[union-attr]
        logits.data_ptr(),
        logits.stride(0),
        *before,
        tokens.data_ptr(),
        B,
        V,
        *rule,
        seed,
        offset,
        code,
    )
    return tokens


def cuda_fwd(
    logits: torch.Tensor, previous: torch.Tensor | None, rule: Rule, seed: int, offset: int
) -> torch.Tensor:
    """The `cuda` backend."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    before = (None, 0, 0) if previous is None else (previous, previous.stride(0), previous.shape[1])
    sizes = (logits.stride(0), *before, tokens, *logits.shape)
    backend.launch_cuda("sample", logits, logits, *sizes, *rule, seed, offset)
    return tokens


def why_not_cuda(logits: torch.Tensor, *_: Any) -> str | None:
    """Why the CUDA kernel cannot take these logits, or None."""
    V = logits.shape[-1]
    return None if V <= MAX_TOKENS_CUDA else f"a row must have at most 2^18 logits, got {V}"


OP = backend.Op(
    "sample",
    {
        "torch": backend.Implementation(reference_fwd),
        "cpu": backend.Implementation(cpu_fwd),
        "cuda": backend.Implementation(cuda_fwd, why_not=why_not_cuda),
    },
    listed=False,  # tokens are drawn, not computed to within an error: tests/test_sample.py
)


def _fwd(
    logits: torch.Tensor,
    previous: torch.Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    seed: int,
    offset: int,
) -> torch.Tensor:
    rule = make_rule(logits.shape[-1], temperature, top_k, top_p, min_p, repetition_penalty)
    rows = unit_stride(logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1]))
    if previous is None or repetition_penalty == 1 or previous.shape[-1] == 0:
        previous = None
    else:
        previous = unit_stride(previous.reshape(-1, previous.shape[-1]))
    tokens = OP.choose(rows).fwd(rows, previous, rule, seed, offset)
    return tokens if logits.dim() == 2 else tokens.view(logits.shape[:-1])


def _fake_fwd(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)


sample_fwd = define(
    "sample_fwd(Tensor logits, Tensor? previous, float temperature, SymInt? top_k, float? top_p,"
    " float? min_p, float repetition_penalty, SymInt seed, SymInt offset) -> Tensor",
    _fwd,
    _fake_fwd,
)


def sample(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    previous: torch.Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> torch.Tensor:
    """Draw a token from softmax(logits / temperature), cut by top_k, then top_p, then min_p.

    The draw is decided by its arguments: the same on every backend, from run to run. Let `offset`
    count the steps of a text.

    Args:
        logits: (..., V), any strides; float32, bfloat16, float16; float64 is rounded to float32.
        temperature: divides the logits; 0 takes the largest logit, the first of equal ones.
        top_k: keep the k most likely tokens, exactly; None, or k >= V, keeps all.
        top_p: keep the most likely tokens that together have this probability; None keeps all.
        min_p: keep tokens with this fraction of the largest probability; None keeps all.
        repetition_penalty: divides positive logits of the tokens in `previous`, and multiplies
            negative ones; 1 changes nothing.
        previous: (..., P) int64 tokens that were there before. Tokens outside [0, V) stand for
            none: -1 fills up shorter rows.
        seed: from 0 to 2^63 - 1.
        offset: from 0 to 2^63 - 1; another one is another draw.

    Returns:
        (...) int64 tokens; -1 for a row with NaN or infinity, or with nothing above minus infinity.

    Raises:
        TypeError: logits are not floating point, or previous is not int64.
        ValueError: shapes that do not fit, no logits in a row, or an option out of range.
        RuntimeError: previous is on another device; a backend is forced that cannot run the call.

    Limits: V at most 2^22; 2^18 on the cuda backend. A token whose probability is below 2^-40 of
        the largest is never drawn.

    Source: see the module.
    """
    op = "sample"
    check_floating(op, "logits", logits)
    if logits.dim() == 0 or not 0 < logits.shape[-1] <= MAX_TOKENS:
        given = tuple(logits.shape)
        raise ValueError(f"{op}: logits must be (..., V), V from 1 to {MAX_TOKENS}, got {given}")
    check_sampling(op, temperature, top_k, top_p, min_p, repetition_penalty)
    if not (0 <= seed < 2**63 and 0 <= offset < 2**63):
        raise ValueError(f"{op}: seed and offset must be in [0, 2^63), got {seed} and {offset}")
    if previous is not None:
        check_dtypes(op, torch.int64, previous=previous)
        if previous.dim() == 0 or previous.shape[:-1] != logits.shape[:-1]:
            expected = f"({', '.join([*map(str, logits.shape[:-1]), 'P'])})"
            raise ValueError(f"{op}: previous must be {expected}, got {tuple(previous.shape)}")
        check_device(op, logits.device, previous=previous)
    if logits.dtype == torch.float64:
        logits = logits.float()
    if logits.requires_grad:
        logits = logits.detach()
    options = (float(temperature), top_k, top_p, min_p, float(repetition_penalty))
    return sample_fwd(logits, previous, *options, seed, offset)


def check_sampling(
    op: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
) -> None:
    """Raise ValueError naming the first option that is out of its range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{op}: temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{op}: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be in (0, 1], got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"{op}: min_p must be in [0, 1], got {min_p}")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"{op}: repetition_penalty must be above 0, got {repetition_penalty}")
