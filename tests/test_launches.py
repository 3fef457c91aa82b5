"""Kernel launches of a training step: they may not become more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
# Forward and backward of ours, when they were last made fewer.
MOST = {"forward": 105, "backward": 215, "clipping": 0, "optimizer": 3}


def in_its_own_process(*arguments):  # it needs TRITON_INTERPRET before triton is imported
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("launches") / "rows.json"
    table = in_its_own_process("-m", "benchmarks.launches", "--no-compile", "--json", str(file))
    assert "gptfast" in table
    return {row["contender"]: row for row in json.loads(file.read_text())}


@pytest.mark.parametrize("contender", ["gptfast", "gptfast, fused loss"])
def test_ours(rows, contender):
    ours = rows[contender]
    assert {part: ours[part] for part in MOST} == MOST
    assert ours["optimizer"] <= 4
    assert ours["total"] == sum(ours["ops"].values()) == sum(MOST.values())
    assert ours["total"] <= 0.75 * rows["eager"]["total"]


def test_eager_is_counted_as_its_sources_say(rows):
    """12 layers: 4 products with bias, attention, 2 norms, GELU, 2 residual sums; then the head."""
    eager, fused = rows["eager"], rows["eager, fused AdamW"]
    # Two embeddings, positions, their sum, the last norm, the head, log-softmax and loss.
    assert eager["forward"] == fused["forward"] == 12 * (4 + 1 + 2 + 1 + 2) + 8
    # A product with bias: dx, dw, db; attention 3, split 1, norms 2 each, GELU 1, sums 2. Then loss
    # and its seed 3, the head 2, the last norm 2, the sum over the batch of positions' gradients,
    # two embeddings and the sum of the two gradients of the tied weight.
    assert eager["backward"] == 12 * (4 * 3 + 3 + 1 + 2 * 2 + 1 + 2) + 3 + 2 + 2 + 1 + 2 + 1
    # Norm 2, stack, norm, + eps, max_norm / that 2, clamp, times.
    assert eager["clipping"] == 9
    # w, m, v twice, sqrt, / , + eps, w again; 148 tensors fit into one launch each.
    assert eager["optimizer"] == 8
    assert fused["optimizer"] == 2


def test_launches_of_many_tensors():
    code = """
from benchmarks.launches import BLOCK, CUDA_12, multi_tensor_launches as count
print(count([], 3, 9), count([0, 0], 3, 9), count([1], 3, 9), count([1] * 3, 3, 9),
      count([1] * 4, 3, 9), count([0, 1, 1, 1], 3, 9), count([BLOCK * 9], 3, 9),
      count([BLOCK * 9 + 1], 3, 9), count([BLOCK * 8, BLOCK * 2, 1], 3, 9),
      count([BLOCK * 20, 1, 1], 3, 9))
"""
    assert in_its_own_process("-c", code).split() == [
        "0",
        "0",
        "1",
        "1",
        "2",
        "1",
        "1",
        "2",
        "2",
        "3",
    ]
