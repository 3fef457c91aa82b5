"""The CUDA kernels, executed on the CPU from their shipped source by the host runner."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from gptfast import backend
from gptfast.testing import CASES, DTYPES, OPS, cuda_host, make_problem, run_case

pytestmark = pytest.mark.skipif(
    cuda_host.missing() is not None, reason=f"CUDA on the CPU: {cuda_host.missing()}"
)
SEEDS = (0, 1, 2)  # of the order of threads and blocks; 0: as they are numbered
OURS = [op for op in OPS if "cuda" in backend.OPS[op].implementations]
problem_of = functools.lru_cache(maxsize=4)(make_problem)


@contextlib.contextmanager
def on_the_cpu(seed=1):
    module = cuda_host.load()
    module.set_seed(seed)
    with backend.cuda_on_cpu(module):
        yield module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.op in OURS], ids=str)
def test_case(case, dtype):
    problem = make_problem(case, dtype)
    results = []
    for seed in SEEDS:
        with on_the_cpu(seed):
            results.append(problem.run("cuda"))
        problem.judge(results[-1])
    for other in results[1:]:  # no order of the threads changes a bit
        for name, value in results[0].items():
            assert torch.equal(value.nan_to_num(), other[name].nan_to_num()), name


@pytest.mark.parametrize("op", OURS)
def test_tails(op):
    for n in range(1, 66):
        for dtype in DTYPES:
            with on_the_cpu():
                run_case(OPS[op].tail(n), "cuda", dtype)
