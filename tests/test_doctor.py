"""`gptfast doctor`: what it says agrees with what the ops do, and it survives what is missing."""

import itertools
import json
import sys
import warnings

import pytest
import torch

import gptfast
from benchmarks.static_report.calls import triton_takes_cpu_tensors
from gptfast import backend, testing
from gptfast.cli import main
from gptfast.doctor import doctor, examine, run_selftest

KEYS = {
    "versions": {
        *("gptfast", "python", "torch", "numpy", "triton", "safetensors", "tiktoken"),
        *("cuda", "hip"),
    },
    "platform": {"system", "machine", "cpu", "cores", "memory_gb", "cpu_features"},
    "tools": {"compiler", "nvcc"},
    "missing": set(backend.BACKENDS),
}


@pytest.fixture
def without_extension(monkeypatch):
    """An installation that has no gptfast._C."""
    caches = (backend.extension, backend.missing)
    monkeypatch.setitem(sys.modules, "gptfast._C", None)  # importing it fails
    monkeypatch.delattr(gptfast, "_C", raising=False)
    for cached in caches:
        cached.cache_clear()
    for op in backend.OPS.values():  # what each has found out about its backends
        monkeypatch.setattr(op, "_candidates", {})
    yield
    for cached in caches:
        cached.cache_clear()


def test_json_is_what_the_docstring_says(capsys):
    assert doctor(json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {
        *("versions", "platform", "extension", "tools", "gpus", "forced_backend", "missing"),
        *("ops", "notes", "selftest"),
    }
    for key, inner in KEYS.items():
        assert set(facts[key]) == inner
    assert facts["versions"]["gptfast"] == gptfast.__version__
    assert facts["selftest"] is None
    for choice in facts["ops"]:
        assert set(choice) == {"op", "device", "dtype", "backend", "refused"}
        assert all(isinstance(reason, str) for reason in choice["refused"].values())


def test_every_op_is_listed_with_the_backend_that_runs_it():
    listed = {(c["op"], c["dtype"]): c for c in examine()["ops"] if c["device"] == "cpu"}
    assert {op for op, _ in listed} == set(testing.OPS)
    for name, dtype in itertools.product(("gelu", "layer_norm"), ("float32", "float64")):
        choice = listed[name, dtype]
        x = torch.ones(4, 64, dtype=getattr(torch, dtype))
        chosen = backend.OPS[name].choose(x)
        assert chosen is backend.OPS[name].implementations[choice["backend"]]
        assert choice["backend"] not in choice["refused"]


def test_a_forced_backend_is_shown_with_its_refusals():
    with gptfast.use_backend("cpu"):
        facts = examine()
    assert facts["forced_backend"] == "cpu"
    refused = [c for c in facts["ops"] if c["device"] == "cpu" and c["dtype"] == "float64"]
    assert refused
    for choice in refused:
        assert choice["backend"] is None
        has_kernel = "cpu" in backend.OPS[choice["op"]].implementations
        assert ("float64" if has_kernel else "no cpu kernel") in choice["refused"]["cpu"]


def test_the_thread_count_is_left_alone():
    before = torch.get_num_threads()
    facts = examine()
    assert torch.get_num_threads() == before
    if facts["extension"]["error"] is None:
        assert facts["extension"]["threads"] == before


def test_tables(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("Which backend runs what", "Refused", "C++ compiler", torch.__version__):
        assert word in out


def test_a_missing_extension_is_explained(without_extension, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the doctor says it itself
        assert doctor() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "There are no compiled kernels (import of gptfast._C halted" in out
    assert backend.HOW_TO_BUILD in out
    facts = examine()
    assert {c["backend"] for c in facts["ops"] if c["device"] == "cpu"} == {"torch"}


def test_the_first_fallback_warns_once(without_extension):
    x = torch.randn(3, 5)
    with pytest.warns(RuntimeWarning, match="no compiled kernels here") as caught:
        y = gptfast.gelu(gptfast.gelu(x))
    assert len(caught) == 1
    with gptfast.use_backend("torch"):
        assert torch.equal(y, gptfast.gelu(gptfast.gelu(x)))


def test_kernels_for_gpus_are_asked_with_what_they_look_at():
    with triton_takes_cpu_tensors():
        choices = [choice for choice in examine()["ops"] if choice["dtype"] != "float64"]
    written = [op for op, row in backend.OPS.items() if "triton" in row.implementations]
    refused = [choice["op"] for choice in choices if "triton" in choice["refused"]]
    assert not set(refused).intersection(written)


def test_the_selftest_runs_each_combination_at_least_once():
    results = run_selftest(seconds=0)
    assert {r["op"] for r in results} == set(testing.OPS)
    assert {r["cases"] for r in results} == {1}
    expected = {"float32", "bfloat16", "float16"}
    assert {r["dtype"] for r in results if r["backend"] == "torch"} == expected
    if backend.missing("cpu") is None:
        assert {r["dtype"] for r in results if r["backend"] == "cpu"} == expected


def test_a_failed_selftest_is_named_and_gives_status_1(monkeypatch, capsys):
    def wrong(case, name, dtype, device):
        if (case.op, name, dtype) == ("gelu", "torch", torch.bfloat16):
            raise AssertionError("3 of 7 elements are wrong")

    monkeypatch.setattr(testing, "run_case", wrong)
    assert doctor(selftest=True) == 1
    out = capsys.readouterr().out
    assert "3 of 7 elements are wrong" in out
    assert "FAILED gelu on torch, bfloat16" in out
    assert doctor(json=True, selftest=True) == 1
    results = json.loads(capsys.readouterr().out)["selftest"]
    bad = [r for r in results if r["failures"]]
    assert [(r["op"], r["backend"], r["dtype"]) for r in bad] == [("gelu", "torch", "bfloat16")]
    monkeypatch.setattr(testing, "run_case", lambda *args: {})
    assert doctor(selftest=True) == 0
