"""benchmarks/gpu.py as far as it runs on a CPU: its contenders compute the same, or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gptfast
from benchmarks import gpu, gpu_works
from benchmarks.timing import Timing

SMALL = [
    lambda: gpu_works.norms(40, 48),
    lambda: gpu_works.elementwise(24, 40),
    lambda: gpu_works.losses(16, 101, 24),
    lambda: gpu_works.attentions(2, 2, 40, 16),
    lambda: gpu_works.decodes(2, 4, 2, 40, 16),
    lambda: gpu_works.ropes(2, 3, 5, 8),
    lambda: gpu_works.embeddings(30, 7, 16),
]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(gpu_works, "DEVICE", "cpu")
    gpu_works.seed.cache_clear()
    yield
    gpu_works.seed.cache_clear()


@pytest.mark.parametrize("number", range(len(SMALL)))
def test_contenders_compute_the_same(number):
    torch.manual_seed(number)
    for work in SMALL[number]():
        gpu.check(work)
        if "dropout" not in work.op:  # whose peers draw masks of their own
            given = work.inputs()
            expected = gpu.results(work.ours, given, work, [])
            for name, peer in work.peers.items():
                if name not in ("SDPA cuDNN", "SDPA efficient"):  # of GPUs
                    got = gpu.results(peer, given, work, [])
                    assert {n: x.shape for n, x in got.items()} == {
                        n: x.shape for n, x in expected.items()
                    }


def test_every_work_has_bytes_of_each_pass():
    for work in gpu_works.works():
        for pass_ in work.passes:
            assert work.bytes[("fwd", "bwd").index(pass_)] > 0


def test_an_op_that_is_wrong_is_refused():
    (work,) = gpu_works.embeddings(30, 7, 16)
    torch.manual_seed(0)

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, idx, w):
            ctx.save_for_backward(idx, w)
            return w[idx]

        @staticmethod
        def backward(ctx, dy):
            idx, w = ctx.saved_tensors
            return None, torch.zeros_like(w).index_add_(0, idx, dy) * 1.05

    wrong = gpu.Work(**{**vars(work), "ours": Wrong.apply})
    with pytest.raises(AssertionError, match="embedding, gradient 0: error"):
        gpu.check(wrong)


def test_rows():
    (work,) = gpu_works.attentions(1, 2, 64, 16)
    ceiling = {"copy_bytes_per_s": 1e12, "bf16_flop_per_s": 1e15}
    row = gpu.row(work, "bwd", gpu.OURS, Timing(2e-6, 1e-6, 3e-6), 1e-6, ceiling)
    flops = 2.5 * 4 * 2 * 64 * 64 / 2 * 16  # five products instead of two; half is masked
    assert row.tflop_per_s == pytest.approx(flops / 2e-6 / 1e12)
    assert row.percent_of_ceiling == pytest.approx(100 * flops / 2e-6 / 1e15)
    assert row.ratio_to_best_peer == pytest.approx(0.5)
    assert (row.median_us, row.p20_us, row.p80_us) == pytest.approx((2, 1, 3))


def test_the_page_shows_what_was_measured():
    root = Path(__file__).parents[1]
    rows = json.loads((root / "benchmarks/results/h100.json").read_text())["rows"]
    page = (root / "docs/gpu.md").read_text()
    shown = page.split("-->\n", 1)[1].split("<!-- end -->")[0]
    assert shown == gpu.markdown([gpu.Row(**row) for row in rows])


def test_refuses_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU"):
        gpu.main()
    assert gptfast.backend.forced_backend() is None
