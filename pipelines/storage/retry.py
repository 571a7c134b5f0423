"""How often and how long something is tried again that may work the next time.

In: an act that fails with `TransientError`. Out: what it gives, or a TesseraError that says how long it was
tried. Must not know what the act is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from models.core.errors import TesseraError

T = TypeVar("T")


class TransientError(Exception):
    """A failure that may pass: the network, a busy server, a body that was cut short."""


@dataclass(frozen=True)
class RetryPolicy:
    """`tries` in all. The wait after a failure doubles from `first_seconds` up to `most_seconds`,
    each a quarter shorter or longer by chance, so that many readers don't come back at once. One try
    may take `call_seconds`.

    The default bears a server that is away for a minute: its waits alone are 69 s at the least.
    """

    tries: int = 10
    first_seconds: float = 0.5
    most_seconds: float = 20.0
    call_seconds: float = 60.0

    def waits(self) -> Iterator[float]:
        """Seconds after each failure but the last."""
        chance = random.SystemRandom()  # the global one belongs to the training
        for n in range(self.tries - 1):
            wait = min(self.first_seconds * 2**n, self.most_seconds)
            yield wait * chance.uniform(0.75, 1.25)


def retry_call(act: Callable[[], T], patience: RetryPolicy, what: str) -> T:
    """What `act` gives, tried again while it raises `TransientError`; then TesseraError. `what` begins the
    error's sentence."""
    began = time.monotonic()
    waits = patience.waits()
    for tried in range(1, patience.tries + 1):
        try:
            return act()
        except TransientError as error:
            wait = next(waits, None)
            if wait is None:
                seconds = time.monotonic() - began
                often = f"tried {tried} times in {seconds:.0f} s" if tried > 1 else "tried once"
                raise TesseraError(
                    f"{what}: {error} ({often})", hint="see whether the server is up and reachable"
                ) from None
            time.sleep(wait)
    raise AssertionError("a patience has one try at least")
