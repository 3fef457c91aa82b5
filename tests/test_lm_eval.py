"""The harness's adapter: its three answers against computations of them with transformers."""

from __future__ import annotations

import bz2
import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gptfast import evaluation_sets
from gptfast.evaluate import HellaSwagItem, hellaswag, lambada, read_hellaswag, read_lambada
from gptfast.integrations.huggingface import save_gpt2
from gptfast.integrations.lm_eval import Answers, harness_model
from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import GPT2Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = GPT2Tokenizer()
END = TOKENIZER.end_of_text
T = 48
HELLASWAG = Path(__file__).parents[1] / ".." / "shared" / "data" / "hellaswag_val_full.txt.bz2"


class Asked(NamedTuple):
    """As much of the harness's `Instance` as an adapter sees."""

    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=T, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = save_gpt2(model, tmp_path_factory.mktemp("hf") / "model")
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@torch.inference_mode()
def their_likelihood(theirs, context, continuation):
    ids = [*context, *continuation][-T - 1 :]
    logits = theirs(torch.tensor([ids[:-1]])).logits[0].double()[-len(continuation) :]
    log_p = torch.log_softmax(logits, -1)[torch.arange(len(logits)), torch.tensor(continuation)]
    return log_p.sum().item(), logits.argmax(-1).tolist() == list(continuation)


def test_loglikelihood(model, theirs):
    long = "increase and die and increase and die " * 12
    asked = [
        ("From fairest creatures", " we desire"),
        ("From fairest creatures ", "we desire"),  # the space is the continuation's
        ("", "From"),
        (long, " we"),
        ("x", "\n\ny"),
    ]
    got = Answers(model, TOKENIZER).loglikelihood([Asked(args) for args in asked])
    tokens = [
        (TOKENIZER.encode("From fairest creatures"), TOKENIZER.encode(" we desire")),
        (TOKENIZER.encode("From fairest creatures"), TOKENIZER.encode(" we desire")),
        ([END], TOKENIZER.encode("From")),
        (TOKENIZER.encode(long.rstrip()), TOKENIZER.encode("  we")),
        (TOKENIZER.encode("x"), TOKENIZER.encode("\n\ny")),
    ]
    for (log_p, greedy), pair in zip(got, tokens, strict=True):
        expected = their_likelihood(theirs, *pair)
        assert log_p == pytest.approx(expected[0], rel=1e-5)
        assert greedy == expected[1]


def test_loglikelihood_rolling(model, theirs):
    texts = ["Thy gift, thy tables " * n for n in (1, 5, 20)]
    got = Answers(model, TOKENIZER).loglikelihood_rolling([Asked((text,)) for text in texts])
    for log_p, text in zip(got, texts, strict=True):
        ids, total = [END, *TOKENIZER.encode(text)], 0.0
        for at in range(1, len(ids), T):  # disjoint windows, each with what came before
            total += their_likelihood(theirs, ids[:at], ids[at : at + T])[0]
        assert log_p == pytest.approx(total, rel=1e-5)


def test_generate_until(model, theirs):
    context = "From fairest creatures we desire increase, " * 8
    ids = TOKENIZER.encode(context)[-(T - 16) :]
    new = theirs.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=16, pad_token_id=END
    )[0, len(ids) :].tolist()
    text = TOKENIZER.decode([t for t in new if t != END])
    answers = Answers(model, TOKENIZER)
    settings = {"until": ["\x00"], "max_gen_toks": 16, "do_sample": False}
    assert answers.generate_until([Asked((context, settings))]) == [text]
    stop = text[len(text) // 2 :][:4]
    cut = answers.generate_until([Asked((context, {"until": stop, "max_gen_toks": 16}))])
    assert cut == [text[: text.find(stop)]]


def test_the_harness_is_asked_for_by_name(model):
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match=r"gptfast-kernels\[lm-eval\]"):
            harness_model(model, TOKENIZER)
        return
    from lm_eval.api.model import LM

    assert isinstance(harness_model(model, TOKENIZER), LM)


def test_answers_are_those_of_the_harness_own_model(model, theirs, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    folder = save_gpt2(model, tmp_path / "model", TOKENIZER)
    reference = HFLM(
        pretrained=theirs,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=2,
        max_length=T,
        device="cpu",
    )
    ours = harness_model(model, TOKENIZER)
    long = "increase and die and increase and die " * 12
    settings = {"until": [" the", "\n\n"], "max_gen_toks": 16, "do_sample": False}
    asked = {
        "loglikelihood": [
            ("From fairest creatures", " we desire"),
            ("From fairest creatures ", "we desire"),
            ("", "From"),
            (long, " we"),
            ("x", "\n\ny"),
        ],
        "loglikelihood_rolling": [("Thy gift, thy tables " * n,) for n in (1, 5, 20)],
        "generate_until": [(text, dict(settings)) for text in ("From fairest creatures", long)],
    }
    for name, arguments in asked.items():
        requests = [Instance(name, {}, args, n) for n, args in enumerate(arguments)]
        got, expected = getattr(ours, name)(requests), getattr(reference, name)(requests)
        if name == "generate_until":
            assert got == expected
            continue
        for mine, his in zip(got, expected, strict=True):
            assert mine == pytest.approx(his, rel=1e-5)


# ---- Real items ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_scores_of_real_items_are_those_of_transformers(model, theirs, n):
    """Items of HellaSwag, and passages of LAMBADA's form made of them."""
    if not HELLASWAG.exists():
        pytest.skip("no HellaSwag beside this repository")
    items = read_hellaswag(HELLASWAG, limit=n)
    items = [i for i in items if max(len(TOKENIZER.encode(" " + e)) for e in i.endings) <= T]
    right = {"acc": 0, "acc_norm": 0, "acc_per_token": 0}
    for item in items:
        context = TOKENIZER.encode(item.context)
        endings = [TOKENIZER.encode(" " + ending) for ending in item.endings]
        log_p = torch.tensor([their_likelihood(theirs, context, e)[0] for e in endings])
        for name, size in (
            ("acc", torch.ones(4)),
            ("acc_norm", torch.tensor([len(e.encode()) for e in item.endings])),
            ("acc_per_token", torch.tensor([len(e) for e in endings])),
        ):
            right[name] += int((log_p / size).argmax()) == item.label
    assert hellaswag(model, TOKENIZER, items) == {k: v / len(items) for k, v in right.items()}

    passages = [f"{item.context} {item.endings[item.label]}" for item in items]
    losses, greedy = 0.0, 0
    for passage in passages:
        context, word = passage.rsplit(" ", 1)
        scored = their_likelihood(theirs, TOKENIZER.encode(context), TOKENIZER.encode(" " + word))
        losses, greedy = losses - scored[0], greedy + scored[1]
    got = lambada(model, TOKENIZER, passages)
    assert got["acc"] == greedy / len(passages)
    assert got["ppl"] == pytest.approx(2.718281828459045 ** (losses / len(passages)), rel=1e-4)


# ---- Sets by name --------------------------------------------------------------------------------


def test_sets_are_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = b'{"text": "the last word"}\n'
    fetched = []

    def urlopen(url, timeout):
        fetched.append(url)
        return io.BytesIO(data)

    monkeypatch.setattr(evaluation_sets.urllib.request, "urlopen", urlopen)
    with pytest.raises(ValueError, match=r"lambada_test\.jsonl: expected sha256 4aa8d02c"):
        read_lambada("lambada")
    assert not list(tmp_path.rglob("*.jsonl"))
    published = evaluation_sets.PUBLISHED["lambada"]
    mine = published._replace(sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(evaluation_sets.PUBLISHED, "lambada", mine)
    assert read_lambada("lambada") == read_lambada("lambada") == ["the last word"]
    assert len(fetched) == 2
    next(tmp_path.rglob("*.jsonl")).write_bytes(b"cut")
    with pytest.raises(ValueError, match="delete it to fetch it again"):
        read_lambada("lambada")

    def refused(url, timeout):
        raise OSError("no network")

    monkeypatch.setattr(evaluation_sets.urllib.request, "urlopen", refused)
    with pytest.raises(ConnectionError, match=r"hellaswag_val.jsonl: no network; give the path"):
        read_hellaswag("hellaswag")
    (tmp_path / "set.bz2").write_bytes(bz2.compress(b"a b\n1\nw\nx\ny\nz\n"))
    item = HellaSwagItem("a b", ("w", "x", "y", "z"), 1)
    assert read_hellaswag(tmp_path / "set.bz2") == [item]
