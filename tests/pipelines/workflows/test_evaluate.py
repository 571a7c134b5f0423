"""`evaluate` as a function: what it returns, and what it stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.core.errors import TesseraError, UsageError
from pipelines import tag_names
from pipelines.workflows import services
from pipelines.workflows.context import Context
from pipelines.workflows.evaluate import evaluate


@pytest.fixture
def context(trained_home: Path) -> Context:
    return Context.from_environment({"TESSERA_HOME": str(trained_home)})


@pytest.mark.slow
def test_metrics_are_returned_and_stored_with_the_version(context: Context, digits: Path) -> None:
    report = evaluate("digits", data=digits, report=False, intervals=False, context=context)
    assert report.folder is None
    assert report.page is None
    assert report.metrics["accuracy"] == report.models[0].metrics["accuracy"].value
    assert report.versions[0].number == 1
    version = services.open_registry(context).version("digits", 1)
    assert f"{tag_names.EVALUATION_PREFIX}test" in version.tags


@pytest.mark.slow
def test_a_report_goes_into_a_new_folder(context: Context, digits: Path, tmp_path: Path) -> None:
    (version,) = services.open_registry(context).versions("digits")
    to = tmp_path / "report"
    report = evaluate(version, data=digits, report=to, robustness=0, context=context)
    assert report.page == to / "report.html"
    assert report.page.is_file()
    low, high = report.models[0].metrics["accuracy"].low, report.models[0].metrics["accuracy"].high
    assert low <= report.metrics["accuracy"] <= high
    with pytest.raises(UsageError, match="already exists"):
        evaluate(version, data=digits, report=to, context=context)


@pytest.mark.parametrize(
    ("models", "more", "message"),
    [
        ("digits", {"data": "nowhere"}, "nowhere"),
        ("digits", {"split": "holdout"}, "holdout"),
        ("digit", {}, "digit"),
        ("digits/x", {}, "does not name a model"),
        (["digits", "digits/1"], {}, "a model is named twice"),
    ],
)
@pytest.mark.slow
def test_bad_arguments_are_refused(
    models: Any, more: dict[str, Any], message: str, context: Context, digits: Path
) -> None:
    with pytest.raises(TesseraError, match=message):
        evaluate(models, context=context, **{"data": digits, "report": False, **more})
