"""The event log of a run whose files are kept in an object store.

In: events, also with the content of the files that they name, and the storage of the run. Out: the
event log with its files on the driver's machine (events.py) and in the storage. Must not know
MLflow, Ray or torch.

The tracker gets only events that are in the storage (`Uploader`, `readable`). So a driver on
another machine knows every point that MLflow has, and delivers none twice:

    time  driver                                  storage       MLflow
    0 s   steps 1 to 40; a checkpoint commits     steps 1-40    steps 1-40
    5 s   steps 41 to 44 are published            steps 1-44    steps 1-44
    7 s   step 45; the machine is lost            steps 1-44    steps 1-44
    60 s  another machine restores steps 1-44, trains again from step 40. For steps 41 to 44 the
          first line counts, so MLflow gets step 45 next.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from models.core.errors import TesseraError
from pipelines.interfaces import Emit
from pipelines.storage import lease
from pipelines.storage.appended import AppendedFile
from pipelines.storage.atomic import write_bytes_atomic
from pipelines.storage.base import Storage
from pipelines.storage.open import open_storage
from pipelines.storage.retry import RetryPolicy
from pipelines.tracking.events import EventLog

PUBLISH_SECONDS = 5.0
"""How often new events are published between two checkpoints."""
CONTENT = "content"
"""In an event that names a file: its bytes, on the way from a worker to the driver."""


class PublishedEventLog(EventLog):
    """An event log in a storage too. `flush` returns when all events so far are there, with the
    files that they name. Any process of the driver's machine may write and flush. `attempt` is
    the number of the driver's lease, if it has one: nothing is published for a driver that was
    replaced."""

    def __init__(self, path: Path, address: str, policy: RetryPolicy, *, attempt: int = 0) -> None:
        super().__init__(path)
        self._address, self._policy, self._attempt = address, policy, attempt
        self._storage = open_storage(address, policy=policy, has_responded=True)
        self._appended = AppendedFile(path, self._storage, path.name)

    def __call__(self, event: Mapping[str, Any]) -> None:
        plain = dict(event)
        content = plain.pop(CONTENT, None)
        if content is not None:
            file = _file_of(plain, self.path.parent)
            if file is not None and not (file.exists() and file.read_bytes() == content):
                write_bytes_atomic(file, content)
        super().__call__(plain)

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(PublishedEventLog, attempt=self._attempt)
        return make, (self.path, self._address, self._policy)

    def published(self) -> int:
        """The bytes of the file that are in the storage."""
        return self._appended.published()

    def publish(self) -> None:
        """Uploads new events, after the files that they name. Raises LeaseLostError if another
        driver has replaced this one."""
        self._appended.publish(self._upload_files)

    def flush(self) -> None:
        self.publish()
        for file in offset_files(self.path):
            # Its bytes, because the uploader may replace the file meanwhile.
            self._storage.write(file.name, file.read_bytes())

    def _upload_files(self, lines: bytes) -> None:
        if self._attempt:
            name = self.path.parent.name
            lease.check_attempt(self._storage, lease.FOLDER, name, self._attempt)
        for line in lines.splitlines():
            try:
                file = _file_of(json.loads(line), self.path.parent)
            except ValueError:
                continue
            if file is not None and file.is_file():
                self._storage.upload(file, file.relative_to(self.path.parent).as_posix())


class Publisher:
    """Publishes an event log every `PUBLISH_SECONDS`, in a thread of its own."""

    def __init__(self, log: PublishedEventLog, notify: Callable[[str], None]) -> None:
        self._log, self._notify = log, notify
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="publish-events", daemon=True)

    def start(self) -> Publisher:
        self._thread.start()
        return self

    def close(self, deadline_seconds: float) -> None:
        """Publishes what is left, for at most `deadline_seconds`."""
        self._done.set()
        self._thread.join(deadline_seconds)

    def _run(self) -> None:
        while True:
            # Read the flag before the file: every event written before `close` is then published.
            last = self._done.wait(PUBLISH_SECONDS)
            try:
                if last:
                    self._log.flush()
                else:
                    self._log.publish()
            except (TesseraError, OSError) as error:
                self._notify(f"events can't be published: {error}")
            if last:
                return


class EmitFiles:
    """A worker's `Emit` that adds the content of the files in `run_dir` which an event names: the
    driver may be on another machine."""

    def __init__(self, emit: Emit, run_dir: Path) -> None:
        self._emit, self._run_dir = emit, run_dir

    def __call__(self, event: Mapping[str, Any]) -> None:
        file = _file_of(event, self._run_dir)
        self._emit(event if file is None else {**event, CONTENT: file.read_bytes()})

    def flush(self) -> None:
        self._emit.flush()


def restore(path: Path, storage: Storage) -> None:
    """Makes the event log at `path`, and how far it was delivered, what the storage has. A local
    log that only has more lines is kept."""
    if not AppendedFile(path, storage, path.name).restore():
        return
    for file in offset_files(path):
        file.unlink()
    for name in storage.names():
        if name.startswith(f"{path.name}.") and name.endswith(".offset"):
            write_bytes_atomic(path.with_name(name), storage.read(name))


def offset_files(path: Path) -> Iterator[Path]:
    """The files beside an event log that say how far it was delivered."""
    return path.parent.glob(f"{path.name}.*.offset")


def _file_of(event: Any, folder: Path) -> Path | None:
    """The file that an event names; None if it names none, or one outside of `folder`."""
    if not isinstance(event, Mapping) or event.get("kind") not in ("artifact", "image"):
        return None
    folder = folder.resolve()
    file = (folder / str(event.get("path", ""))).resolve()
    return file if file.is_relative_to(folder) and file != folder else None
