"""What the processes of tests/test_distributed.py do: runs with the settings of a JSON file."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch

from gptfast.distributed import processes
from gptfast.train import TrainConfig, Trainer, train

torch.set_num_threads(1)


def stop_rank_1_at(step: int) -> None:
    """Send SIGTERM to rank 1 alone, within a step of every run."""
    update = Trainer._update

    def stopped(trainer: Trainer) -> torch.Tensor:
        if trainer.ranks.rank == 1 and trainer.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(trainer)

    Trainer._update = stopped  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer._update = update  # type: ignore[method-assign]


def main(folder: Path) -> None:
    base = TrainConfig(**json.loads((folder / "base.json").read_text()))
    with processes(60):
        for name, changes in json.loads((folder / "runs.json").read_text()).items():
            config = dataclasses.replace(base, out=str(folder / name), **changes)
            if name.endswith("stopped"):
                for _ in stop_rank_1_at(13):
                    assert train(config, quiet=True).step == 13
                config = dataclasses.replace(config, resume=True)
            train(config)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
