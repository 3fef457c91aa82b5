"""Launch configurations that were measured on a card, in place of the heuristics.

A kernel's `pick_config` is a pure function of sizes and `Target`. `@tunable` looks its arguments up
in the table of measured configurations, `kernels/tuned.json`, and in the file that
`GPTFAST_TUNED` names; what is in neither stays with the heuristic. Every call with the same
arguments is answered from a cache: a tuned launch costs what an untuned one does.

    {"sm_90": {"layer_norm.pick_config": {"M=4096 N=768 itemsize=2": {"num_warps": 2}}}}

`python -m benchmarks.tune` measures and writes such a file. Nothing is tuned while a model runs:
results must not depend on what a timer said.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

from gptfast.targets import TARGETS, Target

Pick = TypeVar("Pick", bound=Callable[..., Any])
# Target -> function -> arguments -> fields of its config that differ from the heuristic's.
Table = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]

# Calls of a `pick_config` that are remembered: far more than the shapes of a model in training, and
# where every batch is longer or shorter than the last, a bound.
CALLS = 1024

_caches: list[Any] = []
_forced: dict[tuple[str, str, str], Any] = {}
_observers: list[Callable[[str, str, str, Any], None]] = []


def tunable(pick: Pick) -> Pick:
    """Let measured configurations override a `pick_config`.

    Args:
        pick: a function of hashable arguments, one of them a `Target`, to a frozen dataclass.
    """
    name = f"{pick.__module__.rsplit('.', 1)[-1]}.{pick.__name__}"
    signature = inspect.signature(pick)

    @functools.lru_cache(maxsize=CALLS)
    def picked(*args: Any, **kwargs: Any) -> Any:
        target, key = describe(signature.bind(*args, **kwargs).arguments)
        forced = _forced.get((target, name, key))
        config = pick(*args, **kwargs) if forced is None else forced
        measured = table().get(target, {}).get(name, {}).get(key) if forced is None else None
        if measured is not None:
            unknown = measured.keys() - {field.name for field in dataclasses.fields(config)}
            if unknown:
                raise ValueError(
                    f"tuned configurations: {name} has no field {sorted(unknown)[0]!r}"
                )
            config = dataclasses.replace(config, **measured)
        for observe in _observers:
            observe(target, name, key, config)
        return config

    _caches.append(picked)
    return cast(Pick, functools.wraps(pick)(picked))


def describe(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """The target's name and the other arguments as text, which is how the table names a call."""
    target = next(value.name for value in arguments.values() if isinstance(value, Target))
    others = (f"{k}={v}" for k, v in arguments.items() if not isinstance(v, Target))
    return target, " ".join(others)


@functools.cache
def table() -> Table:
    """The packaged table, overridden by that in `GPTFAST_TUNED`.

    Raises:
        ValueError: the file is not such a table; names what was expected and given.
        FileNotFoundError: there is no such file.
    """
    packaged = resources.files("gptfast") / "kernels" / "tuned.json"
    merged = _checked(json.loads(packaged.read_text()), "tuned.json")
    own = os.environ.get("GPTFAST_TUNED")
    if own:
        merged = merge(merged, read_table(Path(own)))
    return merged


def read_table(path: Path) -> Table:
    """A table from a file; see `table` for errors."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of tuned configurations, got none")
    try:
        return _checked(json.loads(path.read_text()), str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error


def merge(first: Table, second: Table) -> Table:
    """Both tables; the second one's entries where both have one."""
    merged: dict[str, dict[str, dict[str, Any]]] = {}
    for source in (first, second):
        for target, functions in source.items():
            for name, calls in functions.items():
                merged.setdefault(target, {}).setdefault(name, {}).update(calls)
    return merged


def forget() -> None:
    """Empty the caches, after the table or the environment has changed."""
    table.cache_clear()
    for cache in _caches:
        cache.cache_clear()


@contextlib.contextmanager
def forced(target: str, name: str, key: str, config: Any) -> Iterator[None]:
    """Have one call of one `pick_config` answered with `config` inside the `with` block."""
    _forced[target, name, key] = config
    forget()
    try:
        yield
    finally:
        del _forced[target, name, key]
        forget()


@contextlib.contextmanager
def observed() -> Iterator[dict[tuple[str, str, str], Any]]:
    """Collect (target, function, arguments) -> config of what is picked inside the `with` block."""
    seen: dict[tuple[str, str, str], Any] = {}

    def observe(target: str, name: str, key: str, config: Any) -> None:
        seen[target, name, key] = config

    forget()
    _observers.append(observe)
    try:
        yield seen
    finally:
        _observers.remove(observe)
        forget()


def _checked(value: Any, source: str) -> Table:
    def require(holds: bool, expected: str, given: Any) -> None:
        if not holds:
            raise ValueError(f"{source}: expected {expected}, got {given!r:.80}")

    require(isinstance(value, dict), "an object of targets", value)
    for target, functions in value.items():
        require(target in TARGETS, f"one of {', '.join(TARGETS)}", target)
        require(isinstance(functions, dict), "an object of functions", functions)
        for calls in functions.values():
            require(isinstance(calls, dict), "an object of calls", calls)
            for fields in calls.values():
                right = isinstance(fields, dict) and all(type(v) is int for v in fields.values())
                require(right, "integer fields", fields)
    return cast(Table, value)
