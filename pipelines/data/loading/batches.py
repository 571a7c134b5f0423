"""From sample numbers to a batch: reads, verifies, decodes and fits images and annotations.

In: a split, its data spec, and sample numbers. Out: batches. Must not know epochs, ranks or
processes, but makes a batch in two halves, so that a process can do the first and its parent the
second: `fill` decodes into memory that both share and returns the rest in small arrays; `collect`
makes a batch of both.

    B samples, N objects of one image, M objects of all, C channels, H height, W width

Every batch has

    image   uint8 (B, C, H, W)
    key     list of B names
    index   int64 (B,): sample numbers in the split
    size    int64 (B, 2): height and width as stored
    extent  int64 (B, 2): height and width of the image inside its frame, from the upper left corner

and, by the task that the data set is read for,

    classification         label   int64 (B,)
    detection              boxes   list of float32 (N, 4): left, top, right, bottom in pixels of
                                   `image`
                           labels  list of int64 (N,)
                           crowd   list of bool (N,)
    instance_segmentation  the same, and masks, list of uint8 (N, H, W) of 0 and 1
    semantic_segmentation  mask    uint8 (B, H, W), 255 for pixels without a class or outside
    images                 nothing

Annotations are scaled or cropped with the image. An object of which nothing is left is dropped.
Random crops are for annotations without positions: classes of whole images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.core.errors import TesseraError
from models.core.family import Batch, DataSpec
from pipelines.data.annotations import check_masked, decode_mask, decode_objects
from pipelines.data.image_reading import reading_images
from pipelines.data.images import (
    Fit,
    Size,
    extents,
    fit_image,
    open_image,
    open_shrunk,
    to_tensor,
)
from pipelines.data.index import Rows
from pipelines.data.jpeg import FastDecoder
from pipelines.data.loading import targets
from pipelines.data.loading.crops import Cut, View, cut_out, view_of
from pipelines.data.loading.pixel_cache import PixelBuffer
from pipelines.data.loading.targets import FittedObjects
from pipelines.data.shards import Piece, ShardReader

Numbers = np.ndarray[Any, Any]
Fields = dict[str, Any]
"""The fields of a batch other than its pixels: arrays, and the list of keys."""


class _File(NamedTuple):
    """The bytes of an image, twice, its row of the index, and its sample's number."""

    data: memoryview
    tensor: Tensor
    row: Any
    sample: int

    @property
    def where(self) -> str:
        return f"the image of sample {_key(self.row)}"


class BatchMaker:
    """Decodes samples of a split into memory. Not thread-safe."""

    def __init__(self, reader: ShardReader, spec: DataSpec, fit: Fit = "stretch") -> None:
        self._reader, self._spec, self._fit = reader, spec, fit
        self._has_objects = spec.task in ("detection", "instance_segmentation")
        self._decode_fast = FastDecoder(spec.channels, reader.reading.max_pixels)

    def fill(
        self, samples: Numbers, pixels: PixelBuffer, positions: Numbers, cut: Cut | None = None
    ) -> Fields:
        """Decodes samples, int64 (B,), into `pixels` at `positions`, int64 (B,), except those that
        are already there. With `cut`, these are views: parts of the images. Returns the other
        fields of the batch. Raises TesseraError that names the sample if it is damaged or its
        annotation is invalid."""
        shards, rows = self._reader.index.gather(samples)
        missing = pixels.filled.numpy()[positions] == 0
        chosen = np.flatnonzero(missing | self._has_objects)
        objects: list[FittedObjects] = []
        at = 0
        for piece in self._reader.pieces(samples[chosen], shards[chosen], rows[chosen]):
            part = chosen[at : at + len(piece.rows)]
            with reading_images(self._reader.reading):
                view = partial(self._cut, cut) if cut else self._fit_whole
                self._decode(piece, missing[part], samples[part], positions[part], pixels, view)
            if self._has_objects:
                objects += self._objects(piece, pixels.sizes.numpy()[positions[part]])
            at += len(part)
        keys = [key.decode("ascii", "backslashreplace") for key in rows["key"].tolist()]
        fields: Fields = {"key": keys, "index": samples}
        if self._spec.task == "classification":
            fields["label"] = self._labels(rows)
        if self._has_objects:
            fields |= targets.flatten(objects)
        return fields

    def _decode(
        self,
        piece: Piece,
        missing: Numbers,
        samples: Numbers,
        positions: Numbers,
        pixels: PixelBuffer,
        view: Callable[[_File], tuple[Tensor, Size]],
    ) -> None:
        data, memory = torch.from_numpy(piece.data), memoryview(piece.data)  # type: ignore[arg-type]
        # For many small assignments NumPy is faster than torch.
        images, masks, sizes = (v.numpy() for v in (pixels.images, pixels.masks, pixels.sizes))
        begins = piece.starts + piece.rows["image"]
        ends = (begins + piece.rows["image_size"]).tolist()
        todo = np.flatnonzero(missing).tolist()
        chosen = (v[todo].tolist() for v in (begins, positions, samples))
        for number, start, position, sample in zip(todo, *chosen):
            part = slice(start, ends[number])
            image, size = view(_File(memory[part], data[part], piece.rows[number], sample))
            sizes[position], images[position] = size, image.numpy()
            if len(masks):
                masks[position] = self._mask(piece, number, size)
        pixels.filled.numpy()[positions[todo]] = 1

    def _fit_whole(self, file: _File) -> tuple[Tensor, Size]:
        """The image at the size that the network sees, and its own size."""
        spec = self._spec
        image = self._decode_fast(file.data, file.tensor)
        if image is None:
            image = to_tensor(open_image(bytes(file.data), file.where), spec.channels)
        size = image.size(1), image.size(2)
        if size != (spec.height, spec.width):
            image = fit_image(image, spec.height, spec.width, self._fit)
        return image, size

    def _cut(self, cut: Cut, file: _File) -> tuple[Tensor, Size]:
        """A view of the image at the size that the network sees, and the image's own size. JPEGs
        are decoded at the smallest size that has all pixels of the view."""
        to, image = (self._spec.height, self._spec.width), None

        def view(size: Size) -> View:
            return view_of(cut(file.sample, size), size, *to)

        size = self._decode_fast.size(file.data)
        if size is not None:
            image = self._decode_fast(file.data, file.tensor, shrink=view(size).shrink)
        if image is None or size is None:
            opened, size = open_shrunk(bytes(file.data), file.where, lambda size: view(size).shrink)
            image = to_tensor(opened, self._spec.channels)
        shown = view(size)
        scale = 1.0 if image.shape[-2:] == size else 1 / shown.shrink
        return cut_out(image, shown.box, *to, (scale, scale)), size

    def _labels(self, rows: Rows) -> Numbers:
        labels = rows["label"].astype(np.int64)
        bad = (labels < 0) | (labels >= len(self._spec.classes))
        if bad.any():
            row = rows[bad][0]
            raise TesseraError(
                f"sample {_key(row)} has the class {row['label']}",
                hint=f"a class must be an integer from 0 to {len(self._spec.classes) - 1}",
            )
        return labels

    def _mask(self, piece: Piece, number: int, size: Size) -> Numbers:
        mask = decode_mask(
            _annotation(piece, number),
            height=size[0],
            width=size[1],
            classes=len(self._spec.classes),
            where=f"sample {_key(piece.rows[number])}",
        )
        return targets.fit_mask(mask, size, (self._spec.height, self._spec.width), self._fit)

    def _objects(self, piece: Piece, sizes: Numbers) -> Iterator[FittedObjects]:
        spec = self._spec
        masks = spec.task == "instance_segmentation"
        for number, (height, width) in enumerate(sizes.tolist()):
            where = f"sample {_key(piece.rows[number])}"
            objects = decode_objects(
                _annotation(piece, number),
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
    """Makes a batch of the fields that `fill` returned and the pixels. `masks` is empty if the task
    has none. With `pin`, tensors on the CPU are moved to pinned memory."""
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
    return targets.unflatten(batch)


def _key(row: Any) -> str:
    text: str = row["key"].decode("ascii", "backslashreplace")
    return text


def _annotation(piece: Piece, number: int) -> bytes:
    row = piece.rows[number]
    start = int(piece.starts[number]) + int(row["note"])
    return piece.data[start : start + int(row["note_size"])].tobytes()
