"""ROOM: MLflow, the embedded store: a SQLite file and a folder of artifacts in the home folder.

In: a folder. Out: the address of a store that is set up for the installed version of MLflow. MLflow
is imported when a function runs, never with this module. Must not know runs or the registry.

MLflow keeps absolute paths of artifacts. When the folder was moved or copied, `prepare` makes them
those of the folder that it finds itself in.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import re
import socket
import sqlite3
import tempfile
import threading
from contextlib import closing
from pathlib import Path

from models.core.errors import TesseraError

_MISREAD = re.compile(r"\?|%[0-9A-Fa-f]{2}")
"""What has another meaning in the address of a database than in a path."""


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
    may call it at the same time. Takes seconds the first time, then milliseconds.

    Raises TesseraError if the store or its folder of artifacts can't be used, or not be written.
    """
    database, artifacts = root.absolute() / "mlflow.db", embedded_artifacts(root)
    if misread := _MISREAD.search(str(database)):
        what = "a question mark" if misread[0] == "?" else f"{misread[0]}, which it decodes,"
        raise TesseraError(
            f"MLflow can't keep a store in {root}: there is {what} in its path",
            hint="set TESSERA_HOME to another folder",
        )
    prepare_database(database, upgrade=True)
    try:
        artifacts.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=artifacts).close()
    except OSError as error:
        raise TesseraError(
            f"{artifacts} can't be written: {error.strerror}",
            hint="correct its owner and its permissions, or set TESSERA_HOME to another folder",
        ) from error
    follow_move(database, artifacts)
    return embedded_uri(root)


_LOCATIONS = (
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow's database with paths of artifacts, without that of experiments."""


def follow_move(database: Path, artifacts: Path) -> None:
    """Corrects the paths of a store that was moved or copied here: of each run and model whose
    files are in `artifacts`, and of the experiments that they belong to."""
    here = str(artifacts)
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        found = connection.execute(
            "SELECT DISTINCT artifact_location FROM experiments "
            "WHERE artifact_location LIKE '/%/artifacts' AND artifact_location != ?",
            (here,),
        )
        for (there,) in found.fetchall():
            if not (Path(there).exists() and os.path.samefile(there, here)):
                with connection:
                    _move_rows(connection, there, here)


def _move_rows(connection: sqlite3.Connection, there: str, here: str) -> None:
    moved = False
    for table, column in _LOCATIONS:
        rows = connection.execute(
            f"SELECT rowid, {column} FROM {table} WHERE substr({column}, 1, ?) = ?",
            (len(there) + 1, f"{there}/"),
        )
        for row, location in rows.fetchall():
            rest = location[len(there) + 1 :]
            # models/m-… or the run's id
            folder = "/".join(rest.split("/")[: 2 if rest.startswith("models/") else 1])
            if Path(here, folder).is_dir():
                moved = True
                connection.execute(
                    f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (f"{here}/{rest}", row)
                )
    if moved:
        connection.execute(
            "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?",
            (here, there),
        )


DATABASES = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306, "mssql": 1433, "oracle": 1521}
_CONNECT_SECONDS, _LOGIN_SECONDS = 5.0, 10.0


def check_database(uri: str) -> None:
    """Raises TesseraError within 15 s if a database at `uri`, such as postgresql://…, can't be
    used. MLflow itself would try for minutes."""
    from sqlalchemy import create_engine, make_url
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    problems: list[str] = []

    def log_in() -> None:
        try:
            create_engine(uri, poolclass=NullPool).connect().close()
        except ModuleNotFoundError as error:
            problems.append(f"the driver {error.name!r} isn't installed: pip install it")
        except Exception as error:  # a driver's own
            problems.append(" ".join(str(getattr(error, "orig", None) or error).split())[:200])

    try:
        url = make_url(uri)
        port = url.port or DATABASES.get(url.get_backend_name(), 0)
        if url.host and port:
            socket.create_connection((url.host, port), _CONNECT_SECONDS).close()
        trying = threading.Thread(target=log_in, name="database-login", daemon=True)
        trying.start()
        trying.join(_LOGIN_SECONDS)
        if trying.is_alive():
            problems.append(f"no response in {_LOGIN_SECONDS:.0f} s")
    except ConnectionRefusedError:
        problems.append("nothing listens there")
    except (OSError, SQLAlchemyError, ValueError) as error:
        problems.append(" ".join(str(getattr(error, "strerror", None) or error).split())[:200])
    if problems:
        raise TesseraError(
            f"MLflow's database at {uri} can't be used: {problems[0]}",
            hint="start it, or correct MLFLOW_TRACKING_URI, or unset it to use the embedded store",
        )


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
