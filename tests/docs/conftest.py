"""The project folder from which the pages of the documentation start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from once_per_run import copy_home, shared_folder
from pages import SERVICES, Shell, commands, write_photos

ROOT = Path(__file__).parents[2]
FIRST_STEPS = ROOT / "docs" / "first-steps.md"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, not packed. Only read."""
    return shared_folder(tmp_path_factory, "photos", write_photos)


@pytest.fixture(scope="session")
def project(photos: Path, prepared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of `first-steps.md` ran: the images are packed as
    `data/photos`, and version 1 of the model `photos` is champion. The output of each command is in
    `output`, in the file VERB.txt. Only read: `shell` has a copy."""

    def make(folder: Path) -> None:
        shutil.copytree(photos, folder)
        shutil.copytree(prepared_store, folder / ".tessera")
        (folder / "output").mkdir()
        shell = Shell(folder)
        for command in commands(FIRST_STEPS):
            if command.language == "sh" and command.text not in SERVICES:
                verb = command.text.split()[1]
                (folder / "output" / f"{verb}.txt").write_text(shell(command))

    return shared_folder(tmp_path_factory, "project", make)


@pytest.fixture
def shell(project: Path, tmp_path: Path) -> Shell:
    """Runs commands in a copy of `project`."""
    folder = tmp_path / "project"
    shutil.copytree(project, folder, ignore=shutil.ignore_patterns(".tessera"))
    copy_home(project / ".tessera", folder / ".tessera")
    return Shell(folder)
