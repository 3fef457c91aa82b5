"""Work in other processes, with the results kept on disk.

A compiler may crash, and the interpreter has to be chosen before Triton is imported: so a worker is
a process of its own that answers one line of JSON with another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any

PACKAGE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptfast/static_report"


def serve(function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The worker's side: apply `function` to each line of JSON on standard input.

    What `function` raises is answered as {"error": ...}. Its prints go to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = function(json.loads(line))
        except Exception as error:  # whatever a kernel's code raises is the answer about it
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[-2000:]}"}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A process that runs a module of this package."""

    def __init__(self, module: str, environment: dict[str, str]) -> None:
        self.module, self.environment = module, environment
        self.process: subprocess.Popen[str] | None = None
        self.log: IO[str] | None = None

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer; {"error": ...} where it died over the job."""
        if self.process is None or self.process.poll() is not None:
            self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.{self.module}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                env={**os.environ, **self.environment},
                cwd=PACKAGE.parents[1],
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        code = self.process.wait()
        assert self.log is not None
        self.log.seek(0)
        return {"error": f"worker ended with {code}: {self.log.read()[-2000:].strip()}"}

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def run_jobs(
    module: str,
    jobs: Sequence[tuple[str, dict[str, Any]]],
    processes: int,
    environment: dict[str, str] | None = None,
    cached: bool = True,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every job's answer as (key, answer), the cached ones first.

    Args:
        module: the worker's, in this package.
        jobs: (key, job): the key names the answer in the cache, whatever it depends on.
        processes: workers at a time.
        environment: the worker's, beside this process's.
        cached: whether answers of earlier runs are taken from the disk.
    """
    open_jobs = []
    for key, job in jobs:
        file = CACHE / f"{key}.json"
        if cached and file.exists():
            yield key, json.loads(file.read_text())
        else:
            open_jobs.append((key, job))
    local = threading.local()
    workers: list[Worker] = []

    def work(key: str, job: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if not hasattr(local, "worker"):
            local.worker = Worker(module, environment or {})
            workers.append(local.worker)
        answer = local.worker.ask(job)
        if "error" not in answer:
            _store(CACHE / f"{key}.json", answer)
        return key, answer

    with ThreadPoolExecutor(processes) as pool:
        try:
            for future in as_completed(pool.submit(work, *job) for job in open_jobs):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for worker in workers:
                worker.close()


def _store(file: Path, answer: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as out:
        json.dump(answer, out)
    Path(out.name).replace(file)  # two runs at a time never see half a file
