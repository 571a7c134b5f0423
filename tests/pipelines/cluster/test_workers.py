"""When a group that keeps failing is given up. Groups that really fail are in tests/integration."""

from __future__ import annotations

import pytest

from pipelines.cluster.workers import FailureCount


def test_failures_count_since_the_last_checkpoint() -> None:
    failures = FailureCount(allowed=3)
    for committed in range(1, 20):  # a machine is taken away twice between two checkpoints
        failures.add(committed)
        failures.add(committed)
        assert not failures.are_too_many
    assert failures.in_all == 38
    failures.add(19)
    assert not failures.are_too_many
    failures.add(19)
    assert failures.are_too_many
    assert str(failures) == "4 times since the last checkpoint"


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_without_progress_so_many_failures_are_allowed(allowed: int) -> None:
    failures = FailureCount(allowed)
    for _ in range(allowed):
        failures.add(0)
        assert not failures.are_too_many
    failures.add(0)
    assert failures.are_too_many
