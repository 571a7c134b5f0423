"""Every command that the README shows, in its order, as a person would run it.

They run in a copy of the checkout with a home of its own. The demo has a test of its own,
tests/jobs/test_demo.py.
"""

from __future__ import annotations

import json
import re
import shutil
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
README = PAGE.read_text(encoding="utf-8")
NOT_RUN = {
    "make demo": "needs a package index: tests/jobs/test_demo.py runs what it calls",
    "make test": "it is what runs this",
    ". .venv/bin/activate": "the environment that runs this is on the PATH",
    "cp .env.example .env": "only for the next one",
    "docker compose up --detach --build --wait --scale ray-worker=2": "needs Docker: "
    "tests/deploy/test_compose.py reads the file, and runs its MLflow",
}
PORTS = ("--ray-port", "--dashboard-port", "--mlflow-port")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell in a copy of the checkout, with a folder of images and some new ones."""
    folder = tmp_path_factory.mktemp("readme") / "tessera"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "data", "tests", "docs")
    shutil.copytree(
        ROOT, folder, ignore=lambda at, names: unwanted(at, names) if Path(at) == ROOT else set()
    )
    write_photos(folder)
    shell = Shell(folder, fresh=True)
    yield shell
    subprocess.run(
        [sys.executable, "-m", "jobs.down"], cwd=ROOT, env=shell.environment, check=False
    )


@pytest.mark.slow
def test_every_command_runs(shell: Shell) -> None:
    out: dict[str, str] = {}
    for language, text, _ in commands(PAGE):
        if text in NOT_RUN:
            continue
        ports = [word for option in PORTS for word in (option, str(local_services.free_port()))]
        called = " ".join([text, *ports]) if text == "tessera up" else text
        out[text] = shell(Command(language, called))

    def told(start: str) -> str:
        return next(said for text, said in out.items() if text.startswith(start))

    assert "600 images" in told("tessera pack")
    assert "lr: 0.05" in told("tessera train cnn --data data/photos --set optim.model.lr=0.05")
    assert "models:/photos/1" in told("tessera train cnn --data data/photos --workers 0")
    assert "models:/photos/1" in told("tessera train --resume"), "a finished run was trained again"
    assert "models:/photos/2" in told("tessera submit train")
    assert "models:/photos@champion is version 1" in told("tessera promote photos/1")
    assert "models:/photos@champion is version 2" in told("tessera promote photos/2")
    assert "models:/photos@champion is version 1" in told("tessera rollback")
    assert "accuracy" in told("ray job submit")
    for start in ("import mlflow", "import numpy"):
        assert told(start).count(".") == 10, "not one probability for each class"
    assert "on 60 test images" in told("tessera export")
    answers = [json.loads(line) for line in (shell.folder / "answers.jsonl").open()]
    assert ["error" in answer for answer in answers] == [False] * 8 + [True]
    assert {answer["version"] for answer in answers} == {2}
    assert len(list((shell.folder / "answers").iterdir())) == 8


def test_what_is_not_run_is_shown() -> None:
    """A reason for a command that the README no longer has is no reason."""
    assert set(NOT_RUN) <= {command.text for command in commands(PAGE)}


def test_every_verb_is_shown() -> None:
    missing = [verb for verb in verbs() if not re.search(rf"\b(tessera|make) {verb}\b", README)]
    assert missing == []


def test_what_the_page_names_is_there() -> None:
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    first = re.findall(r"^\d\. `([^`]+)`", README, re.MULTILINE)
    assert len(first) == 5
    for name in [*linked, *first, "CONTRIBUTING.md", "LICENSE"]:
        assert (ROOT / name).exists(), f"the README names {name}"
