"""One training as the driver sees it: its folder, its tracking, its registered model.

In: a recipe, a tracker, a registry and a way to execute the work (ports: the jobs choose which).
Out: an outcome; a run folder that a later process can resume. Must not know MLflow or Ray.

    recipe.json        what is trained        run.json     name, tracking run, registered model
    spool.jsonl        every event, in order  checkpoints/  pictures/
    model/             what was registered    lock         held while a driver is at work
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import models
from models.core.errors import TesseraError, unknown
from pipelines import checkpoints, pictures
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.interfaces import Emit, Registry, Tracker, Version
from pipelines.recipe import Recipe
from pipelines.spool import Shipper, SpoolFile, read_events

CHALLENGER = "challenger"
LIBRARIES = ("torch", "torchvision", "ray", "mlflow", "webdataset", "tessera")
ORIGIN = ("tessera.search", "tessera.trial")
"""Tags of a run that say where its settings come from: its version has them, too."""
DELIVERY_SECONDS = 120.0
"""How long the end of a training waits for a tracking service that is away."""

Execute = Callable[[dict[str, Any], Emit], dict[str, Any]]
SaveServable = Callable[..., str | None]
"""Writes the form of a model that other tools read; gives the reason where it couldn't."""


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
    def spool(self) -> Path:
        return self.folder / "spool.jsonl"

    def recipe(self) -> Recipe:
        return recipes.read(self.folder / "recipe.json")

    def write(self) -> None:
        content: dict[str, Any] = {"name": self.name, "model": self.model, "run_id": self.run_id}
        if self.changing:
            content["changing"] = self.changing
        scratch = self.folder / ".run.json"
        scratch.write_text(json.dumps(content, indent=1), encoding="utf-8")
        scratch.replace(self.folder / "run.json")


class Place(Protocol):
    """What one driver at a time works on."""

    @property
    def folder(self) -> Path: ...
    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Trained:
    """What a training came to. `figures` are of the validation split."""

    run: Run
    figures: Mapping[str, float]
    epoch: int
    images_per_second: float
    undelivered: int
    link: str


@dataclass(frozen=True)
class Outcome(Trained):
    """And what was registered."""

    version: Version


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
    deadline = time.monotonic() + patience_seconds
    with (run.folder / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
            raise TesseraError(
                f"{run.name} is being trained by another process",
                mend="wait for it, or stop it first",
            )
        yield


def launch(
    run: Run,
    recipe: Recipe,
    *,
    tracker: Tracker,
    registry: Registry,
    execute: Execute,
    save_servable: SaveServable,
    is_permanent: Callable[[BaseException], bool],
    listeners: Sequence[Callable[[dict[str, Any]], None]] = (),
    tags: Mapping[str, str] | None = None,
) -> Outcome:
    """Trains (or goes on), then registers the best checkpoint as `challenger`. Raises as `train`."""
    registered: list[Version] = []

    def register(best: Path, summary: Mapping[str, Any]) -> None:
        def once() -> Version:
            return _register(run, best, summary, tracker, registry, save_servable, tags or {})

        registered.append(_patiently(once, run))

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
    spool = SpoolFile(run.spool)
    shipper = Shipper(run.spool, tracker, listeners=listeners, is_permanent=is_permanent)
    shipper.start()
    status, patience_seconds = "FAILED", DELIVERY_SECONDS
    undelivered = 0
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
        undelivered = shipper.close(patience_seconds)
        spool.close()
        if status != "RUNNING":
            _note_end(tracker, status, listeners)
    return Trained(
        run,
        summary["figures"],
        summary["epoch"],
        mean_speed(run),
        undelivered,
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


def history(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Every metric of the run by step; a step that was done again after a restart counts once."""
    curves: dict[str, dict[int, float]] = {}
    for event, _ in read_events(run.spool):
        if event["kind"] == "metrics":
            for name, value in event["values"].items():
                curves.setdefault(name, {}).setdefault(event["step"], value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def mean_speed(run: Run) -> float:
    """Median of the images per second that were logged in training."""
    speeds = sorted(v for _, v in history(run).get("train/images_per_second", []))
    return speeds[len(speeds) // 2] if speeds else 0.0


def _patiently(register: Callable[[], Version], run: Run) -> Version:
    """Tries again while the service is away; what `register` does can be done twice."""
    deadline = time.monotonic() + DELIVERY_SECONDS
    while True:
        try:
            return register()
        except TesseraError:
            raise
        except Exception as error:  # whatever the service raises
            if time.monotonic() > deadline:
                raise TesseraError(
                    f"trained, but not registered: {str(error).splitlines()[0][:200]}",
                    mend=f"when it answers again: tessera train --resume {run.name}",
                ) from error
            time.sleep(2.0)


def _check_effective(checkpoint: Path, asked: Recipe, changing: Sequence[str] = ()) -> None:
    """What was trained must be what was asked for."""
    wrong = recipes.differences(asked, checkpoints.load(checkpoint).recipe, changing)
    if wrong:
        raise TesseraError(f"another recipe was trained than asked for: {'; '.join(wrong)}")


def _changes(run: Run, recipe: Recipe) -> dict[str, str]:
    """Tags for what a resumed run has otherwise than its params say, which can't be changed."""
    before, now = run.recipe().flat(), recipe.flat()
    return {f"tessera.resumed.{p}": now[p] for p in now if now[p] != before.get(p)}


def _draw_curves(run: Run, spool: Emit) -> None:
    curves = history(run)
    path = run.folder / "pictures" / "learning_curves.png"
    pictures.learning_curves(curves, path)
    spool({"kind": "artifact", "path": f"pictures/{path.name}", "folder": "pictures"})


def _register(
    run: Run,
    best: Path,
    summary: Mapping[str, Any],
    tracker: Tracker,
    registry: Registry,
    save_servable: SaveServable,
    origin: Mapping[str, str],
) -> Version:
    for version in registry.versions(run.model):  # it was resumed after it had been registered
        if (version.tags.get("tessera.run"), version.tags.get("tessera.checkpoint")) == (
            run.name,
            best.name,
        ):
            return version
    target = run.folder / "model"
    if target.exists():  # left by a driver that died while registering
        shutil.rmtree(target)
    state = checkpoints.load(best)
    recipe, card = state.recipe, state.card
    family = models.get(recipe.family)
    data = card.spec(recipe.data.height, recipe.data.width, reads=family.task.reads)
    module = family.build(recipe.config(), data)
    module.load_state_dict(state.weights)
    servable = family.servable(module.eval(), data)
    reason: str | None = f"{recipe.family} has no answer that is one tensor"
    if servable is not None:
        import numpy as np

        example = np.zeros((2, data.height, data.width, data.channels), np.uint8)
        metadata = {"classes": list(data.classes), "task": family.task.name}
        reason = save_servable(servable, example, target, metadata=metadata)
    digest = checkpoints.write_model(best, target)
    tags = {
        "tessera.digest": digest,
        "tessera.family": recipe.family,
        "tessera.variant": recipe.variant,
        "tessera.recipe": json.dumps(recipe.model_dump(mode="json"), sort_keys=True),
        "tessera.data_digest": card.digest,
        "tessera.data_name": card.name,
        "tessera.classes": _short_list(card.classes),
        "tessera.preprocessing": json.dumps(asdict(replace(data, classes=())), sort_keys=True),
        "tessera.metrics": json.dumps({f"val/{k}": v for k, v in summary["figures"].items()}),
        "tessera.run": run.name,
        "tessera.checkpoint": best.name,
        "tessera.servable": f"no: {reason}" if reason else "mlflow.pytorch",
        **{name: origin[name] for name in ORIGIN if name in origin},
    }
    version = registry.register(
        run.model, target, run_id=tracker.run_id, tags=tags, step=summary["step"]
    )
    registry.alias(run.model, CHALLENGER, version.number)
    return registry.version(run.model, version.number)


def _short_list(names: Sequence[str]) -> str:
    listed = json.dumps(list(names))
    return listed if len(listed) <= 4000 else f"{len(names)} classes; see card.json"


def _versions() -> dict[str, str]:
    return {f"tessera.version.{name}": importlib.metadata.version(name) for name in LIBRARIES}
