"""What only attention and attention_varlen have: PyTorch's own with explicit masks, errors."""

from __future__ import annotations

import math

import pytest
import torch
from places import INTERPRET, implemented
from torch.nn import functional as F

import gptfast
from gptfast import testing
from gptfast.ops.attention import OP
from gptfast.targets import TARGETS

Q, K = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8)
PACKED_Q, PACKED_K = torch.randn(5, 4, 8), torch.randn(7, 2, 8)
ENDS_Q, ENDS_K = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 4, 7]))


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same(call, other, leaves):
    """Values and gradients of two functions of the same tensors."""
    ours, theirs = call(), other()
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(theirs, leaves, dy)
    )


@pytest.mark.parametrize(("T", "S"), [(7, 12), (12, 7), (9, 9)])
@pytest.mark.parametrize("window", [(2, 3), (0, 0), (-1, 1), (4, -1), (-1, -1)])
@pytest.mark.parametrize("causal", [False, True])
def test_windows_are_masks_of_pytorch(T, S, window, causal):
    q, k, v = random(1, 2, T, 4), random(1, 2, S, 4), random(1, 2, S, 4)
    left, right = window
    mask = torch.zeros(T, S, dtype=torch.bool)
    for i in range(T):
        for j in range(S):
            diagonal = i + S - T
            after = left < 0 or j >= diagonal - left
            before = (right < 0 or j <= diagonal + right) and (not causal or j <= diagonal)
            mask[i, j] = after and before
    assert_same(
        lambda: gptfast.attention(q, k, v, causal=causal, window=window),
        lambda: F.scaled_dot_product_attention(q, k, v, mask),
        (q, k, v),
    )


@pytest.mark.parametrize("own", [False, True])
def test_alibi_is_a_bias_of_pytorch(own):
    q, k, v = random(2, 4, 5, 4), random(2, 2, 8, 4), random(2, 2, 8, 3)
    slopes = torch.rand((2, 4) if own else (4,))
    i, j = torch.arange(5)[:, None], torch.arange(8)
    bias = -slopes.double()[..., None, None] * (i + 3 - j).abs()
    assert_same(
        lambda: gptfast.attention(q, k, v, alibi_slopes=slopes),
        lambda: F.scaled_dot_product_attention(
            q, k, v, bias if own else bias[None], enable_gqa=True
        ),
        (q, k, v),
    )


def test_softcap_comes_before_the_mask():
    q, k, v = random(1, 2, 5, 4), random(1, 2, 5, 4), random(1, 2, 5, 4)

    def spelled_out():
        scores = 1.5 * torch.tanh(q @ k.mT / 2 / 1.5)
        return torch.softmax(scores.masked_fill(~torch.ones(5, 5).bool().tril(), -math.inf), -1) @ v

    assert_same(
        lambda: gptfast.attention(q, k, v, causal=True, softcap=1.5), spelled_out, (q, k, v)
    )


def test_varlen_is_a_loop_over_sequences():
    q, k, v = random(10, 4, 6), random(12, 2, 6), random(12, 2, 5)
    ends_q, ends_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3, 10], [0, 5, 7, 12]))

    def loop():
        parts = []
        for b in range(3):
            rows, keys = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
            T, S = rows.stop - rows.start, keys.stop - keys.start
            mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
            own = (x[None].transpose(1, 2) for x in (q[rows], k[keys], v[keys]))
            o = F.scaled_dot_product_attention(*own, mask, enable_gqa=True)
            parts.append(o[0].transpose(0, 1))
        return torch.cat(parts)

    assert_same(
        lambda: gptfast.attention_varlen(q, k, v, ends_q, ends_k, 7, 5, causal=True),
        loop,
        (q, k, v),
    )


def test_the_log_sum_exp_alone_is_differentiable():
    q, k = random(1, 2, 5, 4), random(1, 2, 5, 4)
    assert_same(
        lambda: gptfast.attention(q, k, k, return_lse=True)[1],
        lambda: torch.logsumexp(q @ k.mT / 2, -1),
        (q, k),
    )


def test_slopes_keep_their_digits_under_autocast():
    q, slopes = torch.zeros(1, 2, 64, 8), torch.tensor([1 + 2**-10, 1.0])
    with torch.autocast("cpu", torch.bfloat16):
        _, lse = gptfast.attention(q, q, q, alibi_slopes=slopes, return_lse=True)
    exact = torch.logsumexp(-slopes[0].double() * torch.arange(64), -1)
    torch.testing.assert_close(lse[0, 0, 0].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", implemented("attention"), ids=str, indirect=True)
def test_scores_far_below_zero(place):
    # exp of a key behind the last one, whose score is 0, would be infinite beside a row like this.
    q, k = (torch.full((1, 1, 5, 8), x, device=place.device) for x in (30.0, -30.0))
    v = torch.randn(1, 1, 5, 8, device=place.device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with gptfast.use_backend(place.backend):
        o = gptfast.attention(*leaves)
        grads = torch.autograd.grad(o, leaves, torch.randn_like(o))
    assert o.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.skipif(not INTERPRET, reason="runs kernels in Triton's interpreter")
@pytest.mark.parametrize("window", [(10, 0), (0, 10), (3, 2)])
def test_hidden_blocks_are_not_touched(window):
    # Half of the keys lie before every window, and then half of the queries behind it.
    for T, S, dead in ((64, 1024, slice(0, 512)), (1024, 64, slice(0, 512))):
        q, k, v, do = (torch.randn(1, 1, n, 16) for n in (T, S, S, T))
        for x in (q, do) if T > S else (k, v):
            x[:, :, dead] = math.nan
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with gptfast.use_backend("triton"):
            o = gptfast.attention(*leaves, window=window)
            dq, dk, dv = torch.autograd.grad(o, leaves, do)
        if T < S:
            assert o.isfinite().all()
            assert dq.isfinite().all()
            assert (dk[:, :, dead] == 0).all()
        else:
            assert (o[:, :, dead] == 0).all()
            assert dk.isfinite().all()
            assert dv.isfinite().all()


@pytest.mark.parametrize("name", TARGETS)
def test_every_call_has_a_configuration(name):
    pytest.importorskip("triton")
    from gptfast.kernels.attention import key_gradients, pick_config

    for D in (1, 16, 40, 64, 80, 96, 111, 128, 256):
        for itemsize in (2, 4):
            of_keys = key_gradients(D, 16, itemsize, TARGETS[name])
            for kernel in ("fwd", "dq", *of_keys):
                for dropout in (False, True):
                    config = pick_config(kernel, D, 16, itemsize, dropout, TARGETS[name])
                    own = config.block_n if kernel in of_keys else config.block_m
                    assert own >= 16
                    assert own % 16 == 0


def test_the_grid_has_one_axis_however_many_heads(monkeypatch):
    pytest.importorskip("triton")
    from gptfast.kernels import attention

    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("fwd", "bwd_dq", "bwd_dkdv"):
        monkeypatch.setattr(attention, f"attention_{name}_kernel", Kernel())
    q = torch.randn(1, 1, 1, 8).expand(70_000, 2, 1, 8)
    options = (None, None, 1.0, -1, 0, 0.0, 0.0)
    o, lse = attention.attention_fwd(q, q, q, *options)
    attention.attention_bwd(o, q, q, q, o, lse, None, *options, [True, True, True], None)
    assert grids == [(140_000,)] * 3


def test_a_head_dim_beyond_the_kernels_is_refused_before_launch():
    wide = torch.randn(1, 1, 3, 257)
    refused = "its head dim must be at most 256, got 257"
    assert OP.implementations["triton"].why_not(Q, K, wide) == refused
    assert gptfast.attention(wide, wide, wide).shape == wide.shape


def varlen(q=PACKED_Q, k=PACKED_K, ends_q=ENDS_Q, ends_k=ENDS_K, longest=(3, 4), **options):
    return gptfast.attention_varlen(q, k, options.pop("v", k), ends_q, ends_k, *longest, **options)


def ends(*values):
    return torch.tensor(values, dtype=torch.int32)


ERRORS = [
    (lambda: gptfast.attention(Q, K, K, window=(1, -2)), ValueError,
     "attention: window must be (left, right), each at least -1, got (1, -2)"),
    (lambda: gptfast.attention(Q, K, K, window=(1,)), ValueError, "window must be (left, right)"),
    (lambda: gptfast.attention(Q, K, K, softcap=0.0), ValueError,
     "attention: softcap must be positive and finite, got 0.0"),
    (lambda: gptfast.attention(Q, K, K, softcap=math.nan), ValueError, "got nan"),
    (lambda: gptfast.attention(Q, K, K, alibi_slopes=torch.ones(3)), ValueError,
     "attention: alibi_slopes must be (4,) or (2, 4), got (3,)"),
    (lambda: gptfast.attention(Q, K, K, alibi_slopes=torch.ones(4).half()), TypeError,
     "attention: alibi_slopes must be torch.float32, got torch.float16"),
    (lambda: gptfast.attention(Q, K, K, alibi_slopes=torch.ones(4, device="meta")), RuntimeError,
     "attention: alibi_slopes must be on cpu, got meta"),
    (lambda: gptfast.attention(Q, K, K[:, :, :8]), ValueError,
     "attention: k must be (2, H_kv, S, 8) and v (2, H_kv, S, Dv), "),
    (lambda: gptfast.attention(Q, K[:, :1].expand(2, 3, 9, 8), K), ValueError,
     "attention: key heads must divide 4 query heads, got 3"),
    (lambda: varlen(Q), ValueError, "attention_varlen: q must be (N, H, D), got (2, 4, 6, 8)"),
    (lambda: varlen(v=PACKED_K[:6]), ValueError,
     "attention_varlen: k must be (N_k, H_kv, 8) and v (N_k, H_kv, Dv), "),
    (lambda: varlen(ends_q=ENDS_Q.long()), TypeError,
     "attention_varlen: cu_seqlens_q must be torch.int32, got torch.int64"),
    (lambda: varlen(ends_q=ENDS_Q[:2]), ValueError,
     "attention_varlen: cu_seqlens_q and cu_seqlens_k must both be (B + 1,), got (2,) and (3,)"),
    (lambda: varlen(ends_q=ends(1, 2, 5)), ValueError,
     "attention_varlen: cu_seqlens_q must start at 0, got 1"),
    (lambda: varlen(ends_k=ends(0, 4, 8)), ValueError,
     "attention_varlen: cu_seqlens_k must end at the 7 tokens, got 8"),
    (lambda: varlen(ends_k=ends(0, 8, 7)), ValueError,
     "attention_varlen: cu_seqlens_k must not decrease, got 8 before 7 at position 1"),
    (lambda: varlen(longest=(2, 4)), ValueError,
     "attention_varlen: max_seqlen_q must be at least 3, got 2"),
    (lambda: varlen(alibi_slopes=torch.ones(3, 4)), ValueError,
     "attention_varlen: alibi_slopes must be (4,) or (2, 4), got (3, 4)"),
    (lambda: varlen(dropout_p=1.0), ValueError, "attention_varlen: dropout_p must be in [0, 1)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[e[2][:60] for e in ERRORS])
def test_error(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 1, 200, 700, 16), (1, 3, 3, 80, 600, 16)])
def test_bits_do_not_depend_on_how_backward_is_split(shape, dtype):
    # With 2 threads one key head is too few, and with 4 so are three: dk and dv, and dq, are
    # then made in two passes.
    case = testing.Case("attention", shape, options={"causal": True, "dropout_p": 0.1})
    problem = testing.make_problem(case, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(problem.run("cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("place", implemented("attention"), ids=str)
def test_no_query_heads(place):
    q, k = (torch.randn(1, H, 4, 16, device=place.device) for H in (0, 2))
    k.requires_grad_()
    if place.backend == "cuda":
        pytest.skip("fp32, and no backward")
    with gptfast.use_backend(place.backend):
        gptfast.attention(q, k, k).sum().backward()
    assert not k.grad.any()


@pytest.mark.parametrize("window", [(1.5, 0), (torch.tensor(1), 0)])
def test_a_window_of_something_else(window):
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(TypeError, match="window must be two integers"):
        gptfast.attention(q, q, q, window=window)
