"""Every command on a page of the documentation runs, each page in a project folder of its own.

The pages of FROM_NOTHING start from a folder of images. All others start where `first-steps.md`
ends: the images are packed as `data/photos`, and version 1 of the model `photos` is champion.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from once_per_run import copy_home, shared_folder
from pages import Shell, commands, write_photos

from jobs.shared import local_services
from pipelines import recipe as recipes
from pipelines.data.packing import pack

ROOT = Path(__file__).parents[2]
FROM_NOTHING = {"first-steps.md"}
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if commands(page)]
PORTS = ("--ray-port", "--dashboard-port", "--mlflow-port")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, not packed."""
    return shared_folder(tmp_path_factory, "photos", write_photos)


@pytest.fixture(scope="module")
def project(photos: Path, prepared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which version 1 of `photos` was trained, evaluated and promoted."""

    def make(folder: Path) -> None:
        from pipelines.workflows import evaluate, promote, train

        shutil.copytree(photos, folder)
        shutil.copytree(prepared_store, folder / ".tessera")
        data = folder / "data" / "photos"
        pack.pack(str(folder / "photos"), data)
        settings = {"train.epochs": 2, "workers.count": 0, "data.path": str(data)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TESSERA_HOME", str(folder / ".tessera"))
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            recipe = recipes.start("cnn", "tiny").with_overrides(settings)
            train.train(recipe, model="photos", progress=False)
            evaluate.evaluate("photos/1", data=data)
            promote.promote("photos/1")

    return shared_folder(tmp_path_factory, "project", make)


@pytest.fixture
def open_shell(
    ray_cluster: None, photos: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[[str], Shell]]:
    """Makes a shell in a copy of the folder from which a page starts."""
    folder = tmp_path / "project"

    def open_shell(page: str) -> Shell:
        if page in FROM_NOTHING:
            shutil.copytree(photos, folder)
        else:
            source: Path = request.getfixturevalue("project")
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".tessera"))
            copy_home(source / ".tessera", folder / ".tessera")
        return Shell(folder, fresh=False)

    yield open_shell
    if (folder / ".tessera" / "services.json").exists():
        environment = Shell(folder, fresh=True).environment
        subprocess.run([sys.executable, "-m", "jobs.down"], cwd=ROOT, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_the_page_runs(page: Path, open_shell: Callable[[str], Shell]) -> None:
    shell = open_shell(page.name)
    for command in commands(page):
        if command.text == "tessera up":
            ports = "".join(f" {option} {local_services.free_port()}" for option in PORTS)
            command = command._replace(text=command.text + ports)
        shell(command)
