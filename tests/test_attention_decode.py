"""What only attention_decode and kv_cache_append do; values are in `test_ops.py`."""

from __future__ import annotations

import pytest
import torch
from places import at_level, implemented
from torch.nn import functional as F

import gptfast
from gptfast import backend, targets
from gptfast.targets import TARGETS

B, H, H_KV, T, S, D = 2, 4, 2, 3, 10, 8
Q = torch.randn(B, H, T, D)
K = torch.randn(B, S, H_KV, D)
NEW = torch.randn(B, H_KV, T, D)
LENGTHS = torch.tensor([S, 4], dtype=torch.int32)
TABLE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
PAGES = torch.randn(4, 5, H_KV, D)


def decode(q=Q, k=K, v=K, lengths=LENGTHS, **options):
    return gptfast.attention_decode(q, k, v, lengths, **options)


def append(k=NEW, v=NEW, k_cache=K, v_cache=K, lengths=LENGTHS, table=None):
    return gptfast.kv_cache_append(k, v, k_cache.clone(), v_cache.clone(), lengths, table)


ERRORS = [
    (lambda: decode(Q[0]), ValueError, "attention_decode: q must be (B, H, T, D), got (4, 3, 8)"),
    (lambda: decode(k=K[0]), ValueError, "k_cache must be (B, S_max, H_kv, D) or (num_pages, "),
    (
        lambda: decode(torch.randn(B, H, 17, D)),
        ValueError,
        "q must have at most 16 tokens a sequence, got 17; gptfast.attention takes any number",
    ),
    (lambda: decode(Q[..., :7]), ValueError, "head dim of k_cache must be 7 as q's, got 8"),
    (lambda: decode(Q[:, :3]), ValueError, "key heads must divide 3 query heads, got 2"),
    (lambda: decode(v=K[:, :9]), ValueError, "v_cache must be (2, 10, 2) and its head dim"),
    (lambda: decode(Q.int()), TypeError, "q must be floating point, got torch.int32"),
    (lambda: decode(v=K.half()), TypeError, "v_cache must be torch.float32, got torch.float16"),
    (lambda: decode(Q[..., :0]), ValueError, "head dim of q must be at least 1, got 0"),
    (
        lambda: decode(lengths=LENGTHS.long()),
        TypeError,
        "cache_seqlens must be torch.int32, got torch.int64",
    ),
    (lambda: decode(lengths=LENGTHS[:1]), ValueError, "cache_seqlens must be (2,), got (1,)"),
    (
        lambda: decode(lengths=LENGTHS + 1),
        IndexError,
        "attention_decode: cache_seqlens must be in [0, 10], got 11 at 0",
    ),
    (lambda: decode(lengths=LENGTHS - 5), IndexError, "must be in [0, 10], got -1 at 1"),
    (lambda: decode(Q[:1], lengths=LENGTHS[:1]), ValueError, "must have 1 sequences as q, got 2"),
    (lambda: decode(v=K.to("meta")), RuntimeError, "v_cache must be on cpu, got meta"),
    (
        lambda: decode(k=PAGES, v=PAGES, block_table=TABLE.long()),
        TypeError,
        "block_table must be torch.int32, got torch.int64",
    ),
    (
        lambda: decode(k=PAGES, v=PAGES, block_table=TABLE[:1]),
        ValueError,
        "block_table must be (2, max_pages), got (1, 2)",
    ),
    (
        lambda: decode(k=PAGES, v=PAGES, block_table=TABLE[0]),
        ValueError,
        "block_table must be (2, max_pages), got (2,)",
    ),
    (
        lambda: decode(k=PAGES[:2], v=PAGES[:2], block_table=TABLE),
        IndexError,
        "block_table must be in [0, 2), got 2 at (1, 0)",
    ),
    (lambda: decode(softcap=0.0), ValueError, "attention_decode: softcap must be positive"),
    (lambda: decode(window=(3,)), ValueError, "attention_decode: window must be (left, right)"),
    (
        lambda: decode(alibi_slopes=torch.rand(3)),
        ValueError,
        "attention_decode: alibi_slopes must be (4,) or (2, 4), got (3,)",
    ),
    (
        lambda: append(NEW[:, :1]),
        ValueError,
        "kv_cache_append: k must be (2, 2, 3, 8) as k_cache, got (2, 1, 3, 8)",
    ),
    (lambda: append(v=NEW[:, :, :2]), ValueError, "v must be (2, 2, 3, 8) as v_cache"),
    (lambda: append(v=NEW.half()), TypeError, "v must be torch.float32, got torch.float16"),
    (lambda: append(lengths=LENGTHS + 1), IndexError, "must be in [0, 10], got 11 at 0"),
    (
        lambda: append(k_cache=PAGES, v_cache=PAGES, table=TABLE + 2),
        IndexError,
        "block_table must be in [0, 4), got 4 at (1, 0)",
    ),
    (
        lambda: append(k_cache=K.clone().requires_grad_()),
        RuntimeError,
        "k_cache must not require gradients",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_error(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize("place", implemented("attention_decode"), ids=str)
@pytest.mark.parametrize("length", [1, 5])
def test_an_infinite_value(place, length):
    q = torch.randn(1, 2, 1, 16, device=place.device).bfloat16()
    k, v = torch.randn(2, 1, 8, 2, 16, device=place.device).bfloat16().unbind()
    v[:, :length] = torch.inf
    lengths = torch.tensor([length], dtype=torch.int32, device=place.device)
    with at_level(place.isa), gptfast.use_backend(place.backend):
        o = gptfast.attention_decode(q, k, v, lengths)
    assert (o == torch.inf).all()


def test_it_refuses_differentiation():
    o = decode(Q.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"attention_decode_fwd has no derivative \(forward"):
        o.sum().backward()


def test_autocast_does_not_copy_the_cache():
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"k_cache must be torch.bfloat16, got torch.float32"),
    ):
        decode(Q.bfloat16())


@pytest.mark.parametrize("op", ["kv_cache_append", "attention_decode_append"])
def test_appending_counts_as_a_write(op, monkeypatch):
    # As kernels do it: through pointers, of which autograd knows nothing.
    implementations = backend.OPS[op].implementations
    result = None if op == "kv_cache_append" else (NEW, NEW)
    unseen = backend.Implementation(lambda *args: result)
    monkeypatch.setitem(implementations, "torch", unseen)
    k_cache, v_cache = K.clone(), K.clone()
    factor = torch.ones(1, requires_grad=True)
    uses = [(factor * cache).sum() for cache in (k_cache, v_cache)]
    with gptfast.use_backend("torch"):
        if op == "kv_cache_append":
            gptfast.kv_cache_append(NEW, NEW, k_cache, v_cache, LENGTHS)
        else:
            gptfast.attention_decode_append(NEW, NEW, NEW, k_cache, v_cache, LENGTHS)
    for use in uses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            use.backward()


def test_appending_differentiates_nothing():
    k_cache, v_cache = K.clone(), K.clone()
    new = NEW.clone().requires_grad_()
    gptfast.kv_cache_append(new, new, k_cache, v_cache, LENGTHS)
    assert not k_cache.requires_grad
    with torch.inference_mode():
        gptfast.kv_cache_append(NEW, NEW, K.clone(), K.clone(), LENGTHS)


def test_an_idle_sequence_writes_nothing():
    pages = PAGES.clone()
    lengths = torch.zeros(B, dtype=torch.int32)
    gptfast.kv_cache_append(NEW, NEW, pages, pages.clone(), lengths, torch.full_like(TABLE, -1))
    assert torch.equal(pages, PAGES)


@pytest.mark.parametrize("page_size", [None, 4])
def test_generation_sees_what_a_pass_over_everything_sees(page_size):
    """Tokens come as 5, then 1, 3, 1, ... at a time, in two sequences, one 2 tokens behind."""
    steps, total = (5, 1, 3, 1, 16, 2), 28
    q, k, v = (torch.randn(B, n, total, D) for n in (H, H_KV, H_KV))
    shape, table = (B, total, H_KV, D), None
    if page_size:
        pages = -(-total // page_size)
        table = torch.randperm(B * pages).int().view(B, pages)
        shape = (B * pages, page_size, H_KV, D)
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    behind = torch.tensor([0, 2])
    exact = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
    )
    seen = torch.zeros(B, dtype=torch.int64)
    for step in steps:
        lengths = seen + step if seen.any() else step - behind  # the first step: the prompts
        rows = [torch.arange(int(n) - step, int(n)).clamp(min=0) for n in lengths]
        new_q, new_k, new_v = (torch.stack([x[b, :, rows[b]] for b in range(B)]) for x in (q, k, v))
        gptfast.kv_cache_append(new_k, new_v, k_cache, v_cache, lengths.int(), table)
        o = gptfast.attention_decode(new_q, k_cache, v_cache, lengths.int(), block_table=table)
        for b in range(B):
            real = torch.arange(int(lengths[b]) - step, int(lengths[b])) >= 0
            expected = exact[b][:, rows[b][real]]
            torch.testing.assert_close(o[b][:, real].double(), expected, rtol=1e-5, atol=1e-5)
            assert not o[b][:, ~real].any()
        seen = lengths


pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
def test_tiles_fit_the_target(target, itemsize, width):
    from gptfast.kernels import attention_decode as kernels

    for rows in (1, 8, 16, 33, 1024):
        config = kernels.pick_config(rows, width, width, itemsize, target)
        assert 16 <= config.block_m <= 64
        block = max(16, width if width != 80 else 128)
        tile = config.block_n * 2 * block * itemsize
        queries = config.block_m * block * itemsize
        assert config.num_stages * tile + queries <= target.shared_memory
        assert config.num_stages * tile <= target.shared_memory_total // 2 or config.num_stages == 1


def test_parts_fill_the_card_and_no_more():
    from gptfast.ops.attention_decode import MAX_PARTS, pick_parts

    target = TARGETS["sm_90"]

    def parts(programs, S, rows=1):
        return pick_parts(programs, S, rows, 128, 128, 2, target)

    assert parts(1000, 2**20) == 1
    assert parts(1, 100) == 1
    assert parts(1, 0) == 1
    assert parts(1, 2**20) == MAX_PARTS
    assert parts(32, 8192) == -(-2 * target.multiprocessors // 32)
    assert parts(8, 4096) == 4096 // 256
    assert parts(8, 4096, rows=64) == 4096 // 1024
    assert [parts(n, 2**16) for n in (1, 10, 100)] == sorted(
        (parts(n, 2**16) for n in (1, 10, 100)), reverse=True
    )


def test_a_target_is_assumed_without_a_gpu():
    with targets.assume("gfx942") as target:
        assert target.multiprocessors == 304


@pytest.mark.parametrize("place", implemented("attention_decode"), ids=str)
@pytest.mark.parametrize("left", [100, 2**31 - 1, 2**63 - 1])
def test_a_window_wider_than_every_cache(place, left):
    """With fewer tokens in the cache than queries, where the sum of positions is negative."""
    options = {"device": place.device, "dtype": torch.bfloat16}  # `cuda` takes no float32
    q, k, v = (torch.randn(s, **options) for s in ((1, 2, 4, 16), *((1, 8, 2, 16),) * 2))
    length = torch.tensor([2], dtype=torch.int32, device=place.device)
    with gptfast.use_backend(place.backend):
        full = gptfast.attention_decode(q, k, v, length)
        o = gptfast.attention_decode(q, k, v, length, window=(left, 0))
    torch.testing.assert_close(o, full)
    assert o[:, :, -1].any()
