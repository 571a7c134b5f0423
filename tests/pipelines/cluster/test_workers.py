"""When a group that keeps failing is given up. Groups that really fail are in tests/integration."""

from __future__ import annotations

import pytest

from models.core.errors import TesseraError
from pipelines.cluster.workers import Failed, FailureCount

FAILED = Failed("worker 1: died", RuntimeError("died"))


def test_failures_count_since_the_last_checkpoint() -> None:
    failures = FailureCount(allowed=3)
    for committed in range(1, 20):  # a machine is taken away twice between two checkpoints
        failures.add(committed, FAILED)
        failures.add(committed, FAILED)
    assert failures.in_all == 38
    failures.add(19, FAILED)
    with pytest.raises(TesseraError, match=r"failed 4 times since the last checkpoint.*worker 1"):
        failures.add(19, FAILED)


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_without_progress_so_many_failures_are_allowed(allowed: int) -> None:
    failures = FailureCount(allowed)
    for _ in range(allowed):
        failures.add(0, FAILED)
    with pytest.raises(TesseraError, match="failed"):
        failures.add(0, FAILED)
