"""The loader: every window once an epoch, in an order that its number alone decides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast.data import Dataset, Loader, document_bounds
from gptfast.data.loader import ROUNDS, permute
from gptfast.data.shards import ShardedTokens
from gptfast.tokenizer import CharTokenizer


def dataset_of(length, shards=1, vocab_size=50_000):
    tokens = np.arange(length, dtype=np.uint16)
    parts = np.array_split(tokens, shards)
    tokenizer = CharTokenizer(map(chr, range(1, vocab_size + 1)))
    return Dataset(tokens if shards == 1 else ShardedTokens(parts), tokens[:0], tokenizer)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_permute_is_a_bijection(size, seed):
    keys = np.random.default_rng(seed).integers(2**63, size=ROUNDS, dtype=np.uint64)
    assert sorted(permute(np.arange(size), size, keys).tolist()) == list(range(size))


def test_permute_shuffles():
    keys = np.random.default_rng(0).integers(2**63, size=ROUNDS, dtype=np.uint64)
    order = permute(np.arange(10_000), 10_000, keys)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    steps = np.diff(np.sort(np.diff(order)))
    assert len(np.unique(np.diff(order))) > 5000
    assert steps.max() < 2000
    # Far beyond what fits into memory, without any.
    large = permute(np.array([0, 1, 2**50]), 2**50 + 1, keys)
    assert len(set(large.tolist())) == 3
    assert large.max() <= 2**50


@pytest.mark.parametrize(("length", "shards"), [(1000, 1), (1000, 7), (21, 1), (11, 1)])
def test_an_epoch_has_every_window_once(length, shards):
    T = 10
    loader = Loader(dataset_of(length, shards), "train", 1, T, seed=3)
    for epoch in range(3):
        batches = [loader.next() for _ in range(loader.windows)]
        assert all(torch.equal(x[:, 1:], y[:, :-1]) for x, y in batches)
        seen = sorted(int(x[0, 0]) for x, _ in batches)
        assert np.all(np.diff(seen) == T), epoch  # no overlap, no gap
        assert length - (seen[-1] + T + 1 - seen[0]) < 2 * T
    loader.close()


def test_epochs_differ_and_seeds_differ():
    loader = Loader(dataset_of(2000), "train", 4, 10, seed=1)
    n = loader.windows // 4
    first, second = ([loader.starts(k).tolist() for k in range(a, a + n)] for a in (0, n))
    assert first != second
    other = Loader(dataset_of(2000), "train", 4, 10, seed=2)
    assert first != [other.starts(k).tolist() for k in range(n)]
    offsets = {int(loader.starts(k * n)[0]) % 10 for k in range(20)}
    assert len(offsets) > 4


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_an_epoch(world):
    dataset, B = dataset_of(1000, 3), 4
    whole = Loader(dataset, "train", B, 10, seed=5)
    expected = [whole.starts(n).tolist() for n in range(24)]
    loaders = [
        Loader(dataset, "train", B, 10, seed=5, rank=r, world_size=world) for r in range(world)
    ]
    given = [loader.starts(n).tolist() for n in range(24 // world) for loader in loaders]
    assert given == expected
    assert len(np.unique(expected)) == 24 * B


def test_a_position_is_all_that_is_needed_to_go_on():
    dataset = dataset_of(3000, 4)
    loader = Loader(dataset, "train", 3, 10, seed=7)
    batches = [loader.next()[0] for _ in range(150)]  # beyond an epoch, which has 99
    for position in (0, 1, 60, 140):
        again = Loader(dataset, "train", 3, 10, seed=7)
        again.position = position
        assert torch.equal(again.next()[0], batches[position])
        assert torch.equal(again.next()[0], batches[position + 1])
        assert again.position == position + 2
        again.position = 5  # with others read ahead
        assert torch.equal(again.next()[0], batches[5])
        again.close()
    loader.close()


def test_what_a_loader_refuses():
    with pytest.raises(ValueError, match=r"train must have at least block_size \+ 1 = 11 .* got 9"):
        Loader(dataset_of(9), "train", 1, 10)
    loader = Loader(dataset_of(100, vocab_size=50), "train", 20, 4)
    with pytest.raises(ValueError, match=r"expected token ids in \[0, 50\), got \d\d"):
        loader.next()
    loader.close()


def test_document_bounds():
    x = torch.tensor([[9, 1, 2, 9, 3], [4, 5, 9, 9, 6], [9, 9, 9, 9, 9]])
    bounds = document_bounds(x, 9)
    assert bounds.tolist() == [0, 3, 5, 7, 8, 10, 11, 12, 13, 14, 15]
    assert bounds.dtype == torch.int32
    assert document_bounds(x, 77).tolist() == [0, 5, 10, 15]
