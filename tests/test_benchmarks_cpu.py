"""benchmarks.cpu and benchmarks.ceiling on works small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import gptfast
from benchmarks.ceiling import SWEEPS, Sweep, SweepCall
from benchmarks.cpu import __main__ as command
from benchmarks.cpu import memory, report, worker
from benchmarks.cpu.differentiated import built
from benchmarks.cpu.report import WARMED, Row
from benchmarks.cpu.works import Limit, Work, all_works
from benchmarks.timing import EAGER, OURS
from gptfast import backend

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="the loops are in gptfast._C")


def row(contender=OURS, **changes):
    values = dict(
        op="gelu", shape="4x4", dtype="float32", passes="fwd", threads=2, contender=contender,
        median_us=10.0, p20=9.0, p80=11.0, gbps=3.0, gflops=None, pct_of_ceiling=50.0,
        ratio_to_best_peer=2.0, extra_mb=1.0,
    )  # fmt: skip
    return Row(**{**values, **changes})


def small_gelu(dtype, compile, ours=gptfast.gelu):
    x = torch.randn(64, 48).to(dtype)
    return built(
        (x,),
        ours,
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        {"fwd": Limit(2 * x.numel() * x.element_size(), Sweep(1, 1)), "bwd": Limit(flops=1e6)},
        (),
        dtype,
        compile,
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("traffic", [*SWEEPS.values(), Sweep(4, 3, 3), Sweep(3, 1)], ids=str)
def test_a_sweep_reads_and_writes_all_it_says(isa, traffic, stream):
    call = SweepCall(traffic, 64 * 1001 * traffic.moved, stream)
    values = [array.view(torch.float32) for array in call.arrays]
    for number, value in enumerate(values[: traffic.reads]):
        value.fill_(10.0**number)
    total = float(sum(10**number for number in range(traffic.reads)))
    call()
    for value in values[traffic.reads - traffic.in_place :]:
        assert (value == total).all()


def test_probes_count_what_they_compute(isa):
    probes = backend.extension()
    assert probes.ceiling_fma(10) == 2 * probes.ceiling_fma(5) > 0
    assert (probes.ceiling_tiles(3, True) > 0) == (isa == "amx")
    assert probes.ceiling_tiles(3, False) == probes.ceiling_tiles(3, True)


def test_rows_of_a_work():
    rows = []
    work = Work("small", "gelu", "64x48", small_gelu)
    worker.time_work(work, torch.float32, False, True, True, rows.append)
    assert [(r.passes, r.contender) for r in rows] == [
        (passes, contender) for passes in ("fwd", "bwd") for contender in (OURS, EAGER)
    ]
    for ours, eager in (rows[:2], rows[2:]):
        assert eager.ratio_to_best_peer == 1
        assert ours.ratio_to_best_peer == pytest.approx(eager.median_us / ours.median_us)
        assert ours.p20 <= ours.median_us <= ours.p80
        assert ours.threads == torch.get_num_threads()
    assert rows[0].gbps == pytest.approx(2 * 64 * 48 * 4 / rows[0].median_us / 1e3)
    assert (rows[0].gflops, rows[2].gbps) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_timed_when_the_values_are_wrong(dtype):
    def wrong(x):
        return gptfast.gelu(x) * 1.05

    work = Work("small", "gelu", "64x48", lambda d, c: small_gelu(d, c, wrong))
    with pytest.raises(AssertionError, match=r"result 0 differs by 5.* in norm"):
        worker.time_work(work, dtype, False, True, True, lambda row: pytest.fail("a row"))


def test_file_keeps_one_row_of_each_key(tmp_path):
    file = tmp_path / "rows.json"
    report.write(file, [row(), row(EAGER)])
    report.write(file, [row(median_us=20.0), row(threads=1)])
    assert json.loads(file.read_text())[0]["pass"] == "fwd"
    assert report.read(file) == [row(median_us=20.0), row(EAGER), row(threads=1)]


def test_table_shows_both_ratios(capsys):
    rows = [row(), row(EAGER, extra_mb=7.0), row(OURS + WARMED, ratio_to_best_peer=1.25)]
    Console(width=160).print(report.table(rows))
    line = next(text for text in capsys.readouterr().out.splitlines() if "gelu" in text)
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        "gelu", "float32", "fwd", "2", "0.01", "2.00", "1.25", "50 %", "50 %", "1", "7"
    ]  # fmt: skip


def test_extra_memory_of_a_call():
    assert 30 <= memory.extra_mb(lambda: torch.ones(10_000_000)) < 60
    assert memory.extra_mb(lambda: None) < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["gelu", "nothing"]}, "--only must be of layer_norm, .*; got 'nothing'"),
        ({"dtypes": ["float64"]}, "--dtypes must be of float32, bfloat16; got 'float64'"),
        ({"allocators": ["cold"]}, "--allocators must be of as found, warmed; got 'cold'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(SystemExit, match=message):
        command.main(**options)


def test_the_warmed_allocator_is_in_the_environment_of_a_worker():
    found, warmed = (command.environment(1, kind) for kind in (command.FOUND, command.WARM))
    assert warmed.items() - found.items() == command.WARM_ENVIRONMENT.items()
    assert found["OMP_NUM_THREADS"] == "1"


def test_every_work_names_a_case_of_the_harness():
    for name, work in all_works().items():
        assert work.name == name
        assert work.op in backend.OPS or work.op in ("adamw", "gpt2")


@pytest.mark.slow
def test_the_command_writes_its_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    command.main(
        only=["layer_norm"], threads=[1], dtypes=["float32"], compile=False, quick=True,
        json_file=file,
    )  # fmt: skip
    contenders = {name for kind in (OURS, EAGER) for name in (kind, kind + WARMED)}
    assert {r.contender for r in report.read(file)} == contenders
    assert "layer_norm" in capsys.readouterr().out


def test_the_documented_table_is_that_of_the_rows():
    root = Path(__file__).resolve().parents[1]
    table = report.markdown(report.read(root / "benchmarks/results/cpu.json"))
    marked = f"<!-- cpu.json -->\n{table}\n<!-- end of cpu.json -->\n"
    assert marked in (root / "docs/cpu.md").read_text()
