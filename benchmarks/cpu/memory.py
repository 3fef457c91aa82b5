"""Resident memory of this process: what a call needs beyond what is there before it (Linux)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"  # see proc(5)


def extra_mb(call: Callable[[], object]) -> float:
    """MB by which resident memory rises at most while `call` runs; NaN where it cannot be known."""
    gc.collect()
    give_back()
    try:
        CLEAR.write_text(FORGET_PEAK)
        before = resident_mb()
        result = call()
        peak = _status_mb("VmHWM")
    except OSError:
        return float("nan")
    del result
    return peak - before


def resident_mb() -> float:
    """Resident memory, in MB of 10^6 bytes."""
    return _status_mb("VmRSS")


def give_back() -> None:
    """Let glibc return free memory to the system, so that its reuse counts again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_mb(field: str) -> float:
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / 1e6
    raise OSError(f"{STATUS} has no {field}")
