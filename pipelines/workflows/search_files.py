"""The files of a search in an object store, if its runs are kept in one.

In: a search's folder and the address of its files. Out: the search's state there, and back on
another machine. Must not know the tuner, whose own state isn't published: reading it would execute
what somebody else may have written. A search that is resumed elsewhere goes on from trials.json.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.search import trials as search_trials
from pipelines.search.trials import Trial
from pipelines.training.run_storage import RunStorage, address_of

SPEC = "search.json"
POPULATION = "population.json"
STATE = (SPEC, search_trials.TRIALS, POPULATION)
_POLL_SECONDS = 0.2


def address(storage: str, name: str) -> str:
    """The address of a search's files; empty if there is no storage."""
    return address_of(storage, "searches", name)


def names(storage: str) -> list[str]:
    """The names of the searches in a storage."""
    return RunStorage.open(f"{storage}/searches").storage.folders()


def fetch(address: str, folder: Path) -> None:
    """Makes the state in the search's local folder that of the storage."""
    files = RunStorage.open(address)
    for file in STATE:
        if files.storage.size(file) is None:
            (folder / file).unlink(missing_ok=True)
        else:
            files.fetch_file(file, folder / file)


def publish(address: str, folder: Path, *names: str) -> None:
    """Uploads files of the search's folder; does nothing without an address."""
    if not address:
        return
    files = RunStorage.open(address)
    for name in names:
        files.publish_file(folder / name, name)


def publish_results(address: str, folder: Path) -> None:
    """Uploads the plots and the winner's recipe."""
    pictures = [f"pictures/{path.name}" for path in sorted((folder / "pictures").glob("*"))]
    publish(address, folder, search_trials.TRIALS, "winner.yaml", *pictures)


def wait_until_recorded(
    address: str, folder: Path, trial: str, *, patience_seconds: float = 300.0
) -> None:
    """Returns when the search's trials.json has the trial: in the storage if there is an address,
    else in the folder. Until then a machine that resumes the search can't know the trial. Raises
    TesseraError after `patience_seconds`."""
    deadline = time.monotonic() + patience_seconds
    while all(known.id != trial for known in _recorded(address, folder)):
        if time.monotonic() > deadline:
            where = f"{address or folder}/{search_trials.TRIALS}"
            raise TesseraError(
                f"the search didn't record trial {trial} in {where} within {patience_seconds:.0f} s"
            )
        time.sleep(_POLL_SECONDS)


def _recorded(address: str, folder: Path) -> list[Trial]:
    if not address:
        return search_trials.read(folder / search_trials.TRIALS)
    storage = RunStorage.open(address).storage
    if storage.size(search_trials.TRIALS) is None:
        return []
    return search_trials.parse(storage.read(search_trials.TRIALS))


class LatestFile:
    """Uploads a file that is written often, in the background: always its newest content, and as
    often as the store keeps up. A search never waits for the store, except in `close`."""

    def __init__(self, address: str, folder: Path, name: str) -> None:
        self._address, self._folder, self._name = address, folder, name
        self._changed, self._closing = threading.Event(), threading.Event()
        self._failure: TesseraError | None = None
        self._thread = threading.Thread(target=self._run, name="publish-trials", daemon=True)
        if address:
            self._thread.start()

    def changed(self) -> None:
        """Called after each write."""
        self._changed.set()

    def close(self) -> None:
        """Returns when the newest content is uploaded. Raises TesseraError if it can't be."""
        self._closing.set()
        self._changed.set()
        if self._address:
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            self._changed.wait()
            # The flags are cleared, and read, before the file: what is written later counts again.
            last = self._closing.is_set()
            self._changed.clear()
            file = self._folder / self._name
            if file.exists():
                try:
                    # Its bytes, because the file may be replaced during the upload.
                    RunStorage.open(self._address).storage.write(self._name, file.read_bytes())
                    self._failure = None
                except TesseraError as error:
                    self._failure = error
            if last:
                return
