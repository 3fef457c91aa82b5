"""What `test_triton.py` runs with TRITON_INTERPRET=1: the shared cases on the triton backend.

`conftest.py` has repaired the interpreter by then.
"""

from __future__ import annotations

import json
import time

import pytest
import torch
from places import first_result
from test_attention import test_no_query_heads  # noqa: F401 - the interpreter is another place
from test_attention_decode import test_a_window_wider_than_every_cache  # noqa: F401
from test_cross_entropy import (  # noqa: F401
    test_no_columns_but_a_bias,
    test_targets_out_of_range_make_nan,
)
from test_edges import (  # noqa: F401
    KEEP_ONE,
    test_dropout_that_keeps_one_element,
    test_dropout_that_keeps_one_score,
)
from test_linear_decode import test_no_columns_and_more_dimensions  # noqa: F401
from triton.runtime import interpreter

import gptfast
from benchmarks.static_report.traffic import Counting
from benchmarks.tune import tune_case
from gptfast import backend, targets, tuning
from gptfast.kernels import attention_decode, cross_entropy, layer_norm, linear_cross_entropy
from gptfast.testing import CASES, DTYPES, OPS, Case, make_problem, run_case

TRITON = [op for op in OPS if "triton" in backend.OPS[op].implementations]
LARGE = 3_000  # elements of a case; what is larger takes the interpreter seconds
SMALL = (
    64  # what has more runs in one dtype in `make test`, in turns, and in all in `make test-slow`
)


def work(case):
    """Elements of a case; of the logits, for linear_cross_entropy; of the scores, for attention,
    where dropout costs ten times as much.
    """
    if case.op == "linear_cross_entropy":
        return torch.Size(case.shape[:-1]).numel()
    if case.op == "kv_cache_append":  # takes a program a token
        B, H_kv, T, *_ = case.shape
        return B * H_kv * T
    if case.op in ("attention_decode", "attention_decode_append"):  # whose heads share a tile
        B, _, H_kv, _, S, *_ = case.shape
        return B * H_kv * S // 3
    if case.op == "attention_varlen":
        scores = case.shape[0] * sum(T * max(S, 1) for T, S in case.options["lengths"])
    elif case.op == "attention":
        B, H, _, T, S, _ = case.shape
        scores = B * H * T * max(S, 1)
    elif case.op == "attention_qkv":
        B, T, _ = case.shape
        scores = B * case.options["heads"][0] * T * T
    else:
        return torch.Size(case.shape).numel()
    return scores * (10 if case.options.get("dropout_p") else 1) // 8


def cases_and_dtypes():
    cases = [case for case in CASES if case.op in TRITON and work(case) <= LARGE]
    for number, case in enumerate(cases):
        for turn, dtype in enumerate(DTYPES):
            now = work(case) <= SMALL or turn == number % len(DTYPES)
            marks = () if now else pytest.mark.slow
            yield pytest.param(case, dtype, id=f"{case}-{dtype}", marks=marks)


@pytest.mark.parametrize(("case", "dtype"), list(cases_and_dtypes()))
def test_case(case, dtype):
    run_case(case, "triton", dtype)


@pytest.mark.parametrize("op", TRITON)
@pytest.mark.parametrize("n", [1, 15, 16, 17])
def test_tails(op, n):
    run_case(OPS[op].tail(n), "triton")


@pytest.mark.parametrize("op", TRITON)
def test_a_planted_wrong_value_is_found(op, monkeypatch):
    implementations = backend.OPS[op].implementations
    right = implementations["triton"]

    def wrong(*args):
        outputs = right.fwd(*args)
        first = first_result(op, outputs, args)
        first[first.abs() == first.abs().max()] *= 1.001
        return outputs

    monkeypatch.setitem(implementations, "triton", backend.Implementation(wrong, right.bwd))
    with pytest.raises(AssertionError, match="elements are wrong"):
        run_case(OPS[op].examples[0], "triton")


def test_rows_wider_than_a_block(monkeypatch):
    monkeypatch.setattr(layer_norm, "MAX_FORWARD", 64)
    monkeypatch.setattr(layer_norm, "MAX_BACKWARD", 32)
    monkeypatch.setattr(cross_entropy, "MAX_BLOCK", 16)
    tuning.forget()
    for case in CASES:
        if (case.op.endswith("_norm") or case.op == "cross_entropy") and work(case) <= 700:
            run_case(case, "triton")
    tuning.forget()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_chunks_and_runs_of_the_vocabulary(dtype, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 1)
    monkeypatch.setattr(linear_cross_entropy, "vocabulary_runs", lambda M, V, config: 3)
    options = {"bias": True, "weight": True, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 5.0}
    for case in (
        Case("linear_cross_entropy", (5, 400, 24)),
        Case("linear_cross_entropy", (70, 300, 16), options={"reduction": "none", **options}),
    ):
        run_case(case, "triton", dtype)


def test_tuning_changes_launches(tmp_path, monkeypatch):
    # Times of the interpreter say nothing about a card, but it has something to tune: it runs one
    # program after another, so that fewer and larger tiles take less of the processor's time.
    def measure(run):
        times = []
        for _ in range(3):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return min(times)

    case = Case("gelu", (3_000,))
    found = tune_case(case, torch.float32, "cpu", measure)
    (tuned,) = found["sm_80"]["gelu.pick_config"].values()
    (tmp_path / "tuned.json").write_text(json.dumps(found))
    monkeypatch.setenv("GPTFAST_TUNED", str(tmp_path / "tuned.json"))
    tuning.forget()
    with tuning.observed() as picked:
        run_case(case, "triton")
    monkeypatch.undo()
    tuning.forget()
    (config,) = picked.values()
    assert {name: getattr(config, name) for name in tuned} == tuned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_dk_and_dv_of_wide_heads_in_a_launch_each(dropout_p, dtype):
    options = {"causal": True, "dropout_p": dropout_p, "softcap": 3.0, "Dv": 20}
    problem = make_problem(Case("attention", (1, 2, 1, 20, 33, 136), options=options), dtype)
    with targets.assume("sm_90"), Counting() as counting:
        problem.judge(problem.run("triton", poison=False))
    launched = [name for name, _ in counting.launches]
    assert launched.count("attention_bwd_dkdv_kernel") == 2


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("wanted", ["k", "v"])
def test_a_gradient_of_keys_or_values_alone(wanted, target):
    shapes = {"q": (1, 2, 5, 130), "k": (1, 1, 9, 130), "v": (1, 1, 9, 130)}
    inputs = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}

    def gradient(*names):
        leaves = {n: x.detach().requires_grad_(n in names) for n, x in inputs.items()}
        with targets.assume(target), gptfast.use_backend("triton"), Counting() as counting:
            gptfast.attention(**leaves).sum().backward()
        assert (leaves["q"].grad is None) == ("q" not in names)
        launched = [name for name, _ in counting.launches]
        kernels = ("attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel")
        return leaves[wanted].grad, [launched.count(name) for name in kernels]

    (alone, launches), (together, _) = gradient(wanted), gradient("q", "k", "v")
    assert torch.equal(alone, together)
    assert launches == [wanted == "k", 1]  # dk wants the delta of the dq kernel


@pytest.mark.parametrize("parts", [2, 5, 40])
def test_keys_visited_in_parts(parts, monkeypatch):
    monkeypatch.setattr(attention_decode, "pick_parts", lambda *args: parts)
    shape, options = (3, 4, 2, 3, 170, 16, 16), {"ragged": True}
    for more in ({}, {"window": (20, 0), "page_size": 7}, {"softcap": 2.0, "alibi": True}):
        run_case(Case("attention_decode", shape, options={**options, **more}), "triton")


@pytest.mark.parametrize("page_size", [None, 16])
def test_decoding_reads_keys_and_values_once_for_all_query_heads(page_size):
    B, H, H_kv, T, S, D, Dv = 2, 8, 2, 3, 96, 16, 32
    options = {} if page_size is None else {"page_size": page_size}
    case = Case("attention_decode", (B, H, H_kv, T, S, D, Dv), options=options)
    problem = make_problem(case, torch.bfloat16)
    with Counting() as counting:
        problem.judge(problem.run("triton", poison=False))
    ((_, counter),) = counting.launches
    caches = B * H_kv * S * (D + Dv) * 2
    table = 0 if page_size is None else B * H_kv * S * 4
    others = B * H * T * (D * 2 + Dv * 2 + 4) + B * H_kv * 4  # q, o, lse, lengths
    assert counter.issued == caches + table + others


# ---- Offsets beyond 32 bits ----------------------------------------------------------------------

FAR = 2**30  # elements: a stride that 32 bits hold, and twice that they do not


@pytest.fixture
def far_apart(monkeypatch):
    """Makes three blocks at this distance in 4 GB of addresses, of which a few pages are used."""
    # It would copy all that memory onto itself: on a CPU the interpreter works on what it is given.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)

    def blocks(*shape):
        memory = torch.empty(2 * FAR + torch.Size(shape).numel(), dtype=torch.float16)
        x = torch.randn(3, *shape)
        return memory.as_strided(x.shape, (FAR, *x.stride()[1:])).copy_(x)

    return blocks


def agree(results, expected):
    """A wrong address is seen however loose the bound: elements are independent, of order one."""
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_heads_of_rope_far_apart(far_apart):
    q, k, dy = (far_apart(2, 8)[None] for _ in range(3))
    cos, sin = gptfast.rope_cache(2, 8)

    def run(name, *tensors):
        q, k, dy = tensors
        leaves = q.requires_grad_(), k.requires_grad_()
        with gptfast.use_backend(name):
            turned = gptfast.rope(*leaves, cos, sin)
            return *turned, *torch.autograd.grad(turned, leaves, (dy, dy))

    agree(run("triton", q, k, dy), run("torch", *(x.clone() for x in (q, k, dy))))


def test_packed_projections_far_apart(far_apart):
    qkv, dy = far_apart(4, 64), far_apart(4, 32)

    def run(name, qkv, dy):
        qkv.requires_grad_()
        with gptfast.use_backend(name):
            y = gptfast.attention_qkv(qkv, 2, 1, causal=True)
            return y, *torch.autograd.grad(y, qkv, dy)

    agree(run("triton", qkv, dy), run("torch", qkv.detach().contiguous(), dy.contiguous()))


def test_packed_attention_refuses_a_factor_that_fp16_has_not():
    """As `attention` does, see `test_dropout_that_keeps_one_score`."""
    tokens = torch.randn(5, 2, 16).half()
    ends = torch.tensor([0, 5], dtype=torch.int32)
    for call in (
        lambda p: gptfast.attention_qkv(tokens.view(1, 5, 32).repeat(1, 1, 3), 2, dropout_p=p),
        lambda p: gptfast.attention_varlen(*[tokens] * 3, ends, ends, 5, 5, dropout_p=p),
    ):
        with gptfast.use_backend("triton"):
            call(0.5)
            with pytest.raises(backend.RefusedError, match="float16 has no factor for a dropout_p"):
                call(KEEP_ONE)


@pytest.mark.parametrize("table", [None, [[2], [0], [1]]])
def test_caches_far_apart(table, far_apart):
    q, k, v = (torch.randn(3, heads, 1, 16).half() for heads in (4, 2, 2))
    lengths = torch.tensor([4, 2, 3], dtype=torch.int32)
    table = None if table is None else torch.tensor(table, dtype=torch.int32)

    def run(name, *caches):
        with gptfast.use_backend(name):
            o = gptfast.attention_decode_append(q, k, v, *caches, lengths, block_table=table)
        return o, *caches

    caches = far_apart(4, 2, 16), far_apart(4, 2, 16)
    copies = [cache.contiguous() for cache in caches]
    agree(run("triton", *caches), run("torch", *copies))


def test_rows_of_linear_decode_far_apart(far_apart):
    x, w = far_apart(40), torch.randn(18, 40).half()
    with gptfast.use_backend("triton"):
        y = gptfast.linear_decode(x, w)
    agree([y], [torch.nn.functional.linear(x.contiguous(), w)])
