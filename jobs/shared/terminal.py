"""Output that the verbs share: messages, tables and JSON."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from models.core.errors import hide_passwords


def say(text: str) -> None:
    """Prints a message to stderr; stdout has only the result."""
    print(hide_passwords(text), file=sys.stderr, flush=True)


def show_next(*words: object) -> None:
    """Prints the command to run next, so that it can be pasted, to stderr: it isn't part of the
    result."""
    say(f"next: tessera {shlex.join(map(str, words))}")


def show_json(value: Any) -> None:
    """Prints one JSON document, for scripts."""
    click.echo(hide_passwords(json.dumps(value, indent=1)))


def json_line(value: Any) -> str:
    """One line of JSON. Letters of any alphabet stay as they are. What can't be printed is escaped,
    such as file names that are not valid UTF-8, and control sequences of terminals."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints aligned columns below a heading line."""
    if not rows:
        return
    table = [list(rows[0]), *[["" if v is None else str(v) for v in row.values()] for row in rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        text = "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip()
        click.echo(hide_passwords(text))


def show_facts(facts: Mapping[str, Any]) -> None:
    """Prints a line `name  value` for each fact."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        click.echo(hide_passwords(f"{name:<{width}}  {value}"))
