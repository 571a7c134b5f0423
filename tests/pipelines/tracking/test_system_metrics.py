"""Measurements of the machine, as metrics of a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines.interfaces import Point
from pipelines.tracking import mlflow_runs, mlflow_store
from pipelines.tracking.system_metrics import Sampler


@pytest.mark.usefixtures("mlflow_settings")
def test_they_continue_after_a_restart(store: Path) -> None:
    for _ in range(2):
        tracker = mlflow_runs.open_run(
            mlflow_store.embedded_uri(store),
            experiment="digits",
            name="first",
            tags={},
            artifact_root=mlflow_store.embedded_artifacts(store),
        )
        tracker.start_system_metrics(0.1)
        tracker.start_system_metrics(0.1)
        time.sleep(0.25)
        tracker.finish("FINISHED")
    names = [thread.name for thread in threading.enumerate()]
    assert "system-metrics" not in names
    rows = tracker._client.get_metric_history(tracker.run_id, "system/cpu_utilization_percentage")
    steps = sorted(row.step for row in rows)
    assert steps == list(range(len(steps)))
    assert len(steps) >= 4


def test_they_survive_an_outage() -> None:
    away, arrived = [True], list[Point]()

    def deliver(points: Sequence[Point]) -> None:
        if away[0]:
            raise OSError("away")
        arrived.extend(points)

    sampler = Sampler(deliver, 0.05, 3)
    sampler.start()
    time.sleep(0.25)
    assert arrived == []
    away[0] = False
    sampler.stop()
    assert [point.step for point in arrived] == list(range(3, 3 + len(arrived)))
    assert len(arrived) >= 3
    assert "system/system_memory_usage_percentage" in arrived[0].values
