"""Evaluation, against computations of its scores with transformers, one sequence at a time."""

import bz2
import json
import math

import pytest
import torch

from gptfast.cli import main
from gptfast.evaluate import (
    HellaSwagItem,
    hellaswag,
    lambada,
    log_likelihoods,
    read_hellaswag,
    read_lambada,
    score_text,
)
from gptfast.integrations.huggingface import save_gpt2
from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import CharTokenizer, GPT2Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = GPT2Tokenizer()
ITEM = ["A man is on a roof. he", "3", "wraps skis.", "levels tiles.", "holds a cube.", "pulls."]


@pytest.fixture(scope="module")
def model():
    """Seeded weights, large enough that likelihoods differ."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=48, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = save_gpt2(model, tmp_path_factory.mktemp("hf") / "model")
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@torch.inference_mode()
def their_likelihood(theirs, context, continuation):
    """log p and greediness of one continuation, in fp64 from fp32 logits, with no batching."""
    ids = [*context, *continuation][-49:]
    logits = theirs(torch.tensor([ids[:-1]])).logits[0].double()
    n = len(continuation)
    log_p = torch.log_softmax(logits[-n:], -1)[torch.arange(n), torch.tensor(continuation)]
    return log_p.sum().item(), logits[-n:].argmax(-1).tolist() == list(continuation)


def random_pairs(n, longest=70):
    generator = torch.Generator().manual_seed(5)

    def some(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(50257, (length,), generator=generator).tolist()

    return [(some(1, longest), some(1, 12)) for _ in range(n)]


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_likelihoods_equal_those_of_single_sequences(model, theirs, batch_tokens):
    pairs = random_pairs(23)
    done = []
    scores = log_likelihoods(model, pairs, batch_tokens=batch_tokens, on_done=done.append)
    assert sum(done) == 23
    for pair, score in zip(pairs, scores, strict=True):
        log_p, greedy = their_likelihood(theirs, *pair)
        assert score.log_p == pytest.approx(log_p, rel=1e-5)
        assert score.greedy == greedy


def test_a_greedy_continuation_is_seen(model, theirs):
    context = [11, 22, 33]
    likely = theirs.generate(
        torch.tensor([context]), do_sample=False, max_new_tokens=4, pad_token_id=0
    )
    continuation = likely[0, 3:].tolist()
    wrong = [*continuation[:-1], continuation[-1] + 1]
    scores = log_likelihoods(model, [(context, continuation), (context, wrong)])
    assert [s.greedy for s in scores] == [True, False]


def test_hellaswag_and_lambada_equal_transformers(model, theirs):
    pairs = random_pairs(40, longest=20)
    items = [
        HellaSwagItem(
            TOKENIZER.decode(context),
            tuple(TOKENIZER.decode(w) for _, w in pairs[4 * n : 4 * n + 4]),
            n % 4,
        )
        for n, (context, _) in enumerate(pairs[:10])
    ]
    right = {"acc": 0, "acc_norm": 0, "acc_per_token": 0}
    for item in items:
        endings = [TOKENIZER.encode(" " + ending) for ending in item.endings]
        context = TOKENIZER.encode(item.context)
        log_p = torch.tensor([their_likelihood(theirs, context, w)[0] for w in endings])
        sizes = {
            "acc": torch.ones(4),
            "acc_norm": torch.tensor([len(ending.encode()) for ending in item.endings]),
            "acc_per_token": torch.tensor([len(w) for w in endings]),
        }
        for name, size in sizes.items():
            right[name] += int((log_p / size).argmax()) == item.label
    assert hellaswag(model, TOKENIZER, items) == {k: v / 10 for k, v in right.items()}

    passages = [f"{item.context} {ending}" for item in items for ending in item.endings]
    scores = []
    for passage in passages:
        context, word = passage.rsplit(" ", 1)
        scores.append(
            their_likelihood(theirs, TOKENIZER.encode(context), TOKENIZER.encode(" " + word))
        )
    result = lambada(model, TOKENIZER, passages)
    assert result["acc"] == sum(greedy for _, greedy in scores) / len(scores)
    loss = -sum(log_p for log_p, _ in scores) / len(scores)
    assert result["ppl"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("stride", [None, 48, 20, 1])
def test_every_token_of_a_text_is_predicted_once(model, theirs, stride):
    text = "From fairest creatures we desire increase, that thereby " * 7
    ids = TOKENIZER.encode(text)
    score = score_text(model, TOKENIZER, text, stride=stride)
    step, loss, done = stride or 48, 0.0, 1
    while done < len(ids):
        end = min(len(ids), done + (48 if done == 1 else step))
        loss -= their_likelihood(theirs, ids[max(0, end - 49) : done], ids[done:end])[0]
        done = end
    assert score.tokens == len(ids) - 1
    assert score.bytes == len(text.encode()) - len(TOKENIZER.token_bytes(ids[0]))
    assert score.loss == pytest.approx(loss / score.tokens, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(loss / math.log(2) / score.bytes, rel=1e-5)


def test_a_uniform_model_needs_the_bits_of_its_vocabulary():
    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=4))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    score = score_text(model, CharTokenizer("abcd"), "abcdabcdabcda")
    assert score.bits_per_byte == pytest.approx(2)
    assert score.perplexity == pytest.approx(4)


def test_evaluation_leaves_the_mode_alone(model):
    for training in (True, False):
        model.train(training)
        log_likelihoods(model, [([1], [2])])
        assert model.training == training


# ---- Files ---------------------------------------------------------------------------------------


def test_six_lines_an_item(tmp_path):
    for name, opener in (("h.txt", open), ("h.txt.bz2", bz2.open)):
        with opener(tmp_path / name, "wt") as file:
            file.write("\n".join(ITEM + ITEM) + "\n")
        items = read_hellaswag(tmp_path / name)
        assert items == [HellaSwagItem(ITEM[0], tuple(ITEM[2:]), 3)] * 2
        assert len(read_hellaswag(tmp_path / name, limit=1)) == 1


def test_published_json_lines(tmp_path):
    line = {
        "activity_label": "Roof",
        "ctx_a": "A man [title] is [step] here.",
        "ctx_b": "he",
        "endings": ["a [title] b", "b", "c", "d"],
        "label": 2,
    }
    (tmp_path / "h.jsonl").write_text(json.dumps(line) + "\n")
    (item,) = read_hellaswag(tmp_path / "h.jsonl")
    assert item == HellaSwagItem("Roof: A man. is here. He", ("a. b", "b", "c", "d"), 2)
    (tmp_path / "l.jsonl").write_text('{"text": " the last word "}\nanother passage here\n')
    assert read_lambada(tmp_path / "l.jsonl") == ["the last word", "another passage here"]


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_hellaswag, "", "expected HellaSwag items, got none"),
        (read_hellaswag, "a\nb\n", "label from 0 to 3 and four endings from line 1 on"),
        (read_hellaswag, "\n".join([*ITEM, "ctx", "7", "a", "b", "c", "d"]), "from line 7 on"),
        (read_hellaswag, "\n".join(ITEM[:5]), "from line 1 on"),
        (read_hellaswag, '{"ctx_a": 1}', "expected a HellaSwag item in line 1"),
        (read_hellaswag, "{", "expected a HellaSwag item in line 1"),
        (read_lambada, "", "expected passages, got none"),
        (read_lambada, "one two\nword\n", "expected two words in line 2"),
        (read_lambada, '{"txt": 1}', 'expected {"text": ...} in line 1'),
    ],
)
def test_files_that_are_something_else(tmp_path, read, content, message):
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match="file: ") as raised:
        read(tmp_path / "file")
    assert message in str(raised.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "nothing")


def test_what_cannot_be_scored(model):
    with pytest.raises(ValueError, match="pair 0 needs a context"):
        log_likelihoods(model, [([], [1])])
    with pytest.raises(ValueError, match="at most block_size 48 tokens, got 49 in pair 1"):
        log_likelihoods(model, [([1], [1]), ([1], [1] * 49)])
    with pytest.raises(IndexError, match="tokens must be in"):
        log_likelihoods(model, [([50257], [1])])
    with pytest.raises(ValueError, match="at least two tokens, got 1"):
        score_text(model, TOKENIZER, "a")
    with pytest.raises(ValueError, match=r"stride must be in \[1, block_size 48\], got 49"):
        score_text(model, TOKENIZER, "a b", stride=49)
    for function in (hellaswag, lambada):
        with pytest.raises(ValueError, match="got none"):
            function(model, TOKENIZER, [])


# ---- The command line ----------------------------------------------------------------------------


def test_command(model, tmp_path, capsys):
    folder = save_gpt2(model, tmp_path / "model", TOKENIZER)
    (tmp_path / "h.txt").write_text("\n".join(ITEM * 3))
    (tmp_path / "l.txt").write_text("the last word\n")
    (tmp_path / "t.txt").write_text("Some text to be predicted.")
    files = [f"--{name}={tmp_path / file}" for name, file in
             (("text", "t.txt"), ("hellaswag", "h.txt"), ("lambada", "l.txt"))]  # fmt: skip
    out = tmp_path / "scores.json"
    command = ["evaluate", "--checkpoint", str(folder), *files, "--json", str(out)]
    assert main(command) == 0
    assert "bits per byte" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert {(row["task"], row["metric"]) for row in rows} == {
        *(("text", m) for m in ("loss", "perplexity", "bits per byte")),
        *(("hellaswag", m) for m in ("acc", "acc_norm", "acc_per_token")),
        *(("lambada", m) for m in ("acc", "ppl")),
    }
    assert {row["task"]: row["items"] for row in rows}["hellaswag"] == 3
    assert main(["evaluate", "--checkpoint", str(folder)]) == 2
    assert "--text, --hellaswag or --lambada" in capsys.readouterr().err
