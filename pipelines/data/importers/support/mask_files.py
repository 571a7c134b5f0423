"""Reads mask files and maps their pixels to classes.

In: bytes of an image file whose values or colours are classes. Out: uint8 (H, W) of class indices.
Must not know where the files are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ImageOps

from models.core.errors import TesseraError, UsageError
from pipelines.data.annotations import IGNORED
from pipelines.data.image_formats import open_lazily, sniff
from pipelines.data.images import open_image
from pipelines.data.sample_error import SampleError

MAX_COLOURS = 64
"""Most colours without names: more come from blending or from JPEG."""
IGNORED_NAME = "ignored"
_COLOUR = re.compile(r"\s*([^=,]+?)\s*=\s*#?([0-9a-fA-F]{6})\s*")
_VALUE_MODES = frozenset({"L", "P", "I", "I;16", "I;16B", "I;16L"})


@dataclass(frozen=True)
class MaskPixels:
    """A mask as in its file: (H, W) of values, or of colours as 0xrrggbb."""

    pixels: np.ndarray[Any, Any]
    colours: bool


def read_mask(data: bytes, where: str) -> MaskPixels:
    """The pixels of a mask file. Grey in three channels counts as grey. Raises TesseraError."""
    form = sniff(data)
    if form in ("JPEG", "WEBP"):
        raise SampleError(
            "unreadable mask",
            f"{where} is a {form} file, which doesn't keep values exactly",
            hint="masks are PNG, BMP, GIF or TIFF",
        )
    upright = open_image(data, where)  # refuses what is damaged or too large
    with open_lazily(data, form or "") as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode == "1":
        return MaskPixels(np.asarray(image, np.uint8) * np.uint8(255), colours=False)
    if image.mode in _VALUE_MODES:
        return MaskPixels(np.asarray(image), colours=False)
    if image.mode == "LA":
        return MaskPixels(np.asarray(image)[..., 0], colours=False)
    if image.mode not in ("RGB", "RGBA"):
        raise SampleError("unreadable mask", f"{where} has pixels of mode {image.mode}")
    rgb = np.asarray(image if image.mode == "RGBA" else upright.convert("RGB"))[..., :3]
    if (rgb == rgb[..., :1]).all():
        return MaskPixels(rgb[..., 0], colours=False)
    packed = rgb.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    return MaskPixels(packed, colours=True)


@dataclass(frozen=True)
class MaskClasses:
    """The classes of a data set's masks.

    colours  whether the masks have colours rather than values
    values   value or colour of each class, in the order of the classes; None if values are classes
    ignored  values or colours without a class
    note     a line for the user
    """

    classes: tuple[str, ...]
    colours: bool
    values: tuple[int, ...] | None
    ignored: tuple[int, ...]
    note: str

    def apply(self, raw: MaskPixels, where: str) -> np.ndarray[Any, Any]:
        """uint8 (H, W) of class indices and `IGNORED`. Raises SampleError."""
        pixels = raw.pixels.astype(np.int64)
        if self.colours and not raw.colours:
            pixels = pixels * 0x010101
        elif raw.colours and not self.colours:
            raise SampleError("unknown class", f"{where} has colours, while others have values")
        values = range(len(self.classes)) if self.values is None else self.values
        known = np.array([*values, *self.ignored], np.int64)
        classes = np.array([*range(len(values)), *([IGNORED] * len(self.ignored))], np.uint8)
        order = np.argsort(known)
        at = np.searchsorted(known[order], pixels).clip(max=len(known) - 1)
        found = order[at]
        strange = pixels != known[found]
        if strange.any():
            value = int(pixels[strange][0])
            shown = f"#{value:06x}" if self.colours else str(value)
            raise SampleError(
                "unknown class", f"{where} has the value {shown}, which is not a class"
            )
        return np.asarray(classes[found])


def infer_classes(masks: Iterable[tuple[str, MaskPixels]], names: Sequence[str]) -> MaskClasses:
    """Infers the classes from all masks; `names` are the classes, if the user gives them."""
    values: set[int] = set()
    colours = False
    for where, raw in masks:
        if raw.colours and not colours:
            values, colours = {value * 0x010101 for value in values}, True
        found = np.unique(raw.pixels).tolist()
        if colours and not raw.colours:
            found = [value * 0x010101 for value in found]
        values.update(found)
        if len(values) > (MAX_COLOURS if colours else IGNORED + 1):
            raise TesseraError(
                f"the masks up to {where} have {len(values)} values: too many for classes",
                hint="blended or depth images are not masks; name colours with --option colours=…",
            )
    if not values:
        raise TesseraError("no mask of the source can be read")
    if colours:
        return _of_colours(sorted(values), names)
    return _of_values(values, names)


def _of_colours(values: Sequence[int], names: Sequence[str]) -> MaskClasses:
    classes = tuple(names) or tuple(f"#{value:06x}" for value in values)
    if len(classes) != len(values):
        raise UsageError(
            f"the masks have {len(values)} colours, but {len(classes)} classes are named",
            hint="give each colour a name: --option colours=road=#804080,sky=#4682b4",
        )
    note = f"the {len(values)} colours of the masks are the classes, sorted by red, green and blue"
    return MaskClasses(classes, True, tuple(values), (), note)


def _of_values(values: set[int], names: Sequence[str]) -> MaskClasses:
    if values <= {0, IGNORED} and len(names) in (0, 2):
        classes = tuple(names) or ("background", "foreground")
        note = f"masks of 0 and 255: 0 is {classes[0]}, 255 is {classes[1]}"
        return MaskClasses(classes, False, (0, IGNORED), (), note)
    most = max(values - {IGNORED}, default=0)
    if most >= IGNORED:
        raise TesseraError(
            f"the masks have values up to {most}; a class is a value from 0 to {IGNORED - 1}",
            hint="masks with numbers of objects have no classes",
        )
    classes = tuple(names) or tuple(str(value) for value in range(most + 1))
    if most >= len(classes):
        raise UsageError(
            f"the masks have the value {most}, but {len(classes)} classes are named",
            hint="name all of them, with commas, from the value 0 on",
        )
    ignored = " and 255 is ignored" if IGNORED in values else ""
    note = f"the values of the masks are the classes, 0 to {len(classes) - 1}{ignored}"
    return MaskClasses(classes, False, None, (IGNORED,), note)


def parse_colours(text: str) -> MaskClasses:
    """NAME=#rrggbb,NAME=#rrggbb: the classes in this order. Raises UsageError."""
    pairs = []
    for part in text.split(","):
        match = _COLOUR.fullmatch(part)
        if not match:
            raise UsageError(
                f"the option colours can't be {part!r}", hint="give road=#804080,sky=#4682b4"
            )
        pairs.append((match[1], int(match[2], 16)))
    kept = [(name, value) for name, value in pairs if name != IGNORED_NAME]
    if len({name for name, _ in kept}) != len(kept) or len({v for _, v in pairs}) != len(pairs):
        raise UsageError(f"the option colours {text!r} has a duplicate name or colour")
    if not 0 < len(kept) < IGNORED:
        raise UsageError(f"the option colours names {len(kept)} classes", hint="name 1 to 254")
    ignored = tuple(value for name, value in pairs if name == IGNORED_NAME)
    return MaskClasses(
        tuple(name for name, _ in kept),
        True,
        tuple(value for _, value in kept),
        ignored,
        f"{len(kept)} colours are classes, from --option colours",
    )
