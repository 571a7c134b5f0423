"""A real MLflow server is killed and restarted: no event is lost or repeated."""

from __future__ import annotations

import json
import socket
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from pipelines.interfaces import Point, Version
from pipelines.tracking import mlflow_runs
from pipelines.tracking.events import FILE, Event, EventLog
from pipelines.tracking.mlflow_registry import MlflowRegistry
from pipelines.tracking.uploader import Uploader

pytestmark = [pytest.mark.usefixtures("mlflow_settings"), pytest.mark.slow]


@pytest.mark.cluster
@pytest.mark.fault(42)
def test_no_event_is_lost_or_repeated_when_the_server_is_killed(
    mlflow_server, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    server = mlflow_server
    run = mlflow_runs.open_run(
        server.uri, experiment="outage", name="r", tags={}, artifact_root=None
    )
    registry = MlflowRegistry(server.uri)
    run.start_system_metrics(1.0)
    messages: list[Event] = []
    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    emit = EventLog(folder / FILE)
    uploader = Uploader(
        folder / FILE,
        run,
        is_permanent=mlflow_runs.is_permanent,
        listeners=[messages.append],
        interval_seconds=0.2,
    ).start()
    slowest_seconds, steps, stop = [0.0], [0], threading.Event()

    def train() -> None:
        while not stop.is_set():
            began = time.perf_counter()
            emit({"kind": "metrics", "step": steps[0], "values": {"loss": steps[0] / 2, "lr": 0.1}})
            slowest_seconds[0] = max(slowest_seconds[0], time.perf_counter() - began)
            steps[0] += 1
            time.sleep(0.02)

    def register(registered: list[Version]) -> None:
        registered.append(
            registry.register("outage", folder / "pictures", run_id=run.run_id, tags={})
        )

    training = threading.Thread(target=train)
    training.start()
    time.sleep(2)
    server.kill()
    (folder / "pictures" / "grid.txt").write_text("a picture")
    emit({"kind": "artifact", "path": "pictures/grid.txt", "folder": "grids"})
    emit({"kind": "tags", "values": {"in": "the dark"}})
    registered: list[Version] = []
    registering = threading.Thread(target=register, args=(registered,))
    registering.start()
    time.sleep(6)
    server.start()
    time.sleep(1)
    stop.set()
    training.join()
    registering.join(60)
    assert uploader.close(60) == 0
    run.finish("FINISHED")

    client = run._client
    for key, factor in (("loss", 0.5), ("lr", None)):
        rows = client.get_metric_history(run.run_id, key)
        assert [row.step for row in sorted(rows, key=lambda row: row.step)] == list(range(steps[0]))
        if factor:
            assert all(row.value == row.step * factor for row in rows)
    logged_events = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    made_at = {
        event["step"]: event["time_ms"] for event in logged_events if event["kind"] == "metrics"
    }
    assert {row.step: row.timestamp for row in rows} == made_at
    assert steps[0] > 300
    assert slowest_seconds[0] < 1.0
    assert [file.path for file in client.list_artifacts(run.run_id, "grids")] == ["grids/grid.txt"]
    assert client.get_run(run.run_id).data.tags["in"] == "the dark"
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert {event["level"] for event in messages if event["kind"] == "notice"} == {
        "warning",
        "info",
    }
    assert [version.number for version in registered] == [1]
    assert [version.number for version in registry.versions("outage")] == [1]
    system = client.get_metric_history(run.run_id, "system/cpu_utilization_percentage")
    times = sorted(row.timestamp for row in system)
    assert max(b - a for a, b in pairwise(times)) < 15_000, "the outage is a gap"


@pytest.mark.control(42)
def test_mlflow_alone_raises_an_error_when_the_server_is_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = MlflowClient(f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(MlflowException, match="Max retries exceeded"):
            client.log_metric("0" * 32, "loss", 0.5, step=1)


def test_a_server_fulfils_the_contract_of_runs(mlflow_server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def open_run() -> mlflow_runs.MlflowTracker:
        return mlflow_runs.open_run(
            mlflow_server.uri, experiment="http", name="r", tags={"a": "b"}, artifact_root=tmp_path
        )

    run = open_run()
    run.params({"x": "1", "long": "y" * 7000})
    run.params({"x": "1", "long": "y" * 7000})
    points = [Point(step, 1000 + step, {"loss": float(step)}) for step in range(2500)]
    run.metrics(points)
    run.metrics(points[:100])
    run.metrics([Point(0, 1, {"nan": float("nan"), "inf": float("inf")})])
    run.dataset(name="d", digest="f" * 64, source="s3://bucket/d", split="train")
    run.finish("FAILED")
    assert open_run().run_id == run.run_id
    assert len(run._client.get_metric_history(run.run_id, "loss")) == 2500
    result = run._client.get_run(run.run_id)
    assert result.info.status == "RUNNING"
    assert result.info.artifact_uri.startswith("mlflow-artifacts:")
    assert run.link().startswith(f"{mlflow_server.uri}/#/experiments/{run.experiment_id}/runs/")
