"""Calls a function again after failures that may pass.

In: a function, and a policy of how often and how long. Out: what the function returns, or an error
that says what was tried. Must not know what the function does.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from models.core.errors import TesseraError

T = TypeVar("T")


class TransientError(Exception):
    """A failure that may pass: of the network, of a busy server, of a response cut short."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often a call is attempted, and how long the waits between attempts are.

    The first wait is `first_wait_seconds`, each further one twice as long, up to
    `max_wait_seconds`. Each varies at random by a quarter either way, so that many readers don't
    return to a server at once. `max_attempts` counts the first attempt, None for no limit. No
    attempt begins later than `deadline_seconds` after the first one. `call_seconds` is the timeout
    of one attempt, for functions that take one: `retry_call` interrupts nothing.

    The default survives a server that is down for a minute: its waits alone are 69 s or more.
    """

    max_attempts: int | None = 10
    deadline_seconds: float | None = None
    first_wait_seconds: float = 0.5
    max_wait_seconds: float = 20.0
    call_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.max_attempts is None and self.deadline_seconds is None:
            raise ValueError("a retry policy needs max_attempts or deadline_seconds")
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, not {self.max_attempts}")

    def allows(self, elapsed_seconds: float) -> bool:
        """Whether an attempt may begin so long after the first one."""
        return self.deadline_seconds is None or elapsed_seconds <= self.deadline_seconds

    def waits(self) -> Iterator[float]:
        """Seconds to wait after each failed attempt but the last."""
        jitter = random.SystemRandom()  # the global generator belongs to the training
        wait = self.first_wait_seconds
        for attempt in count(1):
            if attempt == self.max_attempts:
                return
            yield min(wait, self.max_wait_seconds) * jitter.uniform(0.75, 1.25)
            wait = min(wait * 2, self.max_wait_seconds)


def retry_call(
    call: Callable[[], T],
    policy: RetryPolicy,
    what: str | None,
    *,
    transient: type[Exception] | Callable[[Exception], bool] = TransientError,
    hint: str = "check that the server is up and reachable",
) -> T:
    """Returns what `call` returns. After an error that is `transient`, a type or a test of the
    error, it is called again; any other error is raised at once.

    When no attempt is left, a TesseraError says what failed and what was tried: "WHAT: ERROR (tried
    4 times in 12 s)". With `what=None` the last error itself is raised.
    """
    is_transient = transient if not isinstance(transient, type) else _instance_test(transient)
    started = time.monotonic()
    waits = policy.waits()
    for attempt in count(1):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            elapsed = time.monotonic() - started
            wait = next(waits, None)
            if wait is None or not policy.allows(elapsed + wait):
                if what is None:
                    raise
                tried = f"tried {attempt} times in {elapsed:.0f} s" if attempt > 1 else "tried once"
                raise TesseraError(f"{what}: {_summary(error)} ({tried})", hint=hint) from error
        time.sleep(wait)
    raise AssertionError("unreachable")


def _summary(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _instance_test(kind: type[Exception]) -> Callable[[Exception], bool]:
    return lambda error: isinstance(error, kind)
