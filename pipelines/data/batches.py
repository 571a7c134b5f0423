"""From sample numbers to a batch: read, checked, decoded, fitted, with what is said of the images.

In: a split, what the network sees of it, and numbers of samples. Out: batches on the CPU. Must not
know epochs, ranks or processes.

    B samples, N objects of one image, M objects of all, C channels, H height, W width

A batch has `image` uint8 (B, C, H, W), `key` list of B names, `index` int64 (B,) numbers in the
split, `size` int64 (B, 2) height and width as stored, and by the data set's task

    classification         label   int64 (B,)
    detection              boxes   list of float32 (N, 4): left, top, right, bottom in pixels of `image`
                           labels  list of int64 (N,)
                           crowd   list of bool (N,)
    instance_segmentation  the same, and masks, list of uint8 (N, H, W) of 0 and 1
    semantic_segmentation  mask    uint8 (B, H, W), 255 where a pixel has no class or was added
    images                 nothing

What is said follows the image: scaled with it, or cut with it; an object of which nothing is left
is dropped. A flat batch has one tensor in place of each list, for a hundred small ones are slow to
hand from process to process; `targets.restore` gives the lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.core.errors import TesseraError
from models.core.family import Batch, DataSpec
from pipelines.data import targets
from pipelines.data.annotations import decode_mask, decode_objects
from pipelines.data.decoded import Pixels
from pipelines.data.index import Rows
from pipelines.data.samples import Fit, decode_plain, fit_image, open_image, to_tensor
from pipelines.data.shards import Piece, ShardReader
from pipelines.data.targets import Fitted, Size

Numbers = np.ndarray[Any, Any]


class BatchMaker:
    """Makes batches of a split; with `cache` each sample is decoded once and kept there."""

    def __init__(
        self, reader: ShardReader, spec: DataSpec, fit: Fit = "stretch", cache: Pixels | None = None
    ) -> None:
        self._reader, self._spec, self._fit, self._cache = reader, spec, fit, cache
        self._has_objects = spec.task in ("detection", "instance_segmentation")

    def make(self, samples: Numbers) -> Batch:
        """The flat batch of these samples, int64 (B,). Raises TesseraError that names a sample."""
        shards, rows = self._reader.index.gather(samples)
        cached = self._cache is not None
        pixels = self._cache or Pixels(len(samples), self._spec)
        places = torch.from_numpy(samples if cached else np.arange(len(samples)))
        missing = pixels.filled[places].numpy() == 0
        chosen = np.flatnonzero(missing | self._has_objects)
        found: list[Fitted] = []
        at = 0
        for piece in self._reader.pieces(samples[chosen], shards[chosen], rows[chosen]):
            part = chosen[at : at + len(piece.rows)]
            self._decode(piece, missing[part], places[part], pixels)
            if self._has_objects:
                found += self._objects(piece, pixels.sizes.numpy()[places[part]])
            at += len(part)
        batch: Batch = {
            "image": pixels.images.index_select(0, places) if cached else pixels.images,
            "key": [key.decode("ascii", "backslashreplace") for key in rows["key"].tolist()],
            "index": torch.from_numpy(samples),
            "size": pixels.sizes.index_select(0, places) if cached else pixels.sizes,
        }
        if self._spec.task == "semantic_segmentation":
            batch["mask"] = pixels.masks.index_select(0, places) if cached else pixels.masks
        if self._spec.task == "classification":
            batch["label"] = self._labels(rows)
        if self._has_objects:
            batch |= targets.flatten(found)
        return batch

    def _decode(self, piece: Piece, missing: Numbers, places: Tensor, pixels: Pixels) -> None:
        """Fills `pixels` at `places` with the samples that are missing there."""
        spec, fit = self._spec, self._fit
        channels, shape = spec.channels, torch.Size(spec.shape)
        data, view = torch.from_numpy(piece.data), memoryview(piece.data)  # type: ignore[arg-type]
        starts = (piece.starts + piece.rows["image"]).tolist()
        at = places.tolist()
        ends = (piece.starts + piece.rows["image"] + piece.rows["image_size"]).tolist()
        sizes = pixels.sizes.numpy()
        for number in np.flatnonzero(missing).tolist():
            start, end, place = starts[number], ends[number], at[number]
            image = decode_plain(view[start:end], channels, data[start:end])
            if image is None:
                where = f"the image of sample {_key(piece.rows[number])}"
                image = to_tensor(open_image(bytes(view[start:end]), where), channels)
            height, width = image.shape[1:]
            if image.shape != shape:
                image = fit_image(image, spec.height, spec.width, fit)
            pixels.images[place].copy_(image)
            sizes[place] = height, width
            if len(pixels.masks):
                pixels.masks[place].copy_(self._mask(piece, number, (height, width)))
        pixels.filled[places[torch.from_numpy(missing)]] = 1

    def _labels(self, rows: Rows) -> Tensor:
        labels = rows["label"].astype(np.int64)
        bad = (labels < 0) | (labels >= len(self._spec.classes))
        if bad.any():
            row = rows[bad][0]
            raise TesseraError(
                f"sample {_key(row)} has the class {row['label']}",
                mend=f"it must be a whole number from 0 to {len(self._spec.classes) - 1}",
            )
        return torch.from_numpy(labels)

    def _mask(self, piece: Piece, number: int, given: Size) -> Tensor:
        mask = decode_mask(
            _note(piece, number),
            height=given[0],
            width=given[1],
            classes=len(self._spec.classes),
            where=f"sample {_key(piece.rows[number])}",
        )
        return targets.fit_mask(mask, given, (self._spec.height, self._spec.width), self._fit)

    def _objects(self, piece: Piece, sizes: Numbers) -> Iterator[Fitted]:
        spec = self._spec
        masks = spec.task == "instance_segmentation"
        for number, (height, width) in enumerate(sizes.tolist()):
            objects = decode_objects(
                _note(piece, number),
                height=height,
                width=width,
                classes=len(spec.classes),
                where=f"sample {_key(piece.rows[number])}",
            )
            to = (spec.height, spec.width)
            yield targets.fit_objects(objects, (height, width), to, self._fit, masks=masks)


def _key(row: Any) -> str:
    text: str = row["key"].decode("ascii", "backslashreplace")
    return text


def _note(piece: Piece, number: int) -> bytes:
    row = piece.rows[number]
    start = int(piece.starts[number]) + int(row["note"])
    return piece.data[start : start + int(row["note_size"])].tobytes()
