"""Sources out of images with named boxes and polygons: what labelme, CVAT, KITTI, Open Images and
tables of boxes have in common.

In: for each image its shapes, as a format has them. Out: a `Source` for instance segmentation if a
shape is a polygon, else for detection. Must not know any format.

Classes are the names in alphabetical order, unless they are given. Where some shapes are polygons
and others boxes, a box is a damaged object: `--option task=detection` takes the boxes of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from models.core.errors import TesseraError, UsageError
from pipelines.data import rle
from pipelines.data.annotations import Objects
from pipelines.data.card import Split
from pipelines.data.importers.support.coco_masks import draw
from pipelines.data.importers.support.object_lists import (
    EXIF_OPTION,
    Canvas,
    ObjectList,
    open_canvas,
    read_exif_option,
)
from pipelines.data.importers.support.reading import choose, load, make_keys, no_images, read_inside
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import Item, Source

TASKS = ("instance_segmentation", "detection")
CLASSES_OPTION: Mapping[str, str] = {
    "classes": "names of the classes, with commas; by default those that occur, in alphabetical "
    "order",
}
SHAPE_OPTIONS: Mapping[str, str] = {
    "task": "detection takes the boxes of all shapes; by default polygons are kept if there are "
    "any",
    **CLASSES_OPTION,
    **EXIF_OPTION,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One object.

    name     of its class
    where    names it in messages
    box      left, top, right, bottom; None for that around its rings
    rings    polygons, each x, y, x, y, …
    counts   its mask as run lengths of rows, in the box; see CVAT
    crowd    a region of many objects
    problem  (reason, details) if it can't be used
    """

    name: str
    where: str
    box: tuple[float, ...] | None = None
    rings: tuple[tuple[float, ...], ...] = ()
    counts: tuple[int, ...] = ()
    crowd: bool = False
    problem: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ShapedImage:
    """An image with its shapes.

    origin       its path in the source
    size         (height, width) in the annotation, 0 if it isn't there
    files        label files of this image alone, relative to the source
    normalised   whether coordinates are divided by the image's width and height
    problem      (reason, details) if it can't be used
    """

    origin: str
    shapes: tuple[Shape, ...] = ()
    split: Split | None = None
    size: tuple[int, int] = (0, 0)
    files: tuple[str, ...] = ()
    normalised: bool = False
    problem: tuple[str, str] | None = None


def make_source(
    folder: Path,
    images: Sequence[ShapedImage],
    options: Mapping[str, str],
    *,
    classes: Sequence[str] | None = None,
    shared_files: Iterable[Path] = (),
    notes: Iterable[str] = (),
    orphans: Iterable[tuple[str, str]] = (),
) -> Source:
    """The source of these images. `classes` are those that a file of the source lists.

    Raises TesseraError if there are no images, or no shapes and no classes.
    """
    if not images:
        raise no_images(folder)
    notes = list(notes)
    shapes = [shape for image in images for shape in image.shapes]
    names = _read_classes(options) or tuple(classes or sorted({s.name for s in shapes if s.name}))
    if not names:
        problems = [image.problem[1] for image in images if image.problem]
        if len(problems) == len(images):
            raise TesseraError(f"no annotation can be used: {problems[0]}")
        raise TesseraError(
            "the annotations have no objects", hint="give the classes: --option classes=NAME,NAME"
        )
    task = choose(options, "task", TASKS, "") if "task" in options else _tell_task(shapes, notes)
    keys = make_keys([_utf8(image.origin) for image in images])
    items = [
        Item(key, image.origin, None, image.split, row, image.problem)
        for row, (key, image) in enumerate(zip(keys, images))
    ]
    numbers = {name: number for number, name in enumerate(names)}
    exif = read_exif_option(options)
    with_masks = task == "instance_segmentation"
    return Source(
        name=folder.resolve().name,
        task=task,
        classes=names,
        items=items,
        load=partial(load, folder),
        annotate=partial(_annotate, folder, tuple(images), numbers, with_masks, exif),
        files=partial(_files, folder, tuple(images)),
        notes=tuple(notes),
        folder=folder,
        shared_files=tuple(shared_files),
        orphans=tuple(orphans),
    )


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _read_classes(options: Mapping[str, str]) -> tuple[str, ...]:
    if "classes" not in options:
        return ()
    given = tuple(name.strip() for name in options["classes"].split(","))
    if not all(given) or len(set(given)) != len(given):
        raise UsageError(
            f"the option classes {options['classes']!r} has an empty or duplicate name"
        )
    return given


def _tell_task(shapes: Sequence[Shape], notes: list[str]) -> str:
    usable = [shape for shape in shapes if shape.problem is None]
    drawn = sum(bool(shape.rings or shape.counts) for shape in usable)
    if not drawn:
        return "detection"
    if drawn < len(usable):
        notes.append(
            f"{len(usable) - drawn} of {len(usable)} objects are boxes, the others have masks: a "
            "box is damaged here; --option task=detection takes the boxes of all"
        )
    return "instance_segmentation"


def _files(folder: Path, images: Sequence[ShapedImage], item: Item) -> tuple[Path, ...]:
    return (folder / item.origin, *(folder / path for path in images[item.row].files))


def _annotate(
    folder: Path,
    images: Sequence[ShapedImage],
    numbers: Mapping[str, int],
    with_masks: bool,
    exif: str,
    item: Item,
) -> Objects:
    image = images[item.row]
    canvas = open_canvas(read_inside(folder, item.origin), item.origin, exif, image.size)
    found = ObjectList(canvas, with_masks=with_masks)
    for shape in image.shapes:
        with found.one(numbers.get(shape.name)):
            _add(found, shape, numbers, canvas, image.normalised)
    return found.finish()


def _add(
    found: ObjectList, shape: Shape, numbers: Mapping[str, int], canvas: Canvas, normalised: bool
) -> None:
    if shape.problem:
        raise SampleError(*shape.problem)
    if shape.name not in numbers:
        raise SampleError("unknown class", f"{shape.where} has the class {shape.name[:50]!r}")
    scale = (canvas.width, canvas.height) if normalised else (1, 1)
    rings = [[v * scale[at % 2] for at, v in enumerate(ring)] for ring in shape.rings]
    box = shape.box and [v * scale[at % 2] for at, v in enumerate(shape.box)]
    mask = None
    if found.with_masks and rings:
        mask = draw(rings, canvas.height, canvas.width, shape.where)
    elif found.with_masks and shape.counts:
        mask = _place_mask(shape, canvas)
    if mask is not None and not rle.area(mask):
        raise SampleError("mask without pixels", f"{shape.where}: its mask has no pixel")
    if not box:
        points = np.array([value for ring in rings for value in ring], np.float64).reshape(-1, 2)
        if not len(points):
            raise SampleError("no box", f"{shape.where} has neither a box nor corners")
        box = [float(value) for value in (*points.min(0), *points.max(0))]
    found.add(numbers[shape.name], box, shape.where, mask=mask, crowd=shape.crowd)


def _place_mask(shape: Shape, canvas: Canvas) -> rle.Counts:
    """Run lengths of rows in a box, from zeros on, as a mask of the whole image."""
    left, top, right, bottom = (int(value) for value in shape.box or (0, 0, 0, 0))
    width, height = right - left, bottom - top
    fits = 0 <= left < right <= canvas.width and 0 <= top < bottom <= canvas.height
    if not fits or sum(shape.counts) != width * height or min(shape.counts) < 0:
        raise SampleError("unreadable mask", f"{shape.where}: its run lengths don't fill its box")
    values = np.arange(len(shape.counts), dtype=np.uint8) % 2
    pixels = np.zeros((canvas.height, canvas.width), np.uint8)
    pixels[top:bottom, left:right] = np.repeat(values, shape.counts).reshape(height, width)
    return rle.of_mask(pixels)
