"""Metrics named in a recipe: which names are valid, and what their functions may return."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec
from models.metrics import custom
from models.tasks.classification import CLASSIFICATION

DATA = DataSpec("classification", 1, 8, 8, ("a", "b"))
CODE = """
THREE = 3

def share(records, data):
    return sum(r["label"] == 1 for r in records) / len(records)

def only_b(records, data):
    return {"found": 1 / sum(r["label"] == 1 for r in records)}

def accuracy(records, data):
    return 1.0

def words(records, data):
    return "many"

def odd_key(records, data):
    return {"a/b": 1.0}

def infinite(records, data):
    return float("inf")
"""


@pytest.fixture(autouse=True)
def metric_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metric_lab.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)


def records(*labels: int) -> list[dict[str, Any]]:
    shares = torch.tensor([0.75, 0.25])
    return [{"probabilities": shares, "predicted": 0, "label": label} for label in labels]


def compute(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return custom.metrics(CLASSIFICATION, [f"metric_lab:{name}"], rows, DATA)


def test_values_are_added_to_the_metrics_of_the_task() -> None:
    values = compute("share", records(0, 1, 1, 1))
    assert values["share"] == 0.75
    assert values["accuracy"] == 0.25
    assert compute("only_b", records(0, 1))["only_b_found"] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("only_b", "failed on 2 records: ZeroDivisionError"),
        ("words", "failed on 2 records: ValueError"),
        ("infinite", "returned inf"),
        ("odd_key", "returned the key 'odd_key_a/b'"),
        ("accuracy", "like one of classification's metrics"),
    ],
)
def test_a_metric_without_a_usable_value_is_an_error(name: str, message: str) -> None:
    with pytest.raises(TesseraError, match=message):
        compute(name, records(0, 0))


def test_bootstrap_samples_without_a_value_are_omitted() -> None:
    rows = records(0, 1)
    select = custom.bootstrap_metrics(CLASSIFICATION, ["metric_lab:only_b"], rows, DATA)
    assert select([1, 1])["only_b_found"] == 0.5
    without = select([0, 0])
    assert "only_b_found" not in without
    assert without["accuracy"] == 1


@pytest.mark.parametrize("name", ["share", "metric_lab", ":share", "metric_lab:", "a b:c", "a:b:c"])
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not the name of a metric"):
        custom.check_names([name])


def test_two_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="'share' is there twice"):
        custom.check_names(["one:share", "two:share"])


def test_an_object_that_is_not_a_function_is_refused() -> None:
    with pytest.raises(UsageError, match="of type int, not a function"):
        custom.get("metric_lab:THREE")
