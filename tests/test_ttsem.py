"""The Triton kernels, executed as Triton's IR by ttsem: no race, no access out of bounds.

A second runner beside the interpreter, which sees neither. ttsem compiles each launch to Triton's
IR and executes that on the CPU; it raises `KernelFault` where a program reads or writes outside its
tensors, or two programs touch the same element and one of them writes it.
"""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import test_adamw
import torch
from places import INTERPRET, Place

from benchmarks.static_report.calls import triton_takes_cpu_tensors
from gptfast import backend, targets
from gptfast.testing import OPS, make_problem

triton = pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1 leaves no IR to execute", allow_module_level=True)
if not triton.__version__.startswith(("3.8.", "3.9.")):
    reason = f"ttsem reads the IR of Triton 3.8 and 3.9, not {triton.__version__}"
    pytest.skip(reason, allow_module_level=True)
if sys.version_info < (3, 11):
    pytest.skip("ttsem needs Python 3.11", allow_module_level=True)
sanitize = pytest.importorskip(
    "ttsem.sanitize", reason="ttsem is not installed: `make venv` installs it"
)
tl = triton.language

CASES = [
    case
    for row in OPS.values()
    for case in row.examples
    if "triton" in backend.OPS[case.op].implementations
]


@pytest.fixture(autouse=True)
def ttsem():
    """Launches of Triton kernels go to ttsem, which takes tensors on the CPU."""
    with (
        # ttsem puts stand-ins into torch.cuda and leaves them there: later tests would see a GPU.
        mock.patch.dict(vars(torch.cuda)),
        targets.assume("sm_90"),
        triton_takes_cpu_tensors(),
        sanitize.session(cc=90, cuda_is_cpu=False) as session,
    ):
        yield
    assert session.launches
    assert not session.races_unchecked


# Without poison, whose guards around a tensor would hide from ttsem where it ends.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_race_and_no_access_out_of_bounds(case, dtype):
    problem = make_problem(case, dtype)
    problem.judge(problem.run("triton", poison=False))


def test_adamw_is_beyond_it():
    """The one kernel that is not among the cases: it finds its tensors by addresses in a table,
    where ttsem knows the memory of a launch's arguments. The day it knows more, this fails."""
    params = test_adamw.random_parameters([(7,), (1024,)], [torch.float32])
    with pytest.raises(sanitize.KernelFault, match="kernel `adamw_prepare_kernel`"):
        test_adamw.judge_step(params, Place("triton"))


@triton.jit
def unmasked_load_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs), mask=offs < n)


@triton.jit
def unmasked_store_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0))


@triton.jit
def overlapping_store_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) + tl.program_id(0), mask=offs < n)


@triton.jit
def unordered_sum_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr, tl.load(y_ptr) + tl.sum(x, 0))


BUGS = {
    unmasked_load_kernel: "oob_read",
    unmasked_store_kernel: "oob_write",
    overlapping_store_kernel: "race",
    unordered_sum_kernel: "race",
}


@pytest.mark.parametrize("kernel", BUGS, ids=lambda kernel: kernel.fn.__name__)
def test_a_planted_bug_is_found(kernel):
    x, y = torch.randn(100), torch.zeros(100)
    with pytest.raises(sanitize.KernelFault) as caught:
        kernel[(4,)](x, y, 100, BLOCK=32)
    assert caught.value.fault.kind == BUGS[kernel]
