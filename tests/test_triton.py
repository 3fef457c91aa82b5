"""The Triton kernels, executed from their shipped source by Triton's interpreter.

The interpreter is chosen when Triton is imported, so the cases run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent


def in_the_interpreter(file, which):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton"]
    command += ["-m", which]
    # The interpreter has one thread: a process for each of two cores.
    done = subprocess.run(
        [*command, "--maxfail=10", "--numprocesses=2", str(HERE / file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("file", ["triton_cases.py", "test_adamw.py", "test_gpt_triton.py"])
def test_in_the_interpreter(file):
    in_the_interpreter(file, "not slow")


@pytest.mark.slow
def test_every_case_in_every_dtype_in_the_interpreter():
    in_the_interpreter("triton_cases.py", "slow")
