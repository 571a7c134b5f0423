"""A confusion matrix as a PNG file, put together with Pillow: every training and evaluation draws
one, and matplotlib would need a third of a second for it.

In: counts and class names. Out: one PNG at the given path, whose folder is created. Must not know
what was trained or where the files go.

    K classes
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from models.core.errors import TesseraError
from pipelines.visuals.draw import Font, font, one_line

Array = np.ndarray[Any, Any]

COUNTED_CLASSES = 25
"""With at most this many classes the counts are written into the cells."""
NAMED_CLASSES = 120
"""With at most this many classes each one is named at the axes."""
CELL_PIXELS = 50
SIDE_PIXELS = (540, 1800)
"""The least and the greatest side of the matrix."""
STRETCH = 0.4
"""Exponent of the colour scale: below 1, small shares get a visible colour."""
BAR_TICKS = {0: "0 %", 0.01: "1 %", 0.05: "5 %", 0.2: "20 %", 0.5: "50 %", 1: "100 %"}
BAR_PIXELS, MARGIN, TITLE_PIXELS, TEXT_PIXELS = 18, 12, 18, 13
INK = "#334155"
_BLUES = (
    *((247, 251, 255), (227, 238, 248), (207, 225, 242), (182, 212, 233), (147, 196, 222)),
    *((106, 173, 213), (74, 151, 201), (45, 125, 187), (23, 100, 171), (8, 73, 145), (8, 48, 107)),
)
"""Colours at equal distances, from a share of 0 to a share of 1."""


def confusion_matrix(matrix: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draws counts (K, K): rows are the true classes, columns the predicted ones. The colour is the
    share of the row, on a scale that stretches small shares, so that a few mistakes are visible.

    Raises TesseraError if the matrix has another shape.
    """
    count = len(classes)
    if tuple(matrix.shape) != (count, count):
        raise TesseraError(f"a matrix of shape {tuple(matrix.shape)} for {count} classes")
    counts = matrix.cpu().double().numpy()
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    least, most = SIDE_PIXELS
    cell = round(min(max(least, CELL_PIXELS * count), most) / count)
    side = cell * count
    ticks = range(0, count, math.ceil(count / NAMED_CLASSES))
    names = [textwrap.shorten(one_line(classes[tick]), 24, placeholder="…") for tick in ticks]
    letters = font(round(min(15, max(8, 0.62 * cell))))
    longest = math.ceil(max(letters.getlength(name) for name in names))
    upright = longest > cell
    left = top = 2 * MARGIN + TITLE_PIXELS
    left += longest
    bottom = 2 * MARGIN + 2 * TITLE_PIXELS + (longest if upright else 0)
    right = 4 * MARGIN + BAR_PIXELS + TITLE_PIXELS + 6 * TEXT_PIXELS
    sheet = Image.new("RGB", (left + side + right, top + side + bottom), "white")
    sheet.paste(Image.fromarray(_colours(shares)).resize((side, side), 0), (left, top))
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((left - 1, top - 1, left + side, top + side), outline="black")
    for tick, name in zip(ticks, names):
        middle = round((tick + 0.5) * cell)
        pen.text((left - 8, top + middle), name, "black", letters, anchor="rm")
        if upright:
            _write_upright(sheet, (left + middle, top + side + 8), name, letters, align="top")
        else:
            pen.text((left + middle, top + side + 8), name, "black", letters, anchor="mt")
    if count <= COUNTED_CLASSES:
        _write_counts(pen, counts, shares, left, top, cell)
    heading = font(TITLE_PIXELS)
    correct = f"{int(counts.trace())} of {int(counts.sum())} correct"
    pen.text((left + side / 2, top - 8), correct, "black", heading, anchor="ms")
    below = (left + side / 2, sheet.height - MARGIN)
    pen.text(below, "predicted class", "black", heading, anchor="ms")
    beside = (MARGIN + TITLE_PIXELS // 2, top + side // 2)
    _write_upright(sheet, beside, "true class", heading)
    _draw_bar(sheet, left + side + 2 * MARGIN, top + side // 5, round(0.6 * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _colours(shares: Array) -> Array:
    """uint8 (…, 3)."""
    known = np.linspace(0, 1, len(_BLUES))
    channels = [np.interp(shares**STRETCH, known, channel) for channel in zip(*_BLUES)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _write_counts(
    pen: ImageDraw.ImageDraw, counts: Array, shares: Array, left: int, top: int, cell: int
) -> None:
    letters = font(TEXT_PIXELS)
    for row, column in np.argwhere(counts).tolist():
        middle = (left + (column + 0.5) * cell, top + (row + 0.5) * cell)
        colour = "white" if shares[row, column] > 0.3 else INK
        pen.text(middle, str(int(counts[row, column])), colour, letters, anchor="mm")


def _write_upright(
    sheet: Image.Image, at: tuple[int, int], text: str, letters: Font, *, align: str = "middle"
) -> None:
    """Text from bottom to top. It is centred on `at`, or ends below it with `align="top"`."""
    x0, y0, x1, y1 = (math.floor(edge) for edge in letters.getbbox(text))
    ink = Image.new("L", (x1 - x0 + 2, y1 - y0 + 2))
    ImageDraw.Draw(ink).text((1 - x0, 1 - y0), text, 255, letters)
    ink = ink.transpose(Image.Transpose.ROTATE_90)
    y = at[1] if align == "top" else at[1] - ink.height // 2
    sheet.paste("black", (at[0] - ink.width // 2, y), ink)


def _draw_bar(sheet: Image.Image, left: int, top: int, height: int) -> None:
    """The scale of the colours."""
    position = np.linspace(1, 0, height) ** (1 / STRETCH)
    bar = Image.fromarray(_colours(position)[:, None]).resize((BAR_PIXELS, height), 0)
    sheet.paste(bar, (left, top))
    pen, letters = ImageDraw.Draw(sheet), font(TEXT_PIXELS)
    for share, text in BAR_TICKS.items():
        y = top + round((1 - share**STRETCH) * (height - 1))
        pen.line((left + BAR_PIXELS, y, left + BAR_PIXELS + 5, y), "black")
        pen.text((left + BAR_PIXELS + 9, y), text, "black", letters, anchor="lm")
    x = left + BAR_PIXELS + MARGIN + 5 * TEXT_PIXELS
    _write_upright(sheet, (x, top + height // 2), "share of the true class", letters)
