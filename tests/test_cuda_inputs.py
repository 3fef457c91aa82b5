"""Inputs that the CUDA kernels might get wrong, on the CPU: addresses, strides and widths."""

from __future__ import annotations

import pytest
import torch
from test_cuda_host import on_the_cpu

import gptfast
from gptfast import backend
from gptfast.testing import Case, cuda_host, make_problem, run_case

pytestmark = pytest.mark.skipif(
    cuda_host.missing() is not None, reason=f"CUDA on the CPU: {cuda_host.missing()}"
)
FAR = 2**30  # elements: a stride that 32 bits hold, and twice that they do not


def moved(x):
    """The same values, contiguous, at an address that only the size of an element divides."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize(
    "op",
    ["layer_norm", "rms_norm", "add_layer_norm", "gelu", "bias_gelu", "glu", "cross_entropy"],
)
def test_addresses_that_16_bytes_do_not_divide(op):
    """Of tensors whose rows would all be aligned, one after another, and of all."""
    case = Case(op, (5, 64))
    names = [n for n, x in make_problem(case, torch.bfloat16).inputs.items() if x is not None]
    for chosen in (*([name] for name in names), ["dy"], [*names, "dy"]):
        problem = make_problem(case, torch.bfloat16)
        for given in (problem.inputs, problem.dys):
            for name, x in given.items():
                if x is not None and (name if given is problem.inputs else "dy") in chosen:
                    given[name] = moved(x)
        with on_the_cpu():
            problem.check("cuda")


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantised_weights_at_any_address(format):
    x, aligned = torch.randn(2, 64), gptfast.quantize_weight(torch.randn(16, 64), format)
    weight = aligned._replace(data=moved(aligned.data), scale=moved(aligned.scale))
    with on_the_cpu(), gptfast.use_backend("cuda"):
        results = [gptfast.linear_decode(x, w) for w in (aligned, weight)]
    assert torch.equal(*results)


@pytest.mark.parametrize("N", [65536, 70001])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_widths_up_to_and_beyond_65536(op, N):
    with on_the_cpu():
        run_case(Case(op, (2, N)), "cuda", torch.float16)


def test_tensors_on_another_device():
    x = torch.randn(3, 8)
    refused = r"backend 'cuda' is forced, but (its tensors must be on cuda|.*(CUDA|driver))"
    with gptfast.use_backend("cuda"), pytest.raises(backend.RefusedError, match=refused):
        gptfast.layer_norm(x)


def far_apart(*shape):
    """Three blocks at this distance in 4 GB of addresses, of which a few pages are used."""
    memory = torch.empty(2 * FAR + torch.Size(shape).numel(), dtype=torch.float16)
    x = torch.randn(3, *shape)
    return memory.as_strided(x.shape, (FAR, *x.stride()[1:])).copy_(x)


def agree(call, *tensors):
    """A wrong address is seen however loose the bound: elements are independent, of order one."""
    with on_the_cpu(), gptfast.use_backend("cuda"):
        results = call(*tensors)
    with gptfast.use_backend("torch"):
        expected = call(*(x.detach().contiguous() for x in tensors))
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_rows_of_glu_far_apart():
    dy = torch.randn(3, 24).half()

    def run(gate, up):
        leaves = gate.requires_grad_(), up.requires_grad_()
        y = gptfast.swiglu(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy)

    agree(run, far_apart(24), far_apart(24))


def test_rows_of_linear_decode_far_apart():
    w = torch.randn(18, 40).half()
    agree(lambda x: [gptfast.linear_decode(x, w)], far_apart(40))


def test_rows_of_logits_far_apart():
    agree(lambda x: [gptfast.sample(x, top_k=5, seed=1)], far_apart(100))


def test_heads_of_attention_far_apart():
    agree(
        lambda *qkv: [gptfast.attention(*qkv, causal=True)], *(far_apart(2, 9, 16) for _ in "qkv")
    )


@pytest.mark.parametrize("table", [None, [[2], [0], [1]]])
def test_caches_far_apart(table):
    q, k, v = (torch.randn(3, heads, 1, 16).half() for heads in (4, 2, 2))
    lengths = torch.tensor([4, 2, 3], dtype=torch.int32)
    table = None if table is None else torch.tensor(table, dtype=torch.int32)

    def run(*caches):
        o = gptfast.attention_decode_append(q, k, v, *caches, lengths, block_table=table)
        return o, *caches

    agree(run, far_apart(4, 2, 16), far_apart(4, 2, 16))
