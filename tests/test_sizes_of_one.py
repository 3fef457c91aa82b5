"""Kernels compile where a size is 1, which Triton makes a constant: the interpreter does not."""

from __future__ import annotations

import pytest
import torch
from places import INTERPRET

pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from benchmarks.static_report.calls import registered_calls
from benchmarks.static_report.launches import record
from benchmarks.static_report.report import compile_key
from benchmarks.static_report.worker import run_jobs
from gptfast import backend
from gptfast.testing import OPS, Case

ALMOST_ALL = 0.99999  # is dropped: 1 of 65536 is kept, and the threshold is 1
CASES = [
    *(row.tail(1) for op, row in OPS.items() if "triton" in backend.OPS[op].implementations),
    Case("linear_cross_entropy", (1, 50, 8)),
    Case("dropout_add", (3, 8), options={"p": ALMOST_ALL}),
    Case("attention", (1, 1, 1, 20, 20, 16), options={"dropout_p": ALMOST_ALL}),
]


# They take seconds each: every second one in `make test`, all in `make test-slow`.
IN_TURNS = [
    pytest.param(case, id=str(case), marks=pytest.mark.slow if number % 2 else ())
    for number, case in enumerate(CASES)
]


@pytest.mark.parametrize("case", IN_TURNS)
def test_compiles(case):
    launches = [
        launch
        for call in registered_calls(case, torch.bfloat16)
        for launch in record(call, "sm_90").launches
    ]
    assert launches
    jobs = {compile_key(launch): launch.job() for launch in launches}
    failed = [
        answer["error"]
        for _, answer in run_jobs("compiled", list(jobs.items()), 1)
        if "error" in answer
    ]
    assert not failed
