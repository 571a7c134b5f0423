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
class Choice:
    values: tuple[Any, ...]


Space = Uniform | LogUniform | Choice


def examples(space: Space) -> tuple[Any, ...]:
    """Values in the space, with its ends."""
    if isinstance(space, Choice):
        return space.values
    return (space.low, space.high)
