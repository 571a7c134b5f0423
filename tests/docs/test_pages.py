"""Every command on a page of the documentation runs, each page in a project folder of its own.

A page starts where the commands of `first-steps.md` end: the images are packed as `data/photos`,
and version 1 of the model `photos` is champion. Not here: `search.md` needs Ray
(`test_pages_with_ray.py`), and `clusters.md` needs the services that `tessera up` starts
(`tests/integration/test_local_services.py`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import SERVICES, Shell, commands

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"first-steps", "clusters", "search"}
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if commands(page)]
HERE = [page for page in PAGES if page.stem not in ELSEWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("page", HERE, ids=lambda page: page.stem)
def test_every_command_of_the_page_runs(page: Path, shell: Shell) -> None:
    for command in commands(page):
        shell(command)


@pytest.mark.slow
def test_the_commands_of_the_first_steps(project: Path) -> None:
    """The fixture `project` ran them."""
    out = {file.stem: file.read_text() for file in (project / "output").iterdir()}
    assert set(out) == {"pack", "train", "evaluate", "promote", "predict"}
    assert "600 images" in out["pack"]
    assert "photos/1" in out["train"]
    assert "accuracy" in out["evaluate"]
    assert "photos@champion is version 1" in out["promote"]
    lines = [json.loads(line) for line in (project / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == len(list((project / "new").iterdir()))
    assert [line["path"] for line in lines if "error" in line] == ["new/broken.png"]


@pytest.mark.slow
def test_the_python_of_the_first_steps(shell: Shell) -> None:
    listed = commands(ROOT / "docs" / "first-steps.md")
    (block,) = [command for command in listed if command.language == "python"]
    rows = [row.split() for row in shell(block).splitlines()]
    assert [row[0] for row in rows] == ["new/600.png", "new/601.png"]
    assert all(label.isdigit() and 0 < float(share) <= 1 for _, label, share in rows)


def test_the_commands_for_services_are_on_the_pages() -> None:
    """A command that no page has any more need not be left out."""
    assert set(SERVICES) <= {command.text for page in PAGES for command in commands(page)}


@pytest.mark.slow
def test_the_example_of_a_verb_works(shell: Shell, tmp_path: Path) -> None:
    """In a copy of the project: a verb is a file in the folder `jobs`."""
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "jobs", checkout / "jobs", ignore=ignored)
    shutil.copy(ROOT / "tessera.py", checkout)
    for name in ("models", "pipelines"):
        (checkout / name).symlink_to(ROOT / name)
    (block,) = [
        command
        for command in commands(ROOT / "docs" / "extend.md")
        if command.title == "jobs/count.py"
    ]
    (checkout / block.title).write_text(block.text)

    def tessera(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tessera", *words],
            cwd=checkout,
            env=shell.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    lines = [line.split(maxsplit=1) for line in tessera("--help").splitlines()]
    assert ["count", "Count the registered versions of a model."] in lines
    assert tessera("count", "photos") == "photos has 1 versions\n"
