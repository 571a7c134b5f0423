"""Options that say how images are read."""

from __future__ import annotations

import pytest

from models.core.errors import UsageError
from pipelines.data.image_reading import (
    ImageReading,
    current,
    parse_options,
    parse_range,
    reading_images,
)


def test_options_are_read_and_in_effect_for_a_block() -> None:
    assert parse_options({"other": "x"}) == ImageReading() == current()
    reading = parse_options({"range": "0..4095", "frames": "all"})
    assert reading == ImageReading((0, 4095), all_frames=True)
    with reading_images(reading):
        assert current() == reading
    assert current() == ImageReading()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0..1", (0, 1)), (" -1000 .. 400.5 ", (-1000, 400.5)), ("0..1e-3", (0, 0.001))],
)
def test_ranges(text: str, expected: tuple[float, float]) -> None:
    assert parse_range(text) == expected


@pytest.mark.parametrize("text", ["", "1", "1..0", "0..0", "0..nan", "0..inf", "0..1e999", "a..b"])
def test_invalid_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not LOW\.\.HIGH"):
        parse_range(text)


def test_invalid_frames_are_refused() -> None:
    with pytest.raises(UsageError, match="the option frames can't be 'last'"):
        parse_options({"frames": "last"})
