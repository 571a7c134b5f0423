"""A SQLite store whose lock another process holds: calls wait for it with a word, not for ever."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.interfaces import Point
from pipelines.tracking import mlflow_lock, mlflow_runs, mlflow_store

pytestmark = [pytest.mark.usefixtures("mlflow_settings"), pytest.mark.slow]


@contextmanager
def locked(store: Path) -> Iterator[threading.Event]:
    """Holds the lock for writing until the event is set, or the block ends."""
    free, held = threading.Event(), threading.Event()

    def hold() -> None:
        connection = sqlite3.connect(store / "mlflow.db", isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        held.set()
        free.wait(60)
        connection.execute("ROLLBACK")
        connection.close()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    try:
        yield free
    finally:
        free.set()
        holder.join()


class Impatient:
    """A client whose store gives up at once, as MLflow's does after 20 s."""

    def __init__(self, free: threading.Event, attempts: int) -> None:
        self.tracking_uri = "sqlite:////tmp/mlflow.db"
        self._free, self._attempts = free, attempts

    def log_batch(self) -> str:
        self._attempts -= 1
        if self._attempts == 0:
            self._free.set()
        if not self._free.is_set():
            raise sqlite3.OperationalError("(sqlite3.OperationalError) database is locked")
        return "done"

    def get_run(self) -> None:
        raise ValueError("another error")


def test_a_call_waits_for_the_lock_with_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    logger = logging.getLogger("tessera")
    monkeypatch.setattr(logging.root, "level", logging.ERROR)  # as importing mlflow.pytorch does
    monkeypatch.setattr(logger, "handle", lambda record: said.append(record.getMessage()))
    client = mlflow_lock.PatientClient(Impatient(threading.Event(), 3))
    assert client.log_batch() == "done"
    (line,) = said
    assert line == "note: another process has locked /tmp/mlflow.db: waiting"
    assert client.tracking_uri == "sqlite:////tmp/mlflow.db"
    with pytest.raises(ValueError, match="another error"):
        client.get_run()


def test_a_lock_that_stays_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_lock, "PATIENCE_SECONDS", 1.0)
    client = mlflow_lock.PatientClient(Impatient(threading.Event(), -1))
    with pytest.raises(TesseraError, match=r"has locked MLflow's store /tmp/mlflow.db for 1 s"):
        client.log_batch()


@pytest.mark.parametrize(
    "reason", ["database or disk is full", "attempt to write a readonly database"]
)
def test_a_store_that_cannot_be_written_is_one_line(reason: str) -> None:
    def write() -> None:
        raise sqlite3.OperationalError(f"(sqlite3.OperationalError) {reason}\n[SQL: INSERT]")

    with pytest.raises(TesseraError) as caught:
        mlflow_lock.wait_for_lock(write, "sqlite:////x/mlflow.db")
    assert caught.value.message == f"MLflow's store /x/mlflow.db can't be written: {reason}"


def test_a_run_begins_once_the_store_is_free(store: Path) -> None:
    """MLflow's own error is recognised: its wait for the lock is 20 s."""
    uri = mlflow_store.embedded_uri(store)
    with locked(store) as free:
        threading.Timer(22, free.set).start()
        run = mlflow_runs.open_run(
            uri,
            experiment="digits",
            name="first",
            tags={},
            artifact_root=mlflow_store.embedded_artifacts(store),
        )
    run.metrics([Point(1, 0, {"loss": 1.0})])
    assert run.status() == "RUNNING"
