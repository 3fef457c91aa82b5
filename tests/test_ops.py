"""Every op on every backend, through the shared cases; and what all ops have in common."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import gptfast
from gptfast import backend, testing
from gptfast.backend import OPS
from gptfast.ops.attention import dropout_factors
from gptfast.testing import CASES, DTYPES, Case, run_case, tail_case

C = backend.extension()
EXAMPLES = {  # one plain case per op
    "layer_norm": Case("layer_norm", (9, 33)),
    "gelu": Case("gelu", (6, 41)),
    "cross_entropy": Case("cross_entropy", (9, 37), options={"label_smoothing": 0.1}),
    "attention": Case("attention", (2, 4, 2, 70, 90, 16), options={"causal": True}),
}


def names(values):
    return [str(v).removeprefix("torch.") for v in values]


def test_every_op_has_an_example():
    assert EXAMPLES.keys() == OPS.keys() == testing.OPS.keys()


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=names(DTYPES))
@pytest.mark.parametrize("name", ["torch", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_case(case, name, dtype):
    run_case(case, name, dtype)


@pytest.mark.parametrize("op", OPS)
def test_case_on_every_simd_level(op, isa):
    for case in (case for case in CASES if case.op == op):
        for dtype in DTYPES:
            run_case(case, "cpu", dtype)


@pytest.mark.parametrize("op", OPS)
def test_every_tail_on_every_simd_level(op, isa):
    for n in range(1, 66):
        for dtype in DTYPES:
            run_case(tail_case(op, n), "cpu", dtype)


@pytest.mark.parametrize("case", EXAMPLES.values(), ids=str)
def test_gradcheck_of_the_reference(case):
    testing.gradcheck(case)


def test_gradcheck_of_the_reference_with_options():
    for options in ({"approximate": "none"}, {"approximate": "tanh"}):
        testing.gradcheck(Case("gelu", (3, 5), options=options))
    for options in (
        {"reduction": "none", "weight": True, "label_smoothing": 0.2, "ignored": 0.3},
        {"reduction": "sum", "ignored": 0.3},
    ):
        testing.gradcheck(Case("cross_entropy", (5, 7), options=options))
    for options in ({"causal": False}, {"causal": True, "dropout_p": 0.4}):
        testing.gradcheck(Case("attention", (1, 4, 2, 6, 9, 3), options=options))
    testing.gradcheck(Case("layer_norm", (4, 6), options={"weight": None, "bias": None}))


# ---- Registration --------------------------------------------------------------------------------


def test_opcheck_sees_every_registered_op():
    seen = set()
    for case in EXAMPLES.values():
        seen |= testing.opcheck(case)
    dropout = Case("attention", (1, 2, 2, 9, 9, 8), options={"causal": True, "dropout_p": 0.2})
    seen |= testing.opcheck(dropout)
    assert seen == {f"gptfast::{op}_{pass_}" for op in OPS for pass_ in ("fwd", "bwd")}


@pytest.mark.parametrize("case", EXAMPLES.values(), ids=str)
def test_compiles_without_a_graph_break(case):
    problem = testing.make_problem(case, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(testing.OPS[case.op].call, fullgraph=True, backend="aot_eager")
    problem.judge(problem.run("auto", call=compiled, poison=False))


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


@pytest.mark.parametrize("case", EXAMPLES.values(), ids=str)
def test_double_backward_refuses(case):
    row = testing.OPS[case.op]
    problem = testing.make_problem(case, torch.float32)
    leaf = problem.inputs[row.gradients[0]].clone().requires_grad_()
    inputs = {**problem.inputs, row.gradients[0]: leaf}
    result = row.call(inputs, case.options).square().sum()
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
    shapes = {
        "layer_norm": Case(op, (2100, 67)),
        "gelu": Case(op, (300, 411)),
        "cross_entropy": Case(op, (40, 2000)),
        "attention": Case(op, (2, 4, 2, 200, 260, 32), options={"causal": True, "dropout_p": 0.1}),
    }
    problem = testing.make_problem(shapes[op], dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(problem.run("cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


# ---- Dropout -------------------------------------------------------------------------------------


def test_dropout_mask_is_the_same_on_every_backend(isa):
    T, S, p, seed, head = 70, 45, 0.3, 2**62 + 12345, 7
    keep = torch.zeros(T, S, dtype=torch.uint8)
    C.attention_dropout_mask(keep.data_ptr(), head, (1, 8, 8, T, S, 16), (False, 1.0, p, seed))
    i, j = torch.arange(T)[:, None], torch.arange(S)
    z = dropout_factors(torch.tensor(seed), torch.tensor(head), i, j, p, torch.float64)
    assert torch.equal(keep.bool(), z != 0)
    kept = z[z != 0]
    assert torch.equal(kept, torch.full_like(kept, 65536 / round(0.7 * 65536)))


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
        ("GPTFAST_BACKEND", "cuda", "gelu: backend 'cuda' is forced, but gelu has no cuda kernel"),
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
        "attention: k and v must both be (1, H_kv, S, 8), got (1, 4, 6, 7) and (1, 4, 6, 8)",
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


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("fault", ["one element off", "scaled", "not written"])
def test_a_planted_fault_is_found(op, fault, monkeypatch):
    right = OPS[op].implementations["cpu"]

    def wrong(*args):
        outputs = right.bwd(*args)
        first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        flat = first.view(-1) if first.is_contiguous() else first.transpose(1, 2).view(-1)
        if fault == "one element off":
            flat[3] += 1e-3 * flat.abs().max()
        elif fault == "scaled":
            flat *= 1 + 1e-4
        else:
            flat[3] = torch.empty(1)[0]
        return outputs

    planted = backend.Implementation(right.fwd, wrong)
    monkeypatch.setitem(OPS[op].implementations, "cpu", planted)
    with pytest.raises(AssertionError, match=rf"{op}.*gradient of"):
        run_case(EXAMPLES[op], "cpu")


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    n = 2**31 + 17
    x = torch.zeros(n, dtype=torch.bfloat16)
    x[-3:] = torch.tensor([1.0, -2.0, 3.0])
    y = gptfast.gelu(x)
    assert torch.equal(y[-3:], F.gelu(x[-3:], approximate="tanh"))
    del y
    rows = gptfast.layer_norm(x[: 2**31].view(-1, 2**11))
    expected = F.layer_norm(x[2**31 - 2**11 : 2**31], (2**11,))
    assert torch.equal(rows[-1], expected)
