"""Every option of a GPT against its formulas in plain PyTorch; whole models against others'."""

from __future__ import annotations

import dataclasses
import json

import plain_gpt
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gptfast
from gptfast import checkpoint, decoder
from gptfast.generate import generate
from gptfast.integrations.huggingface import save_gpt2
from gptfast.models import GPT, Bigram, BigramConfig, EncoderDecoder, GPTConfig
from gptfast.models.config import GPT2_SIZES
from gptfast.nn import quantize
from gptfast.testing import assert_close_in_norm
from gptfast.tokenizer import CharTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = GPTConfig(block_size=24, vocab_size=67, n_layer=2, n_head=4, n_embd=32)


def small(preset, **changes):
    """The options of a preset at a small size."""
    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    return GPTConfig.preset(preset, **{n: getattr(SMALL, n) for n in sizes}, **changes)


DECODERS = {
    "sinusoidal": dataclasses.replace(SMALL, positions="sinusoidal"),
    "rotary": dataclasses.replace(SMALL, positions="rotary", rope_base=500.0),
    "no positions": dataclasses.replace(SMALL, positions="none"),
    "rms": dataclasses.replace(SMALL, norm="rms", norm_eps=1e-6),
    "no weights in norms": dataclasses.replace(SMALL, norm_affine=False),
    "post-norm": dataclasses.replace(SMALL, pre_norm=False),
    "post-norm, rms": dataclasses.replace(SMALL, pre_norm=False, norm="rms", bias=False),
    "embedding norm": dataclasses.replace(SMALL, embedding_norm=True),
    "swiglu": dataclasses.replace(SMALL, mlp="swiglu"),
    "relu": dataclasses.replace(SMALL, mlp="relu", n_inner=40),
    "relu2": dataclasses.replace(SMALL, mlp="relu2"),
    "gelu, narrow": dataclasses.replace(SMALL, n_inner=20),
    "grouped queries": dataclasses.replace(SMALL, n_kv_head=2),
    "one head of keys": dataclasses.replace(SMALL, n_kv_head=1, bias=False),
    "queries and keys normalised": dataclasses.replace(SMALL, qk_norm=True),
    "window": dataclasses.replace(SMALL, window=5),
    "window of one": dataclasses.replace(SMALL, window=1),
    "softcap": dataclasses.replace(SMALL, logit_softcap=0.5),
    "untied": dataclasses.replace(SMALL, tied=False),
    "no biases": dataclasses.replace(SMALL, bias=False),
    "llama": small("llama-135m", n_kv_head=2, n_inner=48, tied=False),
    "nanochat": small("nanochat-d20", n_kv_head=1),
    "everything": dataclasses.replace(
        SMALL, positions="rotary", norm="rms", pre_norm=False, embedding_norm=True, mlp="swiglu",
        n_kv_head=2, qk_norm=True, window=7, logit_softcap=2.0, tied=False,
    ),
}  # fmt: skip
ENCODERS = {
    "encoder": dataclasses.replace(SMALL, causal=False),
    "encoder, window": dataclasses.replace(SMALL, causal=False, window=3, positions="rotary"),
    "reader": dataclasses.replace(SMALL, cross_attention=True, n_kv_head=2),
    "reader, post-norm": dataclasses.replace(SMALL, cross_attention=True, pre_norm=False),
}


def new_model(config, seed=0):
    """Random parameters of every kind, norms and biases too."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(0.3 * torch.randn_like(p) + name.endswith("weight"))
            else:
                p.mul_(6)
    return model


def tokens(config, B, T, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (B, T), generator=generator)


def memory_for(config, B, dtype=torch.float32):
    if not config.cross_attention:
        return None
    generator = torch.Generator().manual_seed(8)
    return torch.randn(B, 9, config.n_embd, generator=generator, dtype=torch.float64).to(dtype)


def plain_results(config, model, x, y, dtype):
    """Logits, loss and gradients by the formulas."""
    weights = {n: p.detach().to(dtype).requires_grad_() for n, p in model.named_parameters()}
    logits = plain_gpt.logits_of(config, weights, x, memory_for(config, len(x), dtype))
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return {"logits": logits, "loss": loss, **dict(zip(weights, gradients, strict=True))}


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [*DECODERS.values(), *ENCODERS.values()], ids=[*DECODERS, *ENCODERS]
)
def test_logits_loss_and_gradients(config):
    model, x = new_model(config), tokens(config, 3, 20)
    y = tokens(config, 3, 20, seed=6)
    peer, exact = (plain_results(config, model, x, y, d) for d in (torch.float32, torch.float64))
    memory = memory_for(config, 3)
    for backend in ("auto", "torch"):
        model.zero_grad()
        with gptfast.use_backend(backend):
            logits, loss = model(x, y, memory=memory)
            loss.backward()
        got = {"logits": logits, "loss": loss, **{n: p.grad for n, p in model.named_parameters()}}
        assert got.keys() == exact.keys()
        for name, value in got.items():
            assert_close_in_norm(f"{name} on {backend}", value, peer[name], exact[name])
    for fused in (False, True):
        model.fused_loss = fused
        alone = model(x, y, memory=memory, loss_only=True)[1]
        assert_close_in_norm("loss alone", alone, peer["loss"], exact["loss"])


@pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
def test_a_cache_gives_the_logits_of_the_whole_sequence(config):
    model, x = new_model(config).eval(), tokens(config, 2, 24)
    with torch.no_grad():
        weights = {n: p.double() for n, p in model.named_parameters()}
        whole = plain_gpt.logits_of(config, weights, x)
        cache = model.new_cache(2)
        parts = [model(part, cache=cache)[0] for part in x.split([7, 1, 1, 1, 9, 5], dim=1)]
    exact = whole[:, [6, 7, 8, 9, 18, 23]]
    assert_close_in_norm("logits", torch.cat(parts, 1), model(x)[0][:, [6, 7, 8, 9, 18, 23]], exact)


@pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
def test_generated_text_is_that_of_full_recomputation(config):
    model, idx = new_model(config).eval(), tokens(config, 2, 6)
    got = generate(model, idx, 18, temperature=0)
    weights = {n: p.double() for n, p in model.named_parameters()}
    for _ in range(18):
        z = plain_gpt.logits_of(config, weights, idx)[:, -1]
        idx = torch.cat([idx, z.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, idx)


def test_the_reader_generates_with_a_cache():
    config = ENCODERS["reader"]
    model, idx = new_model(config).eval(), tokens(config, 2, 2)
    memory = memory_for(config, 2)
    got = generate(model, idx, 22, temperature=0, memory=memory)
    for _ in range(22):
        with torch.no_grad():
            z = model(idx, memory=memory)[0][:, -1]
        idx = torch.cat([idx, z.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, idx)


def test_an_encoder_sees_what_follows_and_a_window_hides_what_is_far():
    x = tokens(SMALL, 1, 20)
    changed = x.clone()
    changed[0, 12] += 1 - 2 * (changed[0, 12] == 66).long()
    for config, reached in (
        (SMALL, range(12, 20)),
        (dataclasses.replace(SMALL, causal=False), range(20)),
        (dataclasses.replace(SMALL, n_layer=1, window=3), range(12, 15)),
        (dataclasses.replace(SMALL, n_layer=1, window=3, causal=False), range(10, 15)),
    ):
        model = new_model(config)
        differ = (model(x)[0] != model(changed)[0]).any(-1)[0]
        assert differ.nonzero().flatten().tolist() == list(reached)


# ---- Against models of others --------------------------------------------------------------------


def test_llama_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = small("llama-1.1b", n_kv_head=2, n_inner=96, norm_eps=1e-5)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.inner,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.block_size,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
        )
    ).eval()
    model = new_model(config).eval()
    ours = dict(model.named_parameters())
    kv = config.kv_heads * config.head_dim
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(ours["transformer.wte.weight"])
        theirs.model.norm.weight.copy_(ours["transformer.ln_f.weight"])
        theirs.lm_head.weight.copy_(ours["lm_head.weight"])
        for i, layer in enumerate(theirs.model.layers):
            w = {n.removeprefix(f"transformer.h.{i}."): p for n, p in ours.items()}
            parts = w["attn.c_attn.weight"].split([config.n_embd, kv, kv])
            for name, part in zip("qkv", parts, strict=True):
                getattr(layer.self_attn, f"{name}_proj").weight.copy_(part)
            layer.self_attn.o_proj.weight.copy_(w["attn.c_proj.weight"])
            gate, up = w["mlp.c_fc.weight"].chunk(2)
            layer.mlp.gate_proj.weight.copy_(gate)
            layer.mlp.up_proj.weight.copy_(up)
            layer.mlp.down_proj.weight.copy_(w["mlp.c_proj.weight"])
            layer.input_layernorm.weight.copy_(w["ln_1.weight"])
            layer.post_attention_layernorm.weight.copy_(w["ln_2.weight"])
        x = tokens(config, 2, 24)
        torch.testing.assert_close(model(x)[0], theirs(x).logits, rtol=0, atol=1e-4)
        prompt = x[:1, :4]
        their_text = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert torch.equal(generate(model, prompt, 20, temperature=0), their_text)


def test_the_transformer_of_2017_is_that_of_torch():
    """Post-norm, ReLU, sinusoids: memory and decoder states against `torch.nn`'s layers."""
    config = dataclasses.replace(SMALL, positions="sinusoidal", pre_norm=False, mlp="relu")
    torch.manual_seed(0)
    model = EncoderDecoder(config).eval()
    sizes = (config.n_embd, config.n_head, config.inner, 0.0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(*sizes, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    decoder_ = nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes, batch_first=True), 2).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        halves = (model.encoder, encoder, False), (model.decoder, decoder_, True)
        for ours, theirs, reads in halves:
            for mine, layer in zip(ours.transformer["h"], theirs.layers, strict=True):
                pairs = [
                    (layer.self_attn.in_proj_weight, mine.attn.c_attn.weight),
                    (layer.self_attn.in_proj_bias, mine.attn.c_attn.bias),
                    *_linear(layer.self_attn.out_proj, mine.attn.c_proj),
                    *_linear(layer.linear1, mine.mlp.c_fc),
                    *_linear(layer.linear2, mine.mlp.c_proj),
                    *_linear(layer.norm1, mine.ln_1),
                ]
                if reads:
                    q, kv = mine.cross.c_q, mine.cross.c_kv
                    pairs += [
                        (layer.multihead_attn.in_proj_weight, torch.cat([q.weight, kv.weight])),
                        (layer.multihead_attn.in_proj_bias, torch.cat([q.bias, kv.bias])),
                        *_linear(layer.multihead_attn.out_proj, mine.cross.c_proj),
                        *_linear(layer.norm2, mine.ln_cross),
                        *_linear(layer.norm3, mine.ln_2),
                    ]
                else:
                    pairs += _linear(layer.norm2, mine.ln_2)
                for to, value in pairs:
                    to.copy_(value)
        source, x = tokens(config, 2, 17), tokens(config, 2, 12, seed=9)
        wte = model.decoder.transformer["wte"].weight
        assert wte is model.encoder.transformer["wte"].weight
        wave = model.encoder.tables.wave
        embedded = [wte[i] * config.n_embd**0.5 + wave[: i.shape[1]] for i in (source, x)]
        memory = encoder(embedded[0])
        mask = nn.Transformer.generate_square_subsequent_mask(12)
        states = decoder_(embedded[1], memory, tgt_mask=mask, tgt_is_causal=True)
        torch.testing.assert_close(model.encode(source), memory, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(source, x)[0], states @ wte.T, rtol=1e-4, atol=1e-5)


def _linear(to, of):
    return [(to.weight, of.weight), (to.bias, of.bias)]


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_of_an_encoder_decoder_has_a_gradient(tied):
    model = EncoderDecoder(dataclasses.replace(SMALL, tied=tied, dropout=0.1))
    source, x = tokens(SMALL, 2, 9), tokens(SMALL, 2, 7, seed=3)
    model(source, x, x, loss_only=True)[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    heads = 0 if tied else SMALL.vocab_size * SMALL.n_embd
    one = sum(GPT(dataclasses.replace(SMALL, cross_attention=c)).num_parameters() for c in (0, 1))
    assert model.num_parameters() == one - SMALL.vocab_size * SMALL.n_embd + heads


def test_bigram():
    torch.manual_seed(0)
    model = Bigram(BigramConfig(7))
    x, y = torch.randint(7, (2, 3, 10))
    logits, loss = model(x, y)
    table = model.table.weight
    assert torch.equal(logits, table[x])
    torch.testing.assert_close(loss, F.cross_entropy(table[x].flatten(0, 1), y.flatten()))
    torch.testing.assert_close(model(x, y, loss_only=True)[1], loss)
    assert model.num_parameters() == 49
    with torch.no_grad():
        table.zero_()
        table[torch.arange(7), (torch.arange(7) + 3) % 7] = 50.0
    got = generate(model, torch.tensor([[1, 2]]), 5, generator=torch.Generator().manual_seed(0))
    assert got.tolist() == [[1, 2, 5, 1, 4, 0, 3]]
    # Fitted to pairs, its loss is their conditional entropy.
    counts = torch.zeros(7, 7).index_put_((x.flatten(), y.flatten()), torch.ones(30), True)
    with torch.no_grad():
        table.copy_((counts + 1e-9).log())
    p = counts / counts.sum(1, keepdim=True)
    entropy = -(counts * p.clamp(min=1e-9).log()).sum() / 30
    torch.testing.assert_close(model(x, y)[1].detach(), entropy, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="vocab_size must be a positive integer, got 0"):
        BigramConfig(0)
    with pytest.raises(ValueError, match=r"Bigram: idx must be \(B, T\) .* got \(3,\)"):
        model(torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    ("preset", "count"),
    [("llama-135m", 134_515_008), ("llama-1.1b", 1_100_048_384), ("nanochat-d20", 560_988_160)],
)
def test_presets_have_the_published_sizes(preset, count):
    with torch.device("meta"):
        assert GPT(GPTConfig.preset(preset)).num_parameters() == count


def test_the_character_model_has_10_65_million():
    config = GPTConfig.preset("shakespeare-char")
    count = GPT(config).num_parameters() - config.block_size * config.n_embd
    assert count == 10_646_784


# ---- Around them ---------------------------------------------------------------------------------


def test_decoding_in_one_call_refuses_what_it_does_not_know():
    sizes_only = {"gelu, narrow", "grouped queries", "one head of keys", "untied", "no biases"}
    for name, config in {**DECODERS, **ENCODERS}.items():
        reason = decoder.why_not(new_model(config).eval(), 1)
        assert (reason is None) == (name in sizes_only), (name, reason)
    model = new_model(DECODERS["rotary"]).eval()
    assert decoder.why_not(model, 1) == "the model has positions = 'rotary'"
    model = new_model(SMALL).eval()
    model.transformer["h"][1].attn.window = (3, 0)
    assert decoder.why_not(model, 1) == "transformer.h.1.attn has a window or norms"


def test_checkpoints_hold_the_options(tmp_path):
    tokenizer = CharTokenizer("".join(map(chr, range(65, 65 + 67))))
    for name in ("llama", "nanochat", "sinusoidal"):
        model = new_model(DECODERS[name]).eval()
        path = checkpoint.save(tmp_path / name.replace(" ", ""), 1, model, tokenizer)
        again = checkpoint.load(path).model
        assert again.config == model.config
        x = tokens(SMALL, 2, 24)
        assert torch.equal(model(x)[0], again(x)[0])


def test_checkpoints_from_before_there_were_options(tmp_path):
    tokenizer = CharTokenizer("".join(map(chr, range(65, 65 + 67))))
    model = new_model(SMALL).eval()
    path = checkpoint.save(tmp_path, 1, model, tokenizer)
    header = json.loads((path / "config.json").read_text())
    header["model"] = {name: header["model"][name] for name in GPT2_SIZES}
    (path / "config.json").write_text(json.dumps(header))
    x = tokens(SMALL, 2, 24)
    assert torch.equal(model(x)[0], checkpoint.load(path).model(x)[0])


@pytest.mark.parametrize("name", ["no positions", "window", "nanochat"])
def test_documents_in_a_row_do_not_see_each_other(name):
    config = dataclasses.replace(DECODERS[name], positions="none")
    model, x = new_model(config), tokens(config, 2, 20)
    starts = [0, 3, 4, 20, 31]
    documents = torch.tensor([*starts, 40], dtype=torch.int32)
    got = model(x, documents=documents)[0].flatten(0, 1)
    pieces = x.flatten().tensor_split(starts[1:])
    weights = {n: p.double() for n, p in model.named_parameters()}
    exact, peer = (
        torch.cat([plain_gpt.logits_of(config, w, piece[None])[0] for piece in pieces])
        for w in (weights, dict(model.named_parameters()))
    )
    assert_close_in_norm("logits", got, peer, exact)
    got.sum().backward()
    with pytest.raises(ValueError, match="documents must be None with a cache"):
        model(x, cache=model.new_cache(2), documents=documents)


def test_quantised_variants_run():
    for name in ("llama", "nanochat"):
        model = new_model(DECODERS[name]).eval()
        x = tokens(SMALL, 2, 24)
        before = model(x)[0]
        after = quantize(model, "int8")(x)[0]
        assert (after - before).norm() < 0.1 * before.norm()


def test_positions_stay_exact_in_any_dtype():
    for name, tables in (("rotary", ("cos", "sin")), ("sinusoidal", ("wave",))):
        model = new_model(DECODERS[name])
        cast = new_model(DECODERS[name]).bfloat16()
        for table in tables:
            assert torch.equal(getattr(model.tables, table), getattr(cast.tables, table))
        assert cast(tokens(SMALL, 1, 5))[0].dtype == torch.bfloat16
        assert not any("tables" in key for key in model.state_dict())


def test_compiles_without_a_graph_break():
    config, x = DECODERS["nanochat"], tokens(SMALL, 2, 20)
    model = new_model(config)
    expected = model(x, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x), expected)


def test_autocast():
    model, x = new_model(DECODERS["everything"]), tokens(SMALL, 2, 20)
    exact = model(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(x, x)
    loss.backward()
    assert (logits - exact).norm() < 0.1 * exact.norm()


def test_export_refuses_what_is_no_gpt2(tmp_path):
    with pytest.raises(ValueError, match="expected the architecture of GPT-2, got norm = 'rms'"):
        save_gpt2(new_model(DECODERS["rms"]), tmp_path / "folder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "absolute"}, "positions must be one of learned, .*none, got 'absolute'"),
        ({"norm": "batch"}, "norm must be one of layer, rms, got 'batch'"),
        ({"mlp": "selu"}, "mlp must be one of gelu, relu, relu2, swiglu, got 'selu'"),
        ({"n_kv_head": 3}, "n_kv_head must divide n_head 4, got 3"),
        ({"n_kv_head": 0}, "n_kv_head must be a positive integer, got 0"),
        ({"n_inner": 0}, "n_inner must be a positive integer, got 0"),
        ({"window": 0}, "window must be a positive integer, got 0"),
        ({"logit_softcap": 0.0}, "logit_softcap must be positive and finite, got 0.0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive and finite, got 0.0"),
        ({"rope_base": -1.0}, "rope_base must be positive and finite, got -1.0"),
        (
            {"positions": "rotary", "n_embd": 36},
            "n_embd / n_head must be even for rotary positions, got 9",
        ),
        (
            {"positions": "sinusoidal", "n_embd": 3, "n_head": 1},
            "n_embd must be even for sinusoidal positions, got 3",
        ),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=f"GPTConfig: {message}"):
        dataclasses.replace(SMALL, **changes)


def test_bad_calls():
    x = tokens(SMALL, 2, 5)
    with pytest.raises(ValueError, match="a cache needs a model with causal=True"):
        generate(new_model(ENCODERS["encoder"]), x, 3)
    reader = new_model(ENCODERS["reader"])
    with pytest.raises(ValueError, match=r"memory must be \(B, S, 32\), got None"):
        reader(x)
    with pytest.raises(ValueError, match=r"memory must be \(2, S, 32\), got \(1, 4, 32\)"):
        reader(x, memory=torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match=r"memory must be None without cross attention, got"):
        new_model(SMALL)(x, memory=torch.zeros(2, 4, 32))
