"""Annotations of an image: objects with boxes and masks, or the class of each pixel.

In: annotations from an importer, or bytes from a shard. Out: checked annotations, and their
encoding in a shard. Must not know formats of sources, shards or cards.

In a shard, objects are JSON,
`{"boxes":[[l,t,r,b],…],"crowd":[0,…],"labels":[0,…],"masks":["…",…]}`, with `masks` only if there
are any; classes of pixels are an 8-bit grey PNG. Equal annotations have equal bytes.

    N objects, H height, W width
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.core.errors import TesseraError
from pipelines.data import rle
from pipelines.data.images import encode_png, open_image
from pipelines.data.safe_parsers import is_number, read_json
from pipelines.data.sample_error import SampleError

IGNORED = 255
"""The value of pixels without a class, which count nowhere."""
MAX_JSON_BYTES = 64 << 20
ROUNDING = 0.5
"""Boxes that exceed their image by at most this many pixels, as rounded coordinates do, are
clipped; others are refused."""


@dataclass(frozen=True)
class Damage:
    """An object that an importer can't read: why, and its class index if that is known."""

    reason: str
    message: str
    hint: str = ""
    label: int | None = None


@dataclass(frozen=True)
class Objects:
    """The objects of one image; there may be none.

    boxes   float64 (N, 4): left, top, right, bottom in pixels, from the image's upper left corner
    labels  int64 (N,): class indices
    crowd   bool (N,): regions of many objects, which are not trained on
    masks   the pixels of each object as COCO's compressed RLE in ASCII; None if the source only has
            boxes
    damaged objects of the source that can't be read; `check` refuses them
    """

    boxes: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    crowd: np.ndarray[Any, Any]
    masks: tuple[bytes, ...] | None = None
    damaged: tuple[Damage, ...] = ()


@dataclass(frozen=True)
class Mask:
    """The class of each pixel: uint8 (H, W), `IGNORED` for pixels without a class."""

    pixels: np.ndarray[Any, Any]


Annotation = Objects | Mask


def check(annotation: Annotation, *, height: int, width: int, classes: int, where: str) -> None:
    """Raises SampleError if an annotation doesn't fit an image of that size and that many classes.

    An image without objects is valid. `where` names the image in the message.
    """
    if isinstance(annotation, Mask):
        _check_pixels(annotation.pixels, height, width, classes, where)
        return
    _check_counts(annotation, where)
    for damage in annotation.damaged:
        raise SampleError(damage.reason, damage.message, hint=damage.hint, of_object=True)
    _check_labels(annotation.labels, classes, where)
    _check_boxes(annotation.boxes, height, width, where)
    for number, text in enumerate(annotation.masks or ()):
        if not rle.area(_read_mask(text, height, width, f"{where}: object {number}")):
            raise SampleError(
                "mask without pixels",
                f"{where}: the mask of object {number} has no pixel",
                of_object=True,
            )


def check_masked(annotation: Annotation, where: str) -> None:
    """Raises SampleError if objects have boxes but no masks, for tasks that need masks."""
    if isinstance(annotation, Objects) and annotation.masks is None and len(annotation.boxes):
        raise SampleError(
            "missing mask",
            f"{where}: its objects have boxes and no masks",
            hint="pack it for detection, or give every object a mask",
        )


def _check_pixels(
    pixels: np.ndarray[Any, Any], height: int, width: int, classes: int, where: str
) -> None:
    check_mask_size(pixels.shape, (height, width), where)
    values = np.flatnonzero(np.bincount(pixels.ravel(), minlength=256))
    invalid = values[(values >= classes) & (values != IGNORED)]
    if len(invalid):
        raise SampleError(
            "unknown class",
            f"{where}: its mask has the value {invalid[0]}, and there are {classes} classes",
            hint=f"0 to {classes - 1} and {IGNORED} (ignored) are allowed",
        )
    if values.tolist() == [IGNORED]:
        raise SampleError("mask without pixels", f"{where}: no pixel of its mask has a class")


def check_mask_size(shape: tuple[int, ...], size: tuple[int, int], where: str) -> None:
    """Raises SampleError if the shape of a mask isn't (height, width) of its image."""
    if shape != size:
        raise SampleError(
            "mask of another size",
            f"{where}: the mask is {' by '.join(map(str, shape))} (rows by columns), the image is "
            f"{size[0]} by {size[1]}",
        )


def _check_counts(objects: Objects, where: str) -> None:
    boxes, masks = objects.boxes, objects.masks
    counts = {"boxes": len(boxes), "labels": len(objects.labels), "crowd": len(objects.crowd)}
    if masks is not None:
        counts["masks"] = len(masks)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise SampleError("counts differ", f"{where} has {listed}")
    if boxes.shape != (len(boxes), 4):
        raise SampleError("no box", f"{where}: boxes have the shape {boxes.shape}, not (N, 4)")


def _check_labels(labels: np.ndarray[Any, Any], classes: int, where: str) -> None:
    invalid = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(invalid):
        raise SampleError(
            "unknown class",
            f"{where}: object {invalid[0]} has the class {labels[invalid[0]]}, and there are "
            f"{classes} classes",
            hint=f"0 to {classes - 1} are allowed",
            of_object=True,
        )


def _check_boxes(boxes: np.ndarray[Any, Any], height: int, width: int, where: str) -> None:
    for reason, found in _box_faults(boxes, height, width):
        if found.any():
            at = int(np.flatnonzero(found)[0])
            raise SampleError(
                reason,
                _describe_box(reason, boxes, at, height, width, where),
                hint="a box is left, top, right, bottom in pixels",
                of_object=True,
            )
    if are_normalised(boxes, height, width):
        raise SampleError(
            "box normalised",
            f"{where}: all box coordinates are between 0 and 1, so they are normalised",
            hint="a box is left, top, right, bottom in pixels: multiply by width and height",
        )


def _box_faults(
    boxes: np.ndarray[Any, Any], height: int, width: int
) -> tuple[tuple[str, np.ndarray[Any, Any]], ...]:
    """(reason, which boxes have it: bool (N,)) of each kind of fault."""
    left, top, right, bottom = boxes.T
    with np.errstate(invalid="ignore"):
        inside = (left >= 0) & (top >= 0) & (right <= width) & (bottom <= height)
        return (
            ("box not finite", ~np.isfinite(boxes).all(1)),
            ("box inverted", (right < left) | (bottom < top)),
            ("box without area", (right == left) | (bottom == top)),
            ("box outside the image", ~inside),
        )


def _describe_box(
    reason: str, boxes: np.ndarray[Any, Any], at: int, height: int, width: int, where: str
) -> str:
    numbers = ", ".join(f"{value:g}" for value in boxes[at].tolist())
    return f"{where}, {width} wide and {height} high: {reason}: object {at}, ({numbers})"


def are_normalised(boxes: np.ndarray[Any, Any], height: int, width: int) -> bool:
    """Whether all coordinates are between 0 and 1, in an image of more than one pixel."""
    return bool(len(boxes) and np.isfinite(boxes).all() and boxes.max() <= 1 < min(height, width))


def drop_damaged(
    objects: Objects, *, height: int, width: int, classes: int, where: str
) -> tuple[Objects, tuple[Damage, ...]]:
    """The objects that pass `check`, one by one, and the others. `check` refuses what is wrong with
    all of them, such as normalised boxes."""
    boxes, masks = objects.boxes, objects.masks
    dropped = list(objects.damaged)
    keep = np.ones(len(boxes), bool)
    unknown = (objects.labels < 0) | (objects.labels >= classes)
    faults = (("unknown class", unknown), *_box_faults(boxes, height, width))
    empty = [not rle.area(_read_mask(text, height, width, where)) for text in masks or ()]
    if masks is not None:
        faults = (*faults, ("mask without pixels", np.array(empty, bool)))
    for reason, found in faults:
        for at in np.flatnonzero(found & keep).tolist():
            label = None if unknown[at] else int(objects.labels[at])
            message = _describe_box(reason, boxes, at, height, width, where)
            dropped.append(Damage(reason, message, label=label))
        keep &= ~found
    kept = None if masks is None else tuple(m for m, k in zip(masks, keep) if k)
    good = Objects(boxes[keep], objects.labels[keep], objects.crowd[keep], kept)
    return good, tuple(dropped)


def clip(boxes: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """Boxes (N, 4) clipped to the image if they exceed it by at most `ROUNDING`; the others stay as
    they are, for `check` to refuse."""
    edges = np.array([width, height, width, height], np.float64)
    cut = np.clip(boxes, 0, edges)
    return np.where(np.abs(boxes - cut) <= ROUNDING, cut, boxes)


def encode(annotation: Annotation) -> tuple[str, bytes]:
    """(extension, bytes) of the annotation in a shard."""
    if isinstance(annotation, Mask):
        return "mask.png", encode_png(annotation.pixels)
    fields: dict[str, Any] = {
        # -0.0 equals 0.0 but is written differently.
        "boxes": (annotation.boxes.astype(np.float64) + 0.0).tolist(),
        "labels": annotation.labels.tolist(),
        "crowd": annotation.crowd.astype(int).tolist(),
    }
    if annotation.masks is not None:
        fields["masks"] = [text.decode("ascii") for text in annotation.masks]
    return "json", json.dumps(
        fields, sort_keys=True, separators=(",", ":"), allow_nan=False
    ).encode()


def decode_objects(data: bytes, *, height: int, width: int, classes: int, where: str) -> Objects:
    """Objects from `encode`'s JSON, checked. Raises SampleError."""
    try:
        fields = read_json(data, "the JSON", MAX_JSON_BYTES)
    except TesseraError as error:
        raise _unreadable(where, error.message) from None
    if not isinstance(fields, Mapping) or not {"boxes", "labels", "crowd"} <= fields.keys() <= {
        "boxes",
        "labels",
        "crowd",
        "masks",
    }:
        raise _unreadable(where, "it has other fields than boxes, labels, crowd and masks")
    masks = fields.get("masks")
    objects = Objects(
        _boxes(fields["boxes"], where),
        _numbers(fields["labels"], "labels", where),
        _numbers(fields["crowd"], "crowd", where),
        None if masks is None else _texts(masks, where),
    )
    if ((objects.crowd != 0) & (objects.crowd != 1)).any():
        raise _unreadable(where, "crowd is neither 0 nor 1")
    check(objects, height=height, width=width, classes=classes, where=where)
    return Objects(objects.boxes, objects.labels, objects.crowd.astype(bool), objects.masks)


def _boxes(given: Any, where: str) -> np.ndarray[Any, Any]:
    if not isinstance(given, list) or not all(
        type(row) is list and len(row) == 4 and all(is_number(value) for value in row)
        for row in given
    ):
        raise _unreadable(where, "boxes are not rows of four numbers")
    return np.array(given, np.float64).reshape(-1, 4)


def _numbers(given: Any, what: str, where: str) -> np.ndarray[Any, Any]:
    if not isinstance(given, list) or not all(
        type(value) is int and abs(value) < 1 << 53 for value in given
    ):
        raise _unreadable(where, f"{what} are not integers")
    return np.array(given, np.int64)


def _texts(given: Any, where: str) -> tuple[bytes, ...]:
    if not isinstance(given, list) or not all(type(v) is str and v.isascii() for v in given):
        raise _unreadable(where, "masks are not run lengths as ASCII text")
    return tuple(text.encode("ascii") for text in given)


def _unreadable(where: str, why: str) -> SampleError:
    return SampleError("unreadable annotation", f"{where} has an unreadable annotation: {why}")


def decode_mask(data: bytes, *, height: int, width: int, classes: int, where: str) -> Mask:
    """The class of each pixel from `encode`'s PNG, checked. Raises TesseraError."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise _unreadable(where, "its mask is not a PNG")
    size = (int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big"))
    check_mask_size(size, (height, width), where)
    # Decoding any other PNG would change the values.
    if data[24:26] != b"\x08\x00" or b"tRNS" in data or b"eXIf" in data:
        raise _unreadable(
            where, "its mask is not an 8-bit grey PNG without transparency and rotation"
        )
    mask = Mask(np.array(open_image(data, f"{where}: its mask")))
    check(mask, height=height, width=width, classes=classes, where=where)
    return mask


def resize(
    annotation: Annotation, size_from: tuple[int, int], size_to: tuple[int, int]
) -> Annotation:
    """The annotation for an image resized from one (height, width) to another.

    Boxes are scaled, masks are sampled at the nearest pixel. An object too small for a pixel in the
    new mask keeps one, in its middle.
    """
    if size_from == size_to:
        return annotation
    rows, columns = (_nearest(a, b) for a, b in zip(size_from, size_to, strict=True))
    if isinstance(annotation, Mask):
        return Mask(np.ascontiguousarray(annotation.pixels[np.ix_(rows, columns)]))
    (height, width), (new_height, new_width) = size_from, size_to
    edges = np.array([new_width, new_height, new_width, new_height], np.float64)
    boxes = annotation.boxes * edges / np.array([width, height, width, height], np.float64)
    masks = annotation.masks
    if masks is not None:
        masks = tuple(_resize_mask(text, size_from, rows, columns) for text in masks)
    return Objects(np.minimum(boxes, edges), annotation.labels, annotation.crowd, masks)


def _resize_mask(
    text: bytes, size: tuple[int, int], rows: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]
) -> bytes:
    full = rle.to_mask(_read_mask(text, *size, "mask"), *size)
    small = full[np.ix_(rows, columns)]
    if not small.any() and full.any():
        y, x = np.argwhere(full)[np.count_nonzero(full) // 2]
        small[y * len(rows) // size[0], x * len(columns) // size[1]] = 1
    return rle.write(rle.of_mask(small))


def _nearest(size: int, new: int) -> np.ndarray[Any, Any]:
    """For each of `new` positions, the nearest of `size` positions."""
    return (2 * np.arange(new) + 1) * size // (2 * new)


def count(annotation: Annotation, classes: int) -> list[int]:
    """Number of objects, without crowds, or of pixels of each class."""
    if isinstance(annotation, Mask):
        counts = np.bincount(annotation.pixels.ravel(), minlength=256)[:classes]
    else:
        counts = np.bincount(annotation.labels[~annotation.crowd], minlength=classes)
    return [int(value) for value in counts]


def mask_pixels(objects: Objects, height: int, width: int) -> np.ndarray[Any, Any]:
    """uint8 (N, H, W) of 0 and 1; zeros for objects without masks."""
    pixels = np.zeros((len(objects.boxes), height, width), np.uint8)
    for number, text in enumerate(objects.masks or ()):
        counts = _read_mask(text, height, width, f"object {number}")
        pixels[number] = rle.to_mask(counts, height, width)
    return pixels


def _read_mask(text: bytes, height: int, width: int, where: str) -> rle.Counts:
    try:
        return rle.parse(text, height, width)
    except ValueError as error:
        raise SampleError(
            "mask of another size" if "add up" in str(error) else "unreadable mask",
            f"{where}: its mask can't be read: {error}",
        ) from None
