"""A small model of each family of transformers that `gptfast.patch` knows, for tests and figures.

Random weights from configs, so nothing is downloaded. Nothing here knows of gptfast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from benchmarks.plain_models import Sizes

TINY = Sizes(vocab_size=67, block_size=12, n_layer=2, n_head=4, n_embd=32)
PIXELS = 4  # of an image's patch, in each direction


def _config(kind: type, s: Sizes, **changes: Any) -> Any:
    return kind(
        vocab_size=s.vocab_size,
        hidden_size=s.n_embd,
        intermediate_size=11 * s.n_embd // 4,
        num_hidden_layers=s.n_layer,
        num_attention_heads=s.n_head,
        max_position_embeddings=4 * s.block_size,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )


def _grouped(s: Sizes) -> dict[str, Any]:
    return {"num_key_value_heads": s.n_head // 2, "head_dim": s.n_embd // s.n_head}


def _window(s: Sizes) -> int:
    return 2 * s.block_size // 3  # so that it hides something


def _gemma(s: Sizes) -> dict[str, Any]:
    scale = {"query_pre_attn_scalar": s.n_embd // s.n_head}
    return {**_grouped(s), **scale, "sliding_window": _window(s)}


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _gpt2(s: Sizes) -> Any:
    return hf.GPT2Config(
        vocab_size=s.vocab_size,
        n_positions=4 * s.block_size,
        n_embd=s.n_embd,
        n_layer=s.n_layer,
        n_head=s.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _opt(s: Sizes) -> Any:
    return hf.OPTConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.n_embd,
        ffn_dim=4 * s.n_embd,
        num_hidden_layers=s.n_layer,
        num_attention_heads=s.n_head,
        word_embed_proj_dim=s.n_embd,
        max_position_embeddings=4 * s.block_size,
        dropout=0.0,
        pad_token_id=0,
    )


def _mixed_layers(s: Sizes) -> list[str]:
    return [("sliding_attention", "full_attention")[i % 2] for i in range(s.n_layer)]


def _qwen2(s: Sizes) -> Any:
    changes = {"use_sliding_window": True, "sliding_window": _window(s)}
    return _config(
        hf.Qwen2Config,
        s,
        num_key_value_heads=s.n_head // 2,
        layer_types=_mixed_layers(s),
        **changes,
    )


def _vit(s: Sizes) -> Any:
    kind: Any = hf.ViTConfig
    return kind(
        hidden_size=s.n_embd,
        intermediate_size=4 * s.n_embd,
        num_hidden_layers=s.n_layer,
        num_attention_heads=s.n_head,
        image_size=PIXELS * round(s.block_size**0.5),
        patch_size=PIXELS,
        num_labels=5,
        **NO_DROPOUT,
    )


CONFIGS: dict[str, Callable[[Sizes], Any]] = {
    "gpt2": _gpt2,
    "gpt_neox": lambda s: _config(hf.GPTNeoXConfig, s),
    "opt": _opt,
    "llama": lambda s: _config(hf.LlamaConfig, s, **_grouped(s)),
    "mistral": lambda s: _config(hf.MistralConfig, s, **_grouped(s), sliding_window=_window(s)),
    "qwen2": _qwen2,
    "qwen3": lambda s: _config(hf.Qwen3Config, s, **_grouped(s)),
    "gemma2": lambda s: _config(
        hf.Gemma2Config, s, **_gemma(s), attn_logit_softcapping=3.0, final_logit_softcapping=5.0
    ),
    "gemma3": lambda s: _config(hf.Gemma3TextConfig, s, **_gemma(s), layer_types=_mixed_layers(s)),
    "phi": lambda s: _config(hf.PhiConfig, s, qk_layernorm=True, partial_rotary_factor=0.5),
    "phi3": lambda s: _config(
        hf.Phi3Config, s, num_key_value_heads=s.n_head // 2, sliding_window=_window(s)
    ),
    "bert": lambda s: _config(hf.BertConfig, s, **NO_DROPOUT),
    "vit": _vit,
}
CAUSAL = [family for family in CONFIGS if family not in ("bert", "vit")]
AUTO = {"bert": hf.AutoModelForMaskedLM, "vit": hf.AutoModelForImageClassification}


def new_model(family: str, sizes: Sizes = TINY, **changes: Any) -> nn.Module:
    """In training, its weights so large, biases and norms included, that a wrong one is seen.

    changes: of the config.
    """
    torch.manual_seed(5)
    config = CONFIGS[family](sizes)
    for name, value in changes.items():
        setattr(config, name, value)
    model: nn.Module = AUTO.get(family, hf.AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def new_batch(
    family: str, sizes: Sizes = TINY, B: int = 3, seed: int = 0, padded: bool = True
) -> dict[str, torch.Tensor]:
    """Keyword arguments of a training step; if padded, two rows are, on the left.

    Not those of Gemma 2, whose eager attention makes NaN in float64 of a query that sees nothing.
    """
    draw = torch.Generator().manual_seed(seed)
    T = sizes.block_size
    if family == "vit":
        side = PIXELS * round(T**0.5)
        pixels = torch.randn(B, 3, side, side, generator=draw)
        return {"pixel_values": pixels, "labels": torch.randint(5, (B,), generator=draw)}
    ids = torch.randint(3, sizes.vocab_size, (B, T), generator=draw)
    if not padded or family == "gemma2":
        return {"input_ids": ids, "labels": ids}
    mask = torch.arange(T) >= torch.tensor([0, T // 4, T // 2, *[0] * B])[:B, None]
    labels = ids.masked_fill(~mask, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
