"""README: its commands and its Python run as they are shown, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import Command, Shell, commands, write_photos

from jobs.cli import verbs
from jobs.shared import local_services

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "README.md"
NOT_RUN = {
    "make demo": "needs a package index: tests/jobs/test_demo.py runs what it calls",
    "make test": "it is what runs this",
}
PORTS = ("--ray-port", "--dashboard-port", "--mlflow-port")


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell in a folder with photos, where every command is a process of its own."""
    write_photos(tmp_path)
    shell = Shell(tmp_path, fresh=True)
    yield shell
    if (tmp_path / ".tessera" / "services.json").exists():
        subprocess.run(
            [sys.executable, "-m", "jobs.down"], cwd=ROOT, env=shell.environment, check=False
        )


@pytest.mark.slow
def test_the_python_on_the_first_screen(shell: Shell) -> None:
    (block,) = [command for command in commands(PAGE) if command.language == "python"]
    rows = [row.split() for row in shell(block).splitlines()]
    assert len(rows) == 2
    assert all(label.isdigit() and 0 < float(share) <= 1 for label, share in rows)


@pytest.mark.slow
def test_the_commands_on_the_first_screen(shell: Shell) -> None:
    out = {}
    for language, text, _ in commands(PAGE):
        if language == "sh" and text not in NOT_RUN:
            ports = [word for port in PORTS for word in (port, str(local_services.free_port()))]
            called = " ".join([text, *ports]) if text == "tessera up" else text
            out[text.split()[1]] = shell(Command(language, called))
    assert "600 images" in out["pack"]
    assert "photos/1" in out["train"]
    assert "photos@champion is version 1" in out["promote"]
    assert len(out["predict"].splitlines()) == 2
    assert "http://127.0.0.1" in out["up"]


def test_what_is_not_run_is_shown() -> None:
    """A reason for a command that the README no longer has is no reason."""
    assert set(NOT_RUN) <= {command.text for command in commands(PAGE)}


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
