"""Every op on every backend, through the shared cases; and what all ops have in common.

Longer than 500 lines: what one op must do, all must, so it is written down in one place.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from places import GPU_TAILS, first_result, implemented, refused
from torch.nn import functional as F

import gptfast
from gptfast import backend, testing
from gptfast.backend import OPS
from gptfast.ops.philox import dropout_factors, dropout_threshold
from gptfast.testing import CASES, DTYPES, run_case

C = backend.extension()
EXAMPLES = {op: row.examples[0] for op, row in testing.OPS.items()}
DIFFERENTIABLE = [name for name, op in OPS.items() if f"{name}_bwd" in op.registered]


def best_backend(op):
    """The fastest backend of an op on a CPU."""
    return "cpu" if "cpu" in OPS[op].implementations else "torch"


PROBLEMS: dict[tuple[str, torch.dtype, str], testing.Problem] = {}


def problem_for(case, dtype, device="cpu"):
    """`make_problem`, remembering one per dtype: a case's places are tested one after another."""
    key = (str(case), dtype, device)
    if key not in PROBLEMS:
        if len(PROBLEMS) >= len(DTYPES):
            PROBLEMS.clear()
        PROBLEMS[key] = testing.make_problem(case, dtype, device)
    return PROBLEMS[key]


def names(values):
    return [str(v).removeprefix("torch.") for v in values]


def test_every_op_is_tested():
    assert OPS.keys() == testing.OPS.keys()
    assert {op for op, row in testing.OPS.items() if row.gradients} == set(DIFFERENTIABLE)
    assert set(gptfast.ops.__all__) <= set(gptfast.__all__)


def test_the_extension_is_built():
    assert backend.missing("cpu") is None


def test_cases_have_different_names():
    assert len(set(names(CASES))) == len(CASES)


# ---- Values --------------------------------------------------------------------------------------


# `place` varies fastest: the tests of one case share its exact results.
@pytest.mark.parametrize(
    ("case", "dtype", "place"),
    [(case, dtype, p) for case in CASES for dtype in DTYPES for p in implemented(case.op)],
    ids=str,
    indirect=["place"],
)
def test_case(case, dtype, place):
    if place.backend == "cuda" and refused(case, dtype):
        pytest.skip(f"not on the CUDA kernel: {refused(case, dtype)}")  # see test_cuda_host.py
    problem_for(case, dtype, place.device).check(place.backend)


@pytest.mark.parametrize(
    ("op", "n", "place"),
    [
        (op, n, p)
        for op in OPS
        for n in range(1, 66)
        for p in implemented(op)
        if p.device == "cpu" or n in GPU_TAILS
    ],
    ids=str,
    indirect=["place"],
)
def test_tail(op, n, place):
    case = testing.OPS[op].tail(n)
    for dtype in DTYPES:
        if not (place.backend == "cuda" and refused(case, dtype)):
            problem = problem_for(case, dtype, place.device)
            problem.judge(problem.run(place.backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=names(DTYPES))
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_of_infinity(approximate, dtype, place):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype, device=place.device)
    x.requires_grad_()
    with gptfast.use_backend(place.backend):
        y = gptfast.gelu(x, approximate)
        (dx,) = torch.autograd.grad(y, x, torch.full_like(x, 0.5))
    # In fp64: PyTorch's fp32 kernel says NaN for the erf form of infinity.
    exact = F.gelu(x.double(), approximate=approximate)
    torch.testing.assert_close(y.double(), exact, equal_nan=True)
    # PyTorch's gradient is NaN; ours is the limit.
    assert dx[:2].tolist() == pytest.approx([0.5, 0], abs=1e-30)
    assert dx[2].isnan()


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_keeps_its_digits_in_the_negative_tail(approximate, isa):
    # PyTorch's 1 + tanh and 1 + erf have none left below x = -6, even in fp64: hence not a `Case`.
    x = torch.linspace(-13 if approximate == "none" else -9.5, -1, 5001)
    wide = x.double()
    if approximate == "tanh":
        exponent = 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        exact, roundings = wide * torch.sigmoid(exponent), 3
    else:  # of (x / sqrt 2)^2: the factor and the product, each squared, and the square
        exponent = -wide.square() / 2
        exact, roundings = wide * torch.special.erfc(-wide * math.sqrt(0.5)) / 2, 5
    y = gptfast.gelu(x, approximate).double()
    # An exponent z that is off by k u z moves exp(z) by as much, relatively; 8 u for the rest.
    bound = 2.0**-24 * (8 + roundings * exponent.abs()) * exact.abs()
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    "case", [c for row in testing.OPS.values() for c in row.gradchecks], ids=str
)
def test_gradcheck_of_the_reference(case):
    testing.gradcheck(case)


@pytest.mark.parametrize(
    ("card", "archs", "runs"),
    [
        ((8, 0), "80,90", True),
        ((8, 6), "80,90", True),
        ((7, 5), "80,90", False),
        ((9, 0), "80,100", True),  # by the PTX of the first
        ((12, 1), "80,90a", True),
        ((10, 0), "90a", False),
        ((9, 0), "100", False),
    ],
)
def test_which_cards_a_build_covers(card, archs, runs):
    assert (backend.uncovered(card, archs) is None) == runs


# ---- Registration --------------------------------------------------------------------------------


ALL_EXAMPLES = [case for row in testing.OPS.values() for case in row.examples]


def test_opcheck_sees_every_registered_op():
    seen = set().union(*(testing.opcheck(case) for case in ALL_EXAMPLES))
    names = [name for op in OPS.values() for name in op.registered]
    names += ["cross_entropy_bwd_", "linear_cross_entropy_total", "linear_cross_entropy_total_bwd"]
    assert seen == {f"gptfast::{name}" for name in names}


@pytest.mark.parametrize("case", ALL_EXAMPLES, ids=str)
def test_compiles_without_a_graph_break(case):
    problem = testing.make_problem(case, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(testing.OPS[case.op].call, fullgraph=True, backend="aot_eager")
    problem.judge(problem.run("auto", call=compiled, poison=False))


@pytest.mark.parametrize("case", EXAMPLES.values(), ids=str)
def test_exports(case):
    class Module(torch.nn.Module):
        def forward(self, inputs):
            return testing.OPS[case.op].call(inputs, case.options)

    inputs = testing.make_problem(case, torch.float32).inputs
    exported = torch.export.export(Module(), (inputs,)).module()
    torch.testing.assert_close(exported(inputs), Module()(inputs))


def test_compiles_with_inductor():
    x, w = torch.randn(6, 32), torch.randn(32)
    target = torch.randint(32, (6,))

    def function(x, w):
        y = gptfast.gelu(gptfast.layer_norm(x, w))
        q = y.view(1, 6, 4, 8).transpose(1, 2)
        o = gptfast.attention(q, q, q, causal=True)
        return gptfast.cross_entropy(o.transpose(1, 2).reshape(6, 32), target)

    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        loss = call(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)


def test_autocast_casts_attention_and_leaves_the_others():
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    x, w = torch.randn(4, 8).bfloat16(), torch.randn(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        o = gptfast.attention(q, q.bfloat16(), q, causal=True)
        y = gptfast.layer_norm(x, w)
        assert gptfast.gelu(q).dtype == torch.float32
        assert gptfast.cross_entropy(x, torch.zeros(4, dtype=torch.int64)).dtype == torch.float32
    assert o.dtype == torch.bfloat16
    assert torch.autograd.grad(o.sum(), q)[0].dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), w)[0].dtype == torch.float32


@pytest.mark.parametrize("case", [EXAMPLES[op] for op in DIFFERENTIABLE], ids=str)
def test_double_backward_refuses(case):
    row = testing.OPS[case.op]
    problem = testing.make_problem(case, torch.float32)
    leaf = problem.inputs[row.gradients[0]].clone().requires_grad_()
    inputs = {**problem.inputs, row.gradients[0]: leaf}
    outputs = row.call(inputs, case.options)
    result = (outputs[0] if isinstance(outputs, tuple) else outputs).square().sum()
    (grad,) = torch.autograd.grad(result, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{case.op}_bwd has no derivative"):
        grad.sum().backward()


def test_gradients_nobody_wants_are_not_computed():
    with testing.record_calls() as recorded:
        x, w = torch.randn(5, 8), torch.randn(8, requires_grad=True)
        gptfast.layer_norm(x, w, torch.randn(8)).sum().backward()
        k = torch.randn(1, 2, 6, 4, requires_grad=True)
        q = torch.randn(1, 2, 6, 4)
        gptfast.attention(q, k, q).sum().backward()
    outputs = {call.op.name(): call.output for call in recorded.calls}
    assert [t.numel() for t in outputs["gptfast::layer_norm_bwd"]] == [0, 8, 0]
    assert [t.numel() for t in outputs["gptfast::attention_bwd"]] == [0, k.numel(), 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=names(DTYPES))
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_threads_or_runs(op, dtype):
    problem = testing.make_problem(testing.OPS[op].many, dtype)
    best = best_backend(op)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(problem.run(best))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


# ---- Dropout -------------------------------------------------------------------------------------


def test_dropout_mask_is_the_same_on_every_backend(isa):
    T, S, p, seed, head = 70, 45, 0.3, 2**62 + 12345, 7
    keep = torch.zeros(T, S, dtype=torch.uint8)
    C.attention_dropout_mask(keep.data_ptr(), head, T, S, dropout_threshold(p), seed)
    i, j = torch.arange(T)[:, None], torch.arange(S)
    z = dropout_factors(torch.tensor(seed), torch.tensor(head), i, j, p, torch.float64)
    assert torch.equal(keep.bool(), z != 0)
    kept = z[z != 0]
    assert torch.equal(kept, torch.full_like(kept, 65536 / round(0.7 * 65536)))


@pytest.mark.parametrize("p", [0.5422286988830567, 0.09999847427368169, 1e-6, 0.999999])
def test_dropout_threshold_is_the_same_on_every_backend(p):
    # (1 - p) 2^16 of the first two is 1e-5 below k + 1/2, on the other side of it in fp32.
    T, S, seed = 64, 512, 5
    keep = torch.zeros(T, S, dtype=torch.uint8)
    C.attention_dropout_mask(keep.data_ptr(), 0, T, S, dropout_threshold(p), seed)
    i, j = torch.arange(T)[:, None], torch.arange(S)
    z = dropout_factors(torch.tensor(seed), torch.tensor(0), i, j, p, torch.float64)
    assert torch.equal(keep.bool(), z != 0)
    # With values of one, attention returns the factors' mean: the sum of what was kept, scaled.
    q = torch.zeros(1, 1, T, 8)
    k, v = torch.zeros(1, 1, S, 8), torch.ones(1, 1, S, 8)
    o = gptfast.attention(q, k, v, dropout_p=p, seed=torch.tensor(seed))
    # 512 equal terms in four lanes: an error of 128 u32 at most, and one key more is a part in 512.
    torch.testing.assert_close(o[0, 0, :, 0].double(), z.mean(-1), rtol=128 * 2**-24, atol=0)


def test_dropout_rate_and_independence():
    i, j = torch.arange(400)[:, None], torch.arange(400)
    head = torch.arange(4)[:, None, None]
    keep = dropout_factors(torch.tensor(99), head, i, j, 0.25, torch.float64) != 0
    n = keep.numel()
    sigma = (0.25 * 0.75 / n) ** 0.5
    assert abs(keep.double().mean() - 0.75) < 5 * sigma
    # Neighbours in each direction agree as often as independent draws do.
    for dim in range(3):
        a, b = keep.narrow(dim, 1, keep.shape[dim] - 1), keep.narrow(dim, 0, keep.shape[dim] - 1)
        both = (a & b).double().mean()
        assert abs(both - 0.75**2) < 5 * (0.75**2 * (1 - 0.75**2) / a.numel()) ** 0.5


def test_dropout_follows_manual_seed():
    q = torch.randn(1, 2, 16, 8)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(gptfast.attention(q, q, q, dropout_p=0.5))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# ---- Backends ------------------------------------------------------------------------------------


def test_a_forced_backend_never_falls_back():
    x = torch.randn(4, 8)
    refused = "gelu: backend 'cuda' is forced"
    with gptfast.use_backend("cuda"), pytest.raises(RuntimeError, match=refused):
        gptfast.gelu(x)
    if os.environ.get("TRITON_INTERPRET") != "1":
        refused = (
            "gelu: backend 'triton' is forced, but (its tensors must be on cuda|triton is not)"
        )
        with gptfast.use_backend("triton"), pytest.raises(RuntimeError, match=refused):
            gptfast.gelu(x)
    with gptfast.use_backend("cpu"), pytest.raises(RuntimeError, match="got float64"):
        gptfast.gelu(x.double())
    with gptfast.use_backend("cpu"), gptfast.use_backend("auto"):
        gptfast.gelu(x.double())
    known = "must be one of auto, torch, cpu, triton, cuda; got 'gpu'"
    with pytest.raises(ValueError, match=known), gptfast.use_backend("gpu"):
        pass


def test_use_backend_reaches_the_kernels(monkeypatch):
    def broken(*args):
        raise ArithmeticError("the cpu kernel ran")

    monkeypatch.setitem(OPS["gelu"].implementations, "cpu", backend.Implementation(broken, broken))
    with pytest.raises(ArithmeticError):
        gptfast.gelu(torch.randn(3))
    with gptfast.use_backend("torch"):
        gptfast.gelu(torch.randn(3))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("GPTFAST_BACKEND", "gpu", "GPTFAST_BACKEND must be one of auto, torch, cpu"),
        ("GPTFAST_CPU_ISA", "sse9", "GPTFAST_CPU_ISA: CPU instruction set must be one of baseline"),
        ("GPTFAST_BACKEND", "cuda", "gelu: backend 'cuda' is forced, but "),
    ],
)
def test_bad_environment(variable, value, message):
    done = run_python("gptfast.gelu(torch.randn(3))", **{variable: value})
    assert done.returncode != 0
    assert message in done.stderr


def test_good_environment():
    code = "print(gptfast.backend.extension().cpu_isa(), gptfast.backend.forced_backend())"
    done = run_python(code, GPTFAST_CPU_ISA="baseline", GPTFAST_BACKEND="torch")
    assert done.stdout.split() == ["baseline", "torch"], done.stderr


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", f"import torch, gptfast; {code}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


# ---- Errors --------------------------------------------------------------------------------------

X, Q = torch.randn(4, 8), torch.randn(1, 4, 6, 8)
TARGET = torch.tensor([0, 1, 2, 3])
ERRORS = [
    (lambda: gptfast.gelu(X.int()), TypeError, "gelu: x must be floating point, got torch.int32"),
    (lambda: gptfast.gelu([1.0]), TypeError, "gelu: x must be a torch.Tensor, got list"),
    (lambda: gptfast.gelu(X, "erf"), ValueError, "gelu: approximate must be 'none' or 'tanh'"),
    (
        lambda: gptfast.linear_gelu(torch.tensor(1.0), X, torch.ones(2)),
        ValueError,
        "linear_gelu: x must be (..., C), got a scalar",
    ),
    (
        lambda: gptfast.linear_gelu(X, torch.ones(7, 5), torch.ones(7)),
        ValueError,
        "linear_gelu: weight must be (N, 8), got (7, 5)",
    ),
    (
        lambda: gptfast.linear_gelu(X, torch.ones(7, 8), torch.ones(8)),
        ValueError,
        "linear_gelu: bias must be (7,), got (8,)",
    ),
    (
        lambda: gptfast.linear_gelu(X, torch.ones(7, 8).half(), torch.ones(7)),
        TypeError,
        "linear_gelu: weight must be torch.float32, got torch.float16",
    ),
    (
        lambda: gptfast.bias_gelu(X, torch.ones(7)),
        ValueError,
        "bias_gelu: bias must be (8,), got (7,)",
    ),
    (
        lambda: gptfast.bias_gelu(torch.tensor(1.0), torch.ones(1)),
        ValueError,
        "bias_gelu: x must have at least one dimension, got a scalar",
    ),
    (
        lambda: gptfast.bias_gelu(X, torch.ones(8), "erf"),
        ValueError,
        "bias_gelu: approximate must be 'none' or 'tanh', got 'erf'",
    ),
    (
        lambda: gptfast.bias_gelu(X, torch.ones(8).int()),
        TypeError,
        "bias_gelu: bias must be floating point, got torch.int32",
    ),
    (
        lambda: gptfast.bias_gelu(X, torch.ones(8, device="meta")),
        RuntimeError,
        "bias_gelu: bias must be on cpu, got meta",
    ),
    (
        lambda: gptfast.layer_norm(X, torch.ones(7)),
        ValueError,
        "layer_norm: weight must be (8,), got (7,)",
    ),
    (
        lambda: gptfast.layer_norm(X, torch.ones(8), torch.ones(8, 1)),
        ValueError,
        "layer_norm: bias must be (8,), got (8, 1)",
    ),
    (lambda: gptfast.layer_norm(torch.tensor(1.0)), ValueError, "at least one dimension"),
    (
        lambda: gptfast.layer_norm(X, torch.ones(8, device="meta")),
        RuntimeError,
        "layer_norm: weight must be on cpu, got meta",
    ),
    (
        lambda: gptfast.cross_entropy(X, TARGET[:3]),
        ValueError,
        "cross_entropy: target must be (4,), got (3,)",
    ),
    (
        lambda: gptfast.cross_entropy(X, TARGET.int()),
        TypeError,
        "cross_entropy: target must be int64 class indices, got torch.int32",
    ),
    (
        lambda: gptfast.cross_entropy(X, TARGET, reduction="avg"),
        ValueError,
        "cross_entropy: reduction must be one of ('none', 'mean', 'sum'), got 'avg'",
    ),
    (
        lambda: gptfast.cross_entropy(X, TARGET, label_smoothing=1.5),
        ValueError,
        "cross_entropy: label_smoothing must be in [0, 1], got 1.5",
    ),
    (
        lambda: gptfast.cross_entropy(X, TARGET, torch.ones(3)),
        ValueError,
        "cross_entropy: weight must be (8,), got (3,)",
    ),
    (
        lambda: gptfast.attention(Q, Q[..., :7], Q),
        ValueError,
        "attention: k must be (1, H_kv, S, 8) and v (1, H_kv, S, Dv), "
        "got (1, 4, 6, 7) and (1, 4, 6, 8)",
    ),
    (
        lambda: gptfast.attention(Q, Q[:, :3], Q[:, :3]),
        ValueError,
        "attention: key heads must divide 4 query heads, got 3",
    ),
    (lambda: gptfast.attention(Q[0], Q, Q), ValueError, "attention: q must be (B, H, T, D)"),
    (
        lambda: gptfast.attention(Q, Q.bfloat16(), Q),
        TypeError,
        "attention: k must be torch.float32, got torch.bfloat16",
    ),
    (
        lambda: gptfast.attention(Q, Q, Q, dropout_p=1.0),
        ValueError,
        "attention: dropout_p must be in [0, 1), got 1.0",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_error(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["torch", "cpu"])
@pytest.mark.parametrize("bad", [8, -1, 2**40])
def test_the_first_target_out_of_range_is_named(name, bad):
    target = torch.tensor([0, -100, bad, 99])
    with gptfast.use_backend(name), pytest.raises(IndexError) as raised:
        gptfast.cross_entropy(X, target)
    expected = f"target must be in [0, 8) or ignore_index -100, got {bad} at position 2"
    assert expected in str(raised.value)


# ---- The checks themselves -----------------------------------------------------------------------


def memory_of(x):
    """The elements of a result in the order in which they lie in memory."""
    return (x if x.is_contiguous() else x.transpose(1, 2)).view(-1)


def plant_small(x, args):
    flat = memory_of(x)
    flat[(flat.abs() - flat.abs().median()).abs().argmin()] *= 1.001


def plant_missing(x, args):
    memory_of(x)[3] = 0


def plant_scaled(x, args):
    x *= 1 + 1e-4


def plant_unwritten(x, args):
    memory_of(x)[3] = torch.empty(1)[0]


def plant_overrun(x, args):
    x.as_strided((1,), (1,), x.storage_offset() + x.numel()).fill_(0)


def plant_in_input(x, args):  # the first argument is an incoming gradient, the second a tensor
    args[1].view(-1)[0] += 1


FAULTS = {
    plant_small: "gradient of",
    plant_missing: "gradient of",
    plant_scaled: "gradient of",
    plant_unwritten: "NaN or infinite",
    plant_overrun: "wrote outside the tensor",
    plant_in_input: "was written to",
}


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_found(op, fault, monkeypatch):
    best = best_backend(op)
    if fault is plant_overrun and best == "torch":
        pytest.skip("PyTorch's own results are not made by the guarded torch.empty")
    right = OPS[op].implementations[best]

    def wrong(*args):
        outputs = right.bwd(*args)
        fault(first_result(op, outputs, args), args)
        return outputs

    planted = backend.Implementation(right.fwd, wrong)
    monkeypatch.setitem(OPS[op].implementations, best, planted)
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        run_case(EXAMPLES[op], best)


@pytest.mark.parametrize("op", OPS)
def test_a_planted_fault_in_forward_is_found(op, monkeypatch):
    best = best_backend(op)
    right = OPS[op].implementations[best]

    def wrong(*args):
        outputs = right.fwd(*args)
        plant_small(first_result(op, outputs, args), args)
        return outputs

    planted = backend.Implementation(wrong, right.bwd)
    monkeypatch.setitem(OPS[op].implementations, best, planted)
    with pytest.raises(AssertionError, match=testing.OPS[op].results[0]):
        run_case(EXAMPLES[op], best)


def test_an_error_message_says_what_is_wrong():
    exact = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    got = exact.float().clone()
    got[1, 0] = 3.1
    expected = (
        r"name: 1 of 4 elements are wrong; worst at \(1, 0\): got 3.0999\d+, exact 3, error 0.1"
    )
    with pytest.raises(AssertionError, match=expected):
        testing.assert_close("name", got, exact, exact, 1e-6 * exact)
    got[1, 0] = torch.nan
    with pytest.raises(AssertionError, match=r"1 of 4 elements differ in being NaN.*\(1, 0\)"):
        testing.assert_close("name", got, exact, exact, 1e-6 * exact)


def test_a_poor_peer_excuses_no_small_element():
    exact = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    got = torch.tensor([1.0, 1.01e-6])
    bound = 2.0**-22 * exact
    for peer in ([1 + 1e-6, 1e-6], [1.0, 1e-6]):
        with pytest.raises(AssertionError):
            testing.assert_close("", got, torch.tensor(peer), exact, bound)
    testing.assert_close(
        "", torch.tensor([1 + 1.5e-6, 1e-6]), torch.tensor([1 + 1e-6, 1e-6]), exact, bound
    )


# ---- Offsets beyond 32 bits: 13 GiB --------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    """More than 2^31 elements, zero but for the last."""
    x = torch.zeros(2**31 + 2**12, dtype=torch.bfloat16)
    x[-5:] = torch.tensor([1.0, -2.0, 3.0, 0.5, -0.1])
    return x


@pytest.mark.slow
def test_offsets_gelu(many):
    last = many[-5:].clone().requires_grad_()
    y = F.gelu(last, approximate="tanh")
    assert torch.equal(gptfast.gelu(many)[-5:], y)
    dx = torch.ops.gptfast.gelu_bwd(many, many, "tanh")[-5:]
    (expected,) = torch.autograd.grad(y, last, last)
    torch.testing.assert_close(dx, expected)


@pytest.mark.slow
def test_offsets_layer_norm(many):
    x = many.view(-1, 2**12)
    y, mean, rstd = torch.ops.gptfast.layer_norm_fwd(x, None, None, 1e-5)
    last = x[-1:].float().requires_grad_()
    expected = F.layer_norm(last, (2**12,))
    torch.testing.assert_close(y[-1:], expected.bfloat16())
    del y
    dy = torch.randn(2**12).bfloat16()
    needs = [True, False, False]
    dx = torch.ops.gptfast.layer_norm_bwd(dy.expand(x.shape), x, None, mean, rstd, needs)[0]
    (exact,) = torch.autograd.grad(expected, last, dy.float()[None])
    torch.testing.assert_close(dx[-1:], exact.bfloat16())


@pytest.mark.slow
def test_offsets_cross_entropy(many):
    V = 2**12
    x, target = many.view(-1, V), torch.full((many.numel() // V,), V - 3)
    loss, lse = torch.ops.gptfast.cross_entropy_fwd(x, target, None, -100, 0.0, 0.0, None, False)
    last = x[-1:].float().requires_grad_()
    expected = F.cross_entropy(last, target[-1:])
    torch.testing.assert_close(loss[-1], expected)
    dx = torch.ops.gptfast.cross_entropy_bwd(loss, x, target, None, lse, -100, 0.0, 0.0, None)
    (exact,) = torch.autograd.grad(expected, last, expected.detach())
    torch.testing.assert_close(dx[-1:], exact.bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 5])  # the path of few queries, and the other
def test_offsets_attention(many, T):
    k = many.view(1, 1, -1, 64)
    q = torch.zeros(1, 1, T, 64, dtype=torch.bfloat16)
    q[..., -3] = 800  # times the 3 of the last key, over 8: all weight lies on it
    o = gptfast.attention(q, k, k)
    assert torch.equal(o, k[:, :, -1:].expand(o.shape))


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
def test_offsets_rope(many, interleaved):
    far = many.numel() - 8
    q = many.as_strided((1, 2, 1, 8), (0, far, 8, 1))  # the second head is the last 8 elements
    cos, sin = (x[3:4] for x in gptfast.rope_cache(4, 8))
    turned, _ = gptfast.rope(q, q, cos, sin, interleaved=interleaved)
    expected, _ = gptfast.rope(q.contiguous(), None, cos, sin, interleaved=interleaved)
    assert turned[0, 1].any()
    assert torch.equal(turned, expected)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 5])  # the path of few rows, and that of tiles
def test_offsets_attention_decode(many, T):
    k = many.view(1, -1, 1, 64)
    q = torch.zeros(1, 1, T, 64, dtype=torch.bfloat16)
    q[..., -3] = 800  # as in `test_offsets_attention`
    lengths = torch.tensor([k.shape[1]], dtype=torch.int32)
    o = gptfast.attention_decode(q, k, k, lengths)
    assert torch.equal(o[:, :, -1], k[:, -1])
    new = torch.full((1, 1, 1, 64), 7.0, dtype=torch.bfloat16)
    cache = many.as_strided((1, 2, 1, 64), (0, many.numel() - 64, 64, 1))
    kept = cache[:, 1].clone()
    gptfast.kv_cache_append(new, new, cache, cache, torch.tensor([2], dtype=torch.int32))
    assert (many[-64:] == 7).all()
    cache[:, 1] = kept
