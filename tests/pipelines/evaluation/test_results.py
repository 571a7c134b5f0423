"""Results of an evaluation, as plain JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from pipelines.evaluation.results import (
    Comparison,
    Difference,
    Estimate,
    EvaluationResult,
    McNemar,
    Robustness,
    SliceMetrics,
    read_comparison,
    read_result,
    to_plain,
)

RESULT = EvaluationResult(
    model="m",
    digest="d",
    family="cnn",
    task="classification",
    primary="error",
    direction="min",
    data="photos",
    data_digest="e",
    split="test",
    samples=10,
    metrics={"error": Estimate(0.25, 0.2, 0.3)},
    slices=(SliceMetrics("brightness", "dark", "0..20", 4, {"error": Estimate(0.5, 0.4, 0.6)}),),
    robustness=Robustness(4, 0.2, {"fog": (0.3, 0.4)}, {"pgd_2": 0.9}),
    costs={"latency_p95_ms": 3.0},
)


def test_a_result_is_the_same_after_json() -> None:
    assert read_result(json.loads(json.dumps(to_plain(RESULT)))) == RESULT


def test_numbers_that_json_lacks_come_back_as_nan() -> None:
    result = replace(RESULT, metrics={"error": Estimate(math.nan, 0.0, math.inf)})
    text = json.dumps(to_plain(result), allow_nan=False)
    estimate = read_result(json.loads(text)).metrics["error"]
    assert math.isnan(estimate.value)
    assert estimate.low == 0.0


def test_a_comparison_is_the_same_after_json() -> None:
    compared = Comparison("a", "b", {"error": Difference(0.1, -0.1, 0.3)}, McNemar(3, 5, 0.7))
    assert read_comparison(json.loads(json.dumps(to_plain(compared)))) == compared
    without = replace(compared, mcnemar=None)
    assert read_comparison(json.loads(json.dumps(to_plain(without)))) == without


def test_a_policy_can_limit_metrics_robustness_and_costs() -> None:
    values = RESULT.values()
    assert values.keys() == {"error", "robustness", "pgd_2", "latency_p95_ms"}
    assert values["robustness"] == (0.3 + 0.4) / 2
