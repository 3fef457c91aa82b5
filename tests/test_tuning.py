"""The table of measured configurations, and what is done with it."""

import dataclasses
import json
import subprocess
import sys

import pytest

from gptfast import tuning
from gptfast.targets import TARGETS, Target


@dataclasses.dataclass(frozen=True)
class Config:
    block: int
    num_warps: int


CALLS = []


@tuning.tunable
def pick_config(N: int, itemsize: int, target: Target) -> Config:
    CALLS.append(N)
    return Config(N, 4)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A function that makes a value the user's table."""

    def write(value):
        file = tmp_path / "tuned.json"
        file.write_text(value if isinstance(value, str) else json.dumps(value))
        monkeypatch.setenv("GPTFAST_TUNED", str(file))
        tuning.forget()

    yield write
    monkeypatch.undo()
    tuning.forget()


H100, A100 = TARGETS["sm_90"], TARGETS["sm_80"]
NAME = "test_tuning.pick_config"


def test_the_heuristic_decides_where_nothing_was_measured(tuned):
    tuned({})
    assert pick_config(64, 2, target=H100) == Config(64, 4)


def test_what_is_remembered_is_bounded():
    for N in range(tuning.CALLS + 10):
        pick_config(N, 3, H100)
    for cache in tuning._caches:
        assert cache.cache_info().currsize <= tuning.CALLS


def test_what_was_measured_overrides_it_for_this_card_and_call_alone(tuned):
    tuned({"sm_90": {NAME: {"N=64 itemsize=2": {"num_warps": 8}}}})
    assert pick_config(64, 2, H100) == Config(64, 8)
    assert pick_config(64, itemsize=2, target=H100) == Config(64, 8)
    assert pick_config(64, 4, H100) == Config(64, 4)
    assert pick_config(64, 2, A100) == Config(64, 4)


def test_a_call_is_decided_once(tuned):
    tuned({})
    CALLS.clear()
    for _ in range(5):
        pick_config(32, 2, H100)
    assert CALLS == [32]


def test_forced_and_observed(tuned):
    tuned({"sm_90": {NAME: {"N=64 itemsize=2": {"num_warps": 8}}}})
    with tuning.observed() as seen:
        pick_config(64, 2, H100)
    assert seen == {("sm_90", NAME, "N=64 itemsize=2"): Config(64, 8)}
    with tuning.forced("sm_90", NAME, "N=64 itemsize=2", Config(16, 1)):
        assert pick_config(64, 2, H100) == Config(16, 1)
    assert pick_config(64, 2, H100) == Config(64, 8)


def test_merge():
    first = {"sm_90": {"a": {"N=1": {"x": 1}, "N=2": {"x": 2}}}}
    second = {"sm_90": {"a": {"N=2": {"x": 3}}}, "sm_80": {"b": {}}}
    assert tuning.merge(first, second) == {
        "sm_90": {"a": {"N=1": {"x": 1}, "N=2": {"x": 3}}},
        "sm_80": {"b": {}},
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "expected JSON"),
        ([], "expected an object of targets, got []"),
        ({"sm_10": {}}, "expected one of sm_80, sm_86, sm_89, sm_90"),
        ({"sm_90": 1}, "expected an object of functions, got 1"),
        ({"sm_90": {"a": 1}}, "expected an object of calls, got 1"),
        ({"sm_90": {"a": {"N=1": {"x": "1"}}}}, "expected integer fields"),
        ({"sm_90": {NAME: {"N=64 itemsize=2": {"warps": 1}}}}, "has no field 'warps'"),
    ],
)
def test_tables_that_are_none(tuned, value, message):
    tuned(value)
    with pytest.raises(ValueError, match="tuned") as raised:
        pick_config(64, 2, H100)
    assert message in str(raised.value)


def test_a_table_that_is_not_there(tuned, monkeypatch):
    monkeypatch.setenv("GPTFAST_TUNED", "nowhere.json")
    tuning.forget()
    with pytest.raises(FileNotFoundError, match=r"nowhere.json: expected a file of tuned"):
        pick_config(64, 2, H100)


def test_the_packaged_table_is_one():
    assert isinstance(tuning.table(), dict)


def test_tuning_needs_a_gpu():
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.cuda.is_available = lambda: False\n"
         "from benchmarks.tune import main; main()"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "needs a GPU" in done.stderr
