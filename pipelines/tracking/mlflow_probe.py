"""ROOM: MLflow. A trial of what a training does with MLflow: write, read back, delete.

In: an address, and the credentials of the environment. Out: nothing, or the error. The trial leaves
nothing that MLflow's pages show. Must not know who tries.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.tracking import mlflow_runs

_METRIC = "doctor"


@contextmanager
def probe_run(uri: str, name: str) -> Iterator[str]:
    """The id of a run in an experiment of its own, which is called `name`. Both are deleted at the
    end. Raises TesseraError if MLflow can't be reached or refuses."""
    from mlflow.exceptions import MlflowException

    try:
        tracker = mlflow_runs.open_run(uri, experiment=name, name=name, tags={}, artifact_root=None)
    except MlflowException as error:
        raise _refused(error) from error
    try:
        yield tracker.run_id
    finally:
        with suppress(MlflowException, TesseraError):
            client = mlflow_runs.connect(uri)
            client.delete_run(tracker.run_id)
            client.delete_experiment(tracker.experiment_id)


def try_run(uri: str, run_id: str, key: str) -> None:
    """Writes a metric and a file named after `key` to the run, reads both back, and deletes the
    file. Raises TesseraError for the first thing that doesn't work."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client = mlflow_runs.connect(uri)
    step = "write a metric"
    try:
        client.log_metric(run_id, f"{_METRIC}-{key}", 1.0)
        step = "read a metric"
        if not client.get_metric_history(run_id, f"{_METRIC}-{key}"):
            raise TesseraError("MLflow lost a metric")
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, f"{key}.txt")
            file.write_text(key)
            step = "store a file"
            client.log_artifact(run_id, str(file))
            step = "read a file back"
            read = Path(client.download_artifacts(run_id, file.name, scratch)).read_text()
            if read != key:
                raise TesseraError("MLflow returns another file than was stored")
            step = "delete a file"
            repository = get_artifact_repository(client.get_run(run_id).info.artifact_uri)
            repository.delete_artifacts(file.name)
    except (MlflowException, OSError) as error:
        raise TesseraError(f"can't {step}: {_first_line(error)}") from error


def _refused(error: Exception) -> TesseraError:
    return TesseraError(f"can't create a run: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
