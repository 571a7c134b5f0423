"""Learning curves show every metric, every point, and numbers that can be read."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.core.errors import TesseraError
from pipelines.visuals import curves

ODD = ["$x_1^{", "日本語", "a\nb\t\x07c", "", "<b>&amp;</b>", "w" * 200, "\\frac", "#%&"]
GREY, ORANGE = (138, 148, 166), (194, 65, 12)


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def ink(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a colour is, as rows of (y, x)."""
    return np.argwhere(abs(image - colour).sum(2) < 6)


def drawn(history: dict[str, list[tuple[int, float]]], tmp_path: Path) -> np.ndarray:
    curves.learning_curves(history, tmp_path / "made" / "curves.png")
    return pixels_of(tmp_path / "made" / "curves.png")


def test_there_is_a_plot_for_each_metric(tmp_path):
    curve = [(step, 1 / step) for step in range(1, 50)]
    one = {"train/loss": curve, "val/loss": [(1, 0.6), (2, 0.4)]}
    seven = {f"val/metric_{n}": [(1, 0.1), (2, 0.2)] for n in range(7)}
    both = drawn(one, tmp_path)
    shapes = [both.shape, drawn({**one, "val/accuracy": [(1, 0.6)]}, tmp_path).shape]
    shapes.append(drawn(seven, tmp_path).shape)
    assert [wide / curves.WIDTH for _, wide, _ in shapes] == [1, 2, 3]
    assert [high / curves.HEIGHT for high, _, _ in shapes] == [1, 1, 3]
    assert len(ink(both, GREY)) > 200
    assert len(ink(both, ORANGE)) > 200


def test_steps_and_epochs_both_span_the_whole_plot(tmp_path):
    history = {"train/loss": [(0, 1.0), (900, 0.9)], "val/loss": [(0, 0.1), (3, 0.2)]}
    image = drawn(history, tmp_path)
    for colour in (GREY, ORANGE):
        columns = ink(image, colour)[:, 1]
        assert columns.min() <= curves.LEFT
        assert columns.max() >= curves.WIDTH - curves.RIGHT - 1


def test_higher_values_are_higher(tmp_path):
    image = drawn({"val/accuracy": [(0, 0.0), (10, 1.0)]}, tmp_path)
    line = ink(image, ORANGE)
    first, last = (line[line[:, 1] == x, 0].mean() for x in (line[:, 1].min(), line[:, 1].max()))
    assert first > last + 200


def test_every_point_of_a_short_curve_is_a_dot(tmp_path):
    image = drawn({"val/accuracy": [(1, 0.5)]}, tmp_path)
    assert len(ink(image, ORANGE)) > curves.DOT_RADIUS**2


@pytest.mark.parametrize(
    ("ticks", "texts"),
    [
        ([0.0, 0.5, 1.0], ["0.0", "0.5", "1.0"]),
        ([0.1 * n for n in range(3)], ["0.0", "0.1", "0.2"]),
        ([12500.0, 13000.0], ["12500", "13000"]),
        ([0.0, 1e-4, 2e-4], ["0", "1e-04", "2e-04"]),
        ([-0.0, 2e9], ["0", "2e+09"]),
        ([0.9985, 0.999], ["0.9985", "0.9990"]),
    ],
)
def test_ticks_have_as_many_digits_as_tell_them_apart(ticks, texts):
    assert curves.tick_texts(ticks) == texts


GREATEST = sys.float_info.max


@pytest.mark.parametrize(
    ("low", "high"),
    [
        *((0.0, 0.0), (1.0, 1.0), (1.0, 1 + 1e-15), (5e-324, 5e-324), (0.0, 5e-324)),
        *((1e20, 1e20), (GREATEST, GREATEST), (-GREATEST, GREATEST)),
    ],
)
def test_any_finite_values_are_drawn(tmp_path, low, high):
    image = drawn({"val/loss": [(0, low), (10**9, high)]}, tmp_path)
    assert len(ink(image, ORANGE)) > 10


def test_values_that_are_not_finite_are_omitted(tmp_path):
    history = {"train/loss": [(1, math.nan), (2, 1.0)], "val/loss": [(1, math.inf)]}
    image = drawn(history, tmp_path)
    assert len(ink(image, GREY))
    assert not len(ink(image, ORANGE))
    with pytest.raises(TesseraError, match="no metric"):
        curves.learning_curves({"train/loss": [(1, math.nan)]}, tmp_path / "none.png")


def test_malicious_names_are_drawn_as_text(tmp_path):
    """No formula is interpreted, nothing leaves its plot, and no warning is raised."""
    image = drawn({f"val/{name}": [(1, 0.5)] for name in ODD}, tmp_path)
    assert image.shape == (3 * curves.HEIGHT, 3 * curves.WIDTH, 3)
    assert len(ink(image, ORANGE)) > len(ODD) * curves.DOT_RADIUS**2


def test_matplotlib_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert drawn({"val/loss": [(1, 0.5)]}, tmp_path).std() > 1
