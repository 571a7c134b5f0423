"""From sample numbers to a batch: read, checked, decoded, fitted, with what is said of the images.

In: a split, what the network sees of it, and numbers of samples. Out: batches. Must not know epochs,
ranks or processes, but it makes a batch in two halves, so that a process can do the first and its
parent the second: `fill` decodes into memory that both have and gives the rest in small arrays;
`collect` makes a batch of both.

    B samples, N objects of one image, M objects of all, C channels, H height, W width

A batch has `image` uint8 (B, C, H, W), `key` list of B names, `index` int64 (B,) numbers in the
split, `size` int64 (B, 2) height and width as stored, `extent` int64 (B, 2) how much of `image`,
from its left upper corner, is picture, and by what is read of the data set

    classification         label   int64 (B,)
    detection              boxes   list of float32 (N, 4): left, top, right, bottom in pixels of `image`
                           labels  list of int64 (N,)
                           crowd   list of bool (N,)
    instance_segmentation  the same, and masks, list of uint8 (N, H, W) of 0 and 1
    semantic_segmentation  mask    uint8 (B, H, W), 255 where a pixel has no class or was added
    images                 nothing

What is said follows the image: scaled with it, or cut with it; an object of which nothing is left
is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.core.errors import TesseraError
from models.core.family import Batch, DataSpec
from pipelines.data.annotations import check_masked, decode_mask, decode_objects
from pipelines.data.card import MAX_PIXELS
from pipelines.data.images import Fit, extents, fit_image, open_image, to_tensor
from pipelines.data.index import Rows
from pipelines.data.jpeg import FastDecoder
from pipelines.data.loading import targets
from pipelines.data.loading.pixel_cache import PixelBuffer
from pipelines.data.loading.targets import FittedObjects, Size
from pipelines.data.shards import Piece, ShardReader

Numbers = np.ndarray[Any, Any]
Fields = dict[str, Any]
"""What a batch has beside its pixels: arrays, and the list of keys."""


class BatchMaker:
    """Fills memory with the samples of a split. Not for several threads."""

    def __init__(self, reader: ShardReader, spec: DataSpec, fit: Fit = "stretch") -> None:
        self._reader, self._spec, self._fit = reader, spec, fit
        self._has_objects = spec.task in ("detection", "instance_segmentation")
        self._decode_fast = FastDecoder(spec.channels, MAX_PIXELS)

    def fill(self, samples: Numbers, pixels: PixelBuffer, places: Numbers) -> Fields:
        """Decodes the samples, int64 (B,), into `pixels` at `places`, but for those that are there
        already, and gives the rest of the batch. Raises TesseraError that names a sample."""
        shards, rows = self._reader.index.gather(samples)
        missing = pixels.filled.numpy()[places] == 0
        chosen = np.flatnonzero(missing | self._has_objects)
        found: list[FittedObjects] = []
        at = 0
        for piece in self._reader.pieces(samples[chosen], shards[chosen], rows[chosen]):
            part = chosen[at : at + len(piece.rows)]
            self._decode(piece, missing[part], places[part], pixels)
            if self._has_objects:
                found += self._objects(piece, pixels.sizes.numpy()[places[part]])
            at += len(part)
        keys = [key.decode("ascii", "backslashreplace") for key in rows["key"].tolist()]
        fields: Fields = {"key": keys, "index": samples}
        if self._spec.task == "classification":
            fields["label"] = self._labels(rows)
        if self._has_objects:
            fields |= targets.flatten(found)
        return fields

    def _decode(self, piece: Piece, missing: Numbers, places: Numbers, pixels: PixelBuffer) -> None:
        spec, fit, fast = self._spec, self._fit, self._decode_fast
        data, view = torch.from_numpy(piece.data), memoryview(piece.data)  # type: ignore[arg-type]
        # NumPy is quicker than torch at one small thing after the other.
        images, masks, sizes = (v.numpy() for v in (pixels.images, pixels.masks, pixels.sizes))
        begins = piece.starts + piece.rows["image"]
        ends = (begins + piece.rows["image_size"]).tolist()
        todo = np.flatnonzero(missing).tolist()
        for number, start, place in zip(todo, begins[todo].tolist(), places[todo].tolist()):
            end = ends[number]
            image = fast(view[start:end], data[start:end])
            if image is None:
                where = f"the image of sample {_key(piece.rows[number])}"
                image = to_tensor(open_image(bytes(view[start:end]), where), spec.channels)
            size = sizes[place] = image.size(1), image.size(2)
            if size != (spec.height, spec.width):
                image = fit_image(image, spec.height, spec.width, fit)
            images[place] = image.numpy()
            if len(masks):
                masks[place] = self._mask(piece, number, size)
        pixels.filled.numpy()[places[todo]] = 1

    def _labels(self, rows: Rows) -> Numbers:
        labels = rows["label"].astype(np.int64)
        bad = (labels < 0) | (labels >= len(self._spec.classes))
        if bad.any():
            row = rows[bad][0]
            raise TesseraError(
                f"sample {_key(row)} has the class {row['label']}",
                hint=f"it must be a whole number from 0 to {len(self._spec.classes) - 1}",
            )
        return labels

    def _mask(self, piece: Piece, number: int, given: Size) -> Numbers:
        mask = decode_mask(
            _note(piece, number),
            height=given[0],
            width=given[1],
            classes=len(self._spec.classes),
            where=f"sample {_key(piece.rows[number])}",
        )
        return targets.fit_mask(mask, given, (self._spec.height, self._spec.width), self._fit)

    def _objects(self, piece: Piece, sizes: Numbers) -> Iterator[FittedObjects]:
        spec = self._spec
        masks = spec.task == "instance_segmentation"
        for number, (height, width) in enumerate(sizes.tolist()):
            where = f"sample {_key(piece.rows[number])}"
            objects = decode_objects(
                _note(piece, number),
                height=height,
                width=width,
                classes=len(spec.classes),
                where=where,
            )
            if masks:
                check_masked(objects, where)
            to = (spec.height, spec.width)
            yield targets.fit_objects(objects, (height, width), to, self._fit, masks=masks)


def collect(
    fields: Mapping[str, Any],
    images: Tensor,
    masks: Tensor,
    sizes: Tensor,
    *,
    fit: Fit = "stretch",
    pin: bool = False,
) -> Batch:
    """The batch of what `fill` gave and of its pixels; `pin` moves what is on the CPU to pinned
    memory. `masks` is empty where the task has none."""
    extent = extents(sizes, images.shape[-2], images.shape[-1], fit)
    batch: Batch = {"image": images, "size": sizes, "extent": extent}
    if len(masks):
        batch["mask"] = masks
    for name, value in fields.items():
        batch[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if pin:
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                batch[name] = value.pin_memory()
    return targets.restore(batch)


def _key(row: Any) -> str:
    text: str = row["key"].decode("ascii", "backslashreplace")
    return text


def _note(piece: Piece, number: int) -> bytes:
    row = piece.rows[number]
    start = int(piece.starts[number]) + int(row["note"])
    return piece.data[start : start + int(row["note_size"])].tobytes()
