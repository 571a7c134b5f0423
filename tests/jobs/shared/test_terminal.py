"""What the verbs print: commands that can be pasted, and no password."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import jobs
from jobs.cli import verbs
from jobs.shared import terminal

NEXT = re.compile(r"show_next\(\s*\"([^\"]+)\"")


def test_the_next_command_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "it's 猫 😀", "--data", "a b/$(x)", "DIR"]
    terminal.show_next(*words)
    line = capsys.readouterr().err.removeprefix("next: ")
    assert shlex.split(line) == ["tessera", *words]


def test_every_next_command_begins_with_a_verb() -> None:
    sources = [file.read_text() for file in Path(jobs.__path__[0]).glob("*.py")]
    begins = [word for source in sources for word in NEXT.findall(source)]
    assert len(begins) > 10
    assert set(begins) <= set(verbs())


def test_nothing_that_is_shown_has_a_password(capsys: pytest.CaptureFixture[str]) -> None:
    address = "https://user:hunter2@host/x"
    terminal.say(address)
    terminal.show_facts({"page": address})
    terminal.show_table([{"address": address}])
    terminal.show_json({"page": address})
    shown = capsys.readouterr()
    assert "hunter2" not in shown.out + shown.err
    assert shown.out.count("https://host/x") == 3
    assert json.loads(shown.out[shown.out.index("{") :]) == {"page": "https://host/x"}
