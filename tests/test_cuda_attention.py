"""What only the CUDA attention kernels do, on the CPU; the cases are in `test_cuda_host.py`."""

from __future__ import annotations

import re

import pytest
import torch
from test_cuda_host import on_the_cpu

import gptfast
from gptfast import backend
from gptfast.ops.attention import OP
from gptfast.testing import Case, cuda_host, run_case

pytestmark = pytest.mark.skipif(
    cuda_host.missing() is not None, reason=f"CUDA on the CPU: {cuda_host.missing()}"
)


@pytest.mark.parametrize("layout", ["packed", "expanded"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_strided_heads(layout, causal):
    case = Case("attention", (2, 3, 3, 70, 70, 16), layout=layout, options={"causal": causal})
    with on_the_cpu():
        run_case(case, "cuda", torch.bfloat16)


def test_attention_has_a_forward_only():
    q = torch.randn(1, 2, 5, 16, dtype=torch.bfloat16, requires_grad=True)
    refused = "attention: backend 'cuda' is forced, but it has no backward of this op; torch, cpu"
    with on_the_cpu(), gptfast.use_backend("cuda"):
        o = gptfast.attention(q, q, q)
        with pytest.raises(backend.RefusedError, match=refused):
            o.sum().backward()


HEADS = torch.zeros(1, 2, 6, 24, dtype=torch.float16)
MANY = HEADS[:, :, :1, :16].expand(1, 2, 2**29, 16)


@pytest.mark.parametrize(
    ("q", "k", "v", "reason"),
    [
        (*[HEADS.float()] * 3, "bfloat16 or float16, got float32"),
        (HEADS[..., :12], HEADS[..., :12], HEADS, "multiples of 8, got 12 for q"),
        (HEADS, HEADS, HEADS[..., :4], "multiples of 8, got 4 for v"),
        (*[HEADS.repeat(1, 1, 1, 11)] * 3, "head dim must be at most 256, got 264"),
        (HEADS[..., 1:17], HEADS[..., :16], HEADS, "multiples of 16 bytes, q does not"),
        (
            HEADS,
            HEADS,
            HEADS.mT.contiguous().mT,
            r"contiguous rows .* got \(288, 144, 1, 6\) for v",
        ),
        (HEADS, HEADS[..., :20].contiguous()[..., :16], HEADS, r"\(240, 120, 20, 1\) for k"),
        (MANY, MANY, MANY, r"fewer than 2\^30 tokens, got 536870912 and 536870912"),
    ],
    ids=lambda x: x[:20] if isinstance(x, str) else "",
)
def test_attention_says_what_it_cannot_take(q, k, v, reason):
    assert re.search(reason, OP.implementations["cuda"].why_not(q, k, v))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"q": 8}, "address and strides of q must be multiples of 16 bytes"),
        ({"row": 20}, "address and strides of k must be multiples of 16 bytes"),
        ({"D": 12}, "head dims that are multiples of 8"),
        ({"D": 264}, "head dims must be at most 256, got 264"),
        ({"T": 2**30}, r"fewer than 2\^30 tokens"),
        ({"dtype": torch.float32}, "dtype must be bfloat16 or float16"),
    ],
    ids=str,
)
def test_the_launcher_of_attention_checks_what_it_is_given(given, reason):
    """Before anything is launched: these addresses do not exist."""
    given = {"q": 1024, "row": 64, "D": 64, "T": 4, "dtype": torch.float16, **given}
    other = (1024, 64, 64, 64)
    heads = (given["q"], 64, 64, 64), (1024, 64, 64, given["row"]), other, other
    sizes = 1, 1, 1, given["T"], 4, given["D"], 64, 1.0, -1, -1
    code = backend.DTYPE_CODES[given["dtype"]]
    with on_the_cpu() as module, pytest.raises(RuntimeError, match=reason):
        module.attention_fwd(0, *heads, (1024, 4, 4), 0, 0, *sizes, code, 0)


def test_decoding_in_parts_takes_two_launches_and_else_one():
    q = torch.randn(1, 4, 1, 64, dtype=torch.bfloat16)
    cache = torch.randn(1, 600, 2, 64, dtype=torch.bfloat16)
    lengths = torch.tensor([600], dtype=torch.int32)
    counts = []
    with on_the_cpu() as module, gptfast.use_backend("cuda"):
        for keys in (600, 200):
            before = module.launches()
            gptfast.attention_decode(q, cache[:, :keys], cache[:, :keys], lengths.clamp(max=keys))
            counts.append(module.launches() - before)
    assert counts == [2, 1]
