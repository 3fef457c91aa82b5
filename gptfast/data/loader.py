"""Windows of a split in a shuffled order, each once an epoch; and the documents inside of them.

Which windows a batch has follows from its number alone. So a run that is resumed needs to know no
more than that number, processes share an epoch without talking to each other, and nothing of the
size of the data is kept in memory.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from gptfast.data.dataset import Dataset, windows
from gptfast.data.shards import Split

AHEAD = 2  # batches that are read before they are wanted
ROUNDS = 4  # of the Feistel network; that many make one pseudorandom (Luby and Rackoff, 1988)


class Loader:
    """Batches (x, y) of windows of T tokens that do not overlap, in an order of each epoch's own.

    The windows of an epoch begin at a random one of its first T tokens, so that epochs cut the
    text in different places; at most 2 T tokens of it are left out.

    Args:
        dataset: where the tokens come from.
        split: "train" or "val".
        batch_size: B, windows in a batch.
        block_size: T.
        seed: decides the order.
        rank, world_size: batch number n of this process is number n world_size + rank of all.
        pin_memory: whether batches can be copied to a GPU while it works.

    Attributes:
        position: batches that were taken; may be set at any time.

    Raises:
        ValueError: a split of fewer than T + 1 tokens; from `next`, a token outside the
            vocabulary.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        batch_size: int,
        block_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.tokens = dataset.tokens(split, block_size)
        self.vocab_size = dataset.vocab_size
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        # A block less than there is, where possible: so much room the first window has to move.
        self.windows = max(1, (len(self.tokens) - block_size) // block_size)
        self.position = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gptfast-loader")
        self._ahead: deque[tuple[int, Future[tuple[torch.Tensor, torch.Tensor]]]] = deque()

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch: x, y (B, T) int64 on the CPU."""
        if self._ahead and self._ahead[0][0] != self.position:  # it was set
            self._ahead.clear()
        while len(self._ahead) <= AHEAD:
            position = self.position + len(self._ahead)
            self._ahead.append((position, self._thread.submit(self._read, position)))
        batch = self._ahead.popleft()[1].result()
        self.position += 1
        return batch

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(cancel_futures=True)

    def starts(self, position: int) -> npt.NDArray[np.int64]:
        """(B,) first tokens of the windows in a batch of this process."""
        first = (position * self.world_size + self.rank) * self.batch_size
        numbers = np.arange(first, first + self.batch_size)
        starts = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(numbers // self.windows):
            inside = numbers // self.windows == epoch
            generator = np.random.default_rng((self.seed, int(epoch)))
            room = len(self.tokens) - self.windows * self.block_size
            offset = generator.integers(min(self.block_size, room))
            keys = generator.integers(2**63, size=ROUNDS, dtype=np.uint64)
            order = permute(numbers[inside] % self.windows, self.windows, keys)
            starts[inside] = offset + order * self.block_size
        return starts

    def _read(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = windows(self.tokens, self.starts(position), self.block_size, self.vocab_size)
        return (x.pin_memory(), y.pin_memory()) if self.pin_memory else (x, y)


def permute(
    index: npt.NDArray[np.int64], size: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Where a shuffling of range(size) takes each index; no two indices go to one place.

    A Feistel network permutes the 4^h >= size numbers of 2 h bits; a result that is too large is
    put in again, until it is not.

    Args:
        index: (B,) in [0, size).
        size: length of what is shuffled.
        keys: (ROUNDS,) decide the order.

    Returns:
        (B,) in [0, size).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    result = index.astype(np.uint64)
    todo = np.ones(len(result), bool)
    while todo.any():
        left, right = result[todo] >> half, result[todo] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        result[todo] = (left << half) | right
        todo = result >= np.uint64(size)
    return result.astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread every bit of a number over all of its bits (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def document_bounds(x: torch.Tensor, first_token: int) -> torch.Tensor:
    """Where the documents in a batch begin, if its rows are laid end to end.

    Args:
        x: (B, T) tokens.
        first_token: the token that begins a document; so does the start of a row.

    Returns:
        (S + 1,) int32: S starts, then B T: the cu_seqlens of `attention_varlen`.
    """
    begins = x == first_token
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([x.numel()])]).to(torch.int32)
