"""The batches of a training and of an evaluation, for one rank.

In: a packed data set, what the network sees of it, and which rank of how many this is. Out: `Step`s
for training, batches for evaluation. Must not know what a batch holds, nor Ray, MLflow or how a
shard is laid out.

Global batch k is rows k·B to (k + 1)·B of the epoch's order, whatever the number of ranks and loader
processes; a rank sees its cut of each. So resuming needs (epoch, samples consumed) and nothing else,
and both numbers may change on the way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from models.core.errors import TesseraError
from models.core.family import Batch, DataSpec
from pipelines.data import decoded, targets
from pipelines.data.ahead import Processes, in_thread
from pipelines.data.batches import BatchMaker
from pipelines.data.card import Card
from pipelines.data.decoded import SharedPixels
from pipelines.data.order import EpochOrder, cut
from pipelines.data.samples import Fit
from pipelines.data.shards import ShardReader
from pipelines.ports import World

CACHE_BYTES = 2 << 30
"""A split whose decoded images fit stays decoded in memory."""
NEARLY_ALL = 0.9
"""Of the images: when they are in memory, processes to decode the rest cost more than they give."""
T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One global batch as this rank sees it.

    batch     this rank's rows, as `batches.py` says
    counted   rows of `batch` that count. A rank that a short global batch leaves without rows gets
              its first row with `counted` 0, so that collectives go on
    total     rows of the global batch, over all ranks
    rows      which of them `batch` holds
    consumed  samples of the epoch that are used up when this step is done
    """

    batch: Batch
    counted: int
    total: int
    rows: slice
    consumed: int


class _Loader:
    """What both loaders have: a split, where its decoded images are kept, who makes the batches."""

    def __init__(
        self,
        where: str | Path,
        card: Card,
        spec: DataSpec,
        split: str,
        world: World,
        fit: Fit,
        cache: str,
        cache_bytes: int,
        share: SharedPixels | None,
        loader_workers: int,
    ) -> None:
        self._reader = ShardReader(where, card, split)
        self.samples = len(self._reader)
        choice = decoded.choose(
            self.samples, spec, cache=cache, cache_bytes=cache_bytes, device=world.device
        )
        self.cache_choice = str(choice)
        """Where decoded images are kept, and why."""
        self._pixels = None
        if choice.kind != "none":
            self._pixels = share or decoded.anonymous(self.samples, spec)
        self._maker = BatchMaker(self._reader, spec, fit, self._pixels)
        self._lock = threading.Lock()
        self._device_copy = choice.kind == "device"
        self._images: Tensor | None = None
        self._world = world
        self._on_cuda = world.device.startswith("cuda")
        self._processes = None
        if loader_workers:
            self._processes = Processes(self._make, loader_workers, pin=self._on_cuda)

    def close(self) -> None:
        """Ends the loader's processes. They also end with the loader."""
        if self._processes is not None:
            self._processes.close()

    def _numbers(self, key: Any) -> np.ndarray[Any, Any]:
        raise NotImplementedError

    def _make(self, key: Any) -> Batch:
        with self._lock:  # an iterator given up and the next one may overlap
            return self._maker.make(self._numbers(key))

    def _batches(self, keys: Iterable[Any]) -> Iterator[Batch]:
        if self._processes is not None and self._filled() < NEARLY_ALL:
            made = self._processes.items(keys)
        else:
            self.close()
            made = in_thread(lambda: map(self._make_here, keys))
        for batch in made:
            yield targets.restore(batch)

    def _make_here(self, key: Any) -> Batch:
        batch = self._make(key)
        return {name: _pin(value) for name, value in batch.items()} if self._on_cuda else batch

    def _filled(self) -> float:
        return self._pixels.share_filled if self._pixels is not None else 0.0


def _pin(value: Any) -> Any:
    return value.pin_memory() if isinstance(value, Tensor) else value


class TrainLoader(_Loader):
    """The training batches of one rank. Every rank gets the same number of steps, and every sample
    is in exactly one of them.

    loader_workers  processes that make batches; 0: a thread does
    fit             how an image gets the size of `spec`; see `samples.Fit`
    cache           "auto", "none", "memory" or "device": where decoded images are kept, in at most
                    `cache_bytes`
    share           memory that the ranks of a node have in common; else a rank has its own
    """

    def __init__(
        self,
        where: str | Path,
        card: Card,
        spec: DataSpec,
        *,
        batch_size: int,
        seed: int,
        world: World,
        split: str = "train",
        fit: Fit = "stretch",
        cache: str = "auto",
        cache_bytes: int = CACHE_BYTES,
        share: SharedPixels | None = None,
        loader_workers: int = 0,
    ) -> None:
        super().__init__(
            where, card, spec, split, world, fit, cache, cache_bytes, share, loader_workers
        )
        self._sizes = np.array([shard.samples for shard in card.split(split).shards])
        self._name = (card.digest, split)
        self._seed, self._batch_size = seed, batch_size
        self._order: tuple[int, EpochOrder] | None = None
        self.steps_per_epoch = -(-self.samples // batch_size)

    def epoch(self, epoch: int, consumed: int = 0) -> Iterator[Step]:
        """The epoch's steps after the first `consumed` samples, which are not read.

        `consumed` is a `Step.consumed`, or 0: anything else is a TesseraError. Batches are made
        ahead in a thread or in processes; their errors are raised here.
        """
        inside = 0 <= consumed <= self.samples
        if not inside or (consumed % self._batch_size and consumed != self.samples):
            raise TesseraError(
                f"an epoch of {self.samples} samples can't go on after {consumed}",
                mend=f"with a batch size of {self._batch_size} it goes on after a multiple of that",
            )
        return self._steps(epoch, range(consumed, self.samples, self._batch_size))

    def _steps(self, epoch: int, starts: range) -> Iterator[Step]:
        keys = ((epoch, start) for start in self._announced(epoch, starts))
        # In this order, or the end of the batches would never be asked for.
        for batch, start in zip(self._batches(keys), starts):
            total = min(self._batch_size, self.samples - start)
            rows = cut(total, self._world)
            counted = rows.stop - rows.start
            yield Step(batch, counted, total, rows if counted else slice(0, 1), start + total)

    def _announced(self, epoch: int, starts: range) -> Iterator[int]:
        """The starts; with each new window of shards those of the next one are asked for."""
        order = EpochOrder(*self._name, self._sizes, self._seed, epoch)
        window = -1
        for start in starts:
            if order.window(start) != window:
                window = order.window(start)
                near = [s for w in (window, window + 1) for s in order.shards(w, self._world)]
                self._reader.prefetch(near)
            yield start

    def _numbers(self, key: tuple[int, int]) -> np.ndarray[Any, Any]:
        epoch, start = key
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, EpochOrder(*self._name, self._sizes, self._seed, epoch)
        whole = self._order[1].batch(start, min(start + self._batch_size, self.samples))
        return whole[cut(len(whole), self._world)] if len(whole) > self._world.rank else whole[:1]


class EvalLoader(_Loader):
    """Fixed batches in the split's own order, dealt out to the ranks: figures made of them can't
    depend on the number of ranks. Every sample once, nothing repeated. Arguments as for training."""

    def __init__(
        self,
        where: str | Path,
        card: Card,
        spec: DataSpec,
        *,
        batch_size: int,
        world: World,
        split: str,
        fit: Fit = "stretch",
        cache: str = "auto",
        cache_bytes: int = CACHE_BYTES,
        share: SharedPixels | None = None,
        loader_workers: int = 0,
    ) -> None:
        super().__init__(
            where, card, spec, split, world, fit, cache, cache_bytes, share, loader_workers
        )
        self._batch_size = batch_size

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """(k, batch k) for this rank's k: rank, rank + size, …; a rank may get none."""
        count = -(-self.samples // self._batch_size)
        mine = range(self._world.rank, count, self._world.size)
        try:
            yield from ((k, batch) for batch, k in zip(self._batches(mine), mine))
        finally:
            self.close()

    def _numbers(self, k: int) -> np.ndarray[Any, Any]:
        start = k * self._batch_size
        return np.arange(start, min(start + self._batch_size, self.samples))
