"""Boxes, polygons, keypoints and rotated boxes are told apart by their numbers."""

from __future__ import annotations

import numpy as np
import pytest
from layouts.box_files import yolo_line

from pipelines.data.importers.support.yolo_lines import is_label, parse_line, tell_kind

KINDS = {"box": "boxes", "polygon": "polygons", "pose": "keypoints", "corners": "four corners"}


@pytest.mark.parametrize("form", list(KINDS))
def test_the_kind_of_labels_is_told_without_settings(form: str) -> None:
    lines = [yolo_line(number, form) for number in range(20)]
    assert tell_kind(lines, None) == (KINDS[form], 20 if form == "box" else 0, 20)


def test_settings_name_keypoints_that_lines_don_t_show() -> None:
    lines = [yolo_line(number, "polygon") for number in range(4)]
    assert tell_kind(lines, (3, 2)).kind == "keypoints"
    assert tell_kind(lines, None).kind == "polygons"  # the control


def test_polygons_with_one_number_of_corners_are_not_keypoints() -> None:
    dice = np.random.default_rng(0)
    for corners in (3, 5, 6, 9):
        lines = []
        for _ in range(10):
            angles = np.sort(dice.random(corners)) * 2 * np.pi
            middle, radius = dice.random(2) * 0.4 + 0.3, dice.random() * 0.2 + 0.05
            points = middle + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
            lines.append(f"0 {' '.join(map(str, points.ravel()))}")
        assert tell_kind(lines, None).kind == "polygons"


@pytest.mark.parametrize("values", [2, 3])
@pytest.mark.parametrize("points", [1, 3, 17])
def test_keypoints_of_any_shape_are_seen(values: int, points: int) -> None:
    dice = np.random.default_rng(points)
    lines = []
    for _ in range(10):
        centre, size = dice.random(2) * 0.4 + 0.3, dice.random(2) * 0.2 + 0.05
        inside = centre + (dice.random((points, 2)) - 0.5) * size
        if values == 3:
            inside = np.concatenate([inside, dice.integers(0, 3, (points, 1))], 1)
        numbers = [*centre, *size, *inside.ravel()]
        lines.append(f"1 {' '.join(map(str, numbers))}")
    assert tell_kind(lines, None).kind == "keypoints"


def test_boxes_among_polygons_are_counted() -> None:
    lines = [yolo_line(n, "box" if n < 3 else "polygon") for n in range(8)]
    assert tell_kind(lines, None) == ("polygons", 3, 8)


@pytest.mark.parametrize(
    ("word", "label"), [("1", 1), ("1.0", 1), ("1.000e+00", 1), ("01", 1), ("0.0", 0)]
)
def test_a_class_may_be_written_as_a_float(word: str, label: int) -> None:
    found, values = parse_line(f"{word} 0.5 0.5 0.25 1e-1", 2, "boxes", "x")
    assert (found, values.tolist()) == (label, [0.5, 0.5, 0.25, 0.1])


def test_a_decimal_comma_is_a_point() -> None:
    _, values = parse_line("0 0,5 0,25 0,5 0,5", 1, "boxes", "x")
    assert values.tolist() == [0.5, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0 0.5 0.5 0.1 0.1", True),
        ("1.0 0.5 0.5 0.1 0.1", True),
        ("cat 0.5 0.5 0.1 0.1", True),
        ("a photo of a cat", False),
        ("0 0.5", False),
        ("Car 0.00 0 -1.58 587 173 614 200 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59", False),
        ("images/train/0.jpg", False),
    ],
)
def test_lines_of_other_files_are_no_labels(line: str, expected: bool) -> None:
    assert is_label(line) == expected
