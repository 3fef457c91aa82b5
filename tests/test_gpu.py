"""What can only be tested on a GPU: synchronisation, streams, CUDA graphs, very large tensors.

That results are right is tested by the shared cases, in `test_ops.py`, `test_adamw.py` and
`test_gpt_triton.py`; `make gpu` runs those on the GPU and this file.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
import time

import pytest
import torch
from torch.nn import functional as F

import gptfast
from gptfast import backend, testing
from gptfast.models import GPT, GPTConfig
from gptfast.ops.linear_decode import QuantizedWeight
from gptfast.ops.philox import row_factors
from gptfast.optim import AdamW
from gptfast.testing import DTYPES, OPS, assert_close_in_norm, harness

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
EXAMPLES = [case for row in OPS.values() for case in row.examples]


@pytest.fixture(autouse=True)
def on_triton():
    """Not a place: everything here is about the kernels of this backend."""
    with gptfast.use_backend("triton"):
        yield


def run(problem):
    """Results and gradients, without the checks of `Problem.run`, which look at the memory."""
    case = problem.case
    return harness._differentiate(
        OPS[case.op].call, problem.inputs, case, lambda name, _: problem.dys[name]
    )


@contextlib.contextmanager
def no_waiting():
    """Any call that makes the host wait for the GPU raises inside the block."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def assert_same(results, expected):
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


# ---- Order, streams, graphs ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_twice(op, dtype):
    problem = testing.make_problem(OPS[op].many, dtype, "cuda")
    first = problem.run("triton")
    problem.judge(first)
    for _ in range(2):
        assert_same(problem.run("triton"), first)


@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_gpu(op):
    problem = testing.make_problem(OPS[op].many, torch.bfloat16, "cuda")
    run(problem)  # compiles
    with no_waiting():
        run(problem)


@pytest.mark.parametrize("op", OPS)
def test_a_cuda_graph_of_forward_and_backward(op):
    problem = testing.make_problem(OPS[op].many, torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run(problem)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(problem)
    given = [dy.data_ptr() for dy in problem.dys.values()]
    for value in results.values():
        if value.data_ptr() not in given:  # a gradient that is dy itself
            value.fill_(torch.nan)
    graph.replay()
    assert_same(results, expected)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_cuda_graph_of_optimizer_steps(name):
    if backend.missing(name):
        pytest.skip(backend.missing(name))
    sizes = [(1,), (33, 65), (768, 768), (), (100_003,)]
    params = [torch.nn.Parameter(torch.randn(size, device="cuda")) for size in sizes]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    rates = [torch.tensor(0.01, device="cuda") for _ in range(2)]
    ours, eager = (
        AdamW(ps, lr=lr, max_norm=1.0) for ps, lr in zip((params, twins), rates, strict=True)
    )

    def new_gradients():
        for p, twin in zip(params, twins, strict=True):
            twin.grad = torch.randn_like(p)
            p.grad = twin.grad.clone() if p.grad is None else p.grad.copy_(twin.grad)

    def everything(optimizer, ps):
        return [*ps, optimizer.total_norm, *(s for p in ps for s in optimizer.state[p].values())]

    def assert_alike():
        assert all(map(torch.equal, everything(ours, params), everything(eager, twins)))

    with gptfast.use_backend(name):
        new_gradients()
        ours.step()
        eager.step()
        assert_alike()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours.step()
        # Eleven other tables, in what memory there is; none on this stream for these parameters.
        for count in range(1, 12):
            others = [torch.nn.Parameter(torch.randn(100, device="cuda")) for _ in range(count)]
            for p in others:
                p.grad = torch.randn_like(p)
            AdamW(others).step()
        for step in range(3):
            for lr in rates:
                lr.fill_(0.1 / (step + 1))
            new_gradients()
            graph.replay()
            eager.step()
            assert_alike()
        new_gradients()  # and one that no graph makes
        ours.step()
        eager.step()
        assert_alike()


def test_the_first_step_is_not_captured():
    p = torch.nn.Parameter(torch.randn(8, device="cuda"))
    p.grad = torch.randn_like(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        p.grad.mul_(2)  # an empty graph is warned about
        with pytest.raises(RuntimeError, match="must have had a step before"):
            AdamW([p]).step()


@pytest.mark.parametrize("op", OPS)
def test_kernels_run_on_the_current_stream(op):
    problem = testing.make_problem(OPS[op].many, torch.bfloat16, "cuda")
    expected = run(problem)
    # The inputs arrive on a stream that is busy for a while; kernels on any other stream are early.
    stream = torch.cuda.Stream()
    late = {n: None if x is None else torch.zeros_like(x) for n, x in problem.inputs.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for name, x in late.items():
            if x is not None:
                x.copy_(problem.inputs[name])
        results = harness._differentiate(
            OPS[op].call, late, problem.case, lambda name, _: problem.dys[name]
        )
    stream.synchronize()
    assert_same(results, expected)


def test_tokens_and_targets_out_of_range_make_nan_instead_of_a_wait():
    w = torch.randn(8, 16, device="cuda")
    y = gptfast.embedding(torch.tensor([3, 8, -1], device="cuda"), w)
    assert torch.equal(y[0], w[3])
    assert y[1:].isnan().all()
    target = torch.tensor([3, 8, -1], device="cuda")
    loss = gptfast.cross_entropy(torch.randn(3, 8, device="cuda"), target, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]


# ---- Registration --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_compiles_without_a_graph_break(case):
    problem = testing.make_problem(case, torch.float32, "cuda")
    torch._dynamo.reset()
    compiled = torch.compile(OPS[case.op].call, fullgraph=True, backend="aot_eager")
    problem.judge(problem.run("triton", call=compiled, poison=False))


def test_autocast_casts_attention_and_leaves_the_others():
    q = torch.randn(1, 2, 8, 16, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        o = gptfast.attention(q, q, q, causal=True)
        assert gptfast.gelu(q).dtype == torch.float32
    assert o.dtype == torch.bfloat16
    assert torch.autograd.grad(o.sum(), q)[0].dtype == torch.float32


def small_gpt():
    torch.manual_seed(0)
    config = GPTConfig(block_size=64, vocab_size=101, n_layer=2, n_head=2, n_embd=64)
    model = GPT(config).cuda()
    x, y = torch.randint(101, (2, 4, 64), device="cuda")
    return model, x, y


def loss_and_gradients(model, forward, x, y):
    with torch.autocast("cuda", torch.bfloat16):
        loss = forward(x, y)[1]
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def test_inductor_compiles_a_whole_gpt():
    model, x, y = small_gpt()
    exact_model = copy.deepcopy(model).double()
    with gptfast.use_backend("torch"):
        exact_loss = exact_model(x, y)[1]
        exact_loss.backward()
    exact = {"loss": exact_loss.detach()}
    exact |= {name: p.grad for name, p in exact_model.named_parameters()}
    twin = copy.deepcopy(model)
    eager = loss_and_gradients(twin, twin, x, y)
    torch._dynamo.reset()
    compiled = loss_and_gradients(model, torch.compile(model, fullgraph=True), x, y)
    for name, expected in exact.items():
        assert_close_in_norm(name, compiled[name], eager[name], expected)


def test_training_steps_without_a_wait():
    model, x, y = small_gpt()
    optimizer = AdamW(model.parameters(), lr=1e-2, max_norm=1.0)
    losses = []

    def train(steps):
        for _ in range(steps):
            losses.append(loss_and_gradients(model, model, x, y)["loss"])
            optimizer.step()
            optimizer.zero_grad()

    train(2)  # compiles, and makes the state
    with no_waiting():
        train(10)
    assert losses[-1] < losses[0] - 1


# ---- Offsets beyond 32 bits ----------------------------------------------------------------------

LARGE = 2**31 + 2**24  # elements of a tensor, here of bf16: 4.3 GB
ROOM = 45 * 2**30  # bytes: up to eight such tensors, and what is computed for a comparison


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


@pytest.fixture
def memory():
    """Room for the test, once other processes have done with theirs; none is left behind."""
    # The frames of a test that failed, with its tensors, stay alive through these.
    sys.last_traceback = sys.last_value = sys.last_exc = None
    gc.collect()
    torch.cuda.empty_cache()
    for _ in range(60):
        free, _ = torch.cuda.mem_get_info()
        if free > ROOM:
            break
        time.sleep(1)
    else:
        pytest.skip(f"needs 45 GiB of memory on the GPU, {free / 2**30:.0f} are free")
    yield
    torch.cuda.empty_cache()


@pytest.fixture(params=["triton", "cuda"])
def kernels(request):
    """The backend, of those that have kernels for a GPU."""
    if reason := backend.missing(request.param):
        pytest.skip(reason)
    with gptfast.use_backend(request.param):
        yield request.param


def places_of(M, rows):
    """Blocks of rows at both ends, and where element 2^31 lies if a row has LARGE / M."""
    middle = 2**31 // (LARGE // M)
    return [slice(0, rows), slice(middle - rows // 2, middle + rows // 2), slice(M - rows, M)]


def judge_rows(function, peer, tensors, dy, rows=8):
    """Results and gradients of tensors (M, ...) against a peer in fp64 on a few of their rows.

    A wrong address is seen however loose the bound: elements are independent and of order one.
    """
    leaves = [x.requires_grad_() for x in tensors]
    y = function(*leaves)
    grads = torch.autograd.grad(y, leaves, dy)
    for part in places_of(len(dy), rows):
        own = [x.detach()[part].double().requires_grad_() for x in tensors]
        expected = peer(*own)
        theirs = torch.autograd.grad(expected, own, dy[part].double())
        for got, want in zip((y.detach(), *grads), (expected, *theirs), strict=True):
            torch.testing.assert_close(got[part].double(), want.detach(), rtol=2e-2, atol=2e-2)
    return grads


def test_offsets_of_elementwise_ops(memory, kernels):
    x, dy = random(LARGE // 4096, 4096), random(LARGE // 4096, 4096)
    judge_rows(lambda x: gptfast.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), [x], dy)
    up = random(*x.shape)
    judge_rows(gptfast.swiglu, lambda g, u: F.silu(g) * u, [x.detach(), up], dy)
    bias = random(4096)
    erf = lambda x: F.gelu(x + bias)  # noqa: E731
    judge_rows(lambda x: gptfast.bias_gelu(x, bias, "none"), erf, [x.detach()], dy)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_offsets_of_norms(memory, kernels, name):
    N = 4096
    w = random(N).requires_grad_()
    x, dy = random(LARGE // N, N), random(LARGE // N, N)
    ours = {"layer_norm": gptfast.layer_norm, "rms_norm": gptfast.rms_norm}[name]
    theirs = {"layer_norm": F.layer_norm, "rms_norm": F.rms_norm}[name]
    plain = w.detach().double()
    judge_rows(lambda x: ours(x, w, eps=1e-5), lambda x: theirs(x, (N,), plain, eps=1e-5), [x], dy)
    (dw,) = torch.autograd.grad(ours(x.detach(), w, eps=1e-5), w, dy)
    exact = torch.zeros(N, dtype=torch.float64, device="cuda")
    for part in range(0, len(x), 2**14):
        xs, dys = x.detach()[part : part + 2**14].float(), dy[part : part + 2**14].float()
        exact += (dys * theirs(xs, (N,), eps=1e-5)).sum(0)
    # Sums of 2^19 terms of order one, about 724, stored with 8 bits.
    torch.testing.assert_close(dw.double(), exact, rtol=2.0**-8, atol=1.0)


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm", "dropout_add"])
def test_offsets_of_sums(memory, kernels, name):
    if (name, kernels) == ("dropout_add", "cuda"):
        pytest.skip("no CUDA C++ kernel")
    M, N, p = LARGE // 4096, 4096, 0.25
    seed = torch.tensor(12345, device="cuda")
    x, residual, dy = random(M, N), random(M, N), random(M, N)
    if name == "dropout_add":
        r = gptfast.dropout_add(x, residual, p, seed)
    else:
        y, r = getattr(gptfast, name)(x, residual, dropout_p=p, seed=seed, eps=1e-5)
    z = row_factors(seed, torch.Size((M, 64)), p, torch.float32)  # of the first 64 columns
    for part in places_of(M, 64):
        want = residual[part, :64].float() + z[part] * x[part, :64].float()
        torch.testing.assert_close(r[part, :64].float(), want, rtol=2.0**-8, atol=1e-6)
    if name == "dropout_add":
        return
    norm = F.layer_norm if name == "add_layer_norm" else F.rms_norm
    for part in places_of(M, 8):
        want = norm(r[part].double(), (N,), eps=1e-5)
        torch.testing.assert_close(y[part].double(), want, rtol=2e-2, atol=2e-2)
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    y = getattr(gptfast, name)(*leaves, eps=1e-5)[0]
    dx, dresidual = torch.autograd.grad(y, leaves, dy)
    for part in places_of(M, 8):
        own = (x.detach()[part] + residual.detach()[part]).double().requires_grad_()
        (want,) = torch.autograd.grad(norm(own, (N,), eps=1e-5), own, dy[part].double())
        for got in (dx, dresidual):
            torch.testing.assert_close(got[part].double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_of_cross_entropy(memory, kernels, inplace):
    V = 50257
    M = LARGE // V
    x, dy = random(M, V), torch.rand(M, device="cuda") + 0.5
    target = torch.randint(V, (M,), device="cuda")
    given = {part.stop: x[part].double() for part in places_of(M, 8)}
    logits = x.requires_grad_() * 1 if inplace else x.requires_grad_()
    loss = gptfast.cross_entropy(logits, target, reduction="none", inplace_backward=inplace)
    (dx,) = torch.autograd.grad(loss, logits, dy)
    for part in places_of(M, 8):
        own = given[part.stop].requires_grad_()
        want = F.cross_entropy(own, target[part], reduction="none")
        (grad,) = torch.autograd.grad(want, own, dy[part].double())
        torch.testing.assert_close(loss[part].double(), want, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(dx[part].double(), grad, rtol=1e-2, atol=1e-7)


def test_offsets_of_linear_cross_entropy(memory):
    V, C = 61, 1024
    M = LARGE // C
    x, w = random(M, C), random(V, C) / 32
    target, dy = torch.randint(V, (M,), device="cuda"), torch.rand(M, device="cuda") + 0.5
    leaf = x.requires_grad_()
    loss = gptfast.linear_cross_entropy(leaf, w, target, reduction="none")
    (dx,) = torch.autograd.grad(loss, leaf, dy)
    for part in places_of(M, 64):
        own = x.detach()[part].double().requires_grad_()
        want = F.cross_entropy(own @ w.double().T, target[part], reduction="none")
        (grad,) = torch.autograd.grad(want, own, dy[part].double())
        torch.testing.assert_close(loss[part].double(), want, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(dx[part].double(), grad, rtol=2e-2, atol=1e-3)


def test_offsets_of_embedding(memory):
    N, few = 2048, 5
    idx = torch.randint(few, (LARGE // N,), device="cuda")
    w = random(few, N).requires_grad_()
    y = gptfast.embedding(idx, w)
    for part in places_of(len(idx), 8):
        assert torch.equal(y[part], w[idx[part]])
    dy = random(*y.shape)
    del y
    (dw,) = torch.autograd.grad(gptfast.embedding(idx, w), w, dy)
    exact = torch.zeros(few, N, dtype=torch.float64, device="cuda")
    for part in range(0, len(idx), 2**16):
        hit = F.one_hot(idx[part : part + 2**16], few).float()
        exact += hit.T @ dy[part : part + 2**16].float()
    torch.testing.assert_close(dw.double(), exact, rtol=2.0**-8, atol=1.0)
    del dy
    w = random(LARGE // N, N).requires_grad_()  # and now a large table
    idx = torch.tensor([len(w) - 1, 3, len(w) - 1, 2**20 + 5], device="cuda")
    y = gptfast.embedding(idx, w)
    assert torch.equal(y, w[idx])
    dy = random(*y.shape)
    (dw,) = torch.autograd.grad(y, w, dy)
    assert torch.equal(dw[3], dy[1])
    assert torch.equal(dw[2**20 + 5], dy[3])
    torch.testing.assert_close(dw[-1].float(), dy[0].float() + dy[2].float(), rtol=2.0**-8, atol=0)
    assert torch.equal(dw.count_nonzero(), dw[idx.unique()].count_nonzero())


@pytest.mark.parametrize("interleaved", [False, True])
def test_offsets_of_rope(memory, interleaved):
    H, T, D = 32, 2048, 128
    B = LARGE // (H * T * D)
    q = random(B, H, T, D)
    cos, sin = (x.cuda() for x in gptfast.rope_cache(T, D))
    turned, _ = gptfast.rope(q, None, cos, sin, interleaved=interleaved)
    for b in (0, B // 2, B - 1):
        with gptfast.use_backend("torch"):
            want, _ = gptfast.rope(q[b : b + 1], None, cos, sin, interleaved=interleaved)
        torch.testing.assert_close(turned[b : b + 1], want, rtol=2e-2, atol=2e-2)


def test_offsets_of_rope_in_far_heads(memory):
    H, D = 32, 128
    T = LARGE // (H * D)
    q = random(1, H, T, D)
    cos, sin = (x.cuda() for x in gptfast.rope_cache(T, D))
    turned, _ = gptfast.rope(q, None, cos, sin)
    for h in (0, H - 1):
        for part in (slice(0, 64), slice(T - 64, T)):
            with gptfast.use_backend("torch"):
                want, _ = gptfast.rope(q[:, h : h + 1, part], None, cos[part], sin[part])
            torch.testing.assert_close(turned[:, h : h + 1, part], want, rtol=2e-2, atol=2e-2)


def test_offsets_of_attention_qkv(memory):
    H, T, D = 8, 1024, 64
    B = LARGE // (3 * H * T * D)
    qkv, dy = random(B, T, 3 * H * D), random(B, T, H * D)
    y = gptfast.attention_qkv(qkv.requires_grad_(), H, causal=True)
    (dqkv,) = torch.autograd.grad(y, qkv, dy)
    for b in (0, 2**31 // (3 * H * T * D), B - 1):
        own = qkv.detach()[b : b + 1].float().requires_grad_()
        q, k, v = own.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        want = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        (expected,) = torch.autograd.grad(want, own, dy[b : b + 1].float())
        torch.testing.assert_close(y[b].float(), want[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(dqkv[b].float(), expected[0], rtol=2e-2, atol=2e-2)


def test_offsets_of_linear_decode(memory):
    K = 4096
    x = random(3, K) / 64
    w = random(LARGE // K, K)
    y = gptfast.linear_decode(x, w)
    for part in places_of(len(w), 8):
        want = x.float() @ w[part].float().T
        torch.testing.assert_close(y[:, part].float(), want, rtol=1e-2, atol=2e-2)
    del w
    panels = LARGE // (16 * K)
    q = torch.randint(-127, 128, (panels, K // 4, 16, 4), dtype=torch.int8, device="cuda")
    scale = torch.rand(16 * panels, device="cuda") / 64
    y = gptfast.linear_decode(x, QuantizedWeight(q, scale, None, 16 * panels, K))
    for part in places_of(panels, 2):
        w = q[part].transpose(1, 2).reshape(-1, K).float()
        channels = slice(16 * part.start, 16 * part.stop)
        want = x.float() @ (w * scale[channels, None]).T
        torch.testing.assert_close(y[:, channels].float(), want, rtol=1e-2, atol=2e-2)


def test_offsets_of_attention_in_many_heads(memory):
    H, T, D = 8, 1024, 64
    B = LARGE // (H * T * D)
    q, k, v, do = (random(B, H, T, D) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = gptfast.attention(*leaves, causal=True)
    grads = torch.autograd.grad(o, leaves, do)
    for b in (0, 2**31 // (H * T * D), B - 1):
        own = [x.detach()[b : b + 1].float().requires_grad_() for x in leaves]
        want = F.scaled_dot_product_attention(*own, is_causal=True)
        theirs = torch.autograd.grad(want, own, do[b : b + 1].float())
        for got, expected in zip((o, *grads), (want, *theirs), strict=True):
            torch.testing.assert_close(got[b].float(), expected[0], rtol=2e-2, atol=2e-2)


def test_offsets_of_attention_in_one_sequence(memory):
    T, D = LARGE // 64, 64
    q, k = random(1, 1, 16, D), random(1, 1, T, D)
    k[:, :, -3:] = q[:, :, :3] * 8  # so that all weight of three queries lies on the last keys
    o = gptfast.attention(q, k, k, scale=4.0)
    torch.testing.assert_close(o[:, :, :3], k[:, :, -3:], rtol=2e-2, atol=2e-2)
    ends_q = torch.tensor([0, 16], dtype=torch.int32, device="cuda")
    ends_k = torch.tensor([0, T], dtype=torch.int32, device="cuda")
    packed = [x[0].transpose(0, 1) for x in (q, k, k)]
    o = gptfast.attention_varlen(*packed, ends_q, ends_k, 16, T, scale=4.0)
    torch.testing.assert_close(o[:3], packed[1][-3:], rtol=2e-2, atol=2e-2)


def test_offsets_of_caches(memory):
    B, H, D = 64, 32, 64
    S = LARGE // (B * H * D)
    k_cache, v_cache = random(B, S, H, D), random(B, S, H, D)
    lengths = torch.full((B,), S, dtype=torch.int32, device="cuda")
    k, v, q = (random(B, H, 1, D) for _ in range(3))
    gptfast.kv_cache_append(k, v, k_cache, v_cache, lengths)
    assert torch.equal(k_cache[:, -1], k[:, :, 0])
    assert torch.equal(v_cache[:, -1], v[:, :, 0])
    o = gptfast.attention_decode(q, k_cache, v_cache, lengths)
    for b in (0, B - 1):
        own = (x[b : b + 1].transpose(1, 2).float() for x in (k_cache, v_cache))
        want = F.scaled_dot_product_attention(q[b : b + 1].float(), *own)
        torch.testing.assert_close(o[b].float(), want[0], rtol=2e-2, atol=2e-3)


def test_offsets_of_caches_that_grow(memory):
    B, H, D = 64, 32, 64
    S = LARGE // (B * H * D)
    k_cache, v_cache = random(B, S, H, D), random(B, S, H, D)
    lengths = torch.full((B,), S, dtype=torch.int32, device="cuda")
    k, v, q = (random(B, H, 1, D) for _ in range(3))
    o = gptfast.attention_decode_append(q, k, v, k_cache, v_cache, lengths)
    assert torch.equal(k_cache[:, -1], k[:, :, 0])
    assert torch.equal(v_cache[:, -1], v[:, :, 0])
    for b in (0, B - 1):
        own = (x[b : b + 1].transpose(1, 2).float() for x in (k_cache, v_cache))
        want = F.scaled_dot_product_attention(q[b : b + 1].float(), *own)
        torch.testing.assert_close(o[b].float(), want[0], rtol=2e-2, atol=2e-3)


def test_offsets_of_adamw(memory, kernels):
    p = torch.nn.Parameter(random(LARGE))
    p.grad = random(LARGE)
    places = [slice(0, 64), slice(2**31 - 32, 2**31 + 32), slice(LARGE - 64, LARGE)]
    twins = []
    for part in places:
        twins.append(torch.nn.Parameter(p.detach()[part].float()))
        twins[-1].grad = p.grad[part].float()
    torch.optim.AdamW(twins, lr=0.1).step()
    AdamW([p], lr=0.1).step()
    for part, twin in zip(places, twins, strict=True):
        torch.testing.assert_close(p.detach()[part].float(), twin.detach(), rtol=2e-2, atol=2e-2)
