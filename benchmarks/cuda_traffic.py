"""Bytes that the CUDA kernels move over the least possible: `python -m benchmarks.cuda_traffic`.

Counted with no GPU, by executing the kernels on the host runner; csrc/cuda/host/traffic.cpp says
how. The least is what a call is given and returns, each byte once; but see `least_of`.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import tyro

import gptfast
from benchmarks.static_report.calls import Call, registered_calls, reports_of
from gptfast import backend, targets
from gptfast.backend import dtype_name
from gptfast.testing import DTYPES, Case, cuda_host

# Of the ops with CUDA kernels, those that do little but read and write.
OPS = (
    *("adamw", "add_layer_norm", "add_rms_norm", "bias_gelu", "cross_entropy", "gelu", "glu"),
    *("layer_norm", "rms_norm"),
)
Names = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


class Traffic(NamedTuple):
    """Bytes of one call."""

    read: int
    written: int
    least: int

    @property
    def ratio(self) -> float:
        """Moved over least."""
        return (self.read + self.written) / self.least


def count(call: Call) -> Traffic:
    """Execute a call on the `cuda` backend, and count."""
    module = cuda_host.load(counts=True)
    launch = backend.launch_cuda_on
    module.take()

    def watch(*tensors: Any) -> None:
        for x in tensors:
            if isinstance(x, torch.Tensor):  # all of the memory in which a view lies
                storage = x.untyped_storage()
                module.watch(storage.data_ptr(), storage.nbytes())

    def watched(place: torch.device, kernel: str, *args: Any) -> None:
        watch(*args)
        launch(place, kernel, *args)

    watch(*call.reads, *call.writes)
    with (
        backend.cuda_on_cpu(module),
        gptfast.use_backend("cuda"),
        mock.patch.object(backend, "launch_cuda_on", watched),
        torch.no_grad(),
    ):
        call.op(*call.args)
    read, written = module.take()
    return Traffic(read, written, least_of(call))


def least_of(call: Call) -> int:
    """Bytes that a call has to move.

    AdamW needs the norm of all gradients before the first update, so clipping has to read them
    twice; and it writes a weight that has a master copy without a look at it.
    """
    least = sum(map(_bytes, (*call.reads, *call.writes)))
    if call.name == "adamw_fwd":
        params, grads, _, _, _, masters, _, _, _, max_norm, *_ = call.args
        least += sum(map(_bytes, grads)) if max_norm is not None else 0
        least -= sum(_bytes(p) for p, m in zip(params, masters, strict=False) if m.numel())
    return least


def calls(case: Case, dtype: torch.dtype) -> list[Call]:
    """Forward and backward of a case, and what does both at once."""
    found = registered_calls(case, dtype)
    if case.op == "cross_entropy":
        fwd, bwd = found
        dloss, x, target, weight, _, *options = bwd.args
        reads = [t for t in (x, dloss, target, weight) if t is not None]
        op = torch.ops.gptfast.cross_entropy_fused.default
        args = (x, dloss, target, weight, *options)
        writes = fwd.writes[0], *bwd.writes
        found.append(Call("cross_entropy_fused", op, args, tuple(reads), writes))
    return found


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def main(
    op: Annotated[Names, tyro.conf.arg(help="Only this op; may repeat.")] = (),
    dtype: Annotated[Names, tyro.conf.arg(help="Only this dtype; may repeat.")] = (),
    target: Annotated[str, tyro.conf.arg(help="Whose shared memory blocks may use.")] = "sm_80",
) -> None:
    """Print the bytes of every case that the ops' `reports` name."""
    with targets.assume(target):
        for name in op or OPS:
            for case in reports_of(name):
                for d in DTYPES:
                    if dtype and dtype_name(d) not in dtype:
                        continue
                    for call in calls(case, d):
                        traffic = count(call)
                        print(
                            f"{case} {dtype_name(d)} {call.name}: read {traffic.read}, written "
                            f"{traffic.written}, least {traffic.least}: {traffic.ratio:.3f}",
                            flush=True,
                        )


if __name__ == "__main__":
    tyro.cli(main)
