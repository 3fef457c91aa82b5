"""The models, small and with random weights, and the check that comes before any figure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import gptfast
from benchmarks.plain_models import PLAIN, Sizes
from gptfast.patching import Report
from gptfast.testing import assert_close_in_norm, unit_roundoff

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Family:
    """A kind of model, small, with random weights, in fp32 on the CPU.

    Args:
        make: the model; the same weights at every call.
        batch: what `loss` takes.
        logits, loss: of a model, or of a compiled one, for a batch.
        losses: of each target, from the logits for a batch; `loss` is their mean.
        generate: as many new tokens as the family is timed with, greedily, or None.
        patch: patches a model; by default `gptfast.patch` alone.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    logits: Callable[[Any, Any], torch.Tensor]
    loss: Callable[[Any, Any], torch.Tensor]
    losses: Callable[[torch.Tensor, Any], torch.Tensor]
    generate: Callable[[Any, Any], torch.Tensor] | None
    patch: Callable[[nn.Module], Report] = gptfast.patch


# Two layers: to compile more of them takes longer, and does not run differently.
SIZES = Sizes(vocab_size=2048, block_size=128, n_layer=2, n_head=4, n_embd=256)
BATCH_SIZE = 8
NEW_TOKENS = 16


def loss_of_each(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In float64, so that what errors it has are those of the logits."""
    logits = logits.double().flatten(0, -2)
    return nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")


def plain_family(kind: Callable[[Sizes], nn.Module]) -> Family:
    """A family of `benchmarks/plain_models.py`."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return kind(SIZES)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (BATCH_SIZE, SIZES.block_size + 1)
        idx = torch.randint(SIZES.vocab_size, shape, generator=generator)
        return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()

    def generate(model: Any, batch: Any) -> torch.Tensor:
        idx = batch[0][:1, :32]
        for _ in range(NEW_TOKENS):  # without a cache, as the shortest scripts do it
            idx = torch.cat((idx, model(idx)[0][:, -1:].argmax(-1)), dim=1)
        return idx

    return Family(
        make,
        batch,
        logits=lambda model, batch: model(batch[0])[0],
        loss=lambda model, batch: model(*batch)[1],
        losses=lambda logits, batch: loss_of_each(logits, batch[1]),
        generate=generate,
    )


def huggingface_family(name: str) -> Family:
    """A family of `benchmarks/huggingface_models.py`, which loads transformers when it is used."""

    def make() -> nn.Module:
        from benchmarks.huggingface_models import new_model

        return new_model(name, SIZES)

    def batch() -> dict[str, torch.Tensor]:
        from benchmarks.huggingface_models import new_batch

        return new_batch(name, SIZES, B=BATCH_SIZE, padded=False)

    def logits(model: Any, batch: Any) -> torch.Tensor:
        return model(**{name: x for name, x in batch.items() if name != "labels"}).logits

    def losses(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        labels = batch["labels"]
        if name in ("bert", "vit"):
            return loss_of_each(logits, labels)
        return loss_of_each(logits[:, :-1], labels[:, 1:])  # the next token's

    def generate(model: Any, batch: Any) -> torch.Tensor:
        return model.generate(
            batch["input_ids"][:, :32],
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )

    return Family(
        make,
        batch,
        logits=logits,
        loss=lambda model, batch: model(**batch).loss,
        losses=losses,
        generate=None if name in ("bert", "vit") else generate,
    )


# Of `benchmarks.huggingface_models.CONFIGS`.
HUGGINGFACE = (
    *("gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"),
    *("phi", "phi3", "bert", "vit"),
)
FAMILIES: dict[str, Family] = {name: plain_family(kind) for name, kind in PLAIN.items()}
FAMILIES |= {f"transformers {name}": huggingface_family(name) for name in HUGGINGFACE}


def check(family: Family, model: nn.Module, patched: nn.Module) -> None:
    """Raise unless both models compute the same, within three times the unpatched one's error."""
    batch = family.batch()
    results = []
    for m in (patched, model, copy.deepcopy(model).double()):
        loss = family.loss(m, batch)
        parameters = {n: p for n, p in m.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        with torch.no_grad():
            logits = family.logits(m, batch)
        results.append([loss, logits, *gradients])
        names = ["logits", *(f"gradient of {name}" for name in parameters)]
    (loss, *ours), (_, *peers), (_, *exacts) = results
    for name, *values in zip(names, ours, peers, exacts, strict=True):
        there = [x is not None for x in values]
        assert len(set(there)) == 1, f"{name}: expected from all or none, got it from {there}"
        if all(there):
            assert_close_in_norm(name, *values)
    # One number may be exact by luck in the unpatched model. It is the mean of n losses, whose
    # errors e are not, and the rule of `assert_close_in_norm` for those bounds the mean as well:
    # |mean(e)| <= |e| / sqrt(n), the root mean square.
    losses, exact = family.losses(peers[0], batch), family.losses(exacts[0], batch)
    allowed = 3 * (losses - exact).norm() + 4 * unit_roundoff(loss.dtype) * exact.norm()
    allowed /= exact.numel() ** 0.5
    error = abs(loss.detach().double() - exact.mean())
    assert error <= allowed, f"loss: error {error:.3g}, allowed {allowed:.3g}"
