"""The planner, against counts of PyTorch's and against the model itself."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stock_gpt import StockGPT
from gptfast.cli import main
from gptfast.models import GPT, GPTConfig
from gptfast.plan import (
    GPUS,
    activation_bytes,
    duration,
    forward_flops_per_token,
    make_plan,
    multiplying_weights,
    parse_gpus,
    parse_tokens,
)

CONFIG = GPTConfig(block_size=64, vocab_size=1000, n_layer=3, n_head=4, n_embd=128)


def test_flops_equal_those_that_pytorch_counts():
    idx = torch.zeros(2, 64, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        StockGPT(CONFIG)(idx)
    # PyTorch counts the whole square of scores; the causal half of it is computed.
    square = 4 * CONFIG.n_layer * CONFIG.block_size * CONFIG.n_embd
    assert counter.get_total_flops() / 128 == forward_flops_per_token(CONFIG) + square / 2


def test_multiplying_weights():
    model = GPT(CONFIG)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    assert multiplying_weights(CONFIG) == matrices - model.transformer["wpe"].weight.numel()


def saved_bytes(model, *inputs):
    """Bytes that autograd keeps, but for the parameters; a storage counts once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(*inputs)
    return sum(s.nbytes() for address, s in kept.items() if address not in parameters)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "rotary", "qk_norm": True, "n_kv_head": 2},
        *({"mlp": kind, "norm": "rms"} for kind in ("relu", "relu2", "swiglu")),
    ],
)
def test_activations_equal_what_autograd_keeps(options):
    layers = {}
    for n_layer in (1, 3):
        config = GPTConfig(64, 101, n_layer, 4, 128, **options)
        model = GPT(config).bfloat16()
        idx = torch.zeros(2, 64, dtype=torch.int64)
        layers[n_layer] = saved_bytes(model, idx, idx), activation_bytes(config, 2)
    kept, planned = (layers[3][i] - layers[1][i] for i in (0, 1))  # of two blocks
    assert planned == pytest.approx(kept, rel=0.02)  # statistics are left out: 4 of 4096 bytes


def test_a_plan_adds_up():
    config = GPTConfig.preset("gpt2-xl")
    ddp = make_plan(config, GPUS["h100"], 8, tokens=10e9, batch_size=4)
    fsdp = make_plan(config, GPUS["h100"], 8, tokens=10e9, batch_size=4, strategy="fsdp")
    assert ddp.parameters == 1_557_611_200
    assert ddp.weights + ddp.gradients + ddp.optimizer == 18 * ddp.parameters
    assert fsdp.weights == ddp.weights / 8
    assert fsdp.activations == ddp.activations
    assert ddp.seconds == pytest.approx(10e9 * ddp.flops_per_token / (8 * 989e12 * 0.4))
    recomputed = make_plan(config, GPUS["h100"], 8, tokens=10e9, batch_size=4, recompute=True)
    assert recomputed.activations < ddp.activations / 4
    assert recomputed.seconds == pytest.approx(ddp.seconds * 4 / 3)
    assert not make_plan(config, GPUS["t4"], tokens=1e9).fits
    assert make_plan(GPTConfig.preset("gpt2"), GPUS["h100"], tokens=1e9, batch_size=4).fits


@pytest.mark.parametrize(
    ("text", "value"),
    [("10B", 1e10), ("300m", 3e8), ("1.5T", 1.5e12), ("12,000", 12e3), ("1e9", 1e9)],
)
def test_tokens(text, value):
    assert parse_tokens(text) == value


def test_gpus():
    assert parse_gpus("8xH100") == (8, GPUS["h100"])
    assert parse_gpus("2 x a100-40") == (2, GPUS["a100-40"])
    assert parse_gpus("L4") == (1, GPUS["l4"])


def test_duration():
    assert [duration(s) for s in (7, 300, 7200, 864000)] == [
        *("7 seconds", "5.0 minutes", "2.0 hours", "10.0 days"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "8xH1000"], "unknown card 'H1000'; known: T4, L4"),
        (["--gpus", "0xH100"], "gpus must be a card or NxCARD, such as 8xH100; got '0xH100'"),
        (["--tokens", "lots"], "tokens must be a number such as 10B or 300M, got 'lots'"),
        (["--tokens", "1.2.3B"], "tokens must be a number such as 10B or 300M, got '1.2.3B'"),
        (["--mfu", "1.5"], "plan: mfu must be in (0, 1], got 1.5"),
        (["--batch-size", "0"], "plan: batch_size must be at least 1, got 0"),
        (["--block-size", "0"], "block_size must be a positive integer, got 0"),
    ],
)
def test_plans_that_make_no_sense(capsys, options, message):
    assert main(["plan", *options]) == 2
    assert message in capsys.readouterr().err


def test_command(capsys):
    assert main(["plan", "--preset", "gpt2-xl", "--gpus", "8xA100-40", "--tokens", "10B"]) == 0
    out = capsys.readouterr().out
    for word in ("1,557,611,200", "8 x A100-40", "does NOT fit", "18.69 GB", "predicted"):
        assert word in out
