"""Generation: which tokens are drawn, from what, and where the text ends."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast.generate import _text, generate, generate_text, pick_device, stream
from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import CharTokenizer, GPT2Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

V = 13
TOKENIZER = CharTokenizer("abcdefghijk \n")


def new_model(block_size: int = 8, vocab_size: int = V) -> GPT:
    """Random weights, larger than at the start of training: logits lie far apart.

    The blocks' most of all, or the tied head would just repeat the last token.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(12 if "wte" in name else 40)
    return model.eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def next_distribution(model: GPT, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0][0, -1].double().softmax(-1)


class FixedLogits(torch.nn.Module):
    """A model that always has the same logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.reference = new_model(64)
        self.config, self.lm_head = self.reference.config, self.reference.lm_head

    def new_cache(self, batch_size):
        return self.reference.new_cache(batch_size)

    def forward(self, idx, cache=None):
        cache.advance(idx.shape[1])
        return self.logits.expand(idx.shape[0], 1, -1), None


# --- against the model without a cache


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("prompt", [[5], [1, 2, 3], list(range(12))])
def test_greedy_is_the_argmax_without_cache(block_size, prompt):
    model = new_model(block_size)
    # What the module's documentation says, spelled out.
    ids, window = list(prompt), prompt[-block_size:]
    for _ in range(30):
        ids.append(int(next_distribution(model, window).argmax()))
        window = [*window, ids[-1]]
        if len(window) > block_size:
            window = window[-max(1, block_size // 2) :]
    given_ids = list(stream(model, prompt, 30, temperature=0))
    assert given_ids == ids[len(prompt) :]
    if block_size >= 8:
        assert len(set(given_ids)) > 3  # not the same token for ever


def test_top_k_1_is_greedy_at_any_temperature():
    model = new_model()
    greedy = list(stream(model, [3], 40, temperature=0))
    for temperature in (1e-320, 1e-9, 1.0, 100.0):
        assert list(stream(model, [3], 40, temperature=temperature, top_k=1)) == greedy
    for temperature in (1e-320, 1e-9):
        assert list(stream(model, [3], 40, temperature=temperature)) == greedy
    assert list(stream(model, [3], 40, top_p=1e-9)) == greedy


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 0.0}])
def test_a_batch_is_its_rows(options):
    model = new_model()
    idx = torch.randint(V, (4, 3), generator=seeded())
    out = generate(model, idx, 20, generator=seeded(7), **options)
    assert out.shape == (4, 23)
    assert out.dtype == torch.int64
    assert torch.equal(out[:, :3], idx)
    assert not out.is_inference()
    if options == {"temperature": 0.0}:
        for row, prompt in zip(out[:, 3:], idx, strict=True):
            assert row.tolist() == list(stream(model, prompt.tolist(), 20, temperature=0))
    one = generate(model, idx[:1], 20, generator=seeded(3), **options)[0, 3:]
    assert one.tolist() == list(stream(model, idx[0].tolist(), 20, generator=seeded(3), **options))


# --- the distribution drawn from


def draws(logits, n=4000, **options):
    model = FixedLogits(torch.tensor(logits))
    idx = torch.zeros(n, 1, dtype=torch.int64)
    tokens = generate(model, idx, 1, generator=seeded(5), **options)[:, 1]
    return torch.bincount(tokens, minlength=len(logits)).double() / n


LOGITS = [2.0, 1.0, 0.0, -1.0, 1.0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    expected = (torch.tensor(LOGITS) / temperature).double().softmax(-1)
    # 4000 draws: five standard deviations are at most 5 / (2 sqrt(4000)) = 0.04.
    assert (draws(LOGITS, temperature=temperature) - expected).abs().max() < 0.04


def test_top_k_keeps_k_also_among_equals():
    assert (draws(LOGITS, top_k=2) > 0).sum() == 2
    expected = torch.tensor(LOGITS).double().softmax(-1)
    expected[3] = 0
    expected[2] = 0
    assert (draws(LOGITS, top_k=3) - expected / expected.sum()).abs().max() < 0.04
    assert (draws(LOGITS, top_k=99) > 0).all()
    assert (draws([0.0] * 5, top_k=4) > 0).sum() == 4


def test_top_p_keeps_the_smallest_sufficient_set():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().tolist()
    for top_p, kept in [(0.4, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)]:
        expected = torch.where(torch.arange(4) < kept, p, 0).double()
        given_p = draws(logits, top_p=top_p)
        assert (given_p > 0).tolist() == (expected > 0).tolist()
        assert (given_p - expected / expected.sum()).abs().max() < 0.04
    # After top_k and temperature, as in other libraries.
    assert (draws(logits, top_k=3, top_p=0.96) > 0).sum() == 3
    assert (draws(logits, temperature=0.1, top_p=0.9) > 0).sum() == 1


def test_min_p_keeps_what_is_near_the_most_likely():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for min_p, kept in [(0.05, 4), (0.2, 3), (0.5, 2), (0.7, 1), (1.0, 1)]:
        expected = torch.where(torch.arange(4) < kept, p, 0).double()
        given_p = draws(p.log().tolist(), min_p=min_p)
        assert (given_p > 0).tolist() == (expected > 0).tolist()
        assert (given_p - expected / expected.sum()).abs().max() < 0.04


def test_tokens_that_are_there_become_less_likely():
    model = FixedLogits(torch.tensor([3.0, 2.0, 1.5, -1.0]))
    tokens = list(stream(model, [0], 5, temperature=0, repetition_penalty=10.0))
    assert tokens == [1, 2, 0, 0, 0]  # of 3, 2 and 1.5 a tenth is left, of -1 ten times
    tokens = list(stream(model, [0], 3, temperature=0, repetition_penalty=0.1))
    assert tokens == [0, 0, 0]
    # Also of tokens that the window no longer sees: the model has 64.
    tokens = list(stream(model, [1] + [0] * 80, 1, temperature=0, repetition_penalty=1.6))
    assert tokens == [0]
    tokens = list(stream(model, [1] + [0] * 80, 1, temperature=0, repetition_penalty=2.5))
    assert tokens == [2]


def test_logits_that_are_not_numbers():
    for bad in (float("nan"), float("inf")):
        model = FixedLogits(torch.tensor([0.0, bad, 1.0]))
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match="logits must be finite numbers, got NaN or inf"):
                list(stream(model, [0], 5, temperature=temperature))


def test_a_padded_vocabulary_is_never_drawn():
    model = FixedLogits(torch.tensor([0.0, 0.0, 50.0, 60.0]))
    tokens = list(stream(model, [0], 50, generator=seeded(), vocab_size=2))
    assert set(tokens) == {0, 1}
    assert set(stream(model, [0], 5, temperature=0, vocab_size=3)) == {2}
    padded = new_model(vocab_size=64)
    text = "".join(generate_text(padded, TOKENIZER, "a", 200, temperature=5.0))
    assert len(text) == 200


def test_a_seed_decides_the_tokens():
    model = new_model()
    runs = [list(stream(model, [1], 60, generator=seeded(s))) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    torch.manual_seed(4)
    default = list(stream(model, [1], 60))
    torch.manual_seed(4)
    assert list(stream(model, [1], 60)) == default


# --- the iterator


def test_tokens_come_one_at_a_time_and_modes_are_kept():
    model = new_model().train()
    tokens = stream(model, [1], 10**9, temperature=0)
    assert len(list(itertools.islice(tokens, 5))) == 5
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert not model.training
    tokens.close()
    assert model.training
    with pytest.raises(IndexError):
        list(stream(model, [V], 5))
    assert model.training
    assert list(stream(model, [1], 0)) == []


def test_dropout_does_not_disturb_generation():
    model = new_model()
    expected = list(stream(model, [1], 20, temperature=0))
    dropping = GPT(GPTConfig(8, V, n_layer=2, n_head=2, n_embd=16, dropout=0.9))
    dropping.load_state_dict(model.state_dict())
    assert list(stream(dropping.train(), [1], 20, temperature=0)) == expected


def test_stop_tokens():
    model = new_model()
    tokens = list(stream(model, [1], 40, temperature=0))
    stop = tokens[5]
    first = tokens.index(stop)
    assert list(stream(model, [1], 40, temperature=0, stop_tokens=[stop])) == tokens[:first]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"temperature": float("inf")}, "temperature must be at least 0, got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1\.5"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\], got nan"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1\.5"),
        ({"min_p": -0.5}, r"min_p must be in \[0, 1\], got -0\.5"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be above 0, got 0\.0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
    ],
)
def test_refused_at_once(options, message):
    options = {"max_new_tokens": 5, **options}
    model = new_model()
    with pytest.raises(ValueError, match=message):
        stream(model, [1], **options)  # not only when the first token is asked for
    with pytest.raises(ValueError, match=message):
        generate(model, torch.ones(1, 1, dtype=torch.int64), **options)
    with pytest.raises(ValueError, match=message):
        generate_text(model, TOKENIZER, "a", **options)


def test_refused_prompts():
    model = new_model()
    with pytest.raises(ValueError, match="expected at least one token"):
        stream(model, [], 5)
    for shape in [(3,), (0, 2), (2, 0), (1, 1, 1)]:
        with pytest.raises(ValueError, match=r"idx must be \(B, T\)"):
            generate(model, torch.ones(shape, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match="got 'Z' at position 1"):
        generate_text(model, TOKENIZER, "aZ", 5)
    for stop in ("abc", [""], ["a", ""]):
        with pytest.raises(ValueError, match="stop must be strings that are not empty"):
            generate_text(model, TOKENIZER, "a", 5, stop=stop)


# --- text


def test_text_is_the_decoded_tokens():
    model = new_model()
    pieces = list(generate_text(model, TOKENIZER, "abc", 30, generator=seeded()))
    tokens = list(stream(model, TOKENIZER.encode("abc"), 30, generator=seeded()))
    assert "".join(pieces) == TOKENIZER.decode(tokens)
    assert len(pieces) == 31


def test_empty_prompts():
    model = new_model()
    newline = TOKENIZER.encode("\n")
    assert "".join(generate_text(model, TOKENIZER, "", 9, temperature=0)) == TOKENIZER.decode(
        stream(model, newline, 9, temperature=0)
    )
    letters = CharTokenizer("abc")
    small = new_model(vocab_size=3)
    assert "".join(generate_text(small, letters, "", 9, temperature=0)) == letters.decode(
        stream(small, [0], 9, temperature=0)
    )


def test_gpt2_text_starts_and_ends_with_end_of_text():
    tokenizer = GPT2Tokenizer()
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50304, n_layer=1, n_head=1, n_embd=8)).eval()
    text = "".join(generate_text(model, tokenizer, "", 12, temperature=0))
    tokens = stream(model, [tokenizer.end_of_text], 12, temperature=0, vocab_size=50257)
    assert text == tokenizer.decode(tokens)

    class Ending(FixedLogits):
        def forward(self, idx, cache=None):
            cache.advance(idx.shape[1])
            logits = torch.zeros(50257)
            logits[tokenizer.end_of_text if cache.length > 3 else 220] = 1
            return logits.expand(1, 1, -1), None

    ending = Ending(torch.zeros(1))
    assert "".join(generate_text(ending, tokenizer, "a", 50, temperature=0)) == "   "


class Pieces:
    """A tokenizer whose token t is the t-th of some byte strings."""

    def __init__(self, pieces):
        self.pieces = pieces

    def token_bytes(self, token):
        return self.pieces[token]


def cut_at_first_stop(pieces: list[bytes], stop: list[str]) -> str:
    text = ""
    for end in range(len(pieces) + 1):
        complete = end == len(pieces)
        text = b"".join(pieces[:end]).decode("utf-8", "replace" if complete else "ignore")
        found = [at for at in (text.find(s) for s in stop) if at >= 0]
        if found:
            return text[: min(found)]
    return text


@settings(deadline=None, max_examples=400)
@given(
    st.text(alphabet="abé€", max_size=20),
    st.lists(st.integers(0, 40), max_size=8),
    st.lists(st.text(alphabet="abé€", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_wherever_the_tokens_are_cut(text, cuts, stop):
    data = text.encode()
    bounds = sorted({0, len(data), *(c for c in cuts if c < len(data))})
    pieces = [data[a:b] for a, b in itertools.pairwise(bounds)]
    given_pieces = list(_text(iter(range(len(pieces))), Pieces(pieces), stop))
    assert "".join(given_pieces) == cut_at_first_stop(pieces, stop)
    # Nothing that might become a stop string has been shown before.
    for end in range(len(given_pieces)):
        assert not any(s in "".join(given_pieces[:end]) for s in stop)


def test_text_is_shown_as_soon_as_it_cannot_be_a_stop_string():
    pieces = [b"x", b"a", b"b", b"a", b"b", b"c", b"y"]
    shown = list(_text(iter(range(7)), Pieces(pieces), ["abc"]))
    assert shown == ["x", "", "", "ab", "", ""]
    assert list(_text(iter(range(4)), Pieces(pieces), ["abc"])) == ["x", "", "", "ab", "a"]


def test_text_that_ends_inside_a_character():
    assert list(_text(iter([0, 1]), Pieces([b"a", "€".encode()[:2]]), [])) == ["a", "", "\ufffd"]


# --- devices


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device("auto").type == expected
    for name in ("", "tpu9", "meta", "gpu", "mps"):
        with pytest.raises(ValueError, match=f"device must be auto, cpu, cuda or .*'{name}'"):
            pick_device(name)
    with pytest.raises(RuntimeError, match=r"device 'cuda:99' is not there: PyTorch .* GPUs"):
        pick_device("cuda:99")
