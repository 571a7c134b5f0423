"""The folder of a run: locked by one driver at a time, looked up by name or id."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.recipe import Recipe
from pipelines.training import run as training_run


def small(digits: Path) -> Recipe:
    return recipes.start("cnn", "tiny").with_overrides({"data.path": str(digits)})


def test_a_second_driver_of_a_run_is_refused(digits: Path, tmp_path: Path) -> None:
    run = training_run.create(tmp_path, small(digits), model="digits", stamp="now")
    with (
        training_run.locked(run),
        pytest.raises(TesseraError, match="is being trained by another process"),
        training_run.locked(run),
    ):
        pass
    with training_run.locked(run):  # free again
        pass


def test_a_run_is_looked_up_by_name_or_id(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match="has no runs yet"):
        training_run.find(tmp_path, "any")
    run = training_run.create(tmp_path, small(digits), model="digits", stamp="now")
    assert training_run.find(tmp_path, run.name).folder == run.folder
    with pytest.raises(TesseraError, match="did you mean"):
        training_run.find(tmp_path, run.name[:-1])
