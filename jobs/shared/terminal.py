"""What the verbs share to speak with a person or a script."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click


def say(text: str) -> None:
    """A line on stderr, where what happens is told; stdout has the result."""
    print(text, file=sys.stderr, flush=True)


def show_next(command: str) -> None:
    """What to run next, on stderr: it isn't part of the result."""
    say(f"next: {command}")


def show_json(value: Any) -> None:
    """One JSON document on stdout, for scripts."""
    click.echo(json.dumps(value, indent=1))


def json_line(value: Any) -> str:
    """One line of JSON, with letters of any alphabet as they are; what can't be printed is escaped:
    names that are no UTF-8 have no other form, and some would steer a terminal."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Aligned columns with a heading line."""
    if not rows:
        return
    table = [list(rows[0]), *[["" if v is None else str(v) for v in row.values()] for row in rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        click.echo("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip())


def show_facts(facts: Mapping[str, Any]) -> None:
    """`name  value` lines."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")
