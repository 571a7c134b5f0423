"""Folders that are created once per test run and read by all of its worker processes."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """The folder `name`, filled by `make(folder)` in the first worker process that needs it. Tests
    only read it, or copy it."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / "shared" / name
    done = folder.with_name(f"{name}.done")
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


def copy_home(source: Path, target: Path) -> Path:
    """Copies a TESSERA_HOME. The absolute paths in MLflow's database are rewritten, so that the
    copy doesn't depend on its source."""
    shutil.copytree(source, target)
    with closing(sqlite3.connect(target / "mlflow.db")) as database, database:
        tables = database.execute("select name from sqlite_master where type = 'table'").fetchall()
        for (table,) in tables:
            for _, column, kind, *_ in database.execute(f"pragma table_info({table})").fetchall():
                if kind.upper().startswith(("VARCHAR", "TEXT", "CHAR")):
                    database.execute(
                        f"update {table} set {column} = replace({column}, ?, ?)"
                        f" where instr({column}, ?)",
                        (str(source), str(target), str(source)),
                    )
    return target
