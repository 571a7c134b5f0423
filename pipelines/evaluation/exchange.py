"""The files of an evaluation whose workers don't share a folder with its driver.

In: an `EvaluationPayload` with an address. Out: the models' files on each worker's machine, and the
report's files on the driver's. Must not know what is evaluated.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from pipelines.evaluation.payload import EvaluationPayload, ModelFiles
from pipelines.training.run_storage import RunStorage, scratch_folder

REPORT = "report"


def publish_models(payload: EvaluationPayload) -> None:
    """Called by the driver before the workers start."""
    storage = RunStorage.open(payload.storage)
    for number, files in enumerate(payload.models):
        storage.publish_folder(files.folder, f"models/{number}")
        if files.judge is not None:
            storage.publish_folder(files.judge, f"judges/{number}")


def fetch_models(payload: EvaluationPayload) -> EvaluationPayload:
    """Called by each worker: the payload with folders of its machine."""
    storage = RunStorage.open(payload.storage, has_responded=True)

    def fetch(folder: Path, path: str) -> Path:
        return storage.fetch_folder(path, scratch_folder(folder.parent) / folder.name)

    models = [
        ModelFiles(
            files.name,
            fetch(files.folder, f"models/{number}"),
            files.digest,
            fetch(files.judge, f"judges/{number}") if files.judge else None,
        )
        for number, files in enumerate(payload.models)
    ]
    report = payload.report and scratch_folder(payload.report.parent) / payload.report.name
    return replace(payload, models=tuple(models), report=report)


def publish_report(payload: EvaluationPayload) -> None:
    """Called by the worker that wrote the report."""
    assert payload.report is not None
    storage = RunStorage.open(payload.storage, has_responded=True)
    for file in sorted(payload.report.rglob("*")):
        if file.is_file():
            path = file.relative_to(payload.report).as_posix()
            storage.publish_file(file, f"{REPORT}/{path}")


def remove_copies(payload: EvaluationPayload) -> None:
    """Called by each worker when all are done. `payload` is what `fetch_models` returned."""
    for files in payload.models:
        for folder in (files.folder, files.judge):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def fetch_report(payload: EvaluationPayload) -> None:
    """Called by the driver when the workers are done."""
    if payload.report is not None:
        RunStorage.open(payload.storage).fetch_files(REPORT, payload.report)
