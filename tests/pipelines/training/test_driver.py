"""A training as the driver sees it, with the tracker and the registry in memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines import tag_names
from pipelines.cluster import workers
from pipelines.data import card as cards
from pipelines.interfaces import Emit
from pipelines.recipe import Recipe
from pipelines.storage.lease import LeaseLostError
from pipelines.storage.open import open_storage
from pipelines.tracking.events import read_events
from pipelines.tracking.memory import MemoryRegistry, MemoryTracker
from pipelines.training import driver, registration, worker
from pipelines.training import run as training_run
from pipelines.training.payload import TrainingPayload, TrainingSummary
from pipelines.training.run import Run
from pipelines.training.setup import open_setup


def small(digits: Path) -> Recipe:
    return recipes.start("cnn", "tiny").with_overrides(
        {
            "data.path": str(digits),
            "data.digest": cards.read(digits).digest,
            "train.epochs": 2,
            "workers.count": 0,
        }
    )


def never(error: BaseException) -> bool:
    return False


def no_flavor(*args: Any, **kwargs: Any) -> str:
    return "not asked for"


def execute(payload: TrainingPayload, emit: Emit) -> TrainingSummary:
    return workers.run_local(worker.run, payload, emit)


class Services:
    def __init__(self, folder: Path) -> None:
        self.tracker = MemoryTracker("run-1")
        self.registry = MemoryRegistry(folder / "registry")

    def launch(self, run: Run, recipe: Recipe, work: Any = execute) -> driver.Outcome:
        return driver.launch(
            run,
            open_setup(recipe),
            tracker=self.tracker,
            registry=self.registry,
            execute=work,
            save_exportable=no_flavor,
            is_permanent=never,
        )


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return Services(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_a_training_whose_checkpoints_are_lost_says_that_it_starts_again(
    damage: str, services: Services, digits: Path, tmp_path: Path
) -> None:
    """No point is delivered twice, and the run is tagged where the second training began."""
    recipe = small(digits).with_overrides({"train.log_every_steps": 5})
    run = training_run.create(tmp_path / "runs", recipe, model="digits", stamp="now")

    def interrupted(payload: TrainingPayload, emit: Emit) -> TrainingSummary:
        execute(replace(payload, until_epoch=1), emit)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        services.launch(run, recipe, interrupted)
    steps = {step for _, step in services.tracker.points}
    for path in (run.folder / "checkpoints").glob("step-*"):
        shutil.rmtree(path) if damage == "removed" else (path / "manifest.json").write_text("{")
    services.launch(training_run.find(tmp_path / "runs", run.name), recipe)
    (restart,) = json.loads(services.tracker.logged_tags[tag_names.RESTARTS])
    assert restart["after_step"] == max(steps)
    expected = "there is no checkpoint in" if damage == "removed" else "damaged: step-0"
    assert restart["reason"].startswith(expected)
    events = [event for event, _ in read_events(run.event_log)]
    trained = [e["step"] for e in events if "train/loss" in e.get("values", ())]
    assert len(trained) > len(set(trained)), "steps were repeated"
    points = [point for point in services.tracker.points if point[0] == "train/loss"]
    assert len(points) == len(set(trained))
    assert all(len(values) == 1 for values in services.tracker.points.values())


def test_a_driver_that_was_replaced_publishes_and_tracks_nothing_more(
    services: Services, digits: Path, tmp_path: Path
) -> None:
    """It was stopped for longer than its lease lives, and continues with its first epoch."""
    recipe = small(digits)
    run = training_run.create(
        tmp_path / "runs", recipe, model="digits", stamp="now", storage=f"memory://b{tmp_path}"
    )
    storage = open_storage(run.storage)
    before: list[str] = []

    def work(payload: TrainingPayload, emit: Emit) -> TrainingSummary:
        (entry,) = storage.names("lease")
        other = {**json.loads(storage.read(entry)), "number": 9, "token": "other", "attempt": 2}
        assert storage.create_if_absent("lease/000000009", json.dumps(other).encode())
        before.extend(name for name in storage.names() if not name.startswith("lease/"))
        assert ours.lease
        assert ours.attempt == payload.attempt == 1
        ours.lease._renewed -= 3600
        return execute(payload, emit)

    with (
        pytest.raises(LeaseLostError, match=r"attempt 2, host .* has replaced attempt 1 of cnn-"),
        training_run.driven(run) as ours,
    ):
        services.launch(ours, recipe, work)
    assert services.tracker.status == "RUNNING"
    assert not services.registry.names()
    assert before == [name for name in storage.names() if not name.startswith("lease/")]


@pytest.mark.slow
def test_a_training_is_tracked_and_registered(
    services: Services, digits: Path, tmp_path: Path
) -> None:
    recipe = small(digits)
    run = training_run.create(tmp_path / "runs", recipe, model="digits", stamp="now")
    outcome = services.launch(run, recipe)
    tracker = services.tracker
    assert tracker.status == "FINISHED"
    assert tracker.logged_params == recipe.flat()
    assert {d["split"] for d in tracker.datasets} == {"train", "val"}
    assert {d["digest"] for d in tracker.datasets} == {cards.read(digits).digest}
    assert tracker.logged_tags["tessera.version.torch"]
    assert ("val/accuracy", 2) in tracker.points
    assert {Path(a).name for a in tracker.artifacts} == {
        "training_samples.png",
        "confusion_matrix.png",
        "worst_mistakes.png",
        "learning_curves.png",
        "val-00001.png",
        "val-00002.png",
    }
    assert tracker.images == {("val", step): f"val-{step:05d}.png" for step in (1, 2)}
    version = services.registry.version("digits", registration.CHALLENGER)
    assert version.number == outcome.version.number == 1
    assert json.loads(version.tags["tessera.recipe"]) == recipe.model_dump(mode="json")
    assert json.loads(version.tags["tessera.classes"]) == [str(i) for i in range(10)]
    assert version.tags["tessera.data_digest"] == cards.read(digits).digest
    assert version.tags["tessera.servable"] == "no: not asked for"
    again = services.launch(training_run.find(tmp_path / "runs", "run-1"), recipe)
    assert again.version.number == 1, "a finished run is not registered twice"
    assert all(len(points) == 1 for points in tracker.points.values())


def test_a_failed_training_is_tracked_and_not_registered(
    services: Services, digits: Path, tmp_path: Path
) -> None:
    recipe = small(digits)
    run = training_run.create(tmp_path / "runs", recipe, model="digits", stamp="now")

    def fail(payload: TrainingPayload, emit: Emit) -> TrainingSummary:
        raise TesseraError("no such luck")

    with pytest.raises(TesseraError, match="no such luck"):
        services.launch(run, recipe, fail)
    assert services.tracker.status == "FAILED"
    assert services.registry.versions("digits") == []


@pytest.mark.parametrize("error", [OSError("no"), TesseraError("no"), KeyboardInterrupt()])
def test_a_training_that_fails_before_it_begins_does_not_stay_running(
    digits: Path, services: Services, tmp_path: Path, error: BaseException
) -> None:
    recipe = small(digits)
    run = training_run.create(tmp_path, recipe, model="digits", stamp="now")

    class Refusing(MemoryTracker):
        def params(self, values: Any) -> None:
            raise error

    services.tracker = Refusing("run-1")
    with pytest.raises(type(error)):
        services.launch(run, recipe)
    is_interrupt = isinstance(error, KeyboardInterrupt)
    assert services.tracker.status == ("KILLED" if is_interrupt else "FAILED")


@pytest.mark.slow
def test_an_interrupted_training_is_killed_and_can_be_resumed(
    services: Services, digits: Path, tmp_path: Path
) -> None:
    recipe = small(digits)
    run = training_run.create(tmp_path / "runs", recipe, model="digits", stamp="now")
    signal: type[BaseException]

    def stop(payload: TrainingPayload, emit: Emit) -> TrainingSummary:
        raise signal

    for signal in (KeyboardInterrupt, SystemExit):
        services.tracker.status = "RUNNING"
        with pytest.raises(signal):
            services.launch(run, recipe, stop)
        assert services.tracker.status == "KILLED"
    services.launch(training_run.find(tmp_path / "runs", run.name), recipe)
    assert services.tracker.status == "FINISHED"


def test_workers_that_trained_another_recipe_are_refused(
    services: Services, digits: Path, tmp_path: Path
) -> None:
    recipe = small(digits)
    run = training_run.create(tmp_path / "runs", recipe, model="digits", stamp="now")

    def other(payload: TrainingPayload, emit: Emit) -> TrainingSummary:
        changed = recipe.with_overrides({"optim.model.lr": 0.123})
        return execute(replace(payload, recipe=changed), emit)

    with pytest.raises(TesseraError, match=r"optim\.model\.lr was .*, is 0\.123"):
        services.launch(run, recipe, other)
    assert services.registry.versions("digits") == []


@pytest.mark.slow
def test_a_resumed_run_keeps_its_params_and_tags_changed_settings(
    services: Services, digits: Path, tmp_path: Path
) -> None:
    recipe = small(digits)
    run = training_run.create(tmp_path / "runs", recipe, model="digits", stamp="now")
    services.launch(run, recipe)
    services.launch(run, recipe.with_overrides({"workers.max_failures": 9}))
    assert services.tracker.logged_params["workers.max_failures"] == "3"
    assert services.tracker.logged_tags["tessera.resumed.workers.max_failures"] == "9"
