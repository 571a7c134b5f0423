"""The score of a member of a population after a generation."""

from __future__ import annotations

import math

import pytest

from pipelines.workflows.generations import _score
from pipelines.workflows.trial import SegmentResult


@pytest.mark.parametrize(
    ("curve", "reason", "expected"),
    [
        ([(1, 0.5), (2, 0.7)], "", (0.7, "")),
        ([(1, 0.5)], "", (0.5, "")),  # it stopped early: its last value counts
        ([], "", (None, "the metric is not finite")),
        ([(2, math.nan)], "", (None, "the metric is not finite")),
        ([(1, 0.5), (2, 0.7)], "the disk is full", (None, "the disk is full")),
    ],
)
def test_the_score_is_the_value_of_the_last_epoch(
    curve: list[tuple[int, float]], reason: str, expected: tuple[float | None, str]
) -> None:
    assert _score(SegmentResult(curve, reason), 2) == expected
