"""Draws panels: an image with its boxes, masks and class names.

In: a `Panel` of annotations or predictions. Out: an RGB image. Must not know where a panel comes
from, or where the image goes. A class has the same colour in all images.

    C channels (1 or 3), H height, W width
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from models.core.family import Panel

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

NAMED_OBJECTS = 15
"""With more objects, names would hide the image: only colours show the classes."""
NO_CLASS = 255
"""The value of pixels without a class in `Panel.mask`."""
TEXT_PIXELS = 12
_LONGEST_NAME = 24
_OBJECT_ALPHA, _PIXEL_ALPHA = 0.38, 0.5
_RIM, _NO_CLASS_COLOUR = (16, 18, 24), (128, 128, 128)
_FIRST_COLOURS = (
    *("#e6194b", "#3cb44b", "#4c8dff", "#ffb000", "#b44cff"),
    *("#00c2c7", "#ff6f2c", "#a3c400", "#ff5fa8", "#8f6b3d"),
)


@cache
def colour(index: int) -> Colour:
    """The colour of a class, visible on dark and on bright images."""
    if index < len(_FIRST_COLOURS):
        return _rgb(_FIRST_COLOURS[index])
    hue = (20 + index * 137.508) % 360  # the golden angle: neighbours differ, no hue repeats
    return _rgb(f"hsl({hue:.1f}, 60%, {62 + index % 3 * 6}%)")


def hex_colour(index: int) -> str:
    """The colour of a class as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*colour(index))


def _rgb(text: str) -> Colour:
    red, green, blue = ImageColor.getrgb(text)[:3]
    return red, green, blue


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever has more contrast with the background."""
    red, green, blue = ((part / 255) ** 2.2 for part in background)
    # At a luminance of 0.18 both have the same contrast (WCAG 2).
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18
    return (0, 0, 0) if light else (255, 255, 255)


def draw(panel: Panel, classes: Sequence[str], *, side: int | None = None) -> Image.Image:
    """Draws a panel, except for its caption, and returns an RGB image.

    With `side` the image is first scaled so that its longer side has that many pixels: lines and
    names are then equally thick in all images, and enlarged pixels stay visible. Crowds have dashed
    lines; pixels without a class are grey.
    """
    base = _scale(_to_image(panel.image), side)
    if panel.mask is not None:
        base = _paint_classes(base, panel.mask.numpy())
    if panel.boxes is None or panel.labels is None:
        return base
    if panel.masks is not None:
        base = _paint_objects(base, panel.masks.numpy(), panel.labels.tolist())
    _draw_boxes(base, panel, classes, base.width / panel.image.shape[-1])
    return base


def _scale(image: Image.Image, side: int | None) -> Image.Image:
    if side is None:
        return image
    factor = side / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    kind = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX
    return image.resize(size, kind, reducing_gap=2.0 if factor < 1 else None)


def _to_image(image: Tensor) -> Image.Image:
    pixels = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def _paint_classes(base: Image.Image, mask: np.ndarray[Any, Any]) -> Image.Image:
    palette = np.array([colour(index) for index in range(256)], np.uint8)
    palette[NO_CLASS] = _NO_CLASS_COLOUR
    pixels = Image.fromarray(mask).resize(base.size, Image.Resampling.NEAREST)
    painted = Image.fromarray(palette[np.asarray(pixels)])
    return Image.blend(base, painted, _PIXEL_ALPHA)


def _paint_objects(
    base: Image.Image, bitmaps: Iterable[np.ndarray[Any, Any]], labels: Sequence[int]
) -> Image.Image:
    canvas = np.array(base)
    for pixels, label in zip(bitmaps, labels):
        bitmap = Image.fromarray(pixels).resize(base.size, Image.Resampling.NEAREST)
        inside = np.asarray(bitmap) > 0
        tint = np.array(colour(label))
        canvas[inside] = (canvas[inside] * (1 - _OBJECT_ALPHA) + tint * _OBJECT_ALPHA).astype(
            np.uint8
        )
        canvas[_edge(inside)] = tint
    return Image.fromarray(canvas)


def _edge(inside: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The pixels of a region that have a neighbour outside of it."""
    padded = np.pad(inside, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(inside & ~core)


def _draw_boxes(base: Image.Image, panel: Panel, classes: Sequence[str], factor: float) -> None:
    assert panel.boxes is not None
    assert panel.labels is not None
    pen = ImageDraw.Draw(base)
    labels = panel.labels.tolist()
    crowd = [False] * len(labels) if panel.crowd is None else panel.crowd.tolist()
    # The outline of a mask shows where its object is; a box around it would hide the image.
    is_boxed = [True] * len(labels) if panel.masks is None else crowd
    boxes = np.rint(panel.boxes.double().numpy().reshape(-1, 4) * factor).astype(int).tolist()
    for (left, top, right, bottom), label, dashed, boxed in zip(boxes, labels, crowd, is_boxed):
        if boxed:
            corners = left, top, max(right - 1, left), max(bottom - 1, top)
            _rectangle(pen, corners, colour(label), dashed=dashed)
    if len(labels) > NAMED_OBJECTS:
        return
    for number, ((left, top, _, _), label) in enumerate(zip(boxes, labels)):
        words = [classes[label]] if len(classes) > 1 else []
        words += [f"{float(panel.scores[number]):.0%}"] if panel.scores is not None else []
        if words:
            _tag(pen, base.size, left, top, " ".join(words), colour(label))


def _rectangle(
    pen: ImageDraw.ImageDraw, corners: tuple[int, int, int, int], fill: Colour, *, dashed: bool
) -> None:
    left, top, right, bottom = corners
    if right - left > 8 and bottom - top > 8:  # a smaller box would be all rim
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_RIM, width=3)
    thick = 2 if min(right - left, bottom - top) > 4 else 1
    pen.rectangle(corners, outline=fill, width=thick)
    if dashed:
        for x in range(left + 6, right, 12):
            pen.line((x, top, min(x + 5, right), top), _RIM, thick)
            pen.line((x, bottom, min(x + 5, right), bottom), _RIM, thick)
        for y in range(top + 6, bottom, 12):
            pen.line((left, y, left, min(y + 5, bottom)), _RIM, thick)
            pen.line((right, y, right, min(y + 5, bottom)), _RIM, thick)


def _tag(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], left: int, top: int, name: str, fill: Colour
) -> None:
    letters = font(TEXT_PIXELS)
    text = one_line(name)
    text = text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"
    width, height = round(pen.textlength(text, letters)) + 6, TEXT_PIXELS + 5
    x = max(0, min(left, size[0] - width))
    y = top - height if top >= height else top
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=fill)
    pen.text((x + 3, y + height / 2), text, text_colour(fill), letters, anchor="lm")


@cache
def font(pixels: int) -> Font:
    """The font that comes with matplotlib: it has more scripts than Pillow's."""
    spec = importlib.util.find_spec("matplotlib")
    found = Path(spec.origin or "").parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if spec else None
    if found is None or not found.is_file():
        return ImageFont.load_default(pixels)
    return ImageFont.truetype(str(found), pixels)


def one_line(text: str) -> str:
    """The text on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
