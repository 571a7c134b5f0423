"""ROOM: MLflow, a SQLite store whose lock another process holds.

In: an `MlflowClient` of a SQLite file. Out: one whose calls wait for the lock, and say so. Must not
know what is called.

MLflow itself waits 20 s for the lock and then raises. A backup, a viewer of databases or another
training may hold it for longer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from models.core.errors import TesseraError

PATIENCE_SECONDS = 120.0
T = TypeVar("T")
_UNWRITABLE = ("database or disk is full", "attempt to write a readonly database")
_log = logging.getLogger("tessera")
# mlflow.pytorch raises the level of the root logger to ERROR when it is imported.
_log.setLevel(logging.WARNING)


def wait_for_lock(call: Callable[[], T], uri: str) -> T:
    """What `call` returns. While another process holds the lock of the store at `uri`, it is called
    again, up to `PATIENCE_SECONDS`, with a warning in the log. Then raises TesseraError."""
    file = uri.removeprefix("sqlite:///")
    deadline = time.monotonic() + PATIENCE_SECONDS
    is_announced = False
    while True:
        try:
            return call()
        except Exception as error:  # MLflow's own error, or SQLAlchemy's
            if reason := next((text for text in _UNWRITABLE if text in str(error)), ""):
                raise TesseraError(
                    f"MLflow's store {file} can't be written: {reason}",
                    hint="free some space, or correct the permissions of the file and its folder",
                ) from error
            if "database is locked" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise TesseraError(
                    f"another process has locked MLflow's store {file} for "
                    f"{PATIENCE_SECONDS:.0f} s",
                    hint="end what holds it, such as a viewer of databases: `fuser -v FILE` shows "
                    "it",
                ) from error
        if not is_announced:
            _log.warning("note: another process has locked %s: waiting", file)
            is_announced = True
        time.sleep(0.5)


class PatientClient:
    """An `MlflowClient` whose methods wait for the lock of the store, as `wait_for_lock` does."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            return wait_for_lock(partial(found, *arguments, **named), self._client.tracking_uri)

        return call
