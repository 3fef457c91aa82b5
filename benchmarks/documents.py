"""Tables that stand in the documentation as a command printed them."""

from __future__ import annotations

from pathlib import Path


def show_table(table: str, name: str, doc: Path | None) -> None:
    """Print a table, or put it into a file, between `<!-- NAME -->` and `<!-- end of NAME -->`."""
    if doc is None:
        print(table)
        return
    text = doc.read_text()
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if text.count(first) != 1 or text.count(last) != 1:
        raise SystemExit(f"{doc}: expected the marks {first.strip()} and {last} once each")
    before, after = text.split(first)[0], text.split(last)[1]
    doc.write_text(f"{before}{first}{table}\n{last}{after}")
