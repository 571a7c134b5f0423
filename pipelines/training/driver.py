"""One training as the driver sees it: execute, track, conclude.

In: a run, a recipe, a tracker and a way to execute the work. Out: an outcome. Must not know MLflow
or Ray.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines import tag_names
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.interfaces import Emit, Registry, Tracker, Version
from pipelines.recipe import Recipe
from pipelines.storage.retry import RetryPolicy, retry_call
from pipelines.tracking.events import EventLog
from pipelines.tracking.uploader import Uploader
from pipelines.training import checkpoints
from pipelines.training.registration import SaveExportable, _register
from pipelines.training.run import Run, history, mean_speed
from pipelines.visuals import plots

LIBRARIES = ("torch", "torchvision", "ray", "mlflow", "webdataset", "tessera-train")


DELIVERY_SECONDS = 120.0
"""How long the end of a training waits for a tracking service that is away."""


Execute = Callable[[dict[str, Any], Emit], dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """What a training came to. `metrics` are of the validation split."""

    run: Run
    metrics: Mapping[str, float]
    epoch: int
    images_per_second: float
    failed_events: int
    link: str


@dataclass(frozen=True)
class Outcome(Trained):
    """And what was registered."""

    version: Version


def launch(
    run: Run,
    recipe: Recipe,
    *,
    tracker: Tracker,
    registry: Registry,
    execute: Execute,
    save_exportable: SaveExportable,
    is_permanent: Callable[[BaseException], bool],
    listeners: Sequence[Callable[[dict[str, Any]], None]] = (),
    tags: Mapping[str, str] | None = None,
) -> Outcome:
    """Trains (or goes on), then registers the best checkpoint as `challenger`. Raises as `train`."""
    registered: list[Version] = []

    def register(best: Path, summary: Mapping[str, Any]) -> None:
        def once() -> Version:
            return _register(run, best, summary, tracker, registry, save_exportable, tags or {})

        registered.append(_register_with_retries(once, run))

    trained = train(
        run,
        recipe,
        tracker=tracker,
        execute=execute,
        is_permanent=is_permanent,
        listeners=listeners,
        tags=tags,
        conclude=register,
    )
    return Outcome(**vars(trained), version=registered[0])


class Stopped(BaseException):
    """Of a training that is told to end where it is, by who runs it in this process and ends its
    run too."""


@dataclass(frozen=True)
class Stoppable:
    """Where a training in this process tells its events; after `stop` that raises `Stopped`."""

    emit: Emit
    stop: Event

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.emit(event)
        if self.stop.is_set():
            raise Stopped

    def flush(self) -> None:
        self.emit.flush()


def train(
    run: Run,
    recipe: Recipe,
    *,
    tracker: Tracker,
    execute: Execute,
    is_permanent: Callable[[BaseException], bool],
    listeners: Sequence[Callable[[dict[str, Any]], None]] = (),
    tags: Mapping[str, str] | None = None,
    conclude: Callable[[Path, Mapping[str, Any]], None] | None = None,
    until_epoch: int | None = None,
    stop: Event | None = None,
) -> Trained:
    """Trains, or goes on. `conclude` is called with the best checkpoint and the summary, as a part
    of the tracked run. One that stops before its last epoch, after `until_epoch`, stays RUNNING.
    `stop` ends a training in this process with what it tells next.

    Raises whatever `execute` and `conclude` raise, after the tracker has the run's end: FAILED, or
    KILLED when the process was told to stop. After `Stopped` the run stays RUNNING.
    """
    card = cards.read(recipe.data.path)
    run = replace(run, run_id=tracker.run_id)
    run.write()
    _note_start(run, recipe, card, tracker, tags or {})
    spool = EventLog(run.event_log)
    shipper = Uploader(run.event_log, tracker, listeners=listeners, is_permanent=is_permanent)
    shipper.start()
    status, patience_seconds = "FAILED", DELIVERY_SECONDS
    failed_events = 0
    try:
        payload = {
            "recipe": recipe.to_json(),
            "run_dir": str(run.folder),
            "until_epoch": until_epoch,
            "changing": run.changing,
        }
        summary = execute(payload, Stoppable(spool, stop) if stop else spool)
        best = run.folder / "checkpoints" / summary["checkpoint"]
        _check_effective(best.with_name(summary["newest"]), recipe)
        _check_effective(best, recipe, run.changing)
        if summary["ended"]:
            _draw_curves(run, spool)
            if conclude is not None:
                conclude(best, summary)
        status = "FINISHED" if summary["ended"] else "RUNNING"
    except Stopped:
        status, patience_seconds = "RUNNING", 1.0
        raise
    except (KeyboardInterrupt, SystemExit):
        status, patience_seconds = "KILLED", 1.0
        raise
    finally:
        # A process that is told to stop has seconds; what it leaves is delivered by a resume.
        failed_events = shipper.close(patience_seconds)
        spool.close()
        if status != "RUNNING":
            _note_end(tracker, status, listeners)
    return Trained(
        run,
        summary["metrics"],
        summary["epoch"],
        mean_speed(run),
        failed_events,
        tracker.link(),
    )


def _note_start(
    run: Run, recipe: Recipe, card: Card, tracker: Tracker, tags: Mapping[str, str]
) -> None:
    tracker.params(run.recipe().flat())
    tracker.tags({**_versions(), **_changes(run, recipe), **tags})
    for split in card.splits:
        if split != "test":
            tracker.dataset(
                name=card.name, digest=card.digest, source=recipe.data.path, split=split
            )


def _note_end(
    tracker: Tracker, status: str, listeners: Sequence[Callable[[dict[str, Any]], None]]
) -> None:
    try:
        tracker.finish(status)
    except Exception as error:  # whatever the service raises, the training's end stands
        for listener in listeners:
            listener({"kind": "notice", "text": f"the run's end was not noted: {error}"})


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
        hint=f"when the server is back: tessera train --resume {run.name}",
    )


def _check_effective(checkpoint: Path, asked: Recipe, changing: Sequence[str] = ()) -> None:
    """What was trained must be what was asked for."""
    wrong = recipes.differences(asked, checkpoints.load(checkpoint).recipe, changing)
    if wrong:
        raise TesseraError(f"another recipe was trained than asked for: {'; '.join(wrong)}")


def _changes(run: Run, recipe: Recipe) -> dict[str, str]:
    """Tags for what a resumed run has otherwise than its params say, which can't be changed."""
    before, now = run.recipe().flat(), recipe.flat()
    return {f"{tag_names.RESUMED_PREFIX}{p}": now[p] for p in now if now[p] != before.get(p)}


def _draw_curves(run: Run, spool: Emit) -> None:
    curves = history(run)
    path = run.folder / "pictures" / "learning_curves.png"
    plots.learning_curves(curves, path)
    spool({"kind": "artifact", "path": f"pictures/{path.name}", "folder": "pictures"})


def _versions() -> dict[str, str]:
    return {
        f"{tag_names.LIBRARY_PREFIX}{name.removesuffix('-train')}": importlib.metadata.version(name)
        for name in LIBRARIES
    }
