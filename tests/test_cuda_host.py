"""The CUDA kernels, executed on the CPU from their shipped source by the host runner."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from math import inf

import pytest
import test_adamw
import test_add_layer_norm
import test_cross_entropy
import test_glu
import torch
from places import Place, refused

import gptfast
from gptfast import backend, targets
from gptfast.optim import AdamW
from gptfast.testing import CASES, DTYPES, OPS, Case, cuda_host, make_problem, run_case

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


def cases_and_dtypes():
    """Each case in one dtype, in turns; `make test-slow` runs it in the others, too."""
    for number, case in enumerate(c for c in CASES if c.op in OURS):
        dtypes = [dtype for dtype in DTYPES if not refused(case, dtype)]
        for turn, dtype in enumerate(dtypes):
            marks = () if turn == number % len(dtypes) else pytest.mark.slow
            yield pytest.param(case, dtype, id=f"{case}-{dtype}", marks=marks)


REFUSED = [c for c in CASES if c.op in OURS and refused(c, torch.float16)]


@pytest.mark.parametrize(("case", "dtype"), list(cases_and_dtypes()))
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
    for n in range(1, 66):  # 3 dtypes in turns: each meets every remainder of a pack of 4 or 8
        case = OPS[op].tail(n)
        dtypes = [dtype for dtype in DTYPES if not refused(case, dtype)]
        if dtypes:
            with on_the_cpu():
                run_case(case, "cuda", dtypes[n % len(dtypes)])


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused_case(case):
    what = f"is forced, but .*{refused(case, torch.float16)}"
    with on_the_cpu(), pytest.raises(backend.RefusedError, match=what):
        make_problem(case, torch.float16).run("cuda")


@pytest.fixture
def room(request, monkeypatch):
    """How many bytes of shared memory a launch may ask for."""
    card = dataclasses.replace(targets.TARGETS["sm_80"], shared_memory=request.param + 512)
    monkeypatch.setattr(targets, "_assumed", card)


# Nothing of a row fits; a part; all of it, or the sums and a part; all.
@pytest.mark.parametrize("room", [0, 7000, 40000, 90000], indirect=True)
@pytest.mark.parametrize("N", [4352, 1501])  # in packs, and in single elements
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_layer_norm"])
def test_rows_that_do_not_fit_into_shared_memory(op, N, room):
    options = {"residual": "float32", "p": 0.3} if op == "add_layer_norm" else {}
    with on_the_cpu():
        run_case(Case(op, (3, N), options=options), "cuda", torch.bfloat16)


@pytest.mark.parametrize("room", [0, 3001, 6500], indirect=True)
def test_logits_that_do_not_fit_into_shared_memory(room):
    case = Case("cross_entropy", (3, 3001), options={"label_smoothing": 0.1})
    with on_the_cpu():
        for overwrite in (False, True):
            test_cross_entropy.test_loss_and_gradient_at_once(Place("cuda"), case, overwrite)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("dtypes", [*((d,) for d in DTYPES), DTYPES], ids=str)
def test_adamw_step(dtypes, max_norm, masters):
    results = []
    for seed in SEEDS:
        params = test_adamw.random_parameters([*test_adamw.SIZES, (3, 4099)], dtypes)
        with on_the_cpu(seed):
            test_adamw.judge_step(params, Place("cuda"), max_norm, masters)
        results.append(params)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


# What tests of other files show on every place.
EVERYWHERE = [
    (test_adamw.test_layouts, {"layout": "transposed", "grad_layout": "strided"}),
    (test_adamw.test_layouts, {"layout": "unaligned", "grad_layout": "expanded"}),
    (test_adamw.test_extreme_gradients, {"values": 1e-15}),
    (test_adamw.test_nonfinite_gradients_do_what_they_do_in_torch, {"bad": inf, "max_norm": 0.5}),
    (test_adamw.test_lr_is_a_tensor, {}),
    (test_adamw.test_gradient_scaler, {"unscales": False, "overflows": False}),
    (test_adamw.test_gradient_scaler, {"unscales": True, "overflows": True}),
    (test_adamw.test_rounding_at_random, {}),
    (test_adamw.test_rounding_at_random_of_what_needs_none, {}),
    (test_adamw.test_masters_see_what_bfloat16_would_lose, {}),
    (test_add_layer_norm.test_either_result_may_go_unused, {"name": "add_layer_norm", "p": 0.4}),
    (test_add_layer_norm.test_either_result_may_go_unused, {"name": "add_rms_norm", "p": 0.0}),
    *(
        (test_cross_entropy.test_loss_and_gradient_at_once, {"case": case, "overwrite": overwrite})
        for case in test_cross_entropy.AT_ONCE
        for overwrite in (False, True)
    ),
    (test_cross_entropy.test_unaligned_loss_and_gradient_at_once, {}),
    (test_glu.test_the_slope_at_infinity_is_the_limit, {"activation": "silu"}),
    (test_glu.test_gradients_nobody_wants_are_not_computed, {"needs": [True, False]}),
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_targets_out_of_range_make_nan(smoothing, weighted, monkeypatch):
    with on_the_cpu():
        test_cross_entropy.test_targets_out_of_range_make_nan(
            Place("cuda"), "mean", weighted, smoothing, monkeypatch
        )


@pytest.mark.parametrize(("test", "options"), EVERYWHERE, ids=lambda x: getattr(x, "__name__", ""))
def test_what_holds_everywhere(test, options):
    with on_the_cpu():
        test(place=Place("cuda"), **options)


def test_adamw_in_small_chunks(monkeypatch):
    with on_the_cpu():
        test_adamw.test_chunks_of_several_blocks(Place("cuda"), monkeypatch)
        test_adamw.test_thousands_of_tiny_tensors(Place("cuda"), monkeypatch)


def test_adamw_takes_two_launches():
    count = []
    module = cuda_host.load()
    for sizes in ([(3,)], [(3,)] * 50):
        for max_norm in (None, 1.0):
            params = test_adamw.random_parameters(sizes, DTYPES)
            with on_the_cpu(), gptfast.use_backend("cuda"):
                before = module.launches()
                AdamW(test_adamw.groups_of(params), max_norm=max_norm).step()
                count.append(module.launches() - before)
    assert count == [2, 2, 2, 2]
