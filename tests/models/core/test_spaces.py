"""Values in a search space."""

from __future__ import annotations

import pytest

from models.core.spaces import (
    MOST_EXAMPLES,
    Choice,
    Integer,
    LogInteger,
    LogUniform,
    Space,
    Uniform,
    examples,
)


@pytest.mark.parametrize("space", [Uniform(0.1, 0.4), LogUniform(1e-4, 1e-1)])
def test_a_range_of_real_numbers_has_its_ends_and_one_between(space: Space) -> None:
    assert isinstance(space, Uniform | LogUniform)
    low, between, high = examples(space)
    assert (low, high) == (space.low, space.high)
    assert low < between < high


def test_a_choice_has_all_its_values() -> None:
    assert examples(Choice((3, "a", None))) == (3, "a", None)


def test_a_short_range_of_whole_numbers_has_all() -> None:
    assert examples(Integer(3, 7)) == (3, 4, 5, 6, 7)


def test_a_long_range_has_its_ends_and_odd_and_even_numbers() -> None:
    found = examples(LogInteger(2, 100_000))
    assert (found[0], found[-1]) == (2, 100_000)
    assert len(found) <= 2 * MOST_EXAMPLES + 3
    assert {number % 2 for number in found[1:-1]} == {0, 1}
