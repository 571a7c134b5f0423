"""A split's batches for a sequence of keys, made by a thread or by processes, with a pixel cache.

In: a split, and a function from a key, of any type, to sample numbers. Out: batches for keys, in
order. Must not know epochs, nor what the keys mean.

Processes decode into memory that they share with this one: the pixel cache, or a ring buffer with
a slot for each batch that may be in progress. What comes through their pipes is small. Batches in
progress are bounded in bytes (`prefetch.AHEAD_BYTES`); beside them, each process, or the thread,
holds one decoded image in its own size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from models.core.family import Batch, DataSpec
from pipelines.data.card import Card
from pipelines.data.images import Fit
from pipelines.data.loading import pixel_cache
from pipelines.data.loading.batches import BatchMaker, Fields, collect
from pipelines.data.loading.crops import Cut
from pipelines.data.loading.pixel_cache import PixelBuffer, SharedPixelBuffer
from pipelines.data.loading.prefetch import (
    LoaderProcesses,
    bound_prefetch,
    max_prefetched,
    prefetch_in_thread,
)
from pipelines.data.shards import ShardReader
from pipelines.interfaces import World

CACHE_BYTES = 2 << 30
NEARLY_ALL = 0.9
"""With this fraction of the images in memory, processes that decode the rest cost more than they
save."""
Numbers = np.ndarray[Any, Any]


class LoadingOptions(TypedDict, total=False):
    """How a split is read. Only `fit` changes what is in a batch.

    fit             how an image gets the size that the network sees, see `images.Fit`
    cache           where decoded images are kept: "auto", "none", "memory" or "device"
    cache_bytes     the most memory for them, in bytes
    share           memory for them that the ranks of a node share; without it each rank has its own
    loader_workers  number of processes that make batches; 0 for a thread. Fewer are used if the
                    batches in progress would take more than `prefetch.AHEAD_BYTES`
    """

    fit: Fit
    cache: str
    cache_bytes: int
    share: SharedPixelBuffer | None
    loader_workers: int


class _Filler:
    """The part of a `BatchSource` that its processes get. They have no reference to the
    `BatchSource`, so it can be collected, and its processes end with it."""

    def __init__(
        self,
        maker: BatchMaker,
        numbers: Callable[[Any], Numbers],
        cuts: Callable[[Any], Cut] | None,
        rows: int,
        cache: PixelBuffer | None,
        ring: PixelBuffer | None,
    ) -> None:
        self.maker, self.numbers, self._cuts = maker, numbers, cuts
        self._rows, self._cache, self._ring = rows, cache, ring

    def fill(self, item: tuple[int, Any]) -> Fields:
        """Runs in a process: makes the batch of (slot in the ring, key) and returns all but its
        pixels, which it writes to the cache or the ring."""
        slot, key = item
        samples = self.numbers(key)
        if self._cache is not None:
            return self.maker.fill(samples, self._cache, samples)
        buffer = self.slot(slot, len(samples))
        buffer.filled.zero_()
        return self.fill_buffer(key, samples, buffer)

    def fill_buffer(self, key: Any, samples: Numbers, buffer: PixelBuffer) -> Fields:
        """Makes the batch of `key` in a buffer of its own."""
        cut = self._cuts(key) if self._cuts else None
        return self.maker.fill(samples, buffer, np.arange(len(samples)), cut)

    def slot(self, slot: int, rows: int) -> PixelBuffer:
        """The ring's memory for a batch of `rows` samples."""
        assert self._ring is not None
        return self._ring.part(slot * self._rows, slot * self._rows + rows)


class BatchSource:
    """The batches of one rank. `numbers(key)` returns the sample numbers of a batch: int64, at most
    `max_rows` of them. `cuts(key)` returns the boxes of its views, if these are parts of images."""

    def __init__(
        self,
        where: str | Path,
        card: Card,
        spec: DataSpec,
        split: str,
        world: World,
        numbers: Callable[[Any], Numbers],
        max_rows: int,
        *,
        cuts: Callable[[Any], Cut] | None = None,
        fit: Fit = "stretch",
        cache: str = "auto",
        cache_bytes: int = CACHE_BYTES,
        share: SharedPixelBuffer | None = None,
        loader_workers: int = 0,
    ) -> None:
        self.reader = ShardReader(where, card, split)
        samples = len(self.reader)
        if cuts:  # a view belongs to one batch, and fills all of its frame
            cache, fit = "none", "stretch"
        choice = pixel_cache.choose(
            samples, spec, cache=cache, cache_bytes=cache_bytes, device=world.device
        )
        reason = "each epoch has other parts of the images" if cuts else choice.reason
        self.cache_choice = f"{choice.kind}: {reason}"
        self._spec, self._fit = spec, fit
        self._lock = threading.Lock()
        self._device = torch.device(world.device) if choice.kind == "device" else None
        self._on_device: tuple[Tensor, Tensor] | None = None
        self._pin = world.device.startswith("cuda")
        self._cache: PixelBuffer | None = None
        if choice.kind != "none":
            self._cache = share or pixel_cache.anonymous(samples, spec)
        batch_bytes = pixel_cache.size_bytes(max_rows, spec)
        loader_workers, self._ahead = bound_prefetch(batch_bytes, loader_workers)
        self._thread_ahead = bound_prefetch(batch_bytes, 0)[1]
        self._slots = max_prefetched(loader_workers, self._ahead)
        ring = None
        if loader_workers and self._cache is None:
            ring = pixel_cache.anonymous(self._slots * max_rows, spec)
        maker = BatchMaker(self.reader, spec, fit)
        self._filler = _Filler(maker, numbers, cuts, max_rows, self._cache, ring)
        self._processes = (
            LoaderProcesses(self._filler.fill, loader_workers, self._ahead)
            if loader_workers
            else None
        )

    def batches(self, keys: Iterable[Any]) -> Iterator[Batch]:
        """Yields the batch of each key. A thread ends with the iterator. Processes end when it is
        closed early; after its end they wait for the next call, or for `close`."""
        filled = self._cache.share_filled if self._cache else 0.0
        if filled == 1.0 and self._device is not None and self._cache and not self._on_device:
            self._on_device = (
                self._cache.images.to(self._device),
                self._cache.masks.to(self._device),
            )
        if self._processes is None or filled >= NEARLY_ALL:
            self.close()
            yield from prefetch_in_thread(lambda: map(self._make, keys), self._thread_ahead)
            return
        items = ((number % self._slots, key) for number, key in enumerate(keys))
        for number, fields in enumerate(self._processes.items(items)):
            yield self._collect(fields, number % self._slots)

    def close(self) -> None:
        """Ends the processes."""
        if self._processes is not None:
            self._processes.close()

    def _make(self, key: Any) -> Batch:
        with self._lock:  # an abandoned iterator and the next one may overlap
            samples = self._filler.numbers(key)
            if self._cache is not None:
                return self._from_cache(self._filler.maker.fill(samples, self._cache, samples))
            pixels = PixelBuffer(len(samples), self._spec)
            fields = self._filler.fill_buffer(key, samples, pixels)
        return self._batch(fields, pixels.images, pixels.masks, pixels.sizes)

    def _collect(self, fields: Fields, slot: int) -> Batch:
        if self._cache is not None:
            return self._from_cache(fields)
        buffer = self._filler.slot(slot, len(fields["index"]))
        parts = (buffer.images, buffer.masks, buffer.sizes)
        return self._batch(fields, *(self._copy(part) for part in parts))

    def _from_cache(self, fields: Fields) -> Batch:
        assert self._cache is not None
        positions = torch.from_numpy(fields["index"])
        images, masks = self._on_device or (self._cache.images, self._cache.masks)
        parts = (images, masks, self._cache.sizes)
        return self._batch(fields, *(self._pick(part, positions) for part in parts))

    def _batch(self, fields: Fields, images: Tensor, masks: Tensor, sizes: Tensor) -> Batch:
        return collect(fields, images, masks, sizes, fit=self._fit, pin=self._pin)

    def _pick(self, part: Tensor, positions: Tensor) -> Tensor:
        if not len(part):  # masks of a task that has none
            return part
        if part.device.type != "cpu":
            return part.index_select(0, positions.to(part.device))
        out = torch.empty((len(positions), *part.shape[1:]), dtype=part.dtype, pin_memory=self._pin)
        np.take(part.numpy(), positions.numpy(), axis=0, out=out.numpy(), mode="clip")
        return out

    def _copy(self, part: Tensor) -> Tensor:
        """Copies with NumPy: torch would split the copy among threads, which wait for the cores
        that the decoders use."""
        out = torch.empty(part.shape, dtype=part.dtype, pin_memory=self._pin)
        out.numpy()[...] = part.numpy()
        return out
