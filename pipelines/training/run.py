"""A training's folder: created, found, locked, and its logged metrics read back.

In: a folder for all runs, and a recipe. Out: a `Run` that a later process can resume. Must not know
MLflow or Ray.

    recipe.json     what is trained            run.json       name, tracking run, registered model
    events.jsonl    every event, in order      checkpoints/   step-NNNNNNNNN each
    pictures/       previews and curves        sample_log/    samples of each step, if recorded
    model/          what was registered        judge/         the classifier that judges, if needed
    start/          the version begun with     lock           held while a driver works on the run
    ray/            Ray Train's own files
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from models.core.errors import TesseraError, unknown
from pipelines import recipe as recipes
from pipelines.recipe import Recipe
from pipelines.storage import lease
from pipelines.storage.atomic import write_json_atomic
from pipelines.storage.folder import FolderStorage
from pipelines.storage.lease import Holder, Lease, LeaseLostError
from pipelines.storage.open import open_storage
from pipelines.storage.retry import RetryPolicy, retry_call
from pipelines.tracking import published_log
from pipelines.tracking.events import read_events
from pipelines.training.run_storage import RunStorage, address_of

MODEL_BYTES = 150
"""So many bytes of a model's name are in a run's: a folder's name has at most 255."""
CHECKPOINTS = "checkpoints"
JUDGE = "judge"
START = "start"
MODEL = "model"
PICTURES = "pictures"
"""Folders within a run's folder."""
LEASE_PATIENCE_SECONDS = 45.0
"""How long a driver that shows no sign of life is waited for: longer than its lease lives."""


@dataclass(frozen=True)
class Run:
    """A training's folder and names.

    Args:
        name: Unique name, which is the folder's.
        model: Name of the registered model that it trains a version of.
        run_id: Id in the tracking service; empty before it was tracked.
        resumed: Whether the folder existed before.
        changing: Paths of settings that may change while it trains: those of a population member.
        storage: Address of its files in an object store, of which `folder` then has working copies;
            empty if `folder` is where they are kept.
        lease: That of the driver, if the files are in an object store and this process drives it.
    """

    folder: Path
    name: str
    model: str
    run_id: str = ""
    resumed: bool = False
    changing: tuple[str, ...] = ()
    storage: str = ""
    lease: Lease | None = field(default=None, compare=False, repr=False)

    @property
    def attempt(self) -> int:
        """The number of the driver that works on the run; 0 if no driver elsewhere could."""
        return self.lease.attempt if self.lease else 0

    @property
    def is_ours(self) -> bool:
        """Whether no other driver has replaced this one, as far as can be told now."""
        try:
            if self.lease:
                self.lease.check(patience_seconds=5.0)
        except LeaseLostError:
            return False
        except TesseraError:
            pass  # the store is down, for everybody
        return True

    @property
    def event_log(self) -> Path:
        return self.folder / "events.jsonl"

    def recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        return recipes.read(self.folder / "recipe.json")

    def write(self) -> None:
        write_json_atomic(self.folder / "run.json", self._content())

    def write_if_absent(self) -> None:
        """As `write`, unless another process has written it."""
        content = json.dumps(self._content()).encode()
        FolderStorage(self.folder).create_if_absent("run.json", content)

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = {"name": self.name, "model": self.model, "run_id": self.run_id}
        if self.changing:
            content["changing"] = self.changing
        if self.storage:
            content["storage"] = self.storage
        return content


class Lockable(Protocol):
    """A run or a search: only one driver at a time may work on it."""

    @property
    def folder(self) -> Path: ...
    @property
    def name(self) -> str: ...


def create(root: Path, recipe: Recipe, *, model: str, stamp: str, storage: str = "") -> Run:
    """Creates the folder of a new training; `stamp` is the time in its name. `storage` is the
    address below which the files of all runs are, if that isn't `root`."""
    short = model.encode()[:MODEL_BYTES].decode(errors="ignore")
    name = f"{recipe.family}-{short}-{stamp}-{secrets.token_hex(2)}"
    folder = root / name
    folder.mkdir(parents=True)
    run = Run(folder, name, model, storage=address_of(storage, "runs", name))
    return _write_new(run, recipe)


def find_or_create(
    root: Path,
    recipe: Recipe,
    *,
    name: str,
    model: str,
    changing: Sequence[str] = (),
    storage: str = "",
) -> Run:
    """The run of this name, created if it doesn't exist. Of several processes that create it at
    the same time, on any machines, the first one's recipe counts. See `Run` for `changing`.
    `storage` is the address of this run's files."""
    folder = root / name
    if (existing := open_existing(folder, storage)) is not None:
        return existing
    files = open_storage(storage or folder)
    new = files.create_if_absent("recipe.json", recipe.to_json().encode())
    if storage:
        RunStorage(files).fetch_file("recipe.json", folder / "recipe.json")
    Run(folder, name, model, changing=tuple(changing), storage=storage).write_if_absent()
    return replace(_read(folder / "run.json"), resumed=not new)


def open_existing(folder: Path, storage: str = "") -> Run | None:
    """The run in `folder`, whose files are at the address `storage` if it is given, or at the one
    that the run was started with: then the folder gets copies of its recipe and event log. None if
    there is no run."""
    if not storage and (folder / "run.json").exists():
        storage = _read(folder / "run.json").storage
    if storage:
        files = RunStorage.open(storage)
        if files.storage.size("run.json") is not None:
            for file in ("recipe.json", "run.json"):
                files.fetch_file(file, folder / file)
            published_log.restore(folder / "events.jsonl", files.storage)
    if not (folder / "run.json").exists():
        return None
    return replace(_read(folder / "run.json"), storage=storage)


def _read(file: Path) -> Run:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Run(
            file.parent,
            content["name"],
            content["model"],
            content["run_id"],
            resumed=True,
            changing=tuple(content.get("changing", ())),
            storage=content.get("storage", ""),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise TesseraError(
            f"{file} can't be read: {reason}",
            hint="restore the file, or remove its folder and train again",
        ) from None


def _write_new(run: Run, recipe: Recipe) -> Run:
    (run.folder / "recipe.json").write_text(recipe.to_json(), encoding="utf-8")
    run.write()
    return run


def discard_untracked(run: Run) -> None:
    """Removes the folder of a run that was created for a training which was refused before it was
    tracked; keeps any other."""
    if run.resumed or json.loads((run.folder / "run.json").read_text(encoding="utf-8"))["run_id"]:
        return
    with suppress(TesseraError):
        with driven(run):  # another process may have begun it
            shutil.rmtree(run.folder)
        if run.storage and (files := open_storage(run.storage)).size("run.json") is None:
            for name in ("recipe.json", *files.names(lease.FOLDER)):
                files.remove(name)


def find(root: Path, ref: str, storage: str = "") -> Run:
    """A run by its name or its id in the tracking service. One that is only in `storage`, where the
    files of all runs may be, is found too; then its folder has a copy of its recipe. Raises
    TesseraError without one."""
    stored = RunStorage.open(f"{storage}/runs") if storage else None
    names = stored.storage.folders() if stored else []
    if stored and (name := _stored_name(stored, names, ref)):
        for copied in ("recipe.json", "run.json"):
            stored.fetch_file(f"{name}/{copied}", root / name / copied)
        address = address_of(storage, "runs", name)
        return replace(_read(root / name / "run.json"), storage=address)
    known = dict.fromkeys(names)
    if Path(ref).name == ref and (root / ref / "run.json").exists():
        return _read(root / ref / "run.json")
    for file in sorted(root.glob("*/run.json")):
        try:
            run = _read(file)
        except TesseraError:  # another run's
            continue
        if ref in (run.name, run.run_id):
            return run
        known[run.name] = None
    if not known:
        where = storage or root
        raise TesseraError(f"there is no run {ref!r}: {where} has no runs yet")
    raise unknown("run", ref, known)


def _stored_name(runs: RunStorage, names: Sequence[str], ref: str) -> str:
    """The name of a stored run, from its name or its id; empty if there is none."""
    for name in [ref] if ref in names else names:  # an id is in the runs' own files
        if runs.storage.size(f"{name}/run.json") is not None:
            content = json.loads(runs.storage.read(f"{name}/run.json"))
            if ref in (name, content["run_id"]):
                return name
    return ""


@contextmanager
def locked(run: Lockable, *, patience_seconds: float = 0.0) -> Iterator[None]:
    """Holds the lock of a run or a search. Raises TesseraError if another process still holds it
    after `patience_seconds`."""
    policy = RetryPolicy(
        max_attempts=None,
        deadline_seconds=patience_seconds,
        first_wait_seconds=0.05,
        max_wait_seconds=0.05,
    )
    with (run.folder / "lock").open("a+") as file:
        lock = partial(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            retry_call(lock, policy, None, transient=BlockingIOError)
        except BlockingIOError:
            file.seek(0)
            seconds = max(0.0, time.time() - os.fstat(file.fileno()).st_mtime)
            raise TesseraError(
                f"{run.name} is being trained by {file.read() or 'another process'}, "
                f"which began {seconds:.0f} s ago",
                hint="wait for it, or stop it first",
            ) from None
        file.truncate(0)
        file.write(str(Holder.this_process()))
        file.flush()
        yield


@contextmanager
def leased(
    run: Lockable,
    storage: str,
    *,
    job: str = "",
    patience_seconds: float = 0.0,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Lease | None]:
    """Makes this process the only driver of a run or a search, over all machines that reach its
    files: by a lock in its folder and, if it has an address in `storage`, by a lease there.

    A driver whose lease is lost gets a KeyboardInterrupt in its main thread, which ends the block
    with the LeaseLostError. `job` is the job that this process belongs to, for messages. A driver
    that may be dead is waited for, which `say` is told; raises TesseraError if another one lives.
    """
    with locked(run, patience_seconds=patience_seconds):
        if not storage:
            yield None
            return
        main = threading.current_thread() is threading.main_thread()
        with lease.held(
            open_storage(storage, policy=lease.REQUESTS),
            lease.FOLDER,
            run.name,
            holder=Holder.this_process(job),
            patience_seconds=LEASE_PATIENCE_SECONDS,
            on_lost=_interrupt if main else lambda error: None,
            on_wait=say,
        ) as held:
            try:
                yield held
            except BaseException:
                if held.lost:
                    raise held.lost from None
                raise


@contextmanager
def driven(run: Run, **options: Any) -> Iterator[Run]:
    """Makes this process the only driver of a run, as `leased` does with these options; yields the
    run with its lease."""
    with leased(run, run.storage, **options) as held:
        yield replace(run, lease=held)


def _interrupt(error: LeaseLostError) -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def history(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Metric name -> [(step, value), …]. A step that was repeated after a restart counts once,
    with its first value."""
    curves: dict[str, dict[int, float]] = {}
    for event, _ in read_events(run.event_log):
        if event["kind"] == "metrics":
            for name, value in event["values"].items():
                curves.setdefault(name, {}).setdefault(event["step"], value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def median_speed(run: Run) -> float:
    """Median of the logged training speed in images per second; 0.0 if nothing was logged."""
    speeds = sorted(v for _, v in history(run).get("train/images_per_second", []))
    return speeds[len(speeds) // 2] if speeds else 0.0
