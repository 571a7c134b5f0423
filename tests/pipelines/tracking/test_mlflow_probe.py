"""The trial of MLflow: it notices what doesn't work, and leaves nothing to see."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.tracking import mlflow_probe, mlflow_runs, mlflow_store


def test_a_run_is_written_read_and_deleted(store: Path) -> None:
    uri = mlflow_store.embedded_uri(store)
    client = mlflow_runs.connect(uri)
    before = {experiment.name for experiment in client.search_experiments()}
    with mlflow_probe.probe_run(uri, "doctor") as run_id:
        mlflow_probe.try_run(uri, run_id, "here")
        mlflow_probe.try_run(uri, run_id, "there")
        assert client.get_run(run_id).data.metrics.keys() == {"doctor-here", "doctor-there"}
        assert client.list_artifacts(run_id) == []
    assert {experiment.name for experiment in client.search_experiments()} == before
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"


def test_a_run_that_can_t_be_written_is_an_error_that_says_what_failed(store: Path) -> None:
    uri = mlflow_store.embedded_uri(store)
    with pytest.raises(TesseraError, match="can't write a metric"):
        mlflow_probe.try_run(uri, "0" * 32, "here")
