"""A split's batches as they are asked for: by a thread or by processes, decoded anew or remembered.

In: a split, and a function from a key, whatever that is, to sample numbers. Out: batches for keys, in
their order. Must not know epochs, nor what the numbers mean.

Processes decode into memory that they have in common with this one: the cache, or a ring with room
for each batch that may be under way. What comes through their pipes is small.
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
from pipelines.data.loading.pixel_cache import PixelBuffer, SharedPixelBuffer
from pipelines.data.loading.prefetch import LoaderProcesses, max_prefetched, prefetch_in_thread
from pipelines.data.shards import ShardReader
from pipelines.interfaces import World

CACHE_BYTES = 2 << 30
NEARLY_ALL = 0.9
"""Of the images: when they are in memory, processes to decode the rest cost more than they give."""
Numbers = np.ndarray[Any, Any]


class LoadingOptions(TypedDict, total=False):
    """How a split is read; none of it changes what is in a batch, but `fit`.

    fit             how an image gets the size that the network sees: see `samples.Fit`
    cache           where decoded images are kept: "auto", "none", "memory" or "device"
    cache_bytes     how much they may take, in bytes
    share           memory for them that the ranks of a node have in common; else a rank has its own
    loader_workers  processes that make batches; 0: a thread does
    """

    fit: Fit
    cache: str
    cache_bytes: int
    share: SharedPixelBuffer | None
    loader_workers: int


class _Filler:
    """What a process has to know. It doesn't know the `BatchSource`, which then ends when it is let go,
    and its processes with it."""

    def __init__(
        self,
        maker: BatchMaker,
        numbers: Callable[[Any], Numbers],
        rows: int,
        cache: PixelBuffer | None,
        ring: PixelBuffer | None,
    ) -> None:
        self.maker, self.numbers = maker, numbers
        self._rows, self._cache, self._ring = rows, cache, ring

    def fill(self, numbered: tuple[int, Any]) -> Fields:
        """In a process: the batch of (slot of the ring, key), but for its pixels."""
        slot, key = numbered
        samples = self.numbers(key)
        if self._cache is not None:
            return self.maker.fill(samples, self._cache, samples)
        room = self.room(slot, len(samples))
        room.filled.zero_()
        return self.maker.fill(samples, room, np.arange(len(samples)))

    def room(self, slot: int, rows: int) -> PixelBuffer:
        """The ring's memory for a batch."""
        assert self._ring is not None
        return self._ring.part(slot * self._rows, slot * self._rows + rows)


class BatchSource:
    """The batches of one rank. `numbers` gives the sample numbers, int64, of a key's batch, and at
    most `max_rows` of them."""

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
        fit: Fit = "stretch",
        cache: str = "auto",
        cache_bytes: int = CACHE_BYTES,
        share: SharedPixelBuffer | None = None,
        loader_workers: int = 0,
    ) -> None:
        self.reader = ShardReader(where, card, split)
        samples = len(self.reader)
        choice = pixel_cache.choose(
            samples, spec, cache=cache, cache_bytes=cache_bytes, device=world.device
        )
        self.cache_choice = str(choice)
        self._spec, self._fit = spec, fit
        self._lock = threading.Lock()
        self._device = torch.device(world.device) if choice.kind == "device" else None
        self._on_device: tuple[Tensor, Tensor] | None = None
        self._pin = world.device.startswith("cuda")
        self._cache: PixelBuffer | None = None
        if choice.kind != "none":
            self._cache = share or pixel_cache.anonymous(samples, spec)
        self._slots = max_prefetched(loader_workers)
        ring = None
        if loader_workers and self._cache is None:
            ring = pixel_cache.anonymous(self._slots * max_rows, spec)
        maker = BatchMaker(self.reader, spec, fit)
        self._filler = _Filler(maker, numbers, max_rows, self._cache, ring)
        self._processes = (
            LoaderProcesses(self._filler.fill, loader_workers) if loader_workers else None
        )

    def batches(self, keys: Iterable[Any]) -> Iterator[Batch]:
        """The batch of each key. Threads and processes end with the iterator, but processes that
        have come to the end of it wait for the next one, or for `close`."""
        filled = self._cache.share_filled if self._cache else 0.0
        if filled == 1.0 and self._device is not None and self._cache and not self._on_device:
            self._on_device = (
                self._cache.images.to(self._device),
                self._cache.masks.to(self._device),
            )
        if self._processes is None or filled >= NEARLY_ALL:
            self.close()
            yield from prefetch_in_thread(lambda: map(self._make, keys))
            return
        numbered = ((number % self._slots, key) for number, key in enumerate(keys))
        for number, fields in enumerate(self._processes.items(numbered)):
            yield self._collect(fields, number % self._slots)

    def close(self) -> None:
        """Ends the processes."""
        if self._processes is not None:
            self._processes.close()

    def _make(self, key: Any) -> Batch:
        with self._lock:  # an iterator given up and the next one may overlap
            samples = self._filler.numbers(key)
            if self._cache is not None:
                return self._from_cache(self._filler.maker.fill(samples, self._cache, samples))
            pixels = PixelBuffer(len(samples), self._spec)
            fields = self._filler.maker.fill(samples, pixels, np.arange(len(samples)))
        return self._whole(fields, pixels.images, pixels.masks, pixels.sizes)

    def _collect(self, fields: Fields, slot: int) -> Batch:
        if self._cache is not None:
            return self._from_cache(fields)
        room = self._filler.room(slot, len(fields["index"]))
        parts = (room.images, room.masks, room.sizes)
        return self._whole(fields, *(self._copy(part) for part in parts))

    def _from_cache(self, fields: Fields) -> Batch:
        assert self._cache is not None
        places = torch.from_numpy(fields["index"])
        images, masks = self._on_device or (self._cache.images, self._cache.masks)
        parts = (images, masks, self._cache.sizes)
        return self._whole(fields, *(self._pick(part, places) for part in parts))

    def _whole(self, fields: Fields, images: Tensor, masks: Tensor, sizes: Tensor) -> Batch:
        return collect(fields, images, masks, sizes, fit=self._fit, pin=self._pin)

    def _pick(self, part: Tensor, places: Tensor) -> Tensor:
        if not len(part):  # masks of a task that has none
            return part
        if part.device.type != "cpu":
            return part.index_select(0, places.to(part.device))
        out = torch.empty((len(places), *part.shape[1:]), dtype=part.dtype, pin_memory=self._pin)
        np.take(part.numpy(), places.numpy(), axis=0, out=out.numpy(), mode="clip")
        return out

    def _copy(self, part: Tensor) -> Tensor:
        """By NumPy: torch would split the copy over threads that wait for the decoders' cores."""
        out = torch.empty(part.shape, dtype=part.dtype, pin_memory=self._pin)
        out.numpy()[...] = part.numpy()
        return out
