"""Models and reports between a driver and workers that share no folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.evaluation import exchange
from pipelines.evaluation.payload import EvaluationPayload, ModelFiles
from pipelines.storage.open import open_storage
from pipelines.training import checkpoints


def model(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(text)
    checkpoints._seal(folder)
    return folder


@pytest.fixture
def payload(tmp_path: Path) -> EvaluationPayload:
    driver = tmp_path / "driver"
    return EvaluationPayload(
        models=(
            ModelFiles("one", model(driver / "0" / "model", "one"), "digest"),
            ModelFiles(
                "two",
                model(driver / "1" / "model", "two"),
                "digest",
                judge=model(driver / "1" / "judge", "judge"),
            ),
        ),
        data="digits",
        report=driver / "report",
        storage=f"memory://bucket/{tmp_path.name}",
    )


def elsewhere(payload: EvaluationPayload, folder: Path) -> EvaluationPayload:
    """The same payload on a machine where the driver's folders are other ones."""

    def moved(path: Path | None) -> Path | None:
        return path and folder.joinpath(*path.parts[-2:])

    models = [
        ModelFiles(one.name, moved(one.folder) or folder, one.digest, moved(one.judge))
        for one in payload.models
    ]
    return replace(payload, models=tuple(models), report=folder / "report")


def test_models_reach_the_workers_and_the_report_the_driver(
    payload: EvaluationPayload, tmp_path: Path
) -> None:
    exchange.publish_models(payload)
    fetched = exchange.fetch_models(elsewhere(payload, tmp_path / "worker"))
    judge = fetched.models[1].judge
    assert judge is not None
    folders = [fetched.models[0].folder, fetched.models[1].folder, judge]
    assert [(f / "recipe.json").read_text() for f in folders] == ["one", "two", "judge"]
    assert all(f.is_relative_to(tmp_path / "worker") for f in folders)
    assert fetched.report is not None
    (fetched.report / "images").mkdir(parents=True)
    (fetched.report / "report.json").write_text(json.dumps({}))
    (fetched.report / "images" / "a.png").write_bytes(b"png")
    exchange.publish_report(fetched)
    exchange.remove_copies(fetched)
    assert not any(f.exists() for f in folders)
    exchange.fetch_report(payload)
    assert payload.report is not None
    assert (payload.report / "images" / "a.png").read_bytes() == b"png"
    assert (payload.report / "report.json").read_text() == "{}"


def test_without_a_report_none_is_fetched(payload: EvaluationPayload) -> None:
    exchange.fetch_report(replace(payload, report=None))
    assert open_storage(payload.storage).names() == []
