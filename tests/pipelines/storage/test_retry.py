"""Patience is bounded, grows, and ends with what was tried."""

from __future__ import annotations

import random

import pytest

from models.core.errors import TesseraError
from pipelines.storage.retry import RetryPolicy, TransientError, retry_call

QUICK = RetryPolicy(tries=4, first_seconds=0.001)


def failing(times: int, error: Exception) -> tuple[list[int], object]:
    calls: list[int] = []

    def act() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return calls, act


@pytest.mark.parametrize("times", [0, 1, 3])
def test_what_passes_is_tried_again(times: int) -> None:
    calls, act = failing(times, TransientError("busy"))
    assert retry_call(act, QUICK, "x") == "done"
    assert len(calls) == times + 1


def test_what_lasts_ends() -> None:
    calls, act = failing(99, TransientError("busy"))
    with pytest.raises(TesseraError, match=r"shard x: busy \(tried 4 times in \d+ s\)"):
        retry_call(act, QUICK, "shard x")
    assert len(calls) == 4


@pytest.mark.parametrize("error", [TesseraError("no"), FileNotFoundError(), KeyboardInterrupt()])
def test_what_will_not_pass_is_not_tried_again(error: Exception) -> None:
    calls, act = failing(99, error)
    with pytest.raises(type(error)):
        retry_call(act, QUICK, "x")
    assert len(calls) == 1


def test_a_minute_is_borne() -> None:
    """What the docstring says of the default, at the shortest that chance makes it."""
    default = RetryPolicy()
    least = min(sum(default.waits()) for _ in range(200))
    most = sum(
        1.25 * min(default.first_seconds * 2**n, default.most_seconds)
        for n in range(default.tries - 1)
    )
    assert 60 < 0.6 * most <= least <= most < 120


def test_chance_is_not_the_trainings() -> None:
    random.seed(1)
    state = random.getstate()
    list(RetryPolicy().waits())
    assert random.getstate() == state
