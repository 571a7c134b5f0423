"""Runs: one contract for the in-memory tracker and MLflow's, and what MLflow stores."""

from __future__ import annotations

import http.server
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models.core.errors import TesseraError
from pipelines import tag_names
from pipelines.interfaces import Point, Tracker
from pipelines.tracking import mlflow_runs, mlflow_store
from pipelines.tracking.memory import MemoryTracker

pytestmark = pytest.mark.usefixtures("mlflow_settings")


def open_here(root: Path, name: str = "first", **tags: str) -> mlflow_runs.MlflowTracker:
    return mlflow_runs.open_run(
        mlflow_store.embedded_uri(root),
        experiment="digits",
        name=name,
        tags=tags,
        artifact_root=mlflow_store.embedded_artifacts(root),
    )


History = Callable[[str], list[tuple[int, int, float]]]


@pytest.fixture(params=["memory", pytest.param("mlflow", marks=pytest.mark.slow)])
def either(request: pytest.FixtureRequest) -> tuple[Tracker, History]:
    """A tracker, and a function that reads (step, time, value) of a metric."""
    if request.param == "memory":
        memory = MemoryTracker()

        def read(key: str) -> list[tuple[int, int, float]]:
            rows = [(s, t, v) for (k, s), pts in memory.points.items() if k == key for t, v in pts]
            return sorted(rows)

        return memory, read
    real = open_here(request.getfixturevalue("store"))

    def fetch(key: str) -> list[tuple[int, int, float]]:
        rows = real._client.get_metric_history(real.run_id, key)
        return sorted((m.step, m.timestamp, m.value) for m in rows)

    return real, fetch


def test_metrics_are_idempotent(either: tuple[Tracker, History]) -> None:
    tracker, history = either
    points = [Point(step, 1000 + step, {"loss": step / 2, "rate": 1.0}) for step in range(1300)]
    tracker.metrics(points)
    tracker.metrics(points[:10])
    tracker.metrics([*points[5:7], *points[5:7]])
    assert history("loss") == [(step, 1000 + step, step / 2) for step in range(1300)]
    tracker.metrics([])
    tracker.metrics([Point(0, 5, {"odd": math.nan})])
    assert math.isnan(history("odd")[0][2])


def test_params_may_be_repeated_but_not_changed(either: tuple[Tracker, History]) -> None:
    tracker, _ = either
    tracker.params({"optim.lr": "0.1", "long": "x" * 7000})
    tracker.params({"optim.lr": "0.1", "long": "x" * 7000, "new": "1"})
    with pytest.raises(TesseraError, match=r"optim\.lr.*another value"):
        tracker.params({"optim.lr": "0.2"})


def test_files_tags_datasets_and_the_final_status(
    either: tuple[Tracker, History], tmp_path: Path
) -> None:
    tracker, _ = either
    (tmp_path / "grid.png").write_bytes(b"png")
    tracker.artifact(tmp_path / "grid.png", "pictures")
    tracker.artifact(tmp_path / "grid.png", "")
    with pytest.raises(FileNotFoundError):
        tracker.artifact(tmp_path / "none.png", "")
    Image.new("RGB", (40, 30)).save(tmp_path / "val.png")
    for step in (1, 2, 2):
        tracker.image(tmp_path / "val.png", "val", step, 1000 + step)
    with pytest.raises(FileNotFoundError):
        tracker.image(tmp_path / "none.png", "val", 1, 1)
    tracker.tags({"ray.job": "1"})
    tracker.tags({"ray.job": "2"})
    tracker.dataset(name="digits", digest="f" * 64, source="/data/digits", split="train")
    assert tracker.run_id in tracker.link()
    tracker.finish("FINISHED")


def test_one_training_is_one_run_through_every_restart(store: Path) -> None:
    first = open_here(store, attempt="1")
    first.metrics([Point(1, 1, {"loss": 1.0})])
    first.finish("FAILED")
    again = open_here(store, attempt="2")
    other = open_here(store, "second")
    assert again.run_id == first.run_id != other.run_id
    run = again._client.get_run(again.run_id)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "first"
    assert run.data.tags["attempt"] == "2"
    assert run.data.tags[tag_names.RUN] == "first"
    assert run.data.metrics == {"loss": 1.0}


def test_a_series_of_images_has_the_form_of_mlflows_own(store: Path, tmp_path: Path) -> None:
    """MLflow's pages find images by file name: compare ours with those that MLflow writes."""
    pixels = Image.new("RGB", (400, 300), "red")
    pixels.save(tmp_path / "val.png")
    tracker = open_here(store)
    for _ in range(2):  # the second time after a restart
        tracker.image(tmp_path / "val.png", "val", 7, 1234)
    tracker._client.log_image(
        tracker.run_id, pixels, key="val", step=7, timestamp=1234, synchronous=True
    )
    folder = mlflow_store.embedded_artifacts(store) / tracker.run_id / "artifacts" / "images"
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 4
    forms = {re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", name) for name in names}
    assert forms == {
        "val+step+7+timestamp+1234+ID.png",
        "val+step+7+timestamp+1234+ID+compressed.webp",
    }
    sizes = {name.rpartition("+")[2]: Image.open(folder / name).size for name in names}
    assert len(set(sizes.values())) <= 2
    assert tracker._client.get_run(tracker.run_id).data.tags["mlflow.loggedImages"] == "True"


def test_a_run_has_tags_datasets_and_a_status(store: Path, tmp_path: Path) -> None:
    tracker = open_here(store)
    for split in ("train", "val"):
        tracker.dataset(name="digits", digest="f" * 64, source="/data/digits", split=split)
    tracker.dataset(name="web", digest="e" * 64, source="https://example.org/x.tar", split="test")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    tracker.artifact(tmp_path / "folder", "notes")
    tracker.tags({f"tag{i}": "x" for i in range(150)})
    tracker.finish("KILLED")
    run = tracker._client.get_run(tracker.run_id)
    assert run.info.status == "KILLED"
    assert {"mlflow.user", "mlflow.source.name"} <= set(run.data.tags)
    if (Path(mlflow_runs.__file__).parents[1] / ".git").exists():
        assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    inputs = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
    assert set(inputs) == {"train", "val", "test"}  # MLflow would drop a second (name, digest)
    assert inputs["val"].digest == "f" * 32
    assert json.loads(inputs["val"].source) == {"uri": "/data/digits"}
    import mlflow.data

    assert mlflow.data.get_source(inputs["test"]).to_dict() == {"url": "https://example.org/x.tar"}
    kept = mlflow_store.embedded_artifacts(store) / tracker.run_id / "artifacts/notes/folder/a.txt"
    assert kept.read_text() == "a"
    result = tracker._client.search_runs(
        [tracker.experiment_id], filter_string=f"datasets.digest = '{'f' * 32}'"
    )
    assert [found_run.info.run_id for found_run in result] == [tracker.run_id]


def test_no_global_state_of_mlflow_changes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    import mlflow

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = dict(os.environ)
    open_here(store).finish("FINISHED")
    assert dict(os.environ) == before
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == f"sqlite:///{tmp_path}/here/mlflow.db"
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "start"),
    [
        ("http://user:secret@host:5000/", "http://host:5000/#/experiments/7/runs/r"),
        ("https://host/prefix", "https://host/prefix/#/experiments/7/runs/r"),
        ("sqlite:////x/mlflow.db", "http://127.0.0.1:5000/#/experiments/7/runs/r"),
    ],
)
def test_links_open_the_training_view(uri: str, start: str) -> None:
    from mlflow import MlflowClient

    client: Any = MlflowClient.__new__(MlflowClient)
    client._tracking_client = type("Client", (), {"tracking_uri": uri})()
    tracker = mlflow_runs.MlflowTracker(client, "7", "r", None)
    assert tracker.link() == f"{start}?workflowType=machine_learning"


def test_an_unreachable_server_is_an_error_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(TesseraError, match=r"can't be used.*refused") as caught:
        mlflow_runs.open_run(uri, experiment="e", name="n", tags={}, artifact_root=None)
    assert time.monotonic() - began < 5
    assert "tessera up" in caught.value.hint


@pytest.mark.slow
def test_a_server_that_hangs_is_an_error_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_runs, "_START_TIMEOUT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(TesseraError, match=r"can't be used.*timed out"):
            mlflow_runs.connect(uri)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses this user"), (403, "refuses this user"), (404, "can't be used")],
)
def test_a_server_that_refuses_or_is_not_mlflow_is_an_error(status: int, message: str) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def respond(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>no</html>")

        do_GET = do_POST = respond

        def log_message(self, *args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(TesseraError, match=message) as caught:
            mlflow_runs.connect(f"http://me:secret@127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()
    assert "secret" not in str(caught.value)


def test_by_default_artifacts_are_beside_the_database(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = mlflow_runs.open_run(
        mlflow_store.embedded_uri(store), experiment="new", name="n", tags={}, artifact_root=None
    )
    run.artifact(store / "mlflow.db", "")
    assert (store / "artifacts" / run.run_id / "artifacts" / "mlflow.db").exists()
    assert list((tmp_path / "here").iterdir()) == []


def test_a_run_is_looked_up_by_its_id(store: Path) -> None:
    run = open_here(store)
    run.finish("FAILED")
    found = mlflow_runs.attach_run(mlflow_store.embedded_uri(store), run.run_id)
    assert found.link() == run.link()
    assert found._client.get_run(run.run_id).info.status == "FAILED"
    with pytest.raises(TesseraError, match="has no run"):
        mlflow_runs.attach_run(mlflow_store.embedded_uri(store), "0" * 32)


@pytest.mark.parametrize("uri", ["file:///nowhere", "gopher://x"])
def test_an_unusable_store_is_an_error_with_a_hint(uri: str) -> None:
    with pytest.raises(TesseraError, match="MLFLOW_TRACKING_URI"):
        mlflow_runs.connect(uri)


def test_a_deleted_experiment_is_an_error_with_a_hint(store: Path) -> None:
    tracker = open_here(store)
    tracker._client.delete_experiment(tracker.experiment_id)
    with pytest.raises(TesseraError, match=r"deleted.*restore"):
        open_here(store)


def test_a_run_name_that_would_break_the_search_is_refused(store: Path) -> None:
    with pytest.raises(TesseraError, match="is not a valid name of a run"):
        open_here(store, 'it\'s "so"')


@pytest.mark.parametrize("name", ["it's", 'say "hi"', "猫 😀", "cafe\u0301", "100%`x`"])
def test_a_run_of_any_name_is_found_again(store: Path, name: str) -> None:
    assert open_here(store, name).run_id == open_here(store, name).run_id


def test_a_resumed_run_is_found_in_its_experiment(store: Path) -> None:
    """A resume that doesn't name the experiment continues the run, and begins no second one."""
    uri = mlflow_store.embedded_uri(store)
    root = mlflow_store.embedded_artifacts(store)

    def open_in(experiment: str, run_id: str = "", name: str = "first") -> str:
        return mlflow_runs.open_run(
            uri, experiment=experiment, name=name, tags={}, artifact_root=root, run_id=run_id
        ).run_id

    first = open_in("mine")
    assert open_in("tessera", first) == first
    assert open_in("tessera") != first, "the control: by its name alone it is another run"
    assert open_in("tessera", first, "second") != first, "the id of another training"
    assert open_in("mine", "0" * 32) == first, "an id of another store"


def test_no_password_reaches_mlflow(store: Path) -> None:
    tracker = open_here(store)
    where = "https://user:hunter2@host/data?token=hunter2"
    for _ in range(2):  # the second time it is compared with what is there
        tracker.params({"data.path": where})
    tracker.tags({"recipe": json.dumps({"path": where})})
    tracker.dataset(name="digits", digest="0" * 64, source=where, split="train")
    run = tracker._client.get_run(tracker.run_id)
    assert run.data.params["data.path"] == "https://host/data?token=…"
    assert "hunter2" not in str(run.to_dictionary())


def test_permanent_errors_are_mlflows_own_refusals(store: Path) -> None:
    tracker = open_here(store)
    with pytest.raises(Exception, match="Invalid value") as bad_name:
        tracker.metrics([Point(1, 1, {"a@b": 1.0})])
    assert mlflow_runs.is_permanent(bad_name.value)
    tracker.run_id = "0" * 32
    with pytest.raises(Exception, match="not found") as no_run:
        tracker.metrics([Point(1, 1, {"a": 1.0})])
    assert mlflow_runs.is_permanent(no_run.value)
    from mlflow.exceptions import MlflowException

    for error in (OSError("away"), MlflowException("API request to x failed"), TesseraError("x")):
        assert not mlflow_runs.is_permanent(error)
    proxy = MlflowException("API request to endpoint /x failed: 404", error_code=None)
    proxy.error_code = "RESOURCE_DOES_NOT_EXIST"
    assert not mlflow_runs.is_permanent(proxy)


def test_settings_are_variables_that_mlflow_knows() -> None:
    import mlflow.environment_variables as known

    for name in mlflow_runs.settings():
        assert hasattr(known, name), name
    assert known.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 0
    assert known.MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is False


@pytest.mark.slow
def test_concurrent_runs_all_log_a_new_dataset(store: Path) -> None:
    """As trials of a search do. With MLflow's client alone, some attempts fail."""
    count, rounds = 4, 25
    trackers = [open_here(store, f"run-{position}") for position in range(count)]
    meeting = threading.Barrier(count)

    def name_it(tracker: mlflow_runs.MlflowTracker, number: int) -> None:
        meeting.wait()
        tracker.dataset(name="digits", digest=f"{number:032d}", source="/data", split="train")

    with ThreadPoolExecutor(count) as threads:
        for number in range(rounds):
            named = [threads.submit(name_it, tracker, number) for tracker in trackers]
            assert [one.exception() for one in named] == [None] * count
    for tracker in trackers:
        inputs = tracker._client.get_run(tracker.run_id).inputs.dataset_inputs
        assert len({one.dataset.digest for one in inputs}) == rounds
