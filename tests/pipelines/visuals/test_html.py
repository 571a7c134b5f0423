"""Templates: everything from the data is text, on one line, and cut."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from pipelines.visuals import html


def test_text_from_the_data_can_not_be_markup(tmp_path: Path) -> None:
    template = tmp_path / "page.html"
    template.write_text("<p>{{ name|line }}, {{ images|count }}</p>")
    page = html.render(template, name="<script>\n", images=12345)
    assert page == "<p>&lt;script&gt;, 12,345</p>"


def test_a_long_name_is_cut() -> None:
    assert html.line("x" * html.LONGEST) == "x" * html.LONGEST
    cut = html.line("x" * (html.LONGEST + 1))
    assert (len(cut), cut[-1]) == (html.LONGEST, "…")


def test_a_value_that_is_missing_is_an_error(tmp_path: Path) -> None:
    template = tmp_path / "page.html"
    template.write_text("{{ nam }}")
    with pytest.raises(jinja2.UndefinedError):
        html.render(template, name="a")
