"""The interfaces between Tessera's core and the services it runs on.

In: nothing. Out: `World` (which worker this is), `Control` (what it is asked for), `Emit` and
`Listener` (where events go), `Tracker` (one run in the tracking service) and `Registry` (model
versions), with the data that they exchange. Must not know Ray, MLflow or
torch.

    interface    real                                substitute without a service
    Emit         `tracking.events.EventLog`          `NullEmit`
    Tracker      `tracking.mlflow_runs`              `tracking.memory.MemoryTracker`
    Registry     `tracking.mlflow_registry`          `tracking.memory.MemoryRegistry`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Control(Protocol):
    """How the driver watches a worker, and asks its group to stop at a common step."""

    def begin(self, step: int) -> None:
        """The training starts after so many steps. Its thread calls this."""

    def phase(self, name: str) -> None:
        """What the training does from now on: "data", "compute", "sync" (which may wait for other
        workers) or "" for something else. Costs a microsecond."""

    def stops_after(self, step: int) -> bool:
        """Called by every worker after each step, with the number of steps completed. True if the
        group is to commit and stop here. While a stop is agreed upon, it waits for the others."""


class NullControl:
    """A `Control` that never asks for anything."""

    def begin(self, step: int) -> None:
        return

    def phase(self, name: str) -> None:
        return

    def stops_after(self, step: int) -> bool:
        return False


class GroupStopped(Exception):
    """Raised by the function of a worker that has committed and stopped because its `Control` asked
    for it. The driver forms the group again."""


@dataclass(frozen=True)
class World:
    """Which worker of a group this is, and its device.

    Args:
        rank: 0 for the worker that leads, which writes files and reports results.
        size: Number of workers; 1 without torch.distributed.
        device: "cpu" or "cuda:0".
        control: The driver's line to this worker.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    control: Control = field(default=NullControl(), compare=False, repr=False)

    @property
    def leads(self) -> bool:
        return self.rank == 0


class Emit(Protocol):
    """Takes the events of a worker, in order; they end up in the run's event log.

    An event is a flat JSON object with a "kind". A call never waits for a service.
    """

    def __call__(self, event: Mapping[str, Any]) -> None: ...

    def flush(self) -> None:
        """Returns when all events so far are on disk."""


class NullEmit:
    """An `Emit` that drops all events."""

    def __call__(self, event: Mapping[str, Any]) -> None:
        return

    def flush(self) -> None:
        return


class Listener(Protocol):
    """Called with each event of a workflow, in the process that runs it, for a display or a log.

    An event is a flat JSON object with a "kind":

    - `message`: a line for a person in `text`
    - `run`: a training begins; its `name`, its `page` in MLflow, and the `metric` that selects
      the best checkpoint
    - `metrics`, `restart`, `resume`, `notice`: as the training's workers and driver emit them
    - `group`: a group of workers was formed again and works; its number of `workers`, that
      `before`, the `seconds` that it took, and the `reason`
    - `advance`: `done` of `total` things are processed, counted in `unit` ("images", "GB")

    Ignore kinds that you don't know: there may be more in the future.
    """

    def __call__(self, event: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Point:
    """Values of metrics at one step, with the time when they were measured, in ms since 1970."""

    step: int
    time_ms: int
    values: Mapping[str, float]


class Tracker(Protocol):
    """One run in the tracking service.

    Every method may raise OSError or an error of the service; the caller decides whether to retry.
    """

    @property
    def run_id(self) -> str: ...

    def params(self, values: Mapping[str, str]) -> None:
        """Logs settings. A param that was logged before keeps its first value."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Sets tags; a tag that exists gets the new value."""

    def metrics(self, points: Sequence[Point]) -> None:
        """Logs metrics. Idempotent: the same point twice is one point."""

    def artifact(self, path: Path, folder: str) -> None:
        """Uploads the file at `path` into `folder` of the run's artifacts, replacing one of the
        same name."""

    def image(self, path: Path, key: str, step: int, time_ms: int) -> None:
        """Logs an image as one step of the series `key`. Idempotent."""

    def dataset(self, *, name: str, digest: str, source: str, split: str) -> None:
        """Logs a split that the run used."""

    def finish(self, status: str) -> None:
        """Ends the run as `FINISHED`, `FAILED` or `KILLED`."""

    def link(self) -> str:
        """Address of the run's page, in MLflow's view for model training; a path where no server
        runs."""


@dataclass(frozen=True)
class Version:
    """A registered model version. `number` counts from 1; `tags` have the names in `tag_names`."""

    name: str
    number: int
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """An entry of a model's promotion record: who is to become champion.

    Args:
        number: Position in the record, assigned by the registry.
        base: Number of the last decision that counted when this one was made, 0 for none. If
            another one has come between, this one doesn't count; see `promotion.champions`.
        target: Version that becomes champion.
        before: Version that was champion; None if there was none.
        kind: Why, for example a promotion or a rollback.
        token: Unique, to recognise one's own decision.
        done: Whether the alias was moved.
    """

    number: int
    base: int
    target: int
    before: int | None
    kind: str
    token: str
    done: bool = False


class Registry(Protocol):
    """The model registry. Raises TesseraError for a version that doesn't exist."""

    def register(
        self, name: str, directory: Path, *, run_id: str, tags: Mapping[str, str], step: int = 0
    ) -> Version:
        """Stores the files of `directory` as a new version. `step` is that of the checkpoint."""

    def version(self, name: str, ref: str | int) -> Version:
        """A version by its number or an alias."""

    def versions(self, name: str) -> list[Version]:
        """All versions, the oldest first; empty for a model that doesn't exist."""

    def names(self) -> list[str]:
        """Names of all registered models, sorted."""

    def tag(self, version: Version, values: Mapping[str, str]) -> None:
        """Sets tags of a version."""

    def alias(self, name: str, alias: str, number: int) -> None:
        """Points an alias at a version. Not conditional: see `decide` for the champion."""

    def delete(self, version: Version) -> None:
        """Removes the version from the registry."""

    def missing(self, version: Version) -> str:
        """Why the origin of a version can't be trusted: its run was deleted, or its files lie
        outside of the registry's own store. Empty if it can."""

    def decide(self, name: str, decision: Decision) -> None:
        """Appends to the model's promotion record. The registry keeps all entries and gives each
        its own number."""

    def decisions(self, name: str) -> list[Decision]:
        """The model's promotion record, in order."""

    def done(self, name: str, decision: Decision) -> None:
        """Marks that the alias was moved for a decision."""

    def download(self, version: Version, to: Path) -> Path:
        """Downloads the version's files below `to`; returns the folder that has them."""

    def link(self, version: Version) -> str:
        """Address of the version's page; a path where no server runs."""
