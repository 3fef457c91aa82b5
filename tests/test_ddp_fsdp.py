"""Every op in DDP and FSDP2, with two processes on a CPU."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

import gptfast
from benchmarks.plain_models import PLAIN, Sizes
from gptfast import testing
from gptfast.patching import OPS

EXAMPLES = {op: row.examples[0] for op, row in testing.OPS.items() if row.gradients}


class EveryOp(nn.Module):
    """Each differentiable op on parameters of its own; x scales what goes in."""

    def __init__(self):
        super().__init__()
        self.inputs = {}
        for op, case in EXAMPLES.items():
            inputs = dict(testing.make_problem(case, torch.float32).inputs)
            for name in testing.OPS[op].gradients:
                if inputs[name] is not None:
                    weight = nn.Parameter(inputs.pop(name).contiguous().clone())
                    self.register_parameter(f"{op}__{name}", weight)
            self.inputs[op] = inputs

    def forward(self, x):
        total = x.new_zeros(())
        for op, case in EXAMPLES.items():
            row = testing.OPS[op]
            learned = {
                name: x * getattr(self, f"{op}__{name}")
                for name in row.gradients
                if hasattr(self, f"{op}__{name}")
            }
            result = row.call({**self.inputs[op], **learned}, case.options)
            result = result[0] if isinstance(result, tuple) else result
            total = total + result.float().square().mean()
        return total


def models():
    """What is trained, by name, and its loss on one process's share."""
    torch.manual_seed(0)

    def every_op(model, rank):
        return model(torch.tensor(1.0 + 0.1 * rank))

    def language_model(model, rank):
        idx = torch.randint(67, (2, 17), generator=torch.Generator().manual_seed(rank))
        return model(idx[:, :-1], idx[:, 1:].contiguous())[1]

    patched = PLAIN["script GPT"](Sizes())
    gptfast.patch(patched, ops=list(OPS))
    return {"every op": (EveryOp(), every_op), "patched": (patched, language_model)}


def train(model, loss, ranks, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (sum(loss(model, rank) for rank in ranks) / len(ranks)).backward()
        optimizer.step()


def work(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for wrap in (data_parallel, sharded):
            for name, (model, loss) in models().items():
                alone = models()[name][0]
                train(alone, loss, (0, 1))
                wrapped, whole = wrap(model)
                train(wrapped, loss, (rank,))
                for (key, p), q in zip(alone.named_parameters(), whole(), strict=True):
                    torch.testing.assert_close(q, p.detach(), msg=f"{wrap.__name__} {name} {key}")
    finally:
        dist.destroy_process_group()


def data_parallel(model):
    return nn.parallel.DistributedDataParallel(model), lambda: [
        p.detach() for p in model.parameters()
    ]


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in getattr(model, "h", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, lambda: [p.full_tensor().detach() for p in model.parameters()]


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_train_as_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.spawn(work, (port,), nprocs=2)
