"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gptfast import backend

EXTENSION = backend.extension()
ISAS = EXTENSION.cpu_isas() if EXTENSION else []


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every SIMD level of this processor in turn."""
    assert EXTENSION is not None
    before = EXTENSION.cpu_isa()
    EXTENSION.set_cpu_isa(request.param)
    yield request.param
    EXTENSION.set_cpu_isa(before)
