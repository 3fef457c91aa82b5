"""What is special to embedding: bad tokens, and the options of its module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gptfast

W = torch.randn(8, 4)
IDX = torch.tensor([0, 7, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gptfast.embedding([1], W), TypeError, "idx must be a torch.Tensor, got list"),
        (
            lambda: gptfast.embedding(IDX.double(), W),
            TypeError,
            "idx must be int64 or int32 tokens, got torch.float64",
        ),
        (lambda: gptfast.embedding(IDX, IDX), TypeError, "weight must be floating point"),
        (lambda: gptfast.embedding(IDX, W[0]), ValueError, r"weight must be \(V, C\), got \(4,\)"),
        (lambda: gptfast.embedding(IDX, W, 8), ValueError, r"padding_idx must be in \[-8, 8\)"),
        (lambda: gptfast.embedding(IDX, W, -9), ValueError, "got -9"),
        (
            lambda: gptfast.embedding(IDX.to("meta"), W),
            RuntimeError,
            "idx must be on cpu, got meta",
        ),
    ],
)
def test_error(call, error, message):
    with pytest.raises(error, match=f"embedding: .*{message}"):
        call()


@pytest.mark.parametrize("bad", [8, -1, 2**40])
def test_the_first_token_out_of_range_is_named(bad):
    idx = torch.tensor([[0, 7], [bad, 99]])
    expected = rf"embedding: tokens must be in \[0, 8\), got {bad} at position 2"
    with pytest.raises(IndexError, match=expected):
        gptfast.embedding(idx, W)
    with pytest.raises(IndexError, match=r"\[0, 0\), got 0 at position 0"):
        gptfast.embedding(idx[:1], W[:0])


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}]
)
def test_the_module_refuses_what_it_does_not_do(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"Embedding: {name} must be"):
        gptfast.nn.Embedding(5, 3, **options)


def test_the_module_loads_torchs_weights():
    theirs = nn.Embedding(8, 4, padding_idx=7)
    ours = gptfast.nn.Embedding(8, 4, padding_idx=7)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for module in (ours, theirs):
        y = module(IDX)
        results.append([y, *torch.autograd.grad(y.square().sum(), [module.weight])])
    torch.testing.assert_close(*results)
    loaded = gptfast.nn.Embedding.from_pretrained(W, freeze=False)
    assert torch.equal(loaded(IDX), W[IDX])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_large_vocabulary(isa, dtype):
    """Several blocks of columns, pieces of the vocabulary, and a result that is streamed."""
    V, C, N = 18800 // dtype.itemsize, 1088, 3000  # 20 MB in rows of whole vectors: see stream.h
    idx = (torch.rand(N) ** 4 * V).long()  # the first token a tenth of the time
    dy = torch.randn(N, C).to(dtype)
    exact = torch.zeros(V, C, dtype=torch.float64).index_add_(0, idx, dy.double())
    size = torch.zeros(V, C, dtype=torch.float64).index_add_(0, idx, dy.double().abs())
    exact[1] = 0  # the padding
    # Each of n - 1 sums rounds once, and the result once to its dtype.
    count = idx.bincount(minlength=V)[:, None]
    bound = count * 2.0**-24 * size + torch.finfo(dtype).eps / 2 * exact.abs()
    for _ in range(3):  # in fresh memory, and in what earlier calls have left
        dw = torch.ops.gptfast.embedding_bwd(dy, idx, V, 1)
        assert ((dw.double() - exact).abs() <= bound).all()
        del dw


def test_a_token_that_is_not_there_gives_no_gradient(isa):
    idx = torch.tensor([3, 8, -1, 2**40])
    dy = torch.randn(4, 5)
    with gptfast.use_backend("cpu"):
        dw = torch.ops.gptfast.embedding_bwd(dy, idx, 8, -1)
    assert torch.equal(dw[3], dy[0])
    dw[3] = 0
    assert not dw.any()


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    V, C = 2**21 + 1, 1024  # 4 GiB
    dy = torch.randn(2, C).bfloat16()
    dw = torch.ops.gptfast.embedding_bwd(dy, torch.tensor([V - 1, 0]), V, -1)
    assert torch.equal(dw[[V - 1, 0]], dy)
    assert not dw[1:-1].any()
