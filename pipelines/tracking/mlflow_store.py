"""ROOM: MLflow, the embedded store: a SQLite file and a folder of artifacts in the home folder.

In: a folder. Out: the address of a store that is set up for the installed version of MLflow. MLflow
is imported when a function runs, never with this module. Must not know runs or the registry.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import re
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from models.core.errors import TesseraError


def embedded_uri(root: Path) -> str:
    """Address of the SQLite store in `root`."""
    return f"sqlite:///{root.absolute()}/mlflow.db"


def embedded_artifacts(root: Path) -> Path:
    """Where the embedded store keeps its files."""
    return root.absolute() / "artifacts"


def exists(root: Path) -> bool:
    """Whether there is an embedded store in `root`."""
    path = root.absolute() / "mlflow.db"
    return path.exists() and path.stat().st_size > 0


def prepare(root: Path) -> str:
    """Creates or upgrades the embedded store in `root` and returns its address. Several processes
    may call it at the same time. Takes seconds the first time, then milliseconds."""
    prepare_database(root.absolute() / "mlflow.db", upgrade=True)
    embedded_artifacts(root).mkdir(exist_ok=True)
    return embedded_uri(root)


def prepare_database(path: Path, *, upgrade: bool) -> None:
    """Sets up MLflow's tables in a new SQLite file; with `upgrade`, brings an old one up to date.

    The version of MLflow that set it up is kept in the file, as SQLite's `user_version`.
    """
    wanted = schema_stamp()
    try:
        if read_stamp(path) == wanted or (not upgrade and read_stamp(path) >= 0):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            stamp = read_stamp(path)
            if stamp >= 0 and stamp != wanted:
                _make_tables(path, wanted)
            if stamp < 0:
                # Created elsewhere and moved here: an interrupted set-up leaves no partial file.
                with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as scratch:
                    _make_tables(Path(scratch) / path.name, wanted)
                    os.replace(Path(scratch) / path.name, path)
    except OSError as error:
        raise TesseraError(
            f"{path} can't be written: {error.strerror}",
            hint="set TESSERA_HOME to a folder that can be written",
        ) from error
    except Exception as error:  # SQLite, SQLAlchemy and Alembic have no common base error
        raise TesseraError(
            f"{path} can't be used by MLflow {importlib.metadata.version('mlflow')}: "
            f"{' '.join(str(error).split())[:200]}",
            hint="restore a good copy, or move the file away to start with an empty store",
        ) from error


def _make_tables(path: Path, stamp: int) -> None:
    from mlflow.store.db import utils

    engine = utils.create_sqlalchemy_engine_with_retry(f"sqlite:///{path}")
    try:
        if utils._is_empty_database(engine):
            utils._initialize_tables(engine)
        else:
            utils._upgrade_db(engine)
    finally:
        engine.dispose()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=wal")  # twice as fast with several writers
        connection.execute(f"PRAGMA user_version={stamp}")


def read_stamp(path: Path) -> int:
    """The `schema_stamp` of the MLflow that set up the file; -1 without a file, 0 if unknown."""
    if not path.exists() or not path.stat().st_size:
        return -1
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def schema_stamp() -> int:
    """The installed MLflow's version as one number: 31702 for 3.17.2."""
    numbers = re.findall(r"\d+", importlib.metadata.version("mlflow"))[:3]
    return int("".join(number.zfill(2) for number in numbers))
