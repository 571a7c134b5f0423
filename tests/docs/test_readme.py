"""README: what it names exists. `tests/test_wheel.py` runs its commands and its Python."""

from __future__ import annotations

import re
from pathlib import Path

from pages import commands

from jobs.cli import verbs

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "README.md"
NOT_RUN = {
    "make demo": "needs a package index: tests/jobs/test_demo.py runs what it calls",
    "make test": "it is what runs this",
    "tessera pack photos --to data/photos": "the first steps begin with it: test_pages.py runs it",
    "tessera up": "tests/integration/test_local_services.py runs it",
}


def test_every_command_is_run_by_a_test() -> None:
    """`tests/test_wheel.py` runs these."""
    shown = [command.text for command in commands(PAGE) if command.language == "sh"]
    run = [text.split()[1] for text in shown if text not in NOT_RUN]
    assert run == ["train", "evaluate", "promote", "predict"]


def test_what_is_not_run_is_shown() -> None:
    """A reason for a command that the README no longer has is no reason."""
    assert set(NOT_RUN) <= {command.text for command in commands(PAGE)}
    first = commands(ROOT / "docs" / "first-steps.md")[0].text
    assert first in NOT_RUN


def test_it_has_at_most_120_lines() -> None:
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 120


def test_every_verb_is_on_a_page() -> None:
    pages = [PAGE, *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert [verb for verb in verbs() if not re.search(rf"\b(tessera|make) {verb}\b", text)] == []


def test_what_the_page_names_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    first = re.findall(r"^\d\. `([^`]+)`", text, re.MULTILINE)
    folders = re.findall(r"^([a-z]+)/ ", text, re.MULTILINE)
    assert len(first) == 5
    for name in [*linked, *first, *folders, "CONTRIBUTING.md", "LICENSE", "tessera.py"]:
        assert (ROOT / name).exists(), f"README names {name}"
