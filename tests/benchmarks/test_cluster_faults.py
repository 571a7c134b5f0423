"""The benchmark that kills machines counts every way in which a training can end badly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from training_faults import Outcome

GOOD = Outcome(
    "one",
    "the head",
    epoch=2,
    statuses=[1, 0],
    repeated_epochs=2,
    status="FINISHED",
    points=[1, 2, 3],
    weights="abc",
)


def test_a_training_that_was_repeated_and_lost_two_epochs_is_good() -> None:
    assert GOOD.faults(3, "abc") == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"statuses": [None, 0]}, "hung"),
        ({"statuses": [1, 1]}, "did not succeed"),
        ({"status": "FAILED"}, "not one finished run"),
        ({"status": ""}, "not one finished run"),
        ({"points": [1, 3]}, "points lost or doubled"),
        ({"points": [1, 2, 2, 3]}, "points lost or doubled"),
        ({"weights": "abd"}, "other weights"),
        ({"repeated_epochs": 3}, "more lost than was not yet in the store"),
    ],
)
def test_each_bad_end_is_counted(change: dict[str, Any], fault: str) -> None:
    assert replace(GOOD, **change).faults(3, "abc") == [fault]
