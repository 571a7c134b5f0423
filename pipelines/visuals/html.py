"""HTML pages that open offline.

In: a template and what it shows. Out: the page as text, with its style in it. Names are other people's
words: every value is escaped, and the templates forbid scripts and addresses by their policy. Must
not know what a page is about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.visuals.draw import one_line

LONGEST = 120
"""Characters of a name or a key; what is longer is cut."""


def render(template: Path, **values: Any) -> str:
    """The page. Templates have the filters `line`, other people's words on one line, and `count`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["line"] = line
    environment.filters["count"] = lambda value: f"{value:,}"
    return environment.get_template(template.name).render(**values)


def line(text: str) -> str:
    """Other people's words on one line, cut where they are long."""
    text = one_line(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
