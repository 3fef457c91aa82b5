"""Saving a training run and going on with it, bit by bit.

`training.pt` has what the weights do not say: the optimizers' state, generators, the last row of
the metrics. With fsdp the processes write their shards of weights and optimizer beside it, in the
format of `torch.distributed.checkpoint`; `gptfast.sharded` reads them, and runs no code in them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptfast import checkpoint

if TYPE_CHECKING:
    from gptfast.train import Trainer

# What comes of harmless values that are not what was saved.
STATE_ERRORS = (LookupError, TypeError, ValueError, RuntimeError, AttributeError)


def save_state(trainer: Trainer) -> None:
    """Write a checkpoint of the step that was made; all processes must call this.

    Raises:
        OSError: it cannot be written; the error names the last good one.
    """
    generators = {
        "data": trainer.generator.get_state(),
        "torch": trainer.ranks.gathered(torch.get_rng_state()),
    }
    if trainer.device.type == "cuda":
        generators["cuda"] = trainer.ranks.gathered(torch.cuda.get_rng_state(trainer.device))
    training: dict[str, Any] = {
        "train_tokens": len(trainer.dataset.train),
        "scaler": trainer.scaler.state_dict(),
        "generators": generators,
        "row": trainer.row,
    }
    if trainer.loader is not None:
        all_batches = trainer.loader.position * trainer.ranks.world_size
        training["windows"] = all_batches * trainer.config.batch_size
    sharded = _save_sharded(trainer) if trainer.fsdp else None
    if not trainer.fsdp:
        training["optimizer"] = trainer.optimizers[0].state_dict()
        if len(trainer.optimizers) > 1:
            training["muon"] = trainer.optimizers[1].state_dict()
        if trainer.average:
            training["weights"] = [p.detach().clone() for p in trainer.parameters]

    def write() -> None:
        trainer.folder.synchronise()
        checkpoint.save(
            trainer.folder.path,
            trainer.step,
            trainer.model,
            trainer.dataset.tokenizer,
            val_loss=trainer.row["val_loss"],
            training=training,
            weights=weights,
            sharded=sharded,
        )

    with trainer.averaged():
        weights = trainer.whole_weights()
        trainer.ranks.on_first(write)


def _sharded_state(trainer: Trainer) -> dict[str, Any]:
    """What fsdp splits, as PyTorch's distributed checkpoints want it."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    trainer.settle()
    weights, optimizer = get_state_dict(trainer.model, trainer.optimizers[0])
    average = {str(n): tensor for n, tensor in enumerate(trainer.average)}
    return {"model": weights, "optimizer": optimizer, "average": average}


def _save_sharded(trainer: Trainer) -> Path:
    """Write the shards of all processes into a folder for `checkpoint.save`."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    from gptfast.sharded import failure_reasons

    path = trainer.folder.path / ".sharded.tmp"
    trainer.ranks.on_first(lambda: shutil.rmtree(path, ignore_errors=True))
    try:
        save(_sharded_state(trainer), checkpoint_id=path)
    except CheckpointException as error:  # of a full disk, say
        raise OSError(
            f"cannot write the shards of step {trainer.step}: {failure_reasons(error)}; "
            f"{checkpoint.last_good(trainer.folder.path)}"
        ) from error
    return path


def _restore_sharded(trainer: Trainer, path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import set_state_dict

    from gptfast.sharded import load_sharded

    folder = trainer.ranks.on_first(lambda: checkpoint.verify_sharded(path))
    if folder is None:
        raise ValueError(f"{path}: expected a checkpoint of fsdp by the settings, got another")
    state = _sharded_state(trainer)
    load_sharded(state, folder)
    try:
        set_state_dict(
            trainer.model,
            trainer.optimizers[0],
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    except (*STATE_ERRORS, AssertionError) as error:
        raise ValueError(
            f"{folder}: expected the optimizer's state of this model: {error!r:.300}"
        ) from error


def _restore_whole(trainer: Trainer, state: dict[str, Any]) -> None:
    for optimizer, name in zip(trainer.optimizers, ("optimizer", "muon"), strict=False):
        optimizer.load_state_dict(state[name])
    if trainer.average:
        with torch.no_grad():
            for parameter, weight in zip(trainer.parameters, state["weights"], strict=True):
                parameter.copy_(weight)


def restore_state(trainer: Trainer, path: Path) -> None:
    """Let a trainer that has the weights of a checkpoint go on with it; all processes must call it.

    Raises:
        ValueError: the checkpoint is damaged or does not fit the settings.
    """
    state = checkpoint.load_training(path)
    file = path / "training.pt"
    settings: list[list[dict[str, Any]]] = [
        [{key: g[key] for key in ("betas", "weight_decay") if key in g} for g in o.param_groups]
        for o in trainer.optimizers
    ]
    if trainer.fsdp:
        _restore_sharded(trainer, path)
    try:
        trainer.row = dict(state["row"])
        trainer.step, trainer.elapsed = int(trainer.row["step"]), float(trainer.row["elapsed"])
        train_tokens = state["train_tokens"]
        if not trainer.fsdp:
            _restore_whole(trainer, state)
        if state["scaler"]:  # empty unless it was float16
            trainer.scaler.load_state_dict(state["scaler"])
        trainer.generator.set_state(state["generators"]["data"])
        if trainer.loader is not None:
            batch = trainer.config.batch_size * trainer.ranks.world_size
            trainer.loader.position = state["windows"] // batch
        _restore_generators(trainer, state["generators"])
    except STATE_ERRORS as error:
        raise ValueError(
            f"{file}: expected the training state of this model: {error!r:.300}"
        ) from error
    if not trainer.fsdp:
        _check_optimizer(trainer, file, state["optimizer"])
    if train_tokens != len(trainer.dataset.train):
        raise ValueError(
            f"{file}: expected to go on with its {train_tokens} training tokens, "
            f"got {len(trainer.dataset.train)}"
        )
    for optimizer, groups in zip(trainer.optimizers, settings, strict=True):
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)  # the settings may have changed


def _restore_generators(trainer: Trainer, generators: dict[str, torch.Tensor]) -> None:
    rank, n = trainer.ranks.rank, trainer.ranks.world_size
    if generators["torch"].dim() != 2:
        raise ValueError(f"expected a generator of each process, got {generators['torch']}")
    if len(generators["torch"]) != n:  # of another number of processes: dropout differs
        torch.manual_seed(trainer.config.seed + trainer.step * n + rank)
        return
    torch.set_rng_state(generators["torch"][rank].clone())
    if trainer.device.type == "cuda" and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"][rank].clone(), trainer.device)


def _check_optimizer(trainer: Trainer, file: Path, state: dict[str, Any]) -> None:
    masters = any("master" in s for s in state["state"].values())
    if masters != (wanted := trainer.config.master_weights):
        raise ValueError(f"{file}: expected master_weights {wanted} by the settings, got {masters}")
    # The optimizer does not look at shapes before its next step.
    for parameter, moments in trainer.optimizers[0].state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            given = getattr(moments.get(name), "shape", None)
            if given != (shape := parameter.shape):
                raise ValueError(f"{file}: expected {name} of {tuple(shape)}, got {given}")
