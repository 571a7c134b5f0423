"""Lines of YOLO's label files: what kind they are, and their numbers.

In: text. Out: class and values, or which of four kinds of labels a set has. Must not know files.

    class cx cy w h                     a box by its centre and size
    class x1 y1 x2 y2 x3 y3 …           a polygon
    class cx cy w h x y [v] x y [v] …   a box with keypoints: data.yaml has kpt_shape
    class x1 y1 x2 y2 x3 y3 x4 y4       a rotated box, or a polygon of four corners

Values are divided by the image's width and height.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from pipelines.data.sample_error import SampleError

Kind = Literal["boxes", "polygons", "keypoints", "four corners"]
_NUMBER = re.compile(r"[-+]?[0-9]{1,12}(\.[0-9]{0,40})?([eE][-+]?[0-9]{1,3})?", re.ASCII)
_COMMA = re.compile(r"[-+]?[0-9]{1,12},[0-9]{1,40}", re.ASCII)
_MARGIN = 0.02
"""How far keypoints may lie outside their box."""


class KindOfLines(NamedTuple):
    """The kind, and how many of the lines are boxes where the others are polygons."""

    kind: Kind
    boxes: int
    lines: int


def split_line(line: str) -> list[str]:
    """The words of a line. A comma in a number is a decimal comma."""
    words = line.split()
    if any("," in word for word in words):
        words = [w.replace(",", ".") if _COMMA.fullmatch(w) else w for w in words]
    return words


def is_label(line: str) -> bool:
    """Whether a line looks like one of YOLO's: a class and at least four numbers.

    A name in place of a class is a mistake that the user is told of, but with 15 or 16 words it is
    KITTI's.
    """
    words = split_line(line)
    if len(words) < 5 or not all(map(_NUMBER.fullmatch, words[1:])):
        return False
    return _to_class(words[0]) is not None or len(words) not in (15, 16)


def tell_kind(lines: Iterable[str], keypoints: tuple[int, int] | None) -> KindOfLines:
    """The kind of a set's lines. `keypoints` is kpt_shape: number, and values of each."""
    rows = [split_line(line)[1:] for line in lines]
    counts = [len(row) for row in rows]
    boxes = counts.count(4)
    if keypoints or (boxes == 0 and len(set(counts)) == 1 and _have_keypoints(rows)):
        return KindOfLines("keypoints", boxes, len(rows))
    if set(counts) == {8}:
        return KindOfLines("four corners", 0, len(rows))
    if any(count >= 6 and count % 2 == 0 for count in counts):
        return KindOfLines("polygons", boxes, len(rows))
    return KindOfLines("boxes", boxes, len(rows))


def _have_keypoints(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first four values of each row are a box around the points that follow."""
    width = len(rows[0]) - 4
    if width < 2:
        return False
    for values in (2, 3):
        if width % values == 0 and all(_is_around(row, values) for row in rows):
            return True
    return False


def _is_around(row: Sequence[str], values: int) -> bool:
    if not all(map(_NUMBER.fullmatch, row)):
        return False
    numbers = np.array([float(word) for word in row])
    centre, size = numbers[:2], numbers[2:4]
    points = numbers[4:].reshape(-1, values)
    if values == 3 and not np.isin(points[:, 2], (0, 1, 2)).all():
        return False
    shown = points[(points[:, :2] != 0).any(1), :2]
    return bool((np.abs(shown - centre) <= size / 2 + _MARGIN).all())


def parse_line(
    line: str, classes: int, kind: Kind, where: str
) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """(class, values): x, y, width, height, or the corners of a polygon. Raises SampleError."""
    first, *rest = split_line(line)
    label = _to_class(first)
    if label is None or label >= classes:
        raise SampleError(
            "unknown class", f"{where}: {first[:30]!r} is not a class from 0 to {classes - 1}"
        )
    if kind == "keypoints":
        rest = rest[:4]
    if len(rest) != 4 and (len(rest) < 6 or len(rest) % 2):
        raise SampleError(
            "unreadable annotation",
            f"{where} has {len(rest)} numbers after the class; a box has 4, a polygon an even "
            "number of at least 6",
        )
    if not all(map(_NUMBER.fullmatch, rest)):
        raise SampleError("unreadable annotation", f"{where} has a value that is not a number")
    values: np.ndarray[Any, Any] = np.array([float(text) for text in rest])
    if not (np.abs(values) <= 2).all():
        raise SampleError(
            "box outside the image",
            f"{where} has numbers far from 0 to 1",
            hint="YOLO's coordinates are divided by the image's width and height",
        )
    return label, values


def _to_class(word: str) -> int | None:
    """A class as 1, 1.0 or 1e+00."""
    if not _NUMBER.fullmatch(word):
        return None
    value = float(word)
    return int(value) if value.is_integer() and 0 <= value < 1e9 else None
