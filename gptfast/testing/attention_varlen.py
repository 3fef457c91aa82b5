"""How attention_varlen is tested.

A case's shape is (H, H_kv, D). Options: lengths, a tuple of (T, S) for each sequence, and those of
attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch

from gptfast.ops import attention_varlen
from gptfast.testing import attention
from gptfast.testing.case import Case, Inputs, OpRow, Options
from gptfast.testing.judge import Magnitude
from gptfast.testing.memory import LAYOUTS


def _inputs(case: Case, dtype: torch.dtype, draw: Any) -> dict[str, Any]:
    H, H_kv, D = case.shape
    lengths = case.options["lengths"]
    ends = [[0, *itertools.accumulate(column)] for column in zip(*lengths, strict=True)]
    N, N_k = (column[-1] for column in ends)
    if case.layout == "packed":
        q, k, v = draw((N, 3, H, D), case.values).to(dtype).unbind(1)
    else:
        shapes = ((N, H, D), (N_k, H_kv, D), (N_k, H_kv, case.options.get("Dv", D)))
        q, k, v = (draw(shape, case.values).to(dtype) for shape in shapes)
    cu_seqlens = [torch.tensor(column, dtype=torch.int32) for column in ends]
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": cu_seqlens[0],
        "cu_seqlens_k": cu_seqlens[1],
        **attention.score_inputs(case, len(lengths), H),
    }


def _call(i: Inputs, options: Options) -> torch.Tensor:
    longest = (max(column) for column in zip(*options["lengths"], strict=True))
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    o, lse = attention_varlen(
        *(i[name] for name in names), *longest, **attention.keywords(i, options), return_lse=True
    )
    return attention.beside(o, lse.t()) if options.get("lse") else o


def _sequences(i: Inputs, options: Options) -> Iterator[dict[str, Any]]:
    """The inputs of each sequence, as `attention`'s."""
    start_q = start_k = 0
    for b, (T, S) in enumerate(options["lengths"]):
        rows, keys = slice(start_q, start_q + T), slice(start_k, start_k + S)
        slopes = i["alibi_slopes"]
        yield {
            "q": i["q"][rows].transpose(0, 1)[None],
            "k": i["k"][keys].transpose(0, 1)[None],
            "v": i["v"][keys].transpose(0, 1)[None],
            "seed": i["seed"],
            "alibi_slopes": slopes if slopes is None or slopes.dim() == 1 else slopes[b : b + 1],
            "first_head": b * i["q"].shape[1],
        }
        start_q, start_k = rows.stop, keys.stop


def _pack(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x[0].transpose(0, 1) for x in parts])


def _peer(i: Inputs, options: Options) -> torch.Tensor:
    return _pack([attention.peer(own, options) for own in _sequences(i, options)])


def _magnitudes(i: Inputs, options: Options, dy: torch.Tensor) -> dict[str, Magnitude]:
    dys = dy.split([T for T, _ in options["lengths"]])
    parts = [
        attention.magnitudes(own, options, own_dy.transpose(0, 1)[None])
        for own, own_dy in zip(_sequences(i, options), dys, strict=True)
    ]
    return {
        name: Magnitude(
            _pack([part[name].terms for part in parts]),
            _pack([part[name].condition for part in parts]),
            max(part[name].length for part in parts),
            factors=_pack([cast(torch.Tensor, part[name].factors) for part in parts]),
        )
        for name in parts[0]
    }


# One query block of 64 and a bit, sequences without keys and without queries, and of one token.
RAGGED = ((5, 7), (70, 66), (0, 9), (3, 0), (1, 1))
LEVEL = ((9, 9), (0, 0), (17, 17))  # as many queries as keys


def _case(
    shape: tuple[int, int, int],
    values: str = "normal",
    lengths: tuple[tuple[int, int], ...] = RAGGED,
    layout: str = "contiguous",
    grad_layout: str = "contiguous",
    **options: Any,
) -> Case:
    given = {"lengths": lengths, **options}
    return Case("attention_varlen", shape, values, layout, grad_layout, given)


def _cases() -> Iterator[Case]:
    for causal in (True, False):
        for lengths in (RAGGED, LEVEL, ((0, 0),)):
            yield _case((2, 1, 8), lengths=lengths, causal=causal)
    for D in (1, 40, 111):
        yield _case((4, 2, D), lengths=LEVEL, causal=True)
    for options in (
        *({"window": (3, 4)}, {"softcap": 2.0}, {"alibi": "own"}, {"dropout_p": 0.3}),
        *({"lse": True}, {"Dv": 20}, {**attention.EVERYTHING, "Dv": 20}),
    ):
        yield _case((2, 1, 8), **options)
    for layout in ("transposed", "sliced", "strided", "packed"):
        yield _case((2, 2, 9), lengths=LEVEL, layout=layout, causal=True)
    for layout in LAYOUTS[1:]:
        yield _case((2, 1, 9), lengths=LEVEL, grad_layout=layout)
    yield _case((2, 1, 8), "nan", lengths=LEVEL, causal=True)


ROW = OpRow(
    inputs=_inputs,
    call=_call,
    peer=_peer,
    magnitudes=_magnitudes,
    gradients=("q", "k", "v"),
    matrix_units=True,
    cases=tuple(_cases()),
    examples=(
        _case((4, 2, 16), causal=True),
        _case((4, 2, 8), **attention.EVERYTHING),
    ),
    gradchecks=(
        _case((4, 2, 3), lengths=((3, 4), (5, 2)), causal=True),
        _case((2, 1, 3), lengths=((3, 4), (2, 5)), **attention.EVERYTHING),
    ),
    tail=lambda n: _case((2, 1, n), lengths=((n, n + 2), (2, n)), causal=n % 2 == 0),
    many=_case((4, 2, 32), lengths=((100, 120), (7, 90)), causal=True, dropout_p=0.1),
    reports=tuple(
        _case((2, 1, D), lengths=((100, 100), (150, 150)), causal=True) for D in (64, 128)
    ),
)
