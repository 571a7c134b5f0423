"""HTML pages that open offline.

In: a template and its values. Out: the page as text, including its style. Values come from other
people's data: all are escaped, and the pages' content security policy forbids scripts and external
addresses. Must not know what a page is about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.visuals.draw import one_line

LONGEST = 120
"""Characters of a name or a key; longer ones are cut."""


def render(template: Path, **values: Any) -> str:
    """Renders a template. It can use the filters `line`, for text from the data, and `count`."""
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
    """Text from the data on one line, cut to `LONGEST` characters."""
    text = one_line(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
