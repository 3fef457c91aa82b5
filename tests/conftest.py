"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from places import INTERPRET, ISAS, PLACES, Place, at_level

if INTERPRET:
    from gptfast import interpreter

    interpreter.install()


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.iter_markers("parametrize")
    if "place" in metafunc.fixturenames and not any("place" in mark.args[0] for mark in marks):
        metafunc.parametrize("place", PLACES, ids=str, indirect=True)


# Files that take a minute or more in few tests: begun last, one would run on alone.
LONG = ("test_triton.py", "test_packaging.py", "test_static_report.py", "test_examples.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; and mark what runs on a GPU: `make gpu` selects it."""
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        place = getattr(item, "callspec", None) and item.callspec.params.get("place")
        if isinstance(place, Place) and place.device == "cuda":
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def gpu_errors_stay_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """An illegal access is reported late, and by every later call: end this process, which xdist
    then says of this test, and replaces.
    """
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)
            pytest.exit(f"{request.node.nodeid}: {error}")


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
