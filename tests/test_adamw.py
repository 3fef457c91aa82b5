"""AdamW against `torch.optim.AdamW` in fp64; `test_triton.py` runs this in the interpreter too."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from places import PLACES

import gptfast
from gptfast import optim
from gptfast.ops import adamw as op
from gptfast.optim import AdamW
from gptfast.testing import DTYPES, Magnitude, assert_close, assert_close_in_norm, rounding_bound
from gptfast.testing.memory import lay_out, poison_empty

HERE = [p for p in PLACES if p.backend in op.OP.implementations]
SIZES = [(1,), (0,), (3, 5), (), (1023,), (1024,), (33, 65), (2049,)]
HYPER = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}

pytestmark = pytest.mark.parametrize("place", HERE, ids=str, indirect=True)


def random_parameters(sizes, dtypes, device="cpu", seed=0):
    """Parameters with gradients, the dtypes in turns."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for i, size in enumerate(sizes):
        dtype = dtypes[i % len(dtypes)]
        p, g = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
        params.append(torch.nn.Parameter(p))
        params[-1].grad = g
    return params


def copies(params, dtype):
    """The same values and gradients in another dtype, contiguous."""
    result = []
    for p in params:
        result.append(torch.nn.Parameter(p.detach().to(dtype, copy=True).contiguous()))
        result[-1].grad = p.grad.to(dtype, copy=True).contiguous()
    return result


def groups_of(params):
    """Two groups with settings of their own."""
    half = len(params) // 2
    return [
        {"params": params[:half], **HYPER},
        {"params": params[half:], **HYPER, "lr": 0.5, "weight_decay": 0.0, "maximize": True},
    ]


def give_state(optimizer, seed=1):
    """Moments in the middle of a training, the same for every optimizer with the same sizes."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            m = torch.randn(p.shape, generator=generator) / 8
            v = torch.rand(p.shape, generator=generator) / 64
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            state = {"step": torch.tensor(6.0, device=p.device)}
            for name, x in (("exp_avg", m), ("exp_avg_sq", v)):
                state[name] = torch.empty_like(p, dtype=dtype).copy_(x)
            if getattr(optimizer, "master_weights", False) and p.dtype != dtype:
                state["master"] = p.detach().float()
            optimizer.state[p] = state


def bounds_of(optimizer, max_norm):
    """How far p, m and v of an fp64 optimizer that is about to step may be off, p's terms in fp32.

    m and v are sums of two terms; the clip factor c in the second is a sum over all gradients.
    w = w - lr lambda w - size m / denominator errs as its terms, and moves as m and as sqrt(v).
    """
    n = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    total = math.sqrt(
        sum(p.grad.square().sum() for g in optimizer.param_groups for p in g["params"])
    )
    c = 1.0 if max_norm is None else min(1.0, max_norm / (total + 1e-6))
    length = 1 if max_norm is None else n
    for group in optimizer.param_groups:
        lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
        for p in group["params"]:
            state, g = optimizer.state[p], (c * p.grad).abs()
            m, v, t = state["exp_avg"].abs(), state["exp_avg_sq"], float(state["step"]) + 1
            new_v = beta2 * v + (1 - beta2) * g**2
            m_size = (2 - beta1) * m + (1 - beta1) * g
            of_m = Magnitude(m_size, (1 - beta1) * g, length)
            of_v = Magnitude(new_v, 2 * (1 - beta2) * g**2, length)
            denominator = (new_v / (1 - beta2**t)).sqrt() + eps
            update = lr / (1 - beta1**t) * (of_m.terms + of_m.condition) / denominator
            w = p.detach().abs()
            of_w = Magnitude((1 + lr * group["weight_decay"]) * w + update, 3 * update, length)
            yield of_w, of_m, of_v


def judge_step(params, place, max_norm=None, masters=False, groups=groups_of):
    """One step on a backend, in poisoned memory, against torch's in fp64."""
    exact, peer = copies(params, torch.float64), copies(params, torch.float32)
    exactly, theirs = torch.optim.AdamW(groups(exact)), torch.optim.AdamW(groups(peer))
    ours = AdamW(groups(params), max_norm=max_norm, master_weights=masters)
    for optimizer in (exactly, theirs, ours):
        give_state(optimizer)
    magnitudes = list(bounds_of(exactly, max_norm))
    given = [p.grad.clone() for p in params]
    with gptfast.use_backend(place.backend), poison_empty():
        ours.step()
    for optimizer, ps in ((exactly, exact), (theirs, peer)):
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(ps, max_norm)
            if optimizer is exactly:
                count = sum(p.numel() for p in ps)
                rtol = 2**-24 * (4 + math.sqrt(count))  # see rounding_bound
                torch.testing.assert_close(ours.total_norm.double(), norm, rtol=rtol, atol=0)
        optimizer.step()
    for i, p in enumerate(params):
        assert torch.equal(p.grad, given[i])
        state = ours.state[p]
        results = {"parameter": p, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        for (name, got), magnitude in zip(results.items(), magnitudes[i], strict=True):
            want, other = (
                q if name == "parameter" else optimizer.state[q][name]
                for optimizer, q in ((exactly, exact[i]), (theirs, peer[i]))
            )
            bound = rounding_bound(want.detach(), magnitude, got.dtype)
            assert_close(f"{name} {i}", got, other, want, bound)
            if name == "parameter" and "master" in state:
                master = state["master"]
                bound = rounding_bound(want.detach(), magnitude, torch.float32)
                assert_close(f"master {i}", master, other, want, bound)
                assert torch.equal(master.to(p.dtype), p)
        assert float(state["step"]) == 7


# ---- One step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9, math.inf])
@pytest.mark.parametrize("dtypes", [*((d,) for d in DTYPES), DTYPES], ids=str)
def test_step(place, dtypes, max_norm):
    judge_step(random_parameters(SIZES, dtypes, place.device), place, max_norm)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), DTYPES], ids=str)
def test_step_of_master_weights(place, dtypes):
    judge_step(random_parameters(SIZES, dtypes, place.device), place, 0.5, masters=True)


@pytest.mark.parametrize("layout", ["transposed", "unaligned"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "transposed", "strided", "expanded"])
def test_layouts(place, layout, grad_layout):
    params = []
    for p in random_parameters([(5, 7), (40, 65), (2, 3, 1100)], DTYPES[:2], place.device):
        if layout == "unaligned":
            memory = p.new_zeros(p.numel() + 1)
            view = memory[1:].view_as(p).copy_(p.detach())
        else:
            view = lay_out(p.detach(), layout)
        params.append(torch.nn.Parameter(view))
        params[-1].grad = lay_out(p.grad, grad_layout)
    judge_step(params, place, 0.5)


def in_small_blocks(place, monkeypatch):
    """Let kernels cut small tensors into several chunks, of several blocks on triton."""
    if place.backend == "cpu":
        monkeypatch.setattr(op, "CPU_CHUNK", 64)
    if place.backend == "cuda":
        monkeypatch.setattr(op, "cuda_chunk", lambda elements: 64)
    if place.backend == "triton":
        from gptfast.kernels import adamw as kernels

        config = kernels.Config(chunk=64, block=16, num_warps=1)
        monkeypatch.setattr(kernels, "pick_config", lambda elements: config)


def test_chunks_of_several_blocks(place, monkeypatch):
    in_small_blocks(place, monkeypatch)
    params = random_parameters([(200,), (64,), (65,), (63,), (16,), (15,)], DTYPES, place.device)
    judge_step(params, place, 0.5, masters=True)


def test_the_tables_of_a_cuda_graph(place, monkeypatch):
    monkeypatch.setattr(op, "is_capturing", lambda device: True)
    in_small_blocks(place, monkeypatch)
    judge_step(random_parameters(SIZES, DTYPES, place.device), place, 0.5, masters=True)


@pytest.mark.parametrize("rounding", [False, True])
def test_a_refused_capture_leaves_no_state(place, monkeypatch, rounding):
    params = random_parameters(SIZES, DTYPES, place.device)
    optimizer = AdamW(params, stochastic_rounding=rounding)
    with monkeypatch.context() as patch:
        patch.setattr(optim, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="must have had a step before one is captured"):
            optimizer.step()
    assert not optimizer.state
    peer = torch.optim.AdamW(copies(params, torch.float32))
    run(peer, peer.param_groups[0]["params"], 1)
    optimizer.load_state_dict(peer.state_dict())
    if rounding:
        monkeypatch.setattr(optim, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="stochastic_rounding must have drawn its seed"):
            optimizer.step()
    assert optimizer.rounding_seed is None


def test_thousands_of_tiny_tensors(place, monkeypatch):
    in_small_blocks(place, monkeypatch)
    count = 100 if place.backend == "triton" and place.device == "cpu" else 5000
    if "cuda" in place:
        count = 1000  # half a minute of 5000 on a card goes into PyTorch's step in fp64
    sizes = [(i % 3 + 1,) for i in range(count)]
    judge_step(random_parameters(sizes, DTYPES, place.device), place, 0.5)


@pytest.mark.parametrize("values", [1e-15, 1e-9, 1e6])
def test_extreme_gradients(place, values):
    params = random_parameters(SIZES, (torch.float32,), place.device)
    for p in params:
        p.grad *= values
    judge_step(params, place, 0.5)


def test_fp64_is_torchs(place):
    if place.backend != "torch":
        pytest.skip("kernels are fp32")
    params = random_parameters(SIZES, (torch.float64,), place.device)
    peer = copies(params, torch.float64)
    ours, theirs = AdamW(groups_of(params), max_norm=0.5), torch.optim.AdamW(groups_of(peer))
    for seed in range(3):
        run(theirs, peer, 1, seed, max_norm=0.5)
        run(ours, params, 1, seed)
        for p, q in zip(params, peer, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_gradients_do_what_they_do_in_torch(place, bad, max_norm):
    params = random_parameters([(40,), (7,)], (torch.float32,), place.device)
    params[0].grad[5] = bad
    peer = copies(params, torch.float32)
    theirs = torch.optim.AdamW(peer)
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(peer, max_norm)
    theirs.step()
    with gptfast.use_backend(place.backend):
        AdamW(params, max_norm=max_norm).step()
    for p, q in zip(params, peer, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)


# ---- Several steps -------------------------------------------------------------------------------


def run(optimizer, params, steps, seed=0, max_norm=None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()


@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_go_both_ways(place, kind, ours_first):
    """Half a run with one class and half with the other is a run with one."""

    def make(cls, dtype, **options):
        params = random_parameters(SIZES, (dtype,), place.device)
        return cls(groups_of(params), **options), params

    exactly, exact = make(torch.optim.AdamW, torch.float64)
    theirs, peer = make(torch.optim.AdamW, torch.float32, **kind)
    ours, params = make(AdamW, torch.float32)
    for optimizer, p in ((exactly, exact), (theirs, peer)):
        run(optimizer, p, 3)
        run(optimizer, p, 3, seed=1)
    with gptfast.use_backend(place.backend):
        if ours_first:
            run(ours, params, 3)
            second = make(torch.optim.AdamW, torch.float32, **kind)[0]
        else:
            first, params = make(torch.optim.AdamW, torch.float32, **kind)
            run(first, params, 3)
            second, ours = AdamW(groups_of(params)), first
        if ours_first:
            second.param_groups = torch.optim.AdamW(groups_of(params), **kind).param_groups
        second.load_state_dict(copy.deepcopy(ours.state_dict()))
        run(second, params, 3, seed=1)
    for i, p in enumerate(params):
        assert_close_in_norm(f"parameter {i}", p, peer[i], exact[i].detach())
        assert float(second.state[p]["step"]) == 6


def test_state_of_half_precision_survives(place):
    params = random_parameters(SIZES, DTYPES[1:], place.device)
    clones = copies(params, torch.float32)
    clones = [
        torch.nn.Parameter(c.detach().to(p.dtype)) for c, p in zip(clones, params, strict=True)
    ]
    ours = AdamW(params, master_weights=True)
    other = AdamW(clones, master_weights=True)
    with gptfast.use_backend(place.backend):
        run(ours, params, 2)
        with torch.no_grad():
            for clone, p in zip(clones, params, strict=True):
                clone.copy_(p)
        state = ours.state_dict()
        other.load_state_dict(state)
        for p, q in zip(params, clones, strict=True):
            for name in ("exp_avg", "exp_avg_sq", "master"):
                assert other.state[q][name].dtype == torch.float32
                assert torch.equal(other.state[q][name], ours.state[p][name])
                assert p.numel() == 0 or (
                    other.state[q][name].data_ptr() != ours.state[p][name].data_ptr()
                )
        run(ours, params, 2, seed=1)
        run(other, clones, 2, seed=1)
    for p, q in zip(params, clones, strict=True):
        assert torch.equal(p, q)


def test_masters_see_what_bfloat16_would_lose(place):
    p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device=place.device))
    q = copy.deepcopy(p)
    with gptfast.use_backend(place.backend):
        for x, masters in ((p, True), (q, False)):
            optimizer = AdamW([x], lr=1e-3, weight_decay=0.0, master_weights=masters)
            for _ in range(10):
                x.grad = torch.ones_like(x)
                optimizer.step()
    assert torch.equal(q, torch.ones_like(q))  # a step is less than half of bfloat16's
    assert torch.equal(p, torch.full_like(p, 0.99))


def rounded_at_random(backend, seed, dtype=torch.bfloat16, device="cpu"):
    """A step of 2^-10 from ones, of which bfloat16 has 1 and 1 - 2^-8."""
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.ones(n, dtype=dtype, device=device)) for n in (4099, 37)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = AdamW(params, lr=2**-10, weight_decay=0.0, stochastic_rounding=True)
    with gptfast.use_backend(backend):
        optimizer.step()
    return params


def test_rounding_at_random(place):
    if place.backend not in ("torch", "cuda"):
        with pytest.raises(RuntimeError, match="rounding at random takes the cuda backend"):
            rounded_at_random(place.backend, 1, device=place.device)
        return
    params = rounded_at_random(place.backend, 1, device=place.device)
    again = rounded_at_random(place.backend, 1, device=place.device)
    other = rounded_at_random(place.backend, 2, device=place.device)
    for p, q, r in zip(params, again, other, strict=True):
        assert set(p.tolist()) == {1.0, 1 - 2**-8}
        assert torch.equal(p, q)
        assert not torch.equal(p, r)
    share = float((params[0] < 1).float().mean())
    assert abs(share - 1 / 4) < 5 * math.sqrt(3 / 16 / 4099)  # five deviations
    reference = rounded_at_random("torch", 1, device=place.device)
    for p, q in zip(params, reference, strict=True):
        # w of the two may differ in its last bit, and so the sum of 16 bits in one of 65536 cases.
        assert (p != q).float().mean() < 0.005


def test_rounding_at_random_of_what_needs_none(place):
    if place.backend not in ("torch", "cuda"):
        pytest.skip("rounds to nearest only")
    params = random_parameters(SIZES, DTYPES, place.device)
    peer = [torch.nn.Parameter(p.detach().clone()) for p in params]
    params[0].grad[0] = math.nan
    for p, q in zip(params, peer, strict=True):
        q.grad = p.grad.clone()
    with gptfast.use_backend(place.backend):
        AdamW(params, stochastic_rounding=True).step()
        AdamW(peer).step()
    for p, q in zip(params, peer, strict=True):
        if p.dtype == torch.bfloat16:
            torch.testing.assert_close(p, q, rtol=2**-7, atol=0, equal_nan=True)
        else:
            torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


def test_the_same_twice(place):
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        params = random_parameters([(70_000,), (3,), (300, 70)], DTYPES, place.device)
        with gptfast.use_backend(place.backend):
            run(AdamW(params, max_norm=0.1), params, 2)
        torch.set_num_threads(before)
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


def test_parameters_without_gradient_stay(place):
    params = random_parameters([(5,), (6,)], (torch.float32,), place.device)
    before = params[0].detach().clone()
    params[0].grad = None
    optimizer = AdamW(params)
    with gptfast.use_backend(place.backend):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state
    params[1].grad = None
    optimizer.step()
    assert float(optimizer.state[params[1]]["step"]) == 1


def test_lr_is_a_tensor(place):
    params = random_parameters([(5,), (6,)], (torch.float32,), place.device)
    peer = copies(params, torch.float32)
    lr = torch.tensor(0.1, device=place.device)
    ours, theirs = AdamW(params, lr=lr), torch.optim.AdamW(peer, lr=0.1)
    with gptfast.use_backend(place.backend):
        for value in (0.1, 0.2):
            lr.fill_(value)
            theirs.param_groups[0]["lr"] = value
            ours.step()
            theirs.step()
    for p, q in zip(params, peer, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("overflows", [True, False])
def test_gradient_scaler(place, unscales, overflows):
    params = random_parameters([(50,), (3, 4)], (torch.float32,), place.device)
    if overflows:
        params[1].grad[0, 0] = math.inf
    peer = copies(params, torch.float32)
    optimizers = AdamW(params, max_norm=0.5), torch.optim.AdamW(peer)
    for optimizer, ps in zip(optimizers, (params, peer), strict=True):
        scaler = torch.amp.GradScaler(place.device, init_scale=1024.0)
        scaler.scale(torch.zeros((), device=place.device))
        for p in ps:
            p.grad *= 1024
        if ps is peer or unscales:
            scaler.unscale_(optimizer)
        if ps is peer:
            torch.nn.utils.clip_grad_norm_(peer, 0.5)
        with gptfast.use_backend(place.backend):
            scaler.step(optimizer)
        scaler.update()
    for p, q in zip(params, peer, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert float(optimizers[0].state[p]["step"]) == (0 if overflows else 1)


def test_closure_and_the_default_of_one_group(place):
    (p,) = random_parameters([(5,)], (torch.float32,), place.device)
    optimizer = AdamW([("w", p)])

    def closure():
        p.grad = None
        loss = p.square().sum()
        loss.backward()
        return loss

    with gptfast.use_backend(place.backend):
        assert optimizer.step(closure).requires_grad
    assert optimizer.total_norm is None


def test_a_scheduler_moves_lr(place):
    (p,) = random_parameters([(5,)], (torch.float32,), place.device)
    (q,) = copies([p], torch.float32)
    with gptfast.use_backend(place.backend):
        for x, cls in ((p, AdamW), (q, torch.optim.AdamW)):
            optimizer = cls([x], lr=0.1)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            for _ in range(4):
                optimizer.step()
                scheduler.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


# ---- Registration, launches ----------------------------------------------------------------------


def arguments(device="cpu", found_inf=None):
    params = [p.detach() for p in random_parameters([(5,), (2, 3)], (torch.float32,), device)]
    m, v, g = ([p.abs() for p in params] for _ in range(3))
    steps = [torch.ones((), device=device) for _ in params]
    hyper = [0.1, 0.9, 0.99, 1e-8, 0.1, 0.0]
    return [params, g, m, v, steps, [], [0, 0], hyper, [], 1.0, None, found_inf]


def test_registration(place):
    with gptfast.use_backend(place.backend):
        torch.library.opcheck(torch.ops.gptfast.adamw_fwd.default, tuple(arguments(place.device)))


def test_compiles_in_one_graph(place):
    def step(*args):
        return op.adamw_fwd(*args) * 2

    ours, theirs = arguments(place.device), arguments(place.device)
    torch._dynamo.reset()
    with gptfast.use_backend(place.backend):
        norm = torch.compile(step, fullgraph=True, backend="aot_eager")(*ours)
        expected = step(*theirs)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("max_norm", "launches"), [(None, 2), (1.0, 3)])
def test_launches_do_not_grow_with_the_number_of_tensors(place, monkeypatch, max_norm, launches):
    if place.backend != "triton":
        pytest.skip("of the triton backend")
    from gptfast.kernels import adamw as kernels

    count = []
    for name in ("adamw_norm_kernel", "adamw_prepare_kernel", "adamw_update_kernel"):
        kernel = getattr(kernels, name)
        counted = type(
            "Counted", (), {"__getitem__": lambda _, grid, k=kernel: count.append(1) or k[grid]}
        )
        monkeypatch.setattr(kernels, name, counted())
    for sizes in ([(3,)], [(3,)] * 50):
        params = random_parameters(sizes, DTYPES, place.device)
        with gptfast.use_backend("triton"):
            AdamW(groups_of(params), max_norm=max_norm).step()
        assert len(count) == launches
        count.clear()


def test_chunk_sizes(place):
    pytest.importorskip("triton")
    from gptfast.kernels.adamw import pick_config

    assert [pick_config(n).chunk for n in (0, 1, 4096 * 1024, 124_439_808, 10**12)] == [
        *(1024, 1024, 1024, 16384, 65536)
    ]


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"foreach": False, "fused": True}, {"fused": False}, {"capturable": True}],
    ids=str,
)
def test_what_chooses_an_implementation_in_torch_changes_nothing(place, options):
    results = []
    for given in ({}, options):
        params = random_parameters(SIZES, (torch.float32,), place.device)
        optimizer = AdamW(params, **given)
        with gptfast.use_backend(place.backend):
            run(optimizer, params, 2)
        peer = torch.optim.AdamW(params)
        peer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(peer, params, 1)
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


# ---- Bad input -----------------------------------------------------------------------------------


def test_a_parameter_with_gaps(place):
    memory = torch.randn(4, 6, device=place.device)
    p = torch.nn.Parameter(memory[:, :3])
    p.grad = torch.randn(4, 3, device=place.device)
    (q,) = copies([p], torch.float32)
    optimizer = AdamW([p])
    if place.backend != "torch":
        refused = (
            rf"adamw: backend '{place.backend}' is forced, but parameter 0 must fill its memory"
        )
        with gptfast.use_backend(place.backend), pytest.raises(RuntimeError, match=refused):
            optimizer.step()
    outside = memory[:, 3:].clone()
    optimizer.step()
    torch.optim.AdamW([q]).step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert torch.equal(memory[:, 3:], outside)


W = torch.nn.Parameter(torch.ones(3))
ERRORS = {
    "amsgrad must be False, got True": lambda: AdamW([W], amsgrad=True),
    "differentiable must be False, got True": lambda: AdamW([W], differentiable=True),
    "foreach and fused must not both be True": lambda: AdamW([W], foreach=True, fused=True),
    "lr must be at least 0, got -1": lambda: AdamW([W], lr=-1),
    "stochastic_rounding must be False with master_weights": lambda: AdamW(
        [W], master_weights=True, stochastic_rounding=True
    ),
    "eps must be at least 0, got -1": lambda: AdamW([W], eps=-1),
    "weight_decay must be at least 0, got nan": lambda: AdamW([W], weight_decay=math.nan),
    "betas must be in [0, 1), got (0.9, 1.0)": lambda: AdamW([W], betas=(0.9, 1.0)),
    "max_norm must be at least 0 or None, got -1": lambda: AdamW([W], max_norm=-1),
    "lr must be a number or one float32, got (2,)": lambda: AdamW([W], lr=torch.ones(2)),
    "parameters must be floating point, got torch.complex64": lambda: AdamW(
        [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    ),
    "parameters must be on cpu, got meta": lambda: AdamW(
        [W, torch.nn.Parameter(torch.ones(3, device="meta"))]
    ),
    "exp_avg must be (3,), got (4,)": lambda: AdamW([W]).load_state_dict(state_of(4)),
    "amsgrad must be False, got": lambda: AdamW([W]).load_state_dict(state_of(3, amsgrad=True)),
    "must be decoupled": lambda: AdamW([W]).load_state_dict(state_of(3, torch.optim.Adam)),
    "gradients must be dense, got torch.sparse_coo": lambda: sparse_step(),
}


def state_of(n, cls=torch.optim.AdamW, **options):
    p = torch.nn.Parameter(torch.ones(n))
    p.grad = torch.ones(n)
    optimizer = cls([p], **options)
    optimizer.step()
    return optimizer.state_dict()


def sparse_step():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3).to_sparse()
    AdamW([p]).step()


@pytest.mark.parametrize("message", ERRORS)
def test_error(place, message):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
        ERRORS[message]()
    assert message in str(raised.value)


def test_a_state_that_does_not_fit_changes_nothing(place):
    params = random_parameters([(3,)], (torch.float32,), place.device)
    optimizer = AdamW(params)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="got"):
        optimizer.load_state_dict(state_of(4))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_a_group_that_does_not_fit_is_not_added(place):
    optimizer = AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="lr must be at least 0"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": -1})
    assert len(optimizer.param_groups) == 1


def test_autograd_sees_that_parameters_changed(place):
    w = torch.nn.Parameter(torch.ones(4, device=place.device))
    y = (w * w).sum()
    y.backward(retain_graph=True)
    with gptfast.use_backend(place.backend):
        AdamW([w], lr=0.5).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_lr_on_another_device_is_refused(place):
    w = torch.nn.Parameter(torch.ones(2, device=place.device))
    with pytest.raises(ValueError, match=rf"lr must be on the CPU or on {w.device}, .* got meta"):
        AdamW([w], lr=torch.tensor(0.5, device="meta"))
