"""Learning curves as a PNG file, put together with Pillow: every training draws them, and
matplotlib would need half a second, and as much again to be loaded.

In: metrics by step. Out: one PNG at the given path, whose folder is created. Must not know what
was trained or where the files go.

All lengths are pixels of the picture, unless a name says otherwise.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from models.core.errors import TesseraError
from pipelines.visuals.draw import font, one_line

Points = list[tuple[int, float]]

FIRST = ("loss", "accuracy")
"""The metrics that come first."""
MOST_COLUMNS = 3
WIDTH, HEIGHT = 504, 348
"""Of one plot, with its labels."""
LEFT, RIGHT, TOP, BOTTOM = 74, 16, 66, 54
"""Room for labels around the lines."""
TEXT_PIXELS, TITLE_PIXELS = 13, 17
LINE_PIXELS, DOT_RADIUS, TICK_PIXELS = 2.5, 3, 5
FINER = 3
"""Lines are drawn this much larger and reduced, so that they have smooth edges."""
MOST_DOTS = 30
"""A line with at most this many points shows each."""
TICKS = 6
"""The most distances between the ticks of an axis."""
MARGIN_SHARE = 0.06
"""The room above and below a line, as a share of its height."""
COLOURS = {"train": "#8a94a6", "val": "#c2410c", "": "#1f6f8b"}
GRID, INK = "#e5e7eb", "#1f2937"


class Scale(NamedTuple):
    """From values to pixels, and the values of the ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]

    def at(self, value: float) -> float:
        share = value / (self.high - self.low) - self.low / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def learning_curves(history: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Draws metrics over the training, one plot per name; `train/loss` and `val/loss` share one.

    `train/…` is by step and `val/…` by epoch: a plot with both has steps below and epochs above, so
    both lines span the whole training. Raises TesseraError if no value is finite.
    """
    plots: dict[str, dict[str, Points]] = {}
    for name, points in history.items():
        split, _, metric_name = name.partition("/") if "/" in name else ("", "", name)
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        if finite:
            plots.setdefault(metric_name, {})[split] = finite
    if not plots:
        raise TesseraError("there is no metric to draw")
    first = {name: rank for rank, name in enumerate(FIRST)}
    order = sorted(plots, key=lambda n: (first.get(n, len(first)), "val" not in plots[n]))
    columns = min(MOST_COLUMNS, len(order))
    rows = math.ceil(len(order) / columns)
    sheet = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), "white")
    for place, name in enumerate(order):
        plot = _plot(name, plots[name])
        sheet.paste(plot, (place % columns * WIDTH, place // columns * HEIGHT))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _plot(name: str, lines: Mapping[str, Points]) -> Image.Image:
    values = [value for points in lines.values() for _, value in points]
    y = _value_scale(min(values), max(values))
    below = {split: points for split, points in lines.items() if split != "val"}
    above = {split: points for split, points in lines.items() if split == "val" and below}
    x = _step_scale(below or lines)
    scales = {split: _step_scale(above) if split in above else x for split in lines}
    canvas = _lines(lines, scales, x, y)
    pen, letters = ImageDraw.Draw(canvas), font(TEXT_PIXELS)
    for tick in x.ticks:
        pen.text((x.at(tick), y.start + 8), f"{tick:g}", INK, letters, anchor="mt")
    for tick, text in zip(y.ticks, tick_texts(y.ticks)):
        pen.text((LEFT - 8, y.at(tick)), text, INK, letters, anchor="rm")
    unit = "epoch" if set(below or lines) <= {"val", "settings"} else "step"
    middle = (x.start + x.end) / 2
    pen.text((middle, HEIGHT - 10), unit, INK, letters, anchor="ms")
    for scale in [scales[split] for split in above]:
        for tick in scale.ticks:
            pen.text((scale.at(tick), y.end - 8), f"{tick:g}", INK, letters, anchor="ms")
        pen.text((middle, y.end - 26), "epoch", INK, letters, anchor="ms")
    title = one_line(name.replace("_", " "))
    heading = font(TITLE_PIXELS)
    while heading.getlength(title) > WIDTH - LEFT - RIGHT:
        title = title[: max(1, len(title) * 7 // 8)].rstrip("…") + "…"
    pen.text((LEFT, y.end - (42 if above else 12)), title, "black", heading, anchor="ls")
    if len(lines) > 1:
        _legend(pen, lines, scales, y)
    return canvas


def _lines(
    lines: Mapping[str, Points], scales: Mapping[str, Scale], x: Scale, y: Scale
) -> Image.Image:
    """The picture without its texts."""
    large = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER), "white")
    pen = ImageDraw.Draw(large)

    def line(points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        finer = [(px * FINER, py * FINER) for px, py in points]
        pen.line(finer, colour, round(width * FINER), joint="curve" if width > 2 else None)

    for tick in x.ticks:
        line([(x.at(tick), y.start), (x.at(tick), y.end)], GRID, 1)
    for tick in y.ticks:
        line([(x.start, y.at(tick)), (x.end, y.at(tick))], GRID, 1)
    line([(x.start, y.end), (x.start, y.start), (x.end, y.start)], INK, 1.25)
    for tick in x.ticks:
        line([(x.at(tick), y.start), (x.at(tick), y.start + TICK_PIXELS)], INK, 1.25)
    for tick in y.ticks:
        line([(x.start - TICK_PIXELS, y.at(tick)), (x.start, y.at(tick))], INK, 1.25)
    for split in sorted(lines):
        colour = COLOURS.get(split, COLOURS[""])
        places = [(scales[split].at(step), y.at(value)) for step, value in lines[split]]
        if len(places) > 1:
            line(places, colour, LINE_PIXELS)
        for px, py in places if len(places) <= MOST_DOTS else ():
            pen.circle((px * FINER, py * FINER), DOT_RADIUS * FINER, fill=colour)
    return large.reduce(FINER)


def _legend(
    pen: ImageDraw.ImageDraw, lines: Mapping[str, Points], scales: Mapping[str, Scale], y: Scale
) -> None:
    """The names of the lines, in the corner that hides the fewest points."""
    letters = font(TEXT_PIXELS)
    names = {split: one_line(split) or "all" for split in sorted(lines)}
    width = 36 + max(letters.getlength(text) for text in names.values())
    height = 20 * len(names)
    places = [(scales[s].at(step), y.at(v)) for s, points in lines.items() for step, v in points]
    corners = [
        (left, top)
        for left in (WIDTH - RIGHT - width - 6, LEFT + 10.0)
        for top in (y.end + 4.0, y.start - height - 6.0)
    ]

    def hidden(corner: tuple[float, float]) -> int:
        left, top = corner
        return sum(left - 8 < px < left + width and top < py < top + height for px, py in places)

    left, top = min(corners, key=hidden)
    for row, (split, text) in enumerate(names.items()):
        middle = top + 20 * row + 10
        pen.line(
            (left, middle, left + 24, middle), COLOURS.get(split, COLOURS[""]), round(LINE_PIXELS)
        )
        pen.text((left + 32, middle), text, INK, letters, anchor="lm")


def _step_scale(lines: Mapping[str, Points]) -> Scale:
    high = max(step for points in lines.values() for step, _ in points) or 1
    step = max(1, _round_up(high / TICKS))
    ticks = [float(value) for value in range(0, high + 1, round(step))]
    return Scale(0, high, LEFT, WIDTH - RIGHT, ticks)


def _value_scale(low: float, high: float) -> Scale:
    room = (high / 2 - low / 2) * 2 * MARGIN_SHARE  # the difference itself may be infinite
    if room <= max(abs(low), abs(high)) * 1e-9:
        room = abs(high) * 0.05 or 0.05
    most = sys.float_info.max
    low, high = max(low - room, -most), min(high + room, most)
    step = _round_up(high / TICKS - low / TICKS)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    return Scale(low, high, HEIGHT - BOTTOM, TOP, ticks)


def _round_up(step: float) -> float:
    """The next of …, 0.1, 0.2, 0.5, 1, 2, 5, 10, …"""
    power = 10.0 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= step * (1 - 1e-9))


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The numbers beside an axis, all with as many digits as tell them apart."""
    greatest = max(abs(tick) for tick in ticks)
    small_or_large = greatest and not 1e-3 <= greatest < 1e6
    for digits in range(13):
        texts = [f"{tick + 0.0:.{digits}{'e' if small_or_large else 'f'}}" for tick in ticks]
        if len(set(texts)) == len(texts) and all(
            math.isclose(float(text), tick, rel_tol=1e-6, abs_tol=greatest * 1e-9)
            for text, tick in zip(texts, ticks)
        ):
            break
    return [text if tick else "0" for text, tick in zip(texts, ticks)] if small_or_large else texts
