"""The embedded store: its set-up by one or several processes, and its upgrade."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.tracking import mlflow_runs, mlflow_store

pytestmark = pytest.mark.usefixtures("mlflow_settings")


def open_run(root: Path) -> mlflow_runs.MlflowTracker:
    return mlflow_runs.open_run(
        mlflow_store.embedded_uri(root),
        experiment="digits",
        name="first",
        tags={},
        artifact_root=mlflow_store.embedded_artifacts(root),
    )


def test_a_damaged_or_read_only_store_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database" * 100)
    for use in (
        mlflow_store.prepare,
        lambda root: mlflow_runs.connect(mlflow_store.embedded_uri(root)),
    ):
        with pytest.raises(TesseraError, match="can't be used by MLflow") as caught:
            use(tmp_path)
        assert "move the file away" in caught.value.hint
    (tmp_path / "file").write_text("")
    with pytest.raises(TesseraError, match="can't be written"):
        mlflow_store.prepare(tmp_path / "file" / "store")


@pytest.mark.slow
def test_concurrent_first_uses_create_one_valid_store(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pipelines.tracking import mlflow_store\n"
        "print(mlflow_store.prepare(Path(sys.argv[1])))"
    )
    root = tmp_path / "with space" / "store"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    assert [out.decode().strip() for out, _ in outputs] == [mlflow_store.embedded_uri(root)] * 2, (
        outputs
    )
    assert [process.returncode for process in processes] == [0, 0]
    began = time.monotonic()
    mlflow_store.prepare(root)
    assert time.monotonic() - began < 1
    with sqlite3.connect(root / "mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


@pytest.mark.slow
def test_a_prepared_store_of_another_version_is_upgraded(store: Path) -> None:
    database = store / "mlflow.db"
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA user_version=1")
    connection.close()
    run = open_run(store)
    run.finish("FINISHED")
    mlflow_store.prepare(store)
    assert mlflow_store.read_stamp(database) == mlflow_store.schema_stamp()
    assert open_run(store).run_id == run.run_id
