"""The sockets that the core plugs into, and the substitutes that need no service.

In: nothing. Out: `World`, `Emit`, `Tracker`, `Registry` and their in-memory forms. Must not know
Ray, MLflow or torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class World:
    """Which worker this is, of how many, and on which device ("cpu" or "cuda:0")."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        return self.rank == 0


class Emit(Protocol):
    """Where a worker's events go: the run's spool, wherever that file is.

    An event is a flat JSON object with a "kind". Calling never blocks on a service.
    """

    def __call__(self, event: Mapping[str, Any]) -> None: ...

    def flush(self) -> None:
        """Returns when every event so far is on disk."""


class NullEmit:
    """An `Emit` whose events nobody reads."""

    def __call__(self, event: Mapping[str, Any]) -> None:
        return

    def flush(self) -> None:
        return


class Listener(Protocol):
    """Called with each event of a workflow, in the process that runs it, for a display or a log.

    An event is a flat JSON object with a "kind":

    - `message`: a line for a person in `text`
    - `run`: a training begins; its `name`, its `page` in MLflow, and the `metric` that selects
    - `metrics`, `restart`, `resume`, `notice`: as the training's workers and driver emit them
    - `advance`: `done` of `total` things are processed, counted in `unit` ("images", "GB")

    Other kinds may come and are to be ignored.
    """

    def __call__(self, event: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Point:
    """Metrics made at one step, with the time of their making."""

    step: int
    time_ms: int
    values: Mapping[str, float]


class Tracker(Protocol):
    """One training's entry in the tracking service. Every method may raise OSError or the
    service's own error; whoever calls decides whether to try again."""

    @property
    def run_id(self) -> str: ...
    def params(self, values: Mapping[str, str]) -> None: ...
    def tags(self, values: Mapping[str, str]) -> None: ...
    def metrics(self, points: Sequence[Point]) -> None:
        """Idempotent: the same point twice is one point."""

    def artifact(self, path: Path, folder: str) -> None: ...
    def image(self, path: Path, key: str, step: int, time_ms: int) -> None:
        """A picture of a series: the same thing at another step. Idempotent."""

    def dataset(self, *, name: str, digest: str, source: str, split: str) -> None: ...
    def finish(self, status: str) -> None:
        """`FINISHED`, `FAILED` or `KILLED`."""

    def link(self) -> str:
        """Address of the run's page in the model-training view, or a path where no server is."""


@dataclass(frozen=True)
class Version:
    """A registered model version. `number` counts from 1."""

    name: str
    number: int
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """A line of a model's record: `target` is to be champion instead of `before`. `number` is its
    place, given by the registry; `base` that of the decision it was based on; `token` is its own."""

    number: int
    base: int
    target: int
    before: int | None
    kind: str
    token: str
    done: bool = False


class Registry(Protocol):
    """The model registry. A version that doesn't exist is a TesseraError."""

    def register(
        self, name: str, directory: Path, *, run_id: str, tags: Mapping[str, str], step: int = 0
    ) -> Version:
        """Stores the files of `directory` as a new version."""

    def version(self, name: str, ref: str | int) -> Version:
        """By number or by alias."""

    def versions(self, name: str) -> list[Version]:
        """All versions, the oldest first; empty for a model that doesn't exist."""

    def names(self) -> list[str]:
        """Of all registered models, sorted."""

    def tag(self, version: Version, values: Mapping[str, str]) -> None: ...
    def alias(self, name: str, alias: str, number: int) -> None: ...
    def delete(self, version: Version) -> None:
        """Removes the version from the registry."""

    def missing(self, version: Version) -> str:
        """Why what the version comes from can't be trusted: its run was deleted, its files lie
        outside of the registry's own store; empty where nothing speaks against it."""

    def decide(self, name: str, decision: Decision) -> None:
        """Appends to the model's record, which never loses a line nor gives two the same number."""

    def decisions(self, name: str) -> list[Decision]:
        """The model's record, in its order."""

    def done(self, name: str, decision: Decision) -> None:
        """Notes that the alias was moved."""

    def download(self, version: Version, to: Path) -> Path:
        """Fetches the version's files; gives the folder with them."""

    def link(self, version: Version) -> str: ...
