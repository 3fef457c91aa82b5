"""Fixtures that several test files share."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from gptfast import backend

EXTENSION = backend.extension()
ISAS = EXTENSION.cpu_isas() if EXTENSION else []
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRET:
    from gptfast import interpreter

    interpreter.install()


class Place(NamedTuple):
    """Where an op can run on this machine."""

    backend: str
    device: str = "cpu"
    isa: str | None = None


PLACES = [Place("torch"), *(Place("cpu", isa=isa) for isa in ISAS)]
if INTERPRET:
    PLACES.append(Place("triton"))
if torch.cuda.is_available():
    PLACES += [Place("torch", "cuda"), Place("triton", "cuda")]


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Last, so that `place` varies fastest: the tests of one case share its exact results.
    if "place" in metafunc.fixturenames:
        ids = [f"{p.backend}-{p.isa or p.device}" for p in PLACES]
        metafunc.parametrize("place", PLACES, ids=ids, indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Every backend, on every device; `cpu` at each of its SIMD levels."""
    with at_level(request.param.isa):
        yield request.param


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every SIMD level of this processor in turn."""
    with at_level(request.param):
        yield request.param


@contextlib.contextmanager
def at_level(isa: str | None) -> Iterator[None]:
    if isa is None:
        yield
        return
    assert EXTENSION is not None
    before = EXTENSION.cpu_isa()
    EXTENSION.set_cpu_isa(isa)
    yield
    EXTENSION.set_cpu_isa(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no small disk: mounting a tmpfs needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)
