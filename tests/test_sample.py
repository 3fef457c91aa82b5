"""Sampling: what is kept, against Hugging Face's processors; what is drawn, against the
distribution; and that every backend draws the same token.
"""

from __future__ import annotations

import contextlib
import functools
import math

import pytest
import torch
from places import ISAS, at_level

import gptfast
from gptfast import backend
from gptfast.ops.sample import MAX_TOKENS, kept_weights, make_rule, penalised, sample, weights
from gptfast.testing import DTYPES, cuda_host, poison_empty

DEFAULTS = {
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "repetition_penalty": 1.0,
}
OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.7},
    {"temperature": 0.6},
    {"temperature": 1e-320},
    {"temperature": 1e308},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "top_k": 5},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    {"temperature": 1.4, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2},
]


def random_logits(B, V, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, V, generator=generator) * 3).to(dtype)


def random_previous(B, V, P=6, seed=1):
    """Tokens, some twice, some that stand for none."""
    return torch.randint(-1, V + 1, (B, P), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def on_the_host(order=0):
    """The CUDA kernel, executed on the CPU, its threads in another order for each number."""
    module = cuda_host.load()
    module.set_seed(order)
    with backend.cuda_on_cpu(module), gptfast.use_backend("cuda"):
        yield


needs_runner = pytest.mark.skipif(
    cuda_host.missing() is not None, reason=f"CUDA on the CPU: {cuda_host.missing()}"
)
# Every way to draw on this machine: the contexts in which `sample` takes it.
PLACES = {
    "torch": lambda: gptfast.use_backend("torch"),
    **{f"cpu-{isa}": functools.partial(at_level, isa) for isa in ISAS},
}
if torch.cuda.is_available():
    PLACES["torch-cuda"] = lambda: gptfast.use_backend("torch")
    PLACES["cuda-cuda"] = lambda: gptfast.use_backend("cuda")


@pytest.fixture(
    params=[
        *PLACES,
        pytest.param("cuda on the host", marks=needs_runner),
    ]
)
def draw(request):
    """`sample` at a place, with fresh memory full of NaN."""
    place = request.param
    device = "cuda" if place.endswith("-cuda") else "cpu"

    def call(logits, previous=None, **options):
        given = [t.to(device) if isinstance(t, torch.Tensor) else t for t in (logits, previous)]
        with PLACES.get(place, on_the_host)(), poison_empty():
            return sample(given[0], previous=given[1], **options).cpu()

    return call


def exact_distribution(logits, previous=None, **options):
    """Hugging Face's processors in fp64, in the order in which they apply them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    given, scores = {**DEFAULTS, **options}, logits.double()
    steps = []
    if given["repetition_penalty"] != 1:
        penalty = transformers.RepetitionPenaltyLogitsProcessor(given["repetition_penalty"])
        rows = zip(previous, scores, strict=True)
        known = [p[(p >= 0) & (p < logits.shape[-1])] for p in previous]
        scores = torch.cat(
            [penalty(k[None], s[None]) for k, (_, s) in zip(known, rows, strict=True)]
        )
    if given["temperature"] != 1:
        steps.append(transformers.TemperatureLogitsWarper(given["temperature"]))
    if given["top_k"] is not None:
        steps.append(transformers.TopKLogitsWarper(given["top_k"]))
    if given["top_p"] is not None:
        steps.append(transformers.TopPLogitsWarper(given["top_p"]))
    if given["min_p"] is not None:
        steps.append(transformers.MinPLogitsWarper(given["min_p"]))
    for step in steps:
        scores = step(None, scores)
    return scores.softmax(-1)


# ---- What is kept --------------------------------------------------------------------------------


def test_weights_are_exponentials():
    z = torch.cat([torch.linspace(-40, 0, 100_001), torch.tensor([-math.inf])])[None]
    for temperature in (0.3, 1.0, 7.0):
        w = weights(z, make_rule(z.shape[1], temperature, None, None, None, 1.0).steps)[0]
        exact = 2.0**40 * torch.exp(z[0].double() / temperature)
        # n = t 2^24 moves by 2^-24 of t for each of three roundings, and by 1 in the floor.
        t = (-z[0].double() / temperature * math.log2(math.e)).nan_to_num(posinf=0)
        bound = exact * (math.log(2) * (3 * t + 1) * 2**-24 + 2**-27) + 1
        assert ((w - exact).abs() <= bound).all()
        assert w[-1] == 0
        assert w[-2] == 2**40
        assert (w[:-1].diff() >= 0).all()


@pytest.mark.parametrize("options", [o for o in OPTIONS if 1e-3 < o.get("temperature", 1) < 1e3])
@pytest.mark.parametrize("V", [1, 2, 13, 500, 5000])
def test_what_is_kept_is_what_transformers_keeps(V, options):
    logits, previous = random_logits(8, V, seed=V), random_previous(8, V)
    given = {**DEFAULTS, **options}
    if given["top_k"] is not None:
        given["top_k"] = min(given["top_k"], V)
    rule = make_rule(V, **given)
    kept = kept_weights(penalised(logits, previous, rule.penalty), rule)
    exact = exact_distribution(logits, previous, **given)
    # As above; a sum of weights moves by no more than the worst of them. Tokens that are kept have
    # more than 2^-38 of the largest probability: the last bit of a weight is 2^-40 of that.
    p = kept.double() / kept.sum(-1, keepdim=True)
    torch.testing.assert_close(p, exact, rtol=2e-5, atol=2**-38)
    limited = exact > 2**-36
    assert torch.equal(kept[limited] > 0, exact[limited] > 0)
    if {"top_k", "top_p", "min_p"} & options.keys():
        assert ((kept > 0) <= (exact > 0)).all()


def test_equal_logits_are_ordered_by_index(draw):
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, -0.0, 2.0, 0.0]])
    for offset in range(40):
        assert draw(logits, temperature=0.0)[0] == 1
        assert draw(logits, top_k=1, offset=offset)[0] == 1
        assert draw(logits, top_k=2, offset=offset)[0] in (1, 3)
        assert draw(logits, top_p=0.5, temperature=0.1, offset=offset)[0] in (1, 3)
        assert draw(logits, top_k=5, temperature=9.0, offset=offset)[0] in (0, 1, 2, 3, 5)
        assert draw(torch.zeros(1, 9), top_p=0.4, offset=offset)[0] in (0, 1, 2, 3)


# ---- What is drawn -------------------------------------------------------------------------------


def chi_square(tokens, p):
    """Standard deviations by which the counts lie further from p than they should."""
    expected = p * tokens.numel()
    counts = torch.bincount(tokens, minlength=p.numel()).double()
    assert (counts[p == 0] == 0).all()
    common = expected >= 5  # rarer tokens are counted together
    e = torch.cat([expected[common], expected[~common].sum()[None]])
    c = torch.cat([counts[common], counts[~common].sum()[None]])
    e, c = e[e > 0.5], c[e > 0.5]
    freedom = max(e.numel() - 1, 1)
    return float((((c - e) ** 2 / e).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("options", [o for o in OPTIONS if 1e-3 < o.get("temperature", 1) < 1e3])
def test_draws_follow_the_distribution(options):
    """Of the backend that a user gets; the others draw the same tokens."""
    n = 20_000
    logits, previous = random_logits(1, 60, seed=3), random_previous(1, 60)
    (p,) = exact_distribution(logits, previous, **options)
    tokens = sample(logits.expand(n, -1), previous=previous.expand(n, -1), seed=11, **options)
    # Of a chi-square variable, 5 standard deviations are less likely than 1 in 10,000.
    assert chi_square(tokens, p) < 5


def test_steps_and_rows_are_independent():
    logits = random_logits(1, 30, seed=4).expand(100, -1)
    (p,) = exact_distribution(logits[:1])
    steps = torch.stack([sample(logits, seed=2**62 + 1, offset=t) for t in range(200)])
    assert chi_square(steps.flatten(), p) < 5
    assert chi_square(torch.stack([sample(logits[:1], seed=s)[0] for s in range(3000)]), p) < 5
    for a, b in ((steps[1:], steps[:-1]), (steps[:, 1:], steps[:, :-1])):
        assert chi_square((a * 30 + b).flatten(), torch.outer(p, p).flatten()) < 5
    # Offsets beyond 32 bits are others.
    assert not torch.equal(sample(logits, offset=2**32), sample(logits, offset=0))


def test_the_statistic_finds_a_wrong_distribution():
    logits = random_logits(1, 60, seed=3)
    (p,) = exact_distribution(logits)
    rows = sample(logits.expand(20_000, -1), temperature=1.1, seed=11)
    assert chi_square(rows, p) > 5


# ---- The same token everywhere -------------------------------------------------------------------


@functools.cache
def expected_tokens(B, V, dtype, index, seed, offset):
    logits, previous = random_logits(B, V, dtype, seed), random_previous(B, V, seed=seed)
    with gptfast.use_backend("torch"):
        given = OPTIONS[index]
        return sample(logits, previous=previous, seed=seed, offset=offset, **given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 9, 257, 5003])
def test_every_backend_draws_the_same_token(V, dtype, draw, request):
    slow = "host" in request.node.callspec.id
    B = 3 if slow else 16
    for index, options in enumerate(OPTIONS):
        for seed in range(1 if slow and V > 1000 else 3):
            key = (V, dtype, index, seed, 2**33 * seed + index)
            logits = random_logits(16, V, dtype, seed)[:B]
            previous = random_previous(16, V, seed=seed)[:B]
            got = draw(logits, previous, seed=seed, offset=key[-1], **options)
            assert torch.equal(got, expected_tokens(16, *key)[:B]), options


@pytest.mark.parametrize("V", [50257, 2**18])
def test_every_backend_draws_the_same_token_of_a_large_vocabulary(V, draw):
    logits, previous = random_logits(2, V), random_previous(2, V)
    for index in (0, 2, 8, 15, 16) if V < 2**18 else (9, 16):
        got = draw(logits, previous, seed=5, offset=index, **OPTIONS[index])
        with gptfast.use_backend("torch"):
            expected = sample(logits, previous=previous, seed=5, offset=index, **OPTIONS[index])
        assert torch.equal(got, expected), OPTIONS[index]


@needs_runner
@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_threads_changes_no_token(order):
    logits, previous = random_logits(2, 3001), random_previous(2, 3001)
    for index, options in enumerate(OPTIONS):
        with on_the_host(order):
            got = sample(logits, previous=previous, seed=1, offset=index, **options)
        with gptfast.use_backend("torch"):
            expected = sample(logits, previous=previous, seed=1, offset=index, **options)
        assert torch.equal(got, expected), options


EXTREMES = {
    "large": lambda z: z * 1e37,
    "tiny": lambda z: z * 1e-38,
    "flat": lambda z: z * 0 + 3,
    "one stands out": lambda z: z.index_fill(1, torch.tensor([5]), 1e4),
    "masked": lambda z: z.masked_fill(z < 1, -math.inf),
    "all but one masked": lambda z: z.masked_fill(z < z.amax(-1, keepdim=True), -math.inf),
    "few values": lambda z: z.round(),
}


@pytest.mark.parametrize("values", EXTREMES)
def test_extreme_logits(values, draw):
    logits, previous = EXTREMES[values](random_logits(4, 70)), random_previous(4, 70)
    for index, options in enumerate(OPTIONS):
        got = draw(logits, previous, seed=7, offset=index, **options)
        with gptfast.use_backend("torch"):
            expected = sample(logits, previous=previous, seed=7, offset=index, **options)
        assert torch.equal(got, expected), options
        assert (logits.gather(1, got[:, None]) > -math.inf).all()


def test_rows_without_a_token(draw):
    logits = random_logits(6, 40)
    logits[1, 3], logits[2, 39], logits[3] = math.nan, math.inf, -math.inf
    logits[4, 0] = -math.inf
    for options in OPTIONS:
        got = draw(logits, random_previous(6, 40), **options)
        assert (got[1:4] == -1).all(), options
        assert (got[[0, 4, 5]] >= 0).all(), options


def test_layouts(draw):
    logits, previous = random_logits(6, 40), random_previous(6, 40)
    expected = draw(logits, previous, repetition_penalty=2.0, top_k=9, seed=3)
    given = {"repetition_penalty": 2.0, "top_k": 9, "seed": 3}
    shifted = torch.full((6, 43), 9.0)
    shifted[:, 1:41] = logits
    wide = logits.repeat_interleave(2, 1)[:, ::2]
    for layout in (shifted[:, 1:41], wide, logits.t().contiguous().t(), logits.double()):
        assert torch.equal(draw(layout, previous, **given), expected)
    columns = previous.t().contiguous().t()
    assert torch.equal(draw(logits, columns, **given), expected)
    several = draw(logits.view(2, 3, 40), previous.view(2, 3, -1), **given)
    assert torch.equal(several, expected.view(2, 3))
    assert torch.equal(draw(logits[0], previous[0], **given), expected[0])
    nothing = previous[:, :0]
    assert torch.equal(draw(logits, nothing, **given), draw(logits, None, **given))
    assert draw(logits[:0], previous[:0], **given).shape == (0,)
    assert draw(logits[:0].view(0, 2, 40)).shape == (0, 2)


# ---- Registration and errors ---------------------------------------------------------------------


def test_opcheck_and_compile():
    logits, previous = random_logits(3, 20), random_previous(3, 20)
    arguments = (logits, previous, 0.7, 5, 0.9, None, 1.2, 3, 4)
    torch.library.opcheck(torch.ops.gptfast.sample_fwd.default, arguments)

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def compiled(logits, offset):
        return sample(logits, temperature=0.7, top_k=5, offset=offset)

    for offset in range(3):
        expected = sample(logits, temperature=0.7, top_k=5, offset=offset)
        assert torch.equal(compiled(logits, offset), expected)
    assert sample(logits.clone().requires_grad_()).dtype == torch.int64


Z = torch.zeros(2, 5)
ERRORS = [
    (lambda: sample(Z.int()), TypeError, "sample: logits must be floating point, got torch.int32"),
    (
        lambda: sample(Z[:, :0]),
        ValueError,
        f"logits must be (..., V), V from 1 to {MAX_TOKENS}, got (2, 0)",
    ),
    (lambda: sample(Z[0, 0]), ValueError, "got ()"),
    (lambda: sample(Z[:, :1].expand(2, 2**23)), ValueError, "got (2, 8388608)"),
    (
        lambda: sample(Z, temperature=-1.0),
        ValueError,
        "sample: temperature must be at least 0, got -1.0",
    ),
    (lambda: sample(Z, temperature=math.nan), ValueError, "at least 0, got nan"),
    (lambda: sample(Z, temperature=math.inf), ValueError, "at least 0, got inf"),
    (lambda: sample(Z, top_k=0), ValueError, "sample: top_k must be at least 1, got 0"),
    (lambda: sample(Z, top_k=-3), ValueError, "top_k must be at least 1, got -3"),
    (lambda: sample(Z, top_p=0.0), ValueError, "sample: top_p must be in (0, 1], got 0.0"),
    (lambda: sample(Z, top_p=1.1), ValueError, "top_p must be in (0, 1], got 1.1"),
    (lambda: sample(Z, min_p=-0.1), ValueError, "sample: min_p must be in [0, 1], got -0.1"),
    (lambda: sample(Z, min_p=2.0), ValueError, "min_p must be in [0, 1], got 2.0"),
    (
        lambda: sample(Z, repetition_penalty=0.0),
        ValueError,
        "sample: repetition_penalty must be above 0, got 0.0",
    ),
    (lambda: sample(Z, seed=-1), ValueError, "seed and offset must be in [0, 2^63), got -1 and 0"),
    (lambda: sample(Z, offset=2**63), ValueError, f"got 0 and {2**63}"),
    (
        lambda: sample(Z, previous=torch.zeros(2, 3)),
        TypeError,
        "sample: previous must be torch.int64, got torch.float32",
    ),
    (
        lambda: sample(Z, previous=torch.zeros(3, 3, dtype=torch.int64)),
        ValueError,
        "sample: previous must be (2, P), got (3, 3)",
    ),
    (
        lambda: sample(Z, previous=torch.zeros(2, 3, dtype=torch.int64, device="meta")),
        RuntimeError,
        "sample: previous must be on cpu, got meta",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_error(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def test_a_top_k_above_the_vocabulary_keeps_all(draw):
    logits = random_logits(4, 30)
    assert torch.equal(draw(logits, top_k=31, seed=1), draw(logits, seed=1))
    assert torch.equal(draw(logits, top_k=10**18, seed=1), draw(logits, seed=1))


@needs_runner
def test_the_cuda_kernel_refuses_a_larger_vocabulary():
    with on_the_host(), pytest.raises(RuntimeError, match=r"at most 2\^18 logits, got 262145"):
        sample(torch.zeros(1, 2**18 + 1))
