"""One training as the driver sees it: its folder, its tracking, its registered model.

In: a recipe, a tracker, a registry and a way to execute the work (ports: the jobs choose which).
Out: an outcome; a run folder that a later process can resume. Must not know MLflow or Ray.

    recipe.json        what is trained        run.json     name, tracking run, registered model
    events.jsonl        every event, in order  checkpoints/  pictures/
    model/             what was registered    lock         held while a driver is at work
"""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from models.core.errors import TesseraError, unknown
from pipelines import recipe as recipes
from pipelines.recipe import Recipe
from pipelines.storage.atomic import write_json_atomic
from pipelines.storage.retry import RetryPolicy, retry_call
from pipelines.tracking.events import read_events


@dataclass(frozen=True)
class Run:
    """A training's place and names."""

    folder: Path
    name: str
    model: str
    run_id: str = ""
    resumed: bool = False
    changing: tuple[str, ...] = ()
    """Settings that this training may change on its way: those of a population."""

    @property
    def event_log(self) -> Path:
        return self.folder / "events.jsonl"

    def recipe(self) -> Recipe:
        return recipes.read(self.folder / "recipe.json")

    def write(self) -> None:
        content: dict[str, Any] = {"name": self.name, "model": self.model, "run_id": self.run_id}
        if self.changing:
            content["changing"] = self.changing
        write_json_atomic(self.folder / "run.json", content)


class Place(Protocol):
    """What one driver at a time works on."""

    @property
    def folder(self) -> Path: ...
    @property
    def name(self) -> str: ...


def create(root: Path, recipe: Recipe, *, model: str, stamp: str) -> Run:
    """A folder for a new training; `stamp` is the time in its name."""
    name = f"{recipe.family}-{model}-{stamp}-{secrets.token_hex(2)}"
    folder = root / name
    folder.mkdir(parents=True)
    return _fill(Run(folder, name, model), recipe)


def find_or_create(
    root: Path, recipe: Recipe, *, name: str, model: str, changing: Sequence[str] = ()
) -> Run:
    """The training of this name, for one that may be started again by whoever starts it."""
    folder = root / name
    if (folder / "run.json").exists():
        return replace(_read(folder / "run.json"), model=model)
    folder.mkdir(parents=True, exist_ok=True)
    return _fill(Run(folder, name, model, changing=tuple(changing)), recipe)


def _read(file: Path) -> Run:
    found = json.loads(file.read_text(encoding="utf-8"))
    return Run(
        file.parent,
        found["name"],
        found["model"],
        found["run_id"],
        resumed=True,
        changing=tuple(found.get("changing", ())),
    )


def _fill(run: Run, recipe: Recipe) -> Run:
    (run.folder / "recipe.json").write_text(recipe.to_json(), encoding="utf-8")
    run.write()
    return run


def forget(run: Run) -> None:
    """Removes the folder of a training that was refused before it began; another one stays."""
    if not json.loads((run.folder / "run.json").read_text(encoding="utf-8"))["run_id"]:
        shutil.rmtree(run.folder)


def find(root: Path, ref: str) -> Run:
    """A training by its name or its tracking run's id."""
    known = {}
    for file in sorted(root.glob("*/run.json")):
        run = _read(file)
        if ref in (run.name, run.run_id):
            return run
        known[run.name] = run
    if not known:
        raise TesseraError(f"there is no run {ref!r}: nothing was trained under {root} yet")
    raise unknown("run", ref, known)


@contextmanager
def locked(run: Place, *, patience_seconds: float = 0.0) -> Iterator[None]:
    """Never two drivers on one run, or on one search. TesseraError where another one has it, and
    after `patience_seconds` still."""
    policy = RetryPolicy(
        max_attempts=None,
        deadline_seconds=patience_seconds,
        first_wait_seconds=0.05,
        max_wait_seconds=0.05,
    )
    with (run.folder / "lock").open("w") as file:
        lock = partial(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            retry_call(lock, policy, None, transient=BlockingIOError)
        except BlockingIOError:
            raise TesseraError(
                f"{run.name} is being trained by another process",
                hint="wait for it, or stop it first",
            ) from None
        yield


def history(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Every metric of the run by step; a step that was done again after a restart counts once."""
    curves: dict[str, dict[int, float]] = {}
    for event, _ in read_events(run.event_log):
        if event["kind"] == "metrics":
            for name, value in event["values"].items():
                curves.setdefault(name, {}).setdefault(event["step"], value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def mean_speed(run: Run) -> float:
    """Median of the images per second that were logged in training."""
    speeds = sorted(v for _, v in history(run).get("train/images_per_second", []))
    return speeds[len(speeds) // 2] if speeds else 0.0
