"""Metrics named in a recipe: which names are valid, and what their functions may return."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec, Metric
from models.metrics import custom
from models.tasks.classification import CLASSIFICATION
from models.tasks.detection import DETECTION

DATA = DataSpec("classification", 1, 8, 8, ("a", "b"))
CODE = """
from models.metrics import higher_is_better, lower_is_better

THREE = 3

@higher_is_better
def good(records, data):
    return 1.0

@lower_is_better
def bad(records, data):
    return {"a": 0.0, "b": 1.0}

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


@pytest.mark.parametrize(
    ("chosen", "direction", "expected"),
    [
        ("", "", Metric("map", "max")),
        ("map50", "max", Metric("map50", "max")),
        ("good", "", Metric("good", "max")),
        ("bad_a", "", Metric("bad_a", "min")),
        ("share", "min", Metric("share", "min")),
        ("good", "min", Metric("good", "min")),
    ],
)
def test_the_primary_metric_and_its_direction(
    chosen: str, direction: str, expected: Metric
) -> None:
    names = ["metric_lab:good", "metric_lab:bad", "metric_lab:share"]
    assert custom.choose_primary(DETECTION, names, chosen, direction) == expected


@pytest.mark.parametrize(
    ("chosen", "direction", "message", "hint"),
    [
        ("share", "", "higher or lower values are better", "@lower_is_better"),
        ("shard", "", "unknown metric 'shard'", "did you mean 'share'"),
        ("map", "min", "higher values are better", "leave primary_direction out"),
        ("map50", "", "higher or lower values are better", "set primary_direction"),
    ],
)
def test_a_primary_metric_without_a_direction_is_refused(
    chosen: str, direction: str, message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        custom.choose_primary(DETECTION, ["metric_lab:share"], chosen, direction)
    assert hint in caught.value.hint


def test_a_direction_that_the_recipe_knows_needs_no_import() -> None:
    """As where a trained model is used and its metric is not installed."""
    metric = custom.choose_primary(DETECTION, ["nowhere:cost"], "cost", "min")
    assert metric == Metric("cost", "min")


def test_of_two_functions_with_one_name_the_first_is_used() -> None:
    assert set(custom.merge(["a:x"], ["b:x", "b:y"])) == {"a:x", "b:y"}
