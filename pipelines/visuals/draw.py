"""What is said of an image, drawn on it: boxes, masks, class names.

In: an image and its annotation, true or predicted. Out: an image to look at. Must not know where
either comes from, or where the picture goes. A class has the same colour in every picture.

    C channels (1 or 3), H height, W width
"""

from __future__ import annotations

import dataclasses
import importlib.util
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from models.core.family import Panel
from pipelines.data.annotations import IGNORED, Annotation, Mask, Objects, mask_pixels

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

NAMED_OBJECTS = 15
"""With more objects than this, names would hide the image: colours alone tell the classes."""
TEXT_PIXELS = 12
_LONGEST_NAME = 24
_FILL, _PIXELS = 0.38, 0.5
"""How much of the colour lies on an object, and on a pixel of a class."""
_DARK, _UNCLASSED = (16, 18, 24), (128, 128, 128)
_FIRST = (
    *("#e6194b", "#3cb44b", "#4c8dff", "#ffb000", "#b44cff"),
    *("#00c2c7", "#ff6f2c", "#a3c400", "#ff5fa8", "#8f6b3d"),
)


@cache
def colour(index: int) -> Colour:
    """The colour of a class, bright enough for dark images and strong enough for bright ones."""
    if index < len(_FIRST):
        return _rgb(_FIRST[index])
    hue = (20 + index * 137.508) % 360  # the golden angle: neighbours differ, no hue comes twice
    return _rgb(f"hsl({hue:.1f}, 60%, {62 + index % 3 * 6}%)")


def hex_colour(index: int) -> str:
    """The same as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*colour(index))


def _rgb(text: str) -> Colour:
    red, green, blue = ImageColor.getrgb(text)[:3]
    return red, green, blue


def ink(ground: Colour) -> Colour:
    """Black or white, whichever is easier to read on that colour."""
    red, green, blue = ((part / 255) ** 2.2 for part in ground)
    # Where the luminance is 0.18, both have the same contrast (WCAG 2).
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18
    return (0, 0, 0) if light else (255, 255, 255)


def draw(
    image: Tensor | Image.Image,
    annotation: Annotation | None,
    classes: Sequence[str],
    *,
    caption: str = "",
    side: int | None = None,
) -> Image.Image:
    """An RGB image with its annotation on it, and `caption` in a band below.

    `image` is uint8 (C, H, W), or of mode L or RGB. With `side` its longer side is made so long
    first, so that lines and names are as thick in all pictures; enlarged pixels stay to be seen.
    Crowds have broken lines; pixels without a class are grey.
    """
    base = _scaled(_open(image), side)
    if isinstance(annotation, Mask):
        base = _paint_classes(base, annotation)
    elif annotation is not None:
        if annotation.masks:
            bitmaps = _bitmaps(annotation, _size(image))
            base = _paint_objects(base, bitmaps, annotation.labels.tolist())
        _draw_boxes(base, annotation, classes, base.width / _size(image)[0])
    return _with_caption(base, caption) if caption else base


def panel(panel: Panel, classes: Sequence[str], *, side: int | None = None) -> Image.Image:
    """An RGB image of what a panel says, but for its caption. `side` as in `draw`."""
    base = _scaled(_open(panel.image), side)
    if panel.mask is not None:
        base = _paint_classes(base, Mask(panel.mask.numpy()))
    if panel.boxes is None or panel.labels is None:
        return base
    count = len(panel.boxes)
    boxes = panel.boxes.double().numpy().reshape(-1, 4)
    objects = Objects(boxes, panel.labels.numpy(), np.zeros(count, bool))
    if panel.masks is not None:
        base = _paint_objects(base, panel.masks.numpy(), panel.labels.tolist())
        objects = dataclasses.replace(
            objects, masks=(b"",) * count
        )  # painted: no boxes around them
    scores = None if panel.scores is None else panel.scores.tolist()
    _draw_boxes(base, objects, classes, base.width / panel.image.shape[-1], scores)
    return base


def _scaled(base: Image.Image, side: int | None) -> Image.Image:
    """Its longer side as long as `side`."""
    if side is None:
        return base
    factor = side / max(base.size)
    size = max(1, round(base.width * factor)), max(1, round(base.height * factor))
    kind = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX
    return base.resize(size, kind, reducing_gap=2.0 if factor < 1 else None)


def _open(image: Tensor | Image.Image) -> Image.Image:
    if isinstance(image, Tensor):
        pixels = image.permute(1, 2, 0).cpu().numpy()
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels)
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _size(image: Tensor | Image.Image) -> tuple[int, int]:
    """(width, height)."""
    if isinstance(image, Tensor):
        return image.shape[-1], image.shape[-2]
    return image.size


def _paint_classes(base: Image.Image, mask: Mask) -> Image.Image:
    palette = np.array([colour(index) for index in range(256)], np.uint8)
    palette[IGNORED] = _UNCLASSED
    pixels = Image.fromarray(mask.pixels).resize(base.size, Image.Resampling.NEAREST)
    painted = Image.fromarray(palette[np.asarray(pixels)])
    return Image.blend(base, painted, _PIXELS)


def _bitmaps(objects: Objects, size: tuple[int, int]) -> Iterator[np.ndarray[Any, Any]]:
    """uint8 (H, W) of each object, one at a time: a thousand masks of a large photo at once would
    not fit into memory."""
    width, height = size
    for number in range(len(objects.masks or ())):
        one = slice(number, number + 1)
        alone = Objects(
            objects.boxes[one],
            objects.labels[one],
            objects.crowd[one],
            (objects.masks or ())[one],
        )
        yield mask_pixels(alone, height, width)[0]


def _paint_objects(
    base: Image.Image, bitmaps: Iterable[np.ndarray[Any, Any]], labels: Sequence[int]
) -> Image.Image:
    canvas = np.array(base)
    for pixels, label in zip(bitmaps, labels):
        bitmap = Image.fromarray(pixels).resize(base.size, Image.Resampling.NEAREST)
        inside = np.asarray(bitmap) > 0
        tint = np.array(colour(label))
        canvas[inside] = (canvas[inside] * (1 - _FILL) + tint * _FILL).astype(np.uint8)
        canvas[_edge(inside)] = tint
    return Image.fromarray(canvas)


def _edge(inside: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The pixels of a region that have a neighbour outside."""
    padded = np.pad(inside, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(inside & ~core)


def _draw_boxes(
    base: Image.Image,
    objects: Objects,
    classes: Sequence[str],
    factor: float,
    scores: Sequence[float] | None = None,
) -> None:
    pen = ImageDraw.Draw(base)
    # With masks the outlines say where, and boxes around them would only hide it.
    boxed = np.ones(len(objects.boxes), bool) if objects.masks is None else objects.crowd
    places = np.rint(objects.boxes * factor).astype(int).tolist()
    drawn = list(zip(places, objects.labels.tolist(), objects.crowd.tolist(), boxed.tolist()))
    for (left, top, right, bottom), label, crowd, outlined in drawn:
        if not outlined:
            continue
        corners = left, top, max(right - 1, left), max(bottom - 1, top)
        _rectangle(pen, corners, colour(label), broken=crowd)
    if len(drawn) > NAMED_OBJECTS:
        return
    for number, ((left, top, _, _), label, _, _) in enumerate(drawn):
        words = [classes[label]] if len(classes) > 1 else []
        words += [f"{scores[number]:.0%}"] if scores is not None else []
        if words:
            _tag(pen, base.size, left, top, " ".join(words), colour(label))


def _rectangle(
    pen: ImageDraw.ImageDraw, corners: tuple[int, int, int, int], tint: Colour, *, broken: bool
) -> None:
    left, top, right, bottom = corners
    if right - left > 8 and bottom - top > 8:  # else the dark rim would be all of it
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_DARK, width=3)
    thick = 2 if min(right - left, bottom - top) > 4 else 1
    pen.rectangle(corners, outline=tint, width=thick)
    if broken:
        for x in range(left + 6, right, 12):
            pen.line((x, top, min(x + 5, right), top), _DARK, thick)
            pen.line((x, bottom, min(x + 5, right), bottom), _DARK, thick)
        for y in range(top + 6, bottom, 12):
            pen.line((left, y, left, min(y + 5, bottom)), _DARK, thick)
            pen.line((right, y, right, min(y + 5, bottom)), _DARK, thick)


def _tag(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], left: int, top: int, name: str, tint: Colour
) -> None:
    letters = font(TEXT_PIXELS)
    text = one_line(name)
    text = text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"
    width, height = round(pen.textlength(text, letters)) + 6, TEXT_PIXELS + 5
    x = max(0, min(left, size[0] - width))
    y = top - height if top >= height else top
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=tint)
    pen.text((x + 3, y + height / 2), text, ink(tint), letters, anchor="lm")


def _with_caption(base: Image.Image, caption: str) -> Image.Image:
    letters = font(TEXT_PIXELS)
    columns = max(8, round(base.width / (0.58 * TEXT_PIXELS)))
    lines = textwrap.wrap(one_line(caption), columns, max_lines=3, placeholder="…")
    line_pixels = TEXT_PIXELS + 4
    whole = Image.new("RGB", (base.width, base.height + len(lines) * line_pixels + 6), "white")
    whole.paste(base, (0, 0))
    pen = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        pen.text((3, base.height + 4 + number * line_pixels), line, "black", letters)
    return whole


@cache
def font(pixels: int) -> Font:
    """The font that matplotlib brings along, which knows more scripts than Pillow's."""
    spec = importlib.util.find_spec("matplotlib")
    found = Path(spec.origin or "").parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if spec else None
    if found is None or not found.is_file():
        return ImageFont.load_default(pixels)
    return ImageFont.truetype(str(found), pixels)


def one_line(text: str) -> str:
    """The text in one line and without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
