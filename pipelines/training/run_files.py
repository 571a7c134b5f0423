"""The files of a run, as its driver handles them: in the run's folder, or in its storage too.

In: a `Run`. Out: its event log, its checkpoints on this machine, and its files in the storage if it
has one. Must not know MLflow or Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.recipe import Recipe
from pipelines.tracking import published_log
from pipelines.tracking.events import EventLog
from pipelines.tracking.published_log import PublishedEventLog, Publisher
from pipelines.training import sample_log
from pipelines.training.run import CHECKPOINTS, JUDGE, MODEL, START, Run
from pipelines.training.run_storage import PATIENCE, RunStorage

Listener = Callable[[dict[str, Any]], None]


class RunFiles:
    """The files of a run that is kept in its folder: nothing is copied."""

    readable: Callable[[], int] | None = None
    """The bytes of the event log that the tracker may get; None for all."""
    fetch: Callable[[str], None] | None = None
    """Brings a file that an event names into the folder; None if all are there."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._log: EventLog | None = None

    def begin(self) -> None:
        """Called when the run is tracked, before it trains."""

    def open_log(self, listeners: Sequence[Listener]) -> EventLog:
        """The event log; listeners get a notice if it can't be published."""
        del listeners
        self._log = EventLog(self._run.event_log)
        return self._log

    def close_log(self, deadline_seconds: float) -> None:
        """Called when all events are written."""
        del deadline_seconds
        if self._log is not None:
            self._log.close()

    def checkpoint(self, name: str) -> Path:
        """The folder of a checkpoint that the workers have committed."""
        return self._run.folder / CHECKPOINTS / name

    def fetch_sample_log(self, recipe: Recipe) -> None:
        """Brings the sample log of all ranks into the folder, if the recipe wants one."""

    def publish_model(self) -> None:
        """Called when the model is registered."""


class PublishedFiles(RunFiles):
    """The files of a run that is kept in a storage; its folder has this machine's copies."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._storage = RunStorage.open(run.storage, attempt=run.attempt)
        self.fetch = self._fetch
        self._publisher: Publisher | None = None

    def begin(self) -> None:
        """Restores the event log, and publishes what the workers need. run.json comes last: a run
        is found by it."""
        folder = self._run.folder
        published_log.restore(self._run.event_log, self._storage.storage)
        self._storage.publish_file(folder / "recipe.json", "recipe.json")
        for used in (JUDGE, START):
            if (folder / used).is_dir():
                self._storage.publish_folder(folder / used, used)
        self._storage.publish_file(folder / "run.json", "run.json")

    def open_log(self, listeners: Sequence[Listener]) -> EventLog:
        log = PublishedEventLog(
            self._run.event_log, self._run.storage, PATIENCE, attempt=self._run.attempt
        )

        def notify(text: str) -> None:
            for listener in listeners:
                listener({"kind": "notice", "level": "warning", "text": text})

        self.readable, self._log = log.published, log
        self._publisher = Publisher(log, notify).start()
        return log

    def close_log(self, deadline_seconds: float) -> None:
        if self._publisher is not None:
            self._publisher.close(deadline_seconds)
        super().close_log(deadline_seconds)

    def _fetch(self, path: str) -> None:
        self._storage.fetch_file(path, self._run.folder / path)

    def checkpoint(self, name: str) -> Path:
        folder = self._run.folder / CHECKPOINTS / name
        return self._storage.fetch_folder(f"{CHECKPOINTS}/{name}", folder)

    def fetch_sample_log(self, recipe: Recipe) -> None:
        if recipe.data.sample_log:
            sample_log.fetch(self._storage.storage, self._run.folder)

    def publish_model(self) -> None:
        # A run whose checkpoint was registered before has no folder of the model here.
        if (self._run.folder / MODEL).is_dir():
            self._storage.publish_folder(self._run.folder / MODEL, MODEL)


def of(run: Run) -> RunFiles:
    """The files of a run. Makes no connection."""
    return PublishedFiles(run) if run.storage else RunFiles(run)
