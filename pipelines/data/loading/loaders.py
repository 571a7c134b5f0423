"""The batches of a training or an evaluation, for one rank.

In: a packed data set, its data spec, and the rank. Out: `TrainStep`s for training, batches for
evaluation. Must not know what a batch holds, Ray, MLflow, or the layout of a shard.

Global batch k is rows k·B to (k + 1)·B of the epoch's order, whatever the number of ranks and
loader processes; a rank gets a part of each. So resuming needs the epoch and the number of consumed
samples and nothing else, and a resumed training may use other numbers of ranks and processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from models.core.errors import TesseraError
from models.core.family import Batch, DataSpec, RandomCrop
from pipelines.data.card import Card
from pipelines.data.loading.crops import RunCrops
from pipelines.data.loading.order import EpochOrder, rank_part
from pipelines.data.loading.samplers import ClassSampler
from pipelines.data.loading.source import BatchSource, LoadingOptions, Numbers
from pipelines.data.shards import ShardReader
from pipelines.interfaces import World


@dataclass(frozen=True)
class TrainStep:
    """One global batch as this rank sees it.

    `batch` has this rank's rows, in the format of `batches.py`. The other fields are those of
    `order.RankPart`.
    """

    batch: Batch
    counted: int
    total: int
    rows: slice
    consumed: int


class TrainLoader:
    """The training batches of one rank. Every rank gets the same number of steps, and every sample
    is in exactly one global batch of an epoch, unless a sampler repeats or leaves out some."""

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
        crop: RandomCrop | None = None,
        sampler: str = "shuffle",
        **options: Unpack[LoadingOptions],
    ) -> None:
        """With `crop`, a batch has views of the images: parts of them, others in each epoch. With
        another `sampler` than "shuffle", images of rare classes are used more often, see
        `samplers.py`."""
        self._batch_size, self._world = batch_size, world
        classes = None
        if sampler != "shuffle":
            labels = ShardReader(where, card, split).index.labels()
            classes = ClassSampler(labels, sampler, f"{card.digest}\0{split}", seed)
        self._rows = TrainRows(card, split, seed, batch_size, world, classes)
        max_rows = -(-batch_size // world.size)
        cuts = RunCrops(crop, seed) if crop else None
        self._source = BatchSource(
            where, card, spec, split, world, self._rows, max_rows, cuts=cuts, **options
        )
        self.samples = card.split(split).samples
        self.steps_per_epoch = -(-self.samples // batch_size)
        self.cache_choice = self._source.cache_choice
        """Where decoded images are kept, and the reason."""

    def close(self) -> None:
        """Ends the loader processes, which otherwise wait for the next epoch. They also end with
        the loader."""
        self._source.close()

    def epoch(self, epoch: int, consumed: int = 0) -> Iterator[TrainStep]:
        """Yields the epoch's steps after the first `consumed` samples, which are not read.

        `consumed` is a `TrainStep.consumed`, or 0; for any other value TesseraError is raised.
        Batches are prefetched by a thread or by processes, whose errors are raised here.
        """
        inside = 0 <= consumed <= self.samples
        if not inside or (consumed % self._batch_size and consumed != self.samples):
            raise TesseraError(
                f"an epoch of {self.samples} samples can't be resumed after {consumed}",
                hint=f"use a multiple of the batch size, {self._batch_size}",
            )
        return self._steps(epoch, range(consumed, self.samples, self._batch_size))

    def _steps(self, epoch: int, starts: range) -> Iterator[TrainStep]:
        keys = ((epoch, start) for start in self._prefetching(epoch, starts))
        # `zip` must request the batches first: otherwise their iterator would never reach its end.
        for batch, start in zip(self._source.batches(keys), starts):
            yield TrainStep(batch, *rank_part(start, self.samples, self._batch_size, self._world))

    def _prefetching(self, epoch: int, starts: range) -> Iterator[int]:
        """Yields the starts. At each new window of shards, the shards of the next one are
        prefetched."""
        order, window = self._rows.order(epoch), -1
        for start in starts:
            if order.window(start) != window:
                window = order.window(start)
                near = [s for w in (window, window + 1) for s in order.shards(w, self._world)]
                self._source.reader.prefetch(near)
            yield start


class TrainRows:
    """Returns a rank's sample numbers, int64, of the global batch that begins at (epoch, start)."""

    def __init__(
        self,
        card: Card,
        split: str,
        seed: int,
        batch_size: int,
        world: World,
        sampler: ClassSampler | None = None,
    ) -> None:
        self._name, self._sampler = (card.digest, split), sampler
        self._shards = np.array([shard.samples for shard in card.split(split).shards])
        self._seed, self._batch_size, self._world = seed, batch_size, world
        self._current: tuple[int, EpochOrder] | None = None

    def order(self, epoch: int) -> EpochOrder:
        repeats = self._sampler.repeats(epoch) if self._sampler else None
        return EpochOrder(*self._name, self._shards, self._seed, epoch, repeats=repeats)

    def __call__(self, key: tuple[int, int]) -> Numbers:
        epoch, start = key
        if self._current is None or self._current[0] != epoch:
            self._current = epoch, self.order(epoch)
        order = self._current[1]
        rows = rank_part(start, order.samples, self._batch_size, self._world).rows
        return order.batch(start, start + self._batch_size)[rows]


class EvalLoader:
    """Fixed batches in the split's own order, distributed among the ranks, so that metrics can't
    depend on the number of ranks. Every sample is in exactly one batch of one rank."""

    def __init__(
        self,
        where: str | Path,
        card: Card,
        spec: DataSpec,
        *,
        batch_size: int,
        world: World,
        split: str,
        only: Numbers | None = None,
        **options: Unpack[LoadingOptions],
    ) -> None:
        """`only`, int64 (N,), restricts the loader to these samples, in this order."""
        numbers = np.arange(card.split(split).samples) if only is None else only
        self.samples = len(numbers)
        self._batch_size, self._world = batch_size, world
        rows = _EvalRows(numbers, batch_size)
        self._source = BatchSource(where, card, spec, split, world, rows, batch_size, **options)
        self.cache_choice = self._source.cache_choice
        """Where decoded images are kept, and the reason."""

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Yields (k, batch k) for this rank's k: rank, rank + size, …. A rank may get none."""
        count = -(-self.samples // self._batch_size)
        mine = range(self._world.rank, count, self._world.size)
        try:
            yield from ((k, batch) for batch, k in zip(self._source.batches(mine), mine))
        finally:
            self._source.close()


class _EvalRows:
    """Returns the sample numbers, int64, of batch k."""

    def __init__(self, numbers: Numbers, batch_size: int) -> None:
        self._numbers, self._batch_size = numbers, batch_size

    def __call__(self, k: int) -> Numbers:
        start = k * self._batch_size
        return self._numbers[start : start + self._batch_size]
