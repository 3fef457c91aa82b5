"""Processes that train one model together: `torchrun` starts them, and each knows its rank.

    torchrun --nproc-per-node 2 -m gptfast train ...

Tensors on GPUs travel by NCCL, tensors on the CPU by gloo. Every process computes its share of each
step's batches, and all of them do the same step. Rank 0 alone prints, and writes all but the shards
of `fsdp`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

Result = TypeVar("Result")


class ProcessLostError(ConnectionError):
    """Another process was lost, or did not answer in time.

    Threads of the communication may wait for it even when this process ends: `gptfast train` ends
    without waiting for them.
    """


@dataclass(frozen=True)
class Ranks:
    """This process among all of them; by itself it is the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def on_first(self, function: Callable[[], Result]) -> Result:
        """What a function returns on rank 0, in every process; so is an error that it raises."""
        if self.world_size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except Exception as error:
                dist.broadcast_object_list([None, error], src=0, device=torch.device("cpu"))
                raise
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def total(self, value: float) -> float:
        """The sum of all processes' values."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.item()

    def largest(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """All processes' tensors of one shape, on the CPU, along a new first dimension."""
        if self.world_size == 1:
            return tensor[None]
        tensors = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(tensors, tensor)
        return torch.stack(tensors)


@contextlib.contextmanager
def processes(timeout: float) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, or those of a group that is there already.

    Args:
        timeout: seconds that a process waits for the others before it gives up.

    Raises:
        ValueError: torchrun's variables are not all there.
        RuntimeError: the other processes cannot be reached.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
        return
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Ranks()
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(
                f"WORLD_SIZE is {world_size}: expected {name} in the environment as well, "
                "as torchrun sets it"
            )
    ranks = Ranks(int(os.environ["RANK"]), world_size, int(os.environ["LOCAL_RANK"]))
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backends, timeout=timedelta(seconds=timeout))
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process was lost, or did not answer in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def shard(model: nn.Module, blocks: list[nn.Module], dtype: torch.dtype) -> None:
    """Split the parameters of a model among the processes, with PyTorch's FSDP2.

    The matrices of each block are a group: its processes gather them in `dtype` for the block's
    forward and backward, and let go of them in between. All others (embeddings, and norms and
    biases, which a block of ours shares with the one before it) are one group, there from the start
    of forward to the end of backward.

    Args:
        model: is changed in place; its parameters are then DTensors.
        blocks: modules in it that are called.
        dtype: of the arithmetic.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    matrices = {p for block in blocks for p in block.parameters() if p.dim() >= 2}
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    # From the outside in: what is a group already would not be looked into for norms.
    fully_shard(model, ignored_params=matrices)
    for block in blocks:
        others = {p for p in block.parameters() if p not in matrices}
        fully_shard(block, ignored_params=others, mp_policy=policy)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be split among the processes, put together; all must call this."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
