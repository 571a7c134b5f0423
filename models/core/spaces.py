"""Search spaces as plain data: a dotted path of the recipe -> one of these. Imports no tuner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Uniform:
    low: float
    high: float


@dataclass(frozen=True)
class LogUniform:
    low: float
    high: float


@dataclass(frozen=True)
class Integer:
    """Whole numbers from `low` to `high`, both included, all as likely."""

    low: int
    high: int


@dataclass(frozen=True)
class LogInteger:
    """Whole numbers from `low`, at least 1, to `high`, both included; small ones more often."""

    low: int
    high: int


@dataclass(frozen=True)
class Choice:
    values: tuple[Any, ...]


Range = Uniform | LogUniform | Integer | LogInteger
Space = Range | Choice

MOST_EXAMPLES = 200
_GOLDEN = 0.6180339887498949


def examples(space: Space) -> tuple[Any, ...]:
    """Values in the space, with its ends: all of a choice and of up to `MOST_EXAMPLES` whole
    numbers, some of a larger range, and of a range of real numbers one that isn't whole."""
    if isinstance(space, Choice):
        return space.values
    if isinstance(space, Integer | LogInteger):
        low, high = space.low, space.high
        step = max((high - low) // MOST_EXAMPLES, 1)
        # Neighbours, too: of a stride all numbers could be even.
        some = {n + k for n in range(low, high + 1, step) for k in (0, 1)} | {high}
        return tuple(sorted(n for n in some if n <= high))
    return (space.low, space.low + (space.high - space.low) * _GOLDEN, space.high)
