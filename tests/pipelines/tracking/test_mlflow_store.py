"""The embedded store: its set-up by one or several processes, and its upgrade."""

from __future__ import annotations

import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.shared.local_services import free_port
from models.core.errors import TesseraError
from pipelines.tracking import mlflow_runs, mlflow_store

pytestmark = pytest.mark.usefixtures("mlflow_settings")


def open_run(root: Path, name: str = "first") -> mlflow_runs.MlflowTracker:
    return mlflow_runs.open_run(
        mlflow_store.embedded_uri(root),
        experiment="digits",
        name=name,
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


def stored_file(root: Path, name: str = "first") -> Path:
    """A file of a run, as MLflow finds it."""
    run = open_run(root, name)
    return Path(run._client.get_run(run.run_id).info.artifact_uri) / "notes/a.txt"


def fill(root: Path, name: str = "first") -> None:
    file = root.parent / "a.txt"
    file.write_text(name)
    run = open_run(root, name)
    run.artifact(file, "notes")
    run.finish("FINISHED")


def move(root: Path, to: Path) -> None:
    shutil.move(root, to)


def copy(root: Path, to: Path) -> None:
    shutil.copytree(root, to)


@pytest.mark.slow
@pytest.mark.parametrize("change", [move, copy])
@pytest.mark.parametrize("name", ["other", "with space 猫's"])
def test_artifacts_are_found_again_after_a_move(
    store: Path, tmp_path: Path, change: Callable[[Path, Path], None], name: str
) -> None:
    fill(store)
    there = tmp_path / "new" / name
    there.parent.mkdir()
    change(store, there)
    if change is move:  # the control: without the correction they are gone
        assert not stored_file(there).exists()
    mlflow_store.prepare(there)
    assert stored_file(there).is_relative_to(there)
    assert stored_file(there).read_text() == "first"
    fill(there, "second")  # another run: MLflow's client remembers where those of before are
    assert stored_file(there, "second").is_relative_to(there)
    assert stored_file(there, "second").read_text() == "second"
    if change is copy:
        mlflow_store.prepare(store)
        assert stored_file(store).is_relative_to(store)
        assert not stored_file(store, "second").exists(), "a copy writes into the original"


@pytest.mark.slow
def test_a_store_that_is_reached_by_a_link_and_foreign_artifacts_stay_as_they_are(
    store: Path, tmp_path: Path
) -> None:
    fill(store)
    foreign = tmp_path / "elsewhere" / "artifacts"
    foreign.mkdir(parents=True)
    client = mlflow_runs.connect(mlflow_store.embedded_uri(store))
    client.create_experiment("foreign", artifact_location=str(foreign))
    link = tmp_path / "link"
    link.symlink_to(store)
    foreign.rmdir()
    for root in (store, link):
        mlflow_store.prepare(root)
        assert stored_file(root).is_relative_to(store)
        assert client.get_experiment_by_name("foreign").artifact_location == str(foreign)


def test_a_folder_of_artifacts_that_cannot_be_written_is_an_error(store: Path) -> None:
    artifacts = mlflow_store.embedded_artifacts(store)
    shutil.rmtree(artifacts, ignore_errors=True)
    artifacts.write_text("")
    with pytest.raises(TesseraError, match="artifacts can't be written"):
        mlflow_store.prepare(store)
    with pytest.raises(TesseraError, match="question mark"):
        mlflow_store.prepare(store / "what?")
    with pytest.raises(TesseraError, match="%20, which it decodes, in its path"):
        mlflow_store.prepare(store / "one%20two")


def test_a_path_with_other_characters_keeps_a_store(tmp_path: Path) -> None:
    """The control: neither of these has a meaning in the address."""
    root = tmp_path / "a #1, 50% & more"
    root.mkdir()
    mlflow_store.prepare(root)
    assert mlflow_store.exists(root)


@pytest.mark.parametrize("scheme", ["postgresql", "mysql", "mysql+pymysql", "mssql"])
def test_a_dead_database_is_one_line_without_its_password(scheme: str) -> None:
    began = time.monotonic()
    with pytest.raises(TesseraError) as caught:
        mlflow_runs.connect(f"{scheme}://user:secret@127.0.0.1:{free_port()}/mlflow")
    assert time.monotonic() - began < 5
    assert caught.value.message.startswith(f"MLflow's database at {scheme}://127.0.0.1:")
    assert caught.value.message.endswith("can't be used: nothing listens there")


def test_a_database_without_a_driver_or_that_is_silent_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlflow_store, "_LOGIN_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for uri, problem in (
            (f"postgresql://u:secret@127.0.0.1:{port}/m", "no response|the driver 'psycopg2'"),
            (f"mysql+nothing://u:secret@127.0.0.1:{port}/m", "load plugin|nothing"),
            ("postgresql://u:secret@no-such-host.invalid/m", "not known"),
        ):
            with pytest.raises(TesseraError, match=problem) as caught:
                mlflow_runs.connect(uri)
            assert "secret" not in str(caught.value)
