"""The folder of a run: locked by one driver at a time, looked up by name or id."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.recipe import Recipe
from pipelines.storage.open import open_storage
from pipelines.training import run as training_run
from pipelines.training import run_files
from pipelines.training.run import Run


def small(digits: Path) -> Recipe:
    return recipes.start("cnn", "tiny").with_overrides({"data.path": str(digits)})


def test_a_second_driver_of_a_run_is_refused(digits: Path, tmp_path: Path) -> None:
    run = training_run.create(tmp_path, small(digits), model="digits", stamp="now")
    with (
        training_run.locked(run),
        pytest.raises(
            TesseraError, match=rf"is being trained by host .*, process {os.getpid()}, which began"
        ),
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


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"name": "x"}', "\0" * 100])
def test_one_broken_run_breaks_no_other(digits: Path, tmp_path: Path, content: str) -> None:
    run = training_run.create(tmp_path, small(digits), model="digits", stamp="now")
    replace(run, run_id="abc").write()
    broken = tmp_path / "a-broken-one"
    broken.mkdir()
    (broken / "run.json").write_text(content)
    for ref in (run.name, "abc"):
        assert training_run.find(tmp_path, ref).name == run.name
    with pytest.raises(TesseraError, match=r"a-broken-one/run.json can't be read"):
        training_run.find(tmp_path, broken.name)
    with pytest.raises(TesseraError, match="unknown run 'other'"):
        training_run.find(tmp_path, "other")


def test_a_run_of_a_model_with_any_name_has_a_folder(digits: Path, tmp_path: Path) -> None:
    for model in ("it's", "猫 😀", "x" * 256, "😀" * 256):
        run = training_run.create(tmp_path, small(digits), model=model, stamp="20240101-000000")
        assert training_run.find(tmp_path, run.name).model == model
        assert run.recipe() == small(digits)


def test_a_stored_run_is_found_from_any_machine(digits: Path, tmp_path: Path) -> None:
    storage = f"memory://bucket/{tmp_path.name}"
    recipe = small(digits)
    run = training_run.create(tmp_path, recipe, model="digits", stamp="now", storage=storage)
    with pytest.raises(TesseraError, match="has no runs yet"):
        training_run.find(tmp_path / "there", run.name, storage)
    tracked = replace(run, run_id="abc")
    tracked.write()
    run_files.of(tracked).begin()
    for ref in (run.name, "abc"):
        found = training_run.find(tmp_path / "there", ref, storage)
        assert (found.name, found.run_id, found.storage) == (run.name, "abc", run.storage)
        assert found.folder == tmp_path / "there" / run.name
        assert found.recipe() == recipe
    with pytest.raises(TesseraError, match="did you mean"):
        training_run.find(tmp_path / "there", run.name[:-1], storage)


def test_a_run_keeps_its_storage_when_it_is_resumed_without_naming_it(
    digits: Path, tmp_path: Path
) -> None:
    storage = f"memory://bucket/{tmp_path.name}"
    run = training_run.create(tmp_path, small(digits), model="digits", stamp="now", storage=storage)
    assert training_run.find(tmp_path, run.name).storage == run.storage
    existing = training_run.open_existing(run.folder)
    assert existing is not None
    assert existing.storage == run.storage


def test_a_run_of_a_folder_is_found_beside_those_of_a_storage(digits: Path, tmp_path: Path) -> None:
    run = training_run.create(tmp_path, small(digits), model="digits", stamp="now")
    found = training_run.find(tmp_path, run.name, f"memory://bucket/{tmp_path.name}")
    assert found.storage == ""


def test_of_two_drivers_that_create_a_run_one_recipe_counts(digits: Path, tmp_path: Path) -> None:
    given = [small(digits).with_overrides({"seed": seed}) for seed in (1, 2)]
    gate = threading.Barrier(2)

    def create(number: int, recipe: Recipe) -> Run:
        gate.wait(20)
        root = tmp_path / str(number)
        return training_run.find_or_create(root, recipe, name="nightly", model="digits")

    with ThreadPoolExecutor(2) as pool:
        for number in range(20):
            one, other = pool.map(partial(create, number), given, timeout=20)
            assert one.recipe() == other.recipe()
            assert one.recipe() in given


def test_a_run_that_was_refused_leaves_nothing_in_its_storage(digits: Path, tmp_path: Path) -> None:
    where = f"memory://refused{tmp_path}"
    run = training_run.create(tmp_path, small(digits), model="m", stamp="now", storage=where)
    with training_run.driven(run) as ours:
        assert ours.attempt == 1
    assert open_storage(where).names()
    training_run.discard_untracked(run)
    assert not open_storage(where).names()
    assert not run.folder.exists()
