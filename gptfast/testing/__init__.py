"""The shared harness of tests and benchmarks: cases, exact results, tolerances.

A test is a row of data. `gptfast/testing/<op>.py` says for each op how inputs are made, how gptfast
is called, which call of PyTorch is its peer, what its rounding errors are proportional to, and on
which cases (shape, values, memory layout, options) it is judged.

    run_case(case, backend, dtype)

runs forward and every gradient in poisoned memory and judges each result by `assert_close`. A new
backend needs no new test; a new op needs its file and a line in `rows.py`.
"""

from gptfast.testing.case import DTYPES, Case, OpRow
from gptfast.testing.harness import (
    Problem,
    gradcheck,
    make_problem,
    opcheck,
    record_calls,
    run_case,
)
from gptfast.testing.judge import (
    Magnitude,
    assert_close,
    assert_close_in_norm,
    rounding_bound,
    unit_roundoff,
)
from gptfast.testing.memory import LAYOUTS, lay_out, poison_empty
from gptfast.testing.rows import CASES, OPS

__all__ = [
    "CASES",
    "DTYPES",
    "LAYOUTS",
    "OPS",
    "Case",
    "Magnitude",
    "OpRow",
    "Problem",
    "assert_close",
    "assert_close_in_norm",
    "gradcheck",
    "lay_out",
    "make_problem",
    "opcheck",
    "poison_empty",
    "record_calls",
    "rounding_bound",
    "run_case",
    "unit_roundoff",
]
