"""Collects the objects of one image, on the pixels that they were drawn on.

In: boxes and masks as a format has them, one by one. Out: `Objects` on the upright image. Must not
know any format.

An image with an EXIF orientation has two sizes: as stored, and upright, as it is shown and packed.
`open_canvas` finds out on which one the annotation was made; `ObjectList.finish` turns it.

    (H, W) of an annotation: the size of its canvas
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.data import rle
from pipelines.data.annotations import Damage, Objects, clip
from pipelines.data.image_formats import sniff
from pipelines.data.importers.support.reading import check_stated_size, choose, image_size
from pipelines.data.sample_error import SampleError

EXIF_OPTION: Mapping[str, str] = {
    "exif": "the pixels that annotations were made on: stored, or upright as EXIF turns them "
    "(default)",
}
_ORIENTATION = 0x0112
_SWAPPED = (5, 6, 7, 8)


class Canvas(NamedTuple):
    """The size that an annotation was made on, and the EXIF orientation that turns it upright."""

    height: int
    width: int
    orientation: int = 1


def read_exif_option(options: Mapping[str, str]) -> str:
    """ "stored", "upright", or "" if it isn't given. Raises UsageError."""
    return choose(options, "exif", ("stored", "upright"), "upright") if "exif" in options else ""


def open_canvas(data: bytes, where: str, exif: str, stated: Sequence[int] = (0, 0)) -> Canvas:
    """The canvas of an image's annotation. `stated` is its (height, width) in the annotation, 0 if
    it isn't there.

    Raises SampleError if the stated size is of another image, or of the stored pixels of an image
    that EXIF turns, unless `exif` says so.
    """
    upright = image_size(data, where)
    known, size = all(stated), (int(stated[0]), int(stated[1]))
    if exif != "stored" and (not known or size == upright):
        return Canvas(*upright)
    orientation = _read_orientation(data)
    stored = upright[::-1] if orientation in _SWAPPED else upright
    if exif == "stored":
        if known:
            check_stated_size(size, stored, where)
        return Canvas(*stored, orientation)
    if not exif and size == stored != upright:
        raise SampleError(
            "annotation of the stored pixels",
            f"{where}: its annotation is for an image {size[1]} wide and {size[0]} high, as its "
            f"pixels are stored; its EXIF orientation {orientation} turns it",
            hint="--option exif=stored turns the annotations too",
        )
    check_stated_size(size, upright, where)
    return Canvas(*upright)


def _read_orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=[sniff(data) or ""]) as image:
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # an unreadable EXIF block counts as no orientation
        return 1
    return value if value in range(1, 9) else 1


def rotated_box(where: str, angle: float) -> SampleError:
    """The error for an object that is a rotated box."""
    return SampleError(
        "unsupported shape",
        f"{where} is rotated by {angle:g} degrees, which no task reads",
        hint="export it as a polygon, or leave it out with --drop boxes",
    )


class ObjectList:
    """The objects of an image so far. An object that raises SampleError is damaged."""

    def __init__(self, canvas: Canvas, *, with_masks: bool) -> None:
        self.canvas, self.with_masks = canvas, with_masks
        self._boxes: list[Sequence[float]] = []
        self._labels: list[int] = []
        self._crowd: list[bool] = []
        self._masks: list[bytes] = []
        self._damaged: list[Damage] = []

    @contextmanager
    def one(self, label: int | None = None) -> Iterator[None]:
        """Reads one object, which is added at the end of the block."""
        try:
            yield
        except SampleError as error:
            self._damaged.append(Damage(error.reason, error.message, error.hint, label))

    def add(
        self,
        label: int,
        box: Sequence[float] | None,
        where: str,
        *,
        mask: rle.Counts | None = None,
        crowd: bool = False,
    ) -> None:
        """Adds an object. Without a box it gets that of its mask."""
        if self.with_masks and mask is None:
            raise SampleError(
                "missing mask",
                f"{where} has no mask, while others have",
                hint="--option task=detection takes the boxes of all",
            )
        if box is None:
            if mask is None or not rle.area(mask):
                raise SampleError("mask without pixels", f"{where}: its mask has no pixel")
            box = [float(value) for value in rle.box(mask, self.canvas.height)]
        self._boxes.append(box)
        self._labels.append(label)
        self._crowd.append(crowd)
        if self.with_masks and mask is not None:
            self._masks.append(rle.write(mask))

    def finish(self) -> Objects:
        """The objects, upright; boxes that exceed the image by at most half a pixel are clipped."""
        boxes = np.array(self._boxes, np.float64).reshape(-1, 4)
        return turn(
            Objects(
                clip(boxes, self.canvas.height, self.canvas.width),
                np.array(self._labels, np.int64),
                np.array(self._crowd, bool),
                tuple(self._masks) if self.with_masks else None,
                tuple(self._damaged),
            ),
            self.canvas,
        )


def turn(objects: Objects, canvas: Canvas) -> Objects:
    """The objects on the upright image."""
    if canvas.orientation == 1:
        return objects
    left, top, right, bottom = objects.boxes.T
    height, width = canvas.height, canvas.width
    flip_x, flip_y = (width - right, width - left), (height - bottom, height - top)
    columns, rows = {
        2: (flip_x, (top, bottom)),
        3: (flip_x, flip_y),
        4: ((left, right), flip_y),
        5: ((top, bottom), (left, right)),
        6: (flip_y, (left, right)),
        7: (flip_y, flip_x),
        8: ((top, bottom), flip_x),
    }[canvas.orientation]
    boxes = np.stack([columns[0], rows[0], columns[1], rows[1]], 1)
    masks = objects.masks
    if masks is not None:
        masks = tuple(_turn_mask(text, canvas) for text in masks)
    return Objects(boxes, objects.labels, objects.crowd, masks, objects.damaged)


def _turn_mask(text: bytes, canvas: Canvas) -> bytes:
    pixels = rle.to_mask(rle.parse(text, canvas.height, canvas.width), canvas.height, canvas.width)
    if canvas.orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if canvas.orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if canvas.orientation in _SWAPPED:
        pixels = pixels.T
    return rle.write(rle.of_mask(np.ascontiguousarray(pixels)))
