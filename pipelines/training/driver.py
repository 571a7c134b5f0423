"""One training as the driver sees it: run the workers, track their events, register the result.

In: a run, its `TrainingSetup`, a tracker, a registry, and a function that runs the workers. Out: an
`Outcome`. Must not know MLflow or Ray.
"""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines import tag_names
from pipelines.interfaces import Emit, Registry, Tracker, Version
from pipelines.recipe import Recipe
from pipelines.storage.base import cache_payload
from pipelines.storage.retry import RetryPolicy, retry_call
from pipelines.tracking.restarts import MarkRestarts
from pipelines.tracking.uploader import Uploader
from pipelines.training import checkpoints, registration, run_files
from pipelines.training.payload import TrainingPayload, TrainingSummary
from pipelines.training.registration import SaveExportable
from pipelines.training.run import PICTURES, Run, history, median_speed
from pipelines.training.setup import TrainingSetup
from pipelines.visuals import curves

LIBRARIES = ("torch", "torchvision", "ray", "mlflow", "webdataset", "tessera-train")
"""Distributions whose versions become tags of the run."""

DELIVERY_SECONDS = 120.0
"""How long the end of a training waits for a tracking service that is down."""
INTERRUPTED_DELIVERY_SECONDS = 1.0
"""The same for a process that was told to stop. A resume delivers the rest."""

Execute = Callable[[TrainingPayload, Emit], TrainingSummary]
"""Runs the workers; see `cluster.workers`."""
Listener = Callable[[dict[str, Any]], None]
"""Called with each event, in order."""


@dataclass(frozen=True)
class TrainingResult:
    """A training that ended, or stopped at `until_epoch`.

    Args:
        metrics: Of the validation split, with the best checkpoint.
        epoch: Epoch of the best checkpoint, counted from 1.
        images_per_second: Median over the logged steps, all workers together.
        failed_events: Events that the tracking service didn't get.
        link: The run's page, or a path where no server runs.
    """

    run: Run
    metrics: Mapping[str, float]
    epoch: int
    images_per_second: float
    failed_events: int
    link: str


@dataclass(frozen=True)
class Outcome(TrainingResult):
    """A training that ended, and its model version."""

    version: Version


class Stopped(BaseException):
    """Raised in a training whose caller asked it to stop. A BaseException, so that no handler of
    failures takes it for one."""


@dataclass(frozen=True)
class StoppableEmit:
    """Passes events on to `emit`, and raises `Stopped` after the first one that follows `stop`."""

    emit: Emit
    stop: Event

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.emit(event)
        if self.stop.is_set():
            raise Stopped

    def flush(self) -> None:
        self.emit.flush()


def launch(
    run: Run,
    setup: TrainingSetup,
    *,
    tracker: Tracker,
    registry: Registry,
    execute: Execute,
    save_exportable: SaveExportable,
    is_permanent: Callable[[BaseException], bool],
    listeners: Sequence[Listener] = (),
    tags: Mapping[str, str] | None = None,
) -> Outcome:
    """Trains a new or resumed run, then registers the best checkpoint as `challenger`. Raises as
    `train`."""
    registered: list[Version] = []

    files = run_files.of(run)

    def register(best: Path, summary: TrainingSummary) -> None:
        once = partial(
            registration.register,
            run,
            best,
            summary,
            tracker,
            registry,
            save_exportable,
            tags or {},
        )
        registered.append(_register_with_retries(once, run))
        files.publish_model()

    result = train(
        run,
        setup,
        tracker=tracker,
        execute=execute,
        is_permanent=is_permanent,
        listeners=listeners,
        tags=tags,
        conclude=register,
    )
    return Outcome(**vars(result), version=registered[0])


def train(
    run: Run,
    setup: TrainingSetup,
    *,
    tracker: Tracker,
    execute: Execute,
    is_permanent: Callable[[BaseException], bool],
    listeners: Sequence[Listener] = (),
    tags: Mapping[str, str] | None = None,
    conclude: Callable[[Path, TrainingSummary], None] | None = None,
    until_epoch: int | None = None,
    stop: Event | None = None,
) -> TrainingResult:
    """Trains a new or resumed run.

    Args:
        execute: Runs the workers.
        is_permanent: Whether an error of the tracking service will occur again.
        conclude: Called with the folder of the best checkpoint and the summary while the tracked
            run is still open, if the training has ended and no other driver has replaced this one.
        until_epoch: Stop after this epoch; the tracked run stays RUNNING.
        stop: Set it to stop a training in this process, at its next event.

    Raises:
        Stopped: After `stop` was set. The tracked run stays RUNNING.
        Exception: Whatever `execute` and `conclude` raise. The tracked run is then FAILED, or
            KILLED after a KeyboardInterrupt or SystemExit.
    """
    run = replace(run, run_id=tracker.run_id)
    with ended_on_error(tracker, listeners):
        run.write()
        files = run_files.of(run)
        files.begin()
        _log_start(run, setup, tracker, tags or {})
        event_log = files.open_log(listeners)
    uploader = Uploader(
        run.event_log,
        tracker,
        listeners=listeners,
        is_permanent=is_permanent,
        readable=files.readable,
        fetch=files.fetch,
    )
    uploader.start()
    status, delivery_seconds = "FAILED", DELIVERY_SECONDS
    failed_events = 0
    try:
        payload = _payload(run, setup, until_epoch)
        emit = MarkRestarts(event_log, run.event_log)
        summary = execute(payload, StoppableEmit(emit, stop) if stop else emit)
        best = files.checkpoint(summary.checkpoint)
        _check_recipe(files.checkpoint(summary.newest), setup.recipe)
        _check_recipe(best, setup.recipe, run.changing)
        if summary.ended:
            files.fetch_sample_log(setup.recipe)
            _draw_curves(run, event_log)
            if run.lease:
                run.lease.check()
            if conclude is not None:
                conclude(best, summary)
        status = "FINISHED" if summary.ended else "RUNNING"
    except Stopped:
        status, delivery_seconds = "RUNNING", INTERRUPTED_DELIVERY_SECONDS
        raise
    except (KeyboardInterrupt, SystemExit):
        status, delivery_seconds = "KILLED", INTERRUPTED_DELIVERY_SECONDS
        raise
    finally:
        if not run.is_ours:  # the other driver tracks the run now
            status, delivery_seconds = "RUNNING", 0.0
        files.close_log(delivery_seconds)
        failed_events = uploader.close(delivery_seconds)
        event_log.close()
        if status != "RUNNING":
            _log_end(tracker, status, listeners)
    return TrainingResult(
        run,
        summary.metrics,
        summary.epoch,
        median_speed(run),
        failed_events,
        tracker.link(),
    )


def _payload(run: Run, setup: TrainingSetup, until_epoch: int | None) -> TrainingPayload:
    return TrainingPayload(
        recipe=setup.recipe,
        card=setup.card,
        run_dir=run.folder,
        until_epoch=until_epoch,
        changing=run.changing,
        cache=cache_payload(),
        storage=run.storage,
        attempt=run.attempt,
        shared_file="run.json",
    )


def _log_start(run: Run, setup: TrainingSetup, tracker: Tracker, tags: Mapping[str, str]) -> None:
    card = setup.card
    tracker.params(run.recipe().flat())
    tracker.tags({**_library_versions(), **_changed_settings(run, setup.recipe), **tags})
    for split in card.splits:
        if split != "test":
            tracker.dataset(
                name=card.name, digest=card.digest, source=setup.recipe.data.path, split=split
            )


@contextmanager
def ended_on_error(tracker: Tracker, listeners: Sequence[Listener] = ()) -> Iterator[None]:
    """Ends the tracked run as FAILED or KILLED if the block, which prepares a training, raises:
    otherwise it would stay RUNNING for ever."""
    try:
        yield
    except BaseException as error:
        is_interrupt = isinstance(error, KeyboardInterrupt | SystemExit)
        _log_end(tracker, "KILLED" if is_interrupt else "FAILED", listeners)
        raise


def _log_end(tracker: Tracker, status: str, listeners: Sequence[Listener]) -> None:
    try:
        tracker.finish(status)
    except Exception as error:  # the training is over, whatever the service raises
        for listener in listeners:
            listener({"kind": "notice", "text": f"the end of the run was not tracked: {error}"})


def _register_with_retries(register: Callable[[], Version], run: Run) -> Version:
    """Calls `register` again while the service is down; it must be safe to call twice."""
    policy = RetryPolicy(
        max_attempts=None,
        deadline_seconds=DELIVERY_SECONDS,
        first_wait_seconds=2.0,
        max_wait_seconds=2.0,
    )
    return retry_call(
        register,
        policy,
        "trained, but not registered",
        transient=lambda error: not isinstance(error, TesseraError),  # whatever the service raises
        hint=f"when the server is back: tessera train --resume {shlex.quote(run.name)}",
    )


def _check_recipe(checkpoint: Path, recipe: Recipe, changing: Sequence[str] = ()) -> None:
    """Raises TesseraError if the checkpoint was trained with another recipe: then the workers had
    other files or another version of the code than the driver."""
    wrong = recipes.differences(recipe, checkpoints.load(checkpoint).recipe, changing)
    if wrong:
        raise TesseraError(f"the workers trained another recipe: {'; '.join(wrong)}")


def _changed_settings(run: Run, recipe: Recipe) -> dict[str, str]:
    """Tags for settings of a resumed run that differ from its params, which never change."""
    before, now = run.recipe().flat(), recipe.flat()
    return {f"{tag_names.RESUMED_PREFIX}{p}": now[p] for p in now if now[p] != before.get(p)}


def _draw_curves(run: Run, emit: Emit) -> None:
    path = run.folder / PICTURES / "learning_curves.png"
    curves.learning_curves(history(run), path)
    emit({"kind": "artifact", "path": f"{PICTURES}/{path.name}", "folder": PICTURES})


def _library_versions() -> dict[str, str]:
    return {
        f"{tag_names.LIBRARY_PREFIX}{name.removesuffix('-train')}": importlib.metadata.version(name)
        for name in LIBRARIES
    }
