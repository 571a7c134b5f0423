"""Retries are limited, wait longer each time, and report their attempts in the end."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from models.core.errors import TesseraError
from pipelines.storage.retry import RetryPolicy, TransientError, retry_call

QUICK = RetryPolicy(max_attempts=4, first_wait_seconds=0.001)


def failing(times: int, error: BaseException) -> tuple[list[int], Callable[[], str]]:
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return calls, call


@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_transient_failure_is_retried(times: int) -> None:
    calls, call = failing(times, TransientError("busy"))
    assert retry_call(call, QUICK, "x") == "done"
    assert len(calls) == times + 1


def test_a_permanent_failure_reports_the_attempts() -> None:
    calls, call = failing(99, TransientError("busy"))
    with pytest.raises(TesseraError, match=r"shard x: busy \(tried 4 times in \d+ s\)") as caught:
        retry_call(call, QUICK, "shard x", hint="wait")
    assert caught.value.hint == "wait"
    assert len(calls) == 4


@pytest.mark.parametrize("error", [TesseraError("no"), FileNotFoundError(), KeyboardInterrupt()])
def test_other_failures_are_not_retried(error: BaseException) -> None:
    calls, call = failing(99, error)
    with pytest.raises(type(error)):
        retry_call(call, QUICK, "x")
    assert len(calls) == 1


def test_the_caller_decides_what_is_transient() -> None:
    for transient in (BlockingIOError, lambda error: error.errno == 11):
        calls, call = failing(2, BlockingIOError(11, "again"))
        assert retry_call(call, QUICK, "x", transient=transient) == "done"
        assert len(calls) == 3


def test_without_a_description_the_last_error_is_raised() -> None:
    _, call = failing(99, BlockingIOError(11, "again"))
    with pytest.raises(BlockingIOError, match="again"):
        retry_call(call, QUICK, None, transient=BlockingIOError)


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_deadline_ends_retries_without_a_number_of_attempts(seconds: float) -> None:
    policy = RetryPolicy(
        max_attempts=None, deadline_seconds=seconds, first_wait_seconds=0.02, max_wait_seconds=0.02
    )
    calls, call = failing(999, TransientError("busy"))
    began = time.monotonic()
    with pytest.raises(TesseraError, match="busy"):
        retry_call(call, policy, "x")
    assert time.monotonic() - began < seconds + 5
    assert (len(calls) > 1) == (seconds > 0)


@pytest.mark.parametrize("wrong", [{"max_attempts": None}, {"max_attempts": 0}])
def test_a_policy_needs_a_limit(wrong: dict[str, None]) -> None:
    with pytest.raises(ValueError, match="max_attempts"):
        RetryPolicy(**wrong)


def test_the_default_survives_a_minute() -> None:
    """The claim of its docstring, with the shortest waits that jitter can give."""
    default = RetryPolicy()
    assert default.max_attempts
    least = min(sum(default.waits()) for _ in range(200))
    most = sum(
        1.25 * min(default.first_wait_seconds * 2**n, default.max_wait_seconds)
        for n in range(default.max_attempts - 1)
    )
    assert 60 < 0.6 * most <= least <= most < 120


def test_jitter_does_not_use_the_global_generator() -> None:
    random.seed(1)
    state = random.getstate()
    list(RetryPolicy().waits())
    assert random.getstate() == state
