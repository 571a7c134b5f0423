"""Runs one trial of a search, in a process of its own.

In: a `TrialPayload`, a trial's id and its settings. Out: a training in the search's folder, a run
in MLflow below the search's run, and a metric value per epoch. Must not know who chooses the
settings.

A trial begins once trials.json has it. So no run in MLflow belongs to a trial that a resumed search
doesn't know.

Ray Tune calls `run_trial`. Its record of a search is written every second or later, the search's
own trials.json after every event. A search that is killed and resumed:

    time  event                                   trials.json            Tune's record
    0 s   trial a starts                          a: running             a: running
    8 s   a reports epoch 1: 0.7                  a: running, 1 epoch    a: running, 1 epoch
    9 s   a reports epoch 2: 0.8, it is stopped   a: stopped, 2 epochs   (not written yet)
    9 s   trial b starts                          b: running             (not written yet)
    9 s   the driver is killed
          tessera tune --resume                   a: stopped, b: running a: running, 1 epoch
          Tune calls run_trial for a again: it reports epochs 1 and 2 from trials.json and returns
          without training. Tune and the leaderboard ignore epochs that they know.
          b isn't in Tune's record. Tune samples its settings again as a new trial c; the driver
          marks b as failed.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.core.errors import TesseraError
from pipelines import tag_names
from pipelines.workflows import search_files, services

if TYPE_CHECKING:
    from pipelines.cluster.tuner import Report
    from pipelines.recipe import Recipe
    from pipelines.search.trials import SettingsChange
    from pipelines.training.run import Run
    from pipelines.workflows.context import Context

MAX_TAG_LENGTH = 5000
LOCK_SECONDS = 60.0
"""How long a process waits for the lock of a trial's run: the one before may still be stopping."""
FAILURE = "failure.json"
"""In a trial's folder: why it failed, if a retry would fail again."""


@dataclass(frozen=True)
class TrialPayload:
    """What the process of a trial needs to know about its search. `recipe` is JSON, `metric` the
    name of the primary metric, `parent` the id of the search's run in MLflow."""

    context: Context
    search: str
    recipe: str
    folder: Path
    parent: str
    experiment: str
    metric: str
    storage: str = ""
    """The address of the search's files in an object store; empty if `folder` has them."""

    def storage_of(self, trial_id: str) -> str:
        """The address of a trial's files; empty without a storage."""
        name = run_name(self.search, trial_id)
        return f"{self.storage}/trials/{name}" if self.storage else ""

    @property
    def trials_dir(self) -> Path:
        return self.folder / "trials"


@dataclass(frozen=True)
class Segment:
    """One generation of a population's member: it is trained from `from_epoch` to `until_epoch`
    epochs with `settings`. `changes` has all its changes of settings so far."""

    id: str
    settings: dict[str, Any]
    changes: list[SettingsChange]
    from_epoch: int
    until_epoch: int


@dataclass(frozen=True)
class SegmentResult:
    """(epoch, metric) of all epochs so far, and why the segment failed; empty if it didn't."""

    curve: list[tuple[int, float]]
    reason: str = ""


def run_trial(
    payload: TrialPayload, trial_id: str, settings: dict[str, Any], report: Report
) -> None:
    """Runs one trial, from its last checkpoint if it has one.

    Called by Ray Tune, in a process that may have run another trial before. `report` raises
    SystemExit when the trial has to stop. A trial that is over in trials.json reports its epochs
    again and isn't trained (see the timeline above).
    """
    from pipelines import recipe as recipes
    from pipelines.search import trials
    from pipelines.training import run as training_run

    known = trials.read(payload.folder / trials.TRIALS)
    before = next((trial for trial in known if trial.id == trial_id), None)
    if before is not None and before.over:
        for epoch, value in before.curve:
            report(epoch, value)
        return
    recipe = recipes.build(json.loads(payload.recipe)).with_overrides(settings)
    search_files.wait_until_recorded(payload.storage, payload.folder, trial_id)
    run = training_run.find_or_create(
        payload.trials_dir,
        recipe,
        name=run_name(payload.search, trial_id),
        model=payload.search,
        storage=payload.storage_of(trial_id),
    )
    for epoch, value in training_run.history(run).get(f"val/{payload.metric}", []):
        report(epoch, value)
    error = _train_and_report(payload, trial_id, run, recipe, report)
    if isinstance(error, TesseraError):  # a retry would fail again: Tune must not start one
        (run.folder / FAILURE).write_text(json.dumps({"reason": error.message}), "utf-8")
    elif error is not None:
        raise error


def _train_and_report(
    payload: TrialPayload, trial_id: str, run: Run, recipe: Recipe, report: Report
) -> BaseException | None:
    """Trains in another thread, reports from this one, which Tune may block. Returns the error."""
    from pipelines.training import driver as training_driver

    metric = f"val/{payload.metric}"
    values: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
    errors: list[BaseException] = []
    # Only a training in this process can be stopped. Workers of Ray Train end with the process,
    # which Tune then doesn't reuse.
    stop = threading.Event() if recipe.workers.count == 0 else None

    def on_event(event: Mapping[str, Any]) -> None:
        if event["kind"] == "metrics" and metric in event["values"]:
            values.put((int(event["epoch"]), float(event["values"][metric])))

    def train() -> None:
        try:
            _train(payload, trial_id, run, recipe, listeners=[on_event], stop=stop)
        except training_driver.Stopped:
            return
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train, name="trial", daemon=True)
    thread.start()
    try:
        while thread.is_alive() or not values.empty():
            try:
                epoch, value = values.get(timeout=0.2)
            except queue.Empty:
                continue
            report(epoch, value)
    finally:
        if stop:
            stop.set()
            thread.join()
    return errors[0] if errors else None


def run_segment(payload: TrialPayload, segment: Segment) -> SegmentResult:
    """Trains a population's member from its newest checkpoint to the end of a generation."""
    from pipelines import recipe as recipes
    from pipelines.training import run as training_run

    recipe = recipes.build(json.loads(payload.recipe)).with_overrides(segment.settings)
    run = training_run.find_or_create(
        payload.trials_dir,
        recipe,
        name=run_name(payload.search, segment.id),
        model=payload.search,
        changing=list(segment.settings),
        storage=payload.storage_of(segment.id),
    )
    _log_settings(run, segment)
    reason = ""
    try:
        tags = {tag_names.SETTINGS: changes_text(segment.changes)}
        _train(payload, segment.id, run, recipe, until_epoch=segment.until_epoch, tags=tags)
    except TesseraError as error:
        reason = error.message
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
    # From the file: a process that was killed may have trained some of the epochs.
    return SegmentResult(training_run.history(run).get(f"val/{payload.metric}", []), reason)


def _log_settings(run: Run, segment: Segment) -> None:
    """Logs the numeric settings as metrics of the segment's epochs: MLflow's params can't change,
    and have the first settings."""
    from pipelines.tracking.events import EventLog

    values = {
        f"settings/{path}": float(value)
        for path, value in segment.settings.items()
        if isinstance(value, int | float)
    }
    event_log = EventLog(run.event_log)
    for epoch in range(segment.from_epoch + 1, segment.until_epoch + 1) if values else ():
        event_log({"kind": "metrics", "step": epoch, "epoch": epoch, "values": values})
    event_log.close()


def changes_text(changes: Sequence[SettingsChange]) -> str:
    """The changes as JSON. The oldest are dropped if the text is too long for a tag of MLflow."""
    kept = list(changes)
    while len(text := json.dumps(kept)) > MAX_TAG_LENGTH and len(kept) > 1:
        kept.pop(0)
    return text


def run_name(search: str, trial_id: str) -> str:
    return f"{search}-{trial_id}"


def _train(
    payload: TrialPayload,
    trial_id: str,
    run: Run,
    recipe: Recipe,
    *,
    listeners: Sequence[Callable[[dict[str, Any]], None]] = (),
    until_epoch: int | None = None,
    tags: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
) -> None:
    from pipelines.tracking import mlflow_runs
    from pipelines.training import driver as training_driver
    from pipelines.training import run as training_run
    from pipelines.training import worker
    from pipelines.training.setup import open_setup, worker_group
    from pipelines.workflows import used_models

    if recipe.judge or recipe.start_from:
        used_models.fetch(recipe, services.open_registry(payload.context), run.folder)
    tags = {
        **(tags or {}),
        **services.tags_of(recipe),
        "mlflow.parentRunId": payload.parent,
        tag_names.SEARCH: payload.search,
        tag_names.TRIAL: trial_id,
    }
    with (
        training_run.locked(run, patience_seconds=LOCK_SECONDS),
        services.executor(
            payload.context,
            worker.run,
            worker_group(recipe),
            name=run.name,
            storage=run.folder / "ray",
            check_shared=False,  # the search has done it
        ) as execute,
    ):
        training_driver.train(
            run,
            open_setup(recipe),
            tracker=services.open_tracker(
                payload.context, run.name, experiment=payload.experiment, tags=tags
            ),
            execute=execute,
            is_permanent=mlflow_runs.is_permanent,
            listeners=listeners,
            tags=tags,
            until_epoch=until_epoch,
            stop=stop,
        )
