"""What is special to the two losses: overwritten logits, memory, tied weights, autocast."""

from __future__ import annotations

import sys

import pytest
import torch
from places import ISAS, at_level, implemented
from torch.nn import functional as F

import gptfast
import gptfast.nn
from gptfast import testing
from gptfast.testing import Case, assert_close_in_norm
from gptfast.testing.cross_entropy import loss_options, plain_loss

# Not an import: gptfast.ops has a function of this name.
LINEAR = sys.modules["gptfast.ops.linear_cross_entropy"]


@pytest.fixture
def rows():
    torch.manual_seed(0)
    target = torch.randint(20, (6,))
    target[2] = -100
    return torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True), target


# ---- Overwriting the logits ----------------------------------------------------------------------


def test_backward_overwrites_the_logits_when_asked(rows, place):
    x, w, target = rows
    logits = x.to(place.device) @ w.to(place.device).T
    target = target.to(place.device)
    with gptfast.use_backend(place.backend):
        (expected,) = torch.autograd.grad(
            gptfast.cross_entropy(logits, target), logits, retain_graph=True
        )
        before, address = logits.detach().clone(), logits.data_ptr()
        loss = gptfast.cross_entropy(
            logits.view(2, 3, 20), target.view(2, 3), inplace_backward=True
        )
        assert torch.equal(logits, before)
        (got,) = torch.autograd.grad(loss, logits)
    assert got.data_ptr() == address
    assert torch.equal(got, expected)
    assert torch.equal(logits.detach(), expected)


def test_nothing_is_overwritten_unless_asked(rows):
    x, w, target = rows
    logits = x @ w.T
    before = logits.detach().clone()
    gptfast.cross_entropy(logits, target).backward()
    assert torch.equal(logits.detach(), before)


def test_a_second_backward_through_overwritten_logits_raises(rows):
    x, w, target = rows
    loss = gptfast.cross_entropy(x @ w.T, target, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_backward_that_needs_the_logits_raises(rows):
    x, w, target = rows
    logits = x @ w.T
    other = logits.square().sum()
    gptfast.cross_entropy(logits, target, inplace_backward=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_create_graph_overwrites_nothing(rows):
    x, w, target = rows
    logits = x @ w.T
    before = logits.detach().clone()
    loss = gptfast.cross_entropy(logits, target, inplace_backward=True)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.equal(logits.detach(), before)
    with pytest.raises(RuntimeError, match="cross_entropy_bwd has no derivative"):
        grad.sum().backward()


LEAF = torch.randn(4, 8, requires_grad=True)
REFUSED = {
    "transposed": (lambda: (LEAF * 1).T, "strides (1, 8) for shape (8, 4)"),
    "expanded": (lambda: (LEAF[:1] * 1).expand(4, 8), "strides (0, 1)"),
    "part": (lambda: (LEAF * 1)[:2], "a part of a larger tensor"),
    "columns": (lambda: (LEAF * 1)[:, :5], "strides (8, 1) for shape (4, 5)"),
    "leaf": (lambda: LEAF, "a leaf"),
    "view": (lambda: LEAF.view(8, 4), "a view of a leaf"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_logits_that_must_not_be_overwritten_are_refused(kind):
    make, message = REFUSED[kind]
    logits = make()
    target = torch.zeros(logits.shape[0], dtype=torch.int64)
    with pytest.raises(RuntimeError, match="fill their memory") as raised:
        gptfast.cross_entropy(logits, target, inplace_backward=True)
    assert message in str(raised.value)
    with torch.no_grad():  # where there is no backward
        gptfast.cross_entropy(logits, target, inplace_backward=True)


def test_the_schema_says_what_is_overwritten():
    schema = torch.ops.gptfast.cross_entropy_bwd_.default._schema
    assert [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] == ["x"]
    x = torch.randn(4, 3).T
    with pytest.raises(RuntimeError, match=r"cross_entropy_bwd_: x must be contiguous"):
        torch.ops.gptfast.cross_entropy_bwd_(
            x[:, 0], x, torch.zeros(3).long(), None, x[:, 0], -100, 0.0, 0.0, None
        )


def test_compiled_code_overwrites_too(rows):
    x, w, target = rows

    def loss(logits):
        return gptfast.cross_entropy(logits, target, inplace_backward=True)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for call in (loss, compiled):
        logits = x @ w.T
        results.append(torch.autograd.grad(call(logits), (logits, x, w)))
        assert torch.equal(results[-1][0], logits.detach())
    torch.testing.assert_close(*results)


# ---- Loss and gradient at once -------------------------------------------------------------------

ALL = {"z_loss": 0.1, "softcap": 5.0, "weight": True, "label_smoothing": 0.2, "ignored": 0.3}
AT_ONCE = [
    *(Case("cross_entropy", (9, 37), options={"reduction": r, **ALL}) for r in ("none", "mean")),
    Case("cross_entropy", (2, 3, 41), options={"reduction": "sum", "weight": True}),
    Case("cross_entropy", (4, 9), options={"ignored": 1.0}),
    Case("cross_entropy", (5, 77), "nonfinite", options={"reduction": "none"}),
    Case("cross_entropy", (6, 41), layout="transposed"),
    Case("cross_entropy", (6, 41), layout="sliced", options={"label_smoothing": 0.2}),
    Case("cross_entropy", (0, 16)),
    Case("cross_entropy", (2, 50257)),
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("case", AT_ONCE, ids=str)
def test_loss_and_gradient_at_once(place, case, overwrite):
    for dtype in testing.DTYPES:
        problem = testing.make_problem(case, dtype, place.device)
        logits = problem.inputs["logits"]
        if overwrite:  # a tensor of its own
            logits = logits.clone(memory_format=torch.contiguous_format)
        before, version = logits.clone(), logits._version
        with gptfast.use_backend(place.backend), testing.poison_empty():
            loss, dlogits = gptfast.cross_entropy_with_gradient(
                logits,
                *(problem.inputs[name] for name in ("target", "class_weight")),
                dloss=problem.dys["result"],
                inplace=overwrite,
                **loss_options(case.options),
            )
        problem.judge({"result": loss, "logits": dlogits})
        assert (dlogits is logits, logits._version > version) == (overwrite, overwrite)
        if not overwrite:
            torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


def test_unaligned_loss_and_gradient_at_once(place):
    logits = torch.randn(5 * 41 + 1, device=place.device)[1:].view(5, 41).requires_grad_()
    target = torch.tensor([3, 40, 0, 7, 12], device=place.device)
    expected = F.cross_entropy(logits, target)
    with gptfast.use_backend(place.backend):
        got = gptfast.cross_entropy_with_gradient(logits.detach(), target)
    torch.testing.assert_close(got, (expected.detach(), *torch.autograd.grad(expected, logits)))


def test_one_number_counts_for_every_row():
    logits, target = torch.randn(6, 20), torch.arange(6)
    ours = [
        gptfast.cross_entropy_with_gradient(logits, target, reduction="none", dloss=dloss)
        for dloss in (0.5, torch.tensor(0.5), torch.full((6,), 0.5))
    ]
    for result in ours[:2]:
        assert all(map(torch.equal, result, ours[2]))


def test_gradient_at_once_trains_without_autograd_of_the_loss(rows):
    x, w, target = rows
    expected = torch.autograd.grad(F.cross_entropy(x @ w.T, target), w)[0]
    logits = x @ w.T
    _, dlogits = gptfast.cross_entropy_with_gradient(logits.detach(), target, inplace=True)
    logits.backward(dlogits)
    torch.testing.assert_close(w.grad, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_loss_and_gradient_at_once_are_registered(rows, inplace):
    logits = torch.randn(6, 20)
    name = "cross_entropy_fused_" if inplace else "cross_entropy_fused"
    args = logits, torch.rand(6), rows[2], None, -100, 0.1, 0.0, None
    torch.library.opcheck(getattr(torch.ops.gptfast, name).default, args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(6, 20, requires_grad=True)}, RuntimeError, "must not require grad"),
        ({"logits": torch.ones(20, 6).T, "inplace": True}, RuntimeError, r"strides \(1, 6\)"),
        (
            {"dloss": torch.ones((), requires_grad=True)},
            RuntimeError,
            "dloss must not require grad",
        ),
        ({"dloss": torch.ones(6)}, ValueError, r"dloss must be \(\), got \(6,\)"),
        ({"target": torch.full((6,), 20)}, IndexError, "target must be .*got 20 at position 0"),
    ],
)
def test_loss_and_gradient_at_once_refuse(rows, change, error, message):
    with pytest.raises(error, match=f"^cross_entropy_with_gradient: .*{message}"):
        gptfast.cross_entropy_with_gradient(
            **{"logits": torch.ones(6, 20), "target": rows[2], **change}
        )


# ---- Options -------------------------------------------------------------------------------------


def both(x, w, target, **options):
    yield lambda: gptfast.cross_entropy(x, target, **options)
    yield lambda: gptfast.linear_cross_entropy(x, w, target, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"z_loss": -1.0}, "z_loss must be finite and not negative, got -1.0"),
        ({"z_loss": float("nan")}, "z_loss must be finite and not negative, got nan"),
        ({"softcap": 0.0}, "softcap must be finite and positive, or None; got 0.0"),
        ({"softcap": float("inf")}, "softcap must be finite and positive, or None; got inf"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"label_smoothing": 2}, "label_smoothing must be in [0, 1], got 2"),
    ],
)
def test_options_out_of_range(options, message):
    x = torch.randn(3, 4)
    for call in both(x, torch.randn(5, 4), torch.tensor([0, 1, 2]), **options):
        with pytest.raises(ValueError, match="cross_entropy: ") as raised:
            call()
        assert message in str(raised.value)


X, W, T = torch.randn(4, 8), torch.randn(5, 8), torch.tensor([0, 1, 2, 3])
LINEAR_ERRORS = [
    (lambda f: f(X.int(), W, T), TypeError, "x must be floating point, got torch.int32"),
    (lambda f: f(X, [1.0], T), TypeError, "linear_weight must be a torch.Tensor, got list"),
    (
        lambda f: f(X, W.bfloat16(), T),
        TypeError,
        "linear_weight must be torch.float32, got torch.b",
    ),
    (lambda f: f(X, W.T, T), ValueError, "linear_weight must be (V, 8) with V >= 1, got (8, 5)"),
    (lambda f: f(X, W[0], T), ValueError, "linear_weight must be (V, 8) with V >= 1, got (8,)"),
    (lambda f: f(X, W[:0], T), ValueError, "linear_weight must be (V, 8) with V >= 1, got (0, 8)"),
    (lambda f: f(X.sum(), W, T), ValueError, "x must be (..., C), got a scalar"),
    (lambda f: f(X, W, T[:3]), ValueError, "target must be (4,), got (3,)"),
    (lambda f: f(X, W, T.int()), TypeError, "target must be int64 class indices, got torch.int32"),
    (lambda f: f(X, W, T, torch.ones(4)), ValueError, "linear_bias must be (5,), got (4,)"),
    (lambda f: f(X, W, T, weight=torch.ones(4)), ValueError, "weight must be (5,), got (4,)"),
    (lambda f: f(X, W.to("meta"), T), RuntimeError, "linear_weight must be on cpu, got meta"),
    (lambda f: f(X, W, T + 2), IndexError, "target must be in [0, 5) or ignore_index -100, got 5"),
    (lambda f: f(X, W, T - 1), IndexError, "got -1 at position 0"),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), LINEAR_ERRORS, ids=[e[2] for e in LINEAR_ERRORS]
)
def test_linear_cross_entropy_refuses(call, error, message):
    with pytest.raises(error, match="linear_cross_entropy: ") as raised:
        call(gptfast.linear_cross_entropy)
    assert message in str(raised.value)


def test_the_names_are_torchs(rows):
    x, w, target = rows
    bias, weight = torch.randn(20), torch.rand(20)
    options = {"linear_bias": bias, "weight": weight, "label_smoothing": 0.1, "reduction": "sum"}
    ours = gptfast.linear_cross_entropy(x, w, target, **options)
    if hasattr(F, "linear_cross_entropy"):  # PyTorch 2.13
        torch.testing.assert_close(ours, F.linear_cross_entropy(x, w, target, **options))
    module = gptfast.nn.LinearCrossEntropyLoss(8, 20, bias=True, weight=weight, z_loss=0.1)
    theirs = module.linear(x)
    expected = plain_loss(theirs, target, weight, {"z_loss": 0.1})
    torch.testing.assert_close(module(x, target), expected)


# ---- linear_cross_entropy ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_many_chunks_make_the_same_loss(name, dtype, monkeypatch):
    torch.manual_seed(1)
    x, w, b = torch.randn(70, 24), torch.randn(50, 24), torch.randn(50)
    target, dloss = torch.randint(50, (70,)), torch.rand(70)
    results = []
    for cast, chunk in ((dtype, 128), (dtype, 2**24), (torch.float64, None)):
        leaves = [t.to(dtype).to(cast).requires_grad_() for t in (x, w, b)]
        if chunk is None:
            loss = F.cross_entropy(F.linear(*leaves), target, reduction="none")
        else:
            monkeypatch.setattr(LINEAR, "CHUNK", chunk)
            with gptfast.use_backend(name):
                loss = gptfast.linear_cross_entropy(
                    *leaves[:2], target, leaves[2], reduction="none"
                )
        grads = torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))
        results.append([loss.detach(), *grads])
    for small, whole, exact in zip(*results, strict=True):
        assert_close_in_norm("chunks", small, whole, exact)


TILES = pytest.mark.skipif("amx" not in ISAS, reason="in tiles: on processors with AMX")


@TILES
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 5.0, "label_smoothing": 0.1}])
def test_several_blocks_of_tiles(options):
    """More than 384 classes and 512 tokens, on any number of threads."""
    case = Case("linear_cross_entropy", (600, 900, 40), options={"ignored": 0.1, **options})
    problem = testing.make_problem(case, torch.bfloat16)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(problem.run("cpu"))
    torch.set_num_threads(threads)
    problem.judge(results[0])
    for other in results[1:]:
        for name, result in results[0].items():
            assert torch.equal(result, other[name]), name


@TILES
def test_a_model_takes_it_where_it_is_faster(rows):
    x, half = rows[0], rows[0].bfloat16()
    assert [LINEAR.is_faster(t) for t in (x, half, x.half())] == [True, True, False]
    with torch.autocast("cpu", torch.float16):
        assert not LINEAR.is_faster(x)
        assert LINEAR.is_faster(x.double())
    with gptfast.use_backend("torch"):
        assert not LINEAR.is_faster(half)
    with at_level("avx512"):
        assert not LINEAR.is_faster(half)


def with_gradients(**options):
    """A loss of 50 rows, in chunks of 10, and the leaves that it depends on."""
    x = torch.randn(50, 8, requires_grad=True)
    w = torch.randn(100, 8, requires_grad=True)
    target = torch.randint(100, (50,))
    return gptfast.linear_cross_entropy(x, w, target, **options), (x, w)


@pytest.fixture
def chunks_of_ten(monkeypatch):
    monkeypatch.setattr(LINEAR, "CHUNK", 1000)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_made_in_forward_follow_what_comes_back(chunks_of_ten, reduction):
    loss, leaves = with_gradients(reduction=reduction)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [d.clone() for d in once]
    thrice = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, one, three, before in zip(leaves, once, thrice, kept, strict=True):
        torch.testing.assert_close(three, 3 * before)
        torch.testing.assert_close(leaf.grad, 2 * before)
        assert torch.equal(one, before)  # whatever was added up since


def test_gradients_made_in_forward_refuse_a_second_derivative(chunks_of_ten):
    loss, leaves = with_gradients()
    (dx,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.square().sum().backward()


def test_gradients_are_made_in_forward_in_full_precision_and_chunks(rows):
    x = rows[0]
    made = LINEAR._gradients_in_forward
    assert [made(t) for t in (x, x.double(), x.bfloat16(), x.half())] == [True, True, False, False]
    with torch.autocast("cpu", torch.bfloat16):
        assert not made(x)
    with gptfast.use_backend("triton"):
        assert not made(x)


def largest_tensor(function):
    """Elements of the largest tensor that is made while `function` runs."""
    sizes = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)]
            sizes.extend(t.untyped_storage().nbytes() // t.element_size() for t in tensors)
            return out

    with Watch():
        function()
    return max(sizes)


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_no_more_logits_than_a_chunk_are_stored(name, monkeypatch):
    monkeypatch.setattr(LINEAR, "CHUNK", 2000)
    x, w = torch.randn(300, 8), torch.randn(200, 8)
    x.requires_grad_()
    w.requires_grad_()
    target = torch.randint(200, (300,))

    def step():
        with gptfast.use_backend(name):
            gptfast.linear_cross_entropy(x, w, target, softcap=5.0).backward()

    assert largest_tensor(step) <= max(x.numel(), w.numel(), 2000)


def test_tied_weights_get_both_gradients():
    torch.manual_seed(2)
    tokens = torch.randint(20, (7,))
    results = []
    for dtype in (torch.float32, torch.float64):
        w = torch.randn(20, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
        w.requires_grad_()
        x = F.embedding(tokens, w).tanh()
        if dtype == torch.float32:
            gptfast.linear_cross_entropy(x[:-1], w, tokens[1:]).backward()
        else:
            F.cross_entropy(x[:-1] @ w.T, tokens[1:]).backward()
        results.append(w.grad)
    torch.testing.assert_close(results[0].double(), results[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_is_computed_for_a_frozen_head(rows, reduction):
    x, w, target = rows
    bias, options = torch.randn(20), {"reduction": reduction}
    with gptfast.testing.record_calls() as recorded:
        gptfast.linear_cross_entropy(x, w.detach(), target, bias, **options).sum().backward()
        gptfast.linear_cross_entropy(x.detach(), w, target, **options).sum().backward()
    makes = "total" if reduction == "mean" else "bwd"  # in forward, or in backward
    sizes = [
        [t.numel() for t in call.output[-3:]]
        for call in recorded.calls
        if call.op.name() == f"gptfast::linear_cross_entropy_{makes}"
    ]
    assert sizes == [[x.numel(), 0, 0], [0, w.numel(), 0]]


def test_autocast_casts_what_the_product_takes(rows):
    x, w, target = rows
    weight = torch.rand(20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = gptfast.linear_cross_entropy(x, w, target, weight=weight, reduction="none")
    expected = gptfast.linear_cross_entropy(
        x.bfloat16(), w.bfloat16(), target, weight=weight, reduction="none"
    )
    assert torch.equal(loss, expected)
    assert torch.autograd.grad(loss.sum(), w)[0].dtype == torch.float32


@pytest.mark.parametrize("place", implemented("linear_cross_entropy"), ids=str)
def test_no_columns_but_a_bias(place):
    x, w, b = (torch.randn(s, device=place.device) for s in ((3, 0), (5, 0), (5,)))
    b.requires_grad_()
    target = torch.tensor([1, 2, 3], device=place.device)
    with gptfast.use_backend(place.backend):
        gptfast.linear_cross_entropy(x, w, target, b, reduction="none").sum().backward()
    expected = 3 * b.detach().softmax(0)
    expected[1:4] -= 1
    torch.testing.assert_close(b.grad, expected)


def as_on_a_gpu(monkeypatch):
    """Nobody looks at the targets: on a GPU that would wait."""
    check = sys.modules["gptfast.ops.cross_entropy"].check_targets
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("check_targets") is check:
            monkeypatch.setattr(module, "check_targets", lambda *_: None)
    monkeypatch.setattr(LINEAR, "_in_chunks", lambda: False)


UNCHECKED = [p for p in implemented("cross_entropy") if p.backend != "cpu"]


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("place", UNCHECKED, ids=str)
def test_targets_out_of_range_make_nan(place, reduction, weighted, smoothing, monkeypatch):
    as_on_a_gpu(monkeypatch)
    x, target = torch.randn(5, 7), torch.tensor([3, 7, -1, 2**40, -100])
    weight = torch.rand(7) if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    x, target, weight = (t if t is None else t.to(place.device) for t in (x, target, weight))
    bad = [False, True, True, True, False]

    def losses(call, *leaves):
        with gptfast.use_backend(place.backend):
            loss = call(*leaves)
            return loss, torch.autograd.grad(loss.sum(), leaves)

    loss, (dx,) = losses(
        lambda x: gptfast.cross_entropy(x, target, weight, **options), x.requires_grad_()
    )
    assert loss.isnan().tolist() == (bad if reduction == "none" else True)
    assert dx.isnan().all(1).tolist() == dx.isnan().any(1).tolist() == bad
    assert not dx[-1].any()
    if place.backend == "cuda":
        return
    w = torch.randn(7, 7, device=place.device, requires_grad=True)
    loss, (dx, dw) = losses(
        lambda x, w: gptfast.linear_cross_entropy(x, w, target, weight=weight, **options), x, w
    )
    assert loss.isnan().tolist() == (bad if reduction == "none" else True)
    assert dx.isnan().all(1).tolist() == dx.isnan().any(1).tolist() == bad
    assert not dx[-1].any()
    assert dw.isnan().all()


def test_softcap_whose_inverse_is_no_float(isa):
    loss = gptfast.cross_entropy(torch.zeros(1, 10), torch.tensor([3]), softcap=1e-39)
    torch.testing.assert_close(loss, torch.tensor(10.0).log())
