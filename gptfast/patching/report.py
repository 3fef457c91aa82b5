"""What `patch` and `unpatch` did: a line for each module, printed as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Entry:
    """One module of the model.

    Args:
        name: where it is in the model; the first of its names, if it is shared.
        cls: the name of its class.
        op: what replaces it, or would.
        reason: why it was left alone; empty where it was replaced.
    """

    name: str
    cls: str
    op: str
    reason: str = ""


@dataclass
class Report:
    """What was replaced, what was not, and why.

    Attributes:
        verb: what happened to the modules in `replaced`.
        replaced: modules that were changed (or would be, in a dry run).
        left: modules that were not, each with its reason.
        fallbacks: (op, reason) of calls that went to the original since, and how many. Compiled
            code does not count.
    """

    verb: str = "replaced"
    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        table = Table(
            title=f"{len(self.replaced)} modules {self.verb}, {len(self.left)} left alone"
        )
        for column in ("class", "op", "modules", "such as", "what"):
            table.add_column(column, justify="right" if column == "modules" else "left")
        entries = [*self.replaced, *self.left]
        kinds = Counter((e.cls, e.op, e.reason) for e in entries)
        first = {(e.cls, e.op, e.reason): e.name for e in reversed(entries)}
        for kind, count in kinds.items():
            cls, op, reason = kind
            what = f"left alone: {reason}" if reason else self.verb
            table.add_row(cls, op, str(count), first[kind] or "(the model)", what)
        for (op, reason), count in self.fallbacks.items():
            table.add_row("", op, "", "", f"{count} calls went to the original: {reason}")
        console = Console(width=120, no_color=True)
        with console.capture() as text:
            console.print(table)
        return text.get()
