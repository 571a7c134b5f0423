"""The batches of a training and of an evaluation, for one rank.

In: a packed data set, what the network sees of it, and which rank of how many this is. Out: `TrainStep`s
for training, batches for evaluation. Must not know what a batch holds, nor Ray, MLflow or how a
shard is laid out.

Global batch k is rows k·B to (k + 1)·B of the epoch's order, whatever the number of ranks and loader
processes; a rank sees its cut of each. So resuming needs (epoch, samples consumed) and nothing else,
and both numbers may change on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from models.core.errors import TesseraError
from models.core.family import Batch, DataSpec
from pipelines.data.card import Card
from pipelines.data.loading.order import EpochOrder, rank_part
from pipelines.data.loading.source import BatchSource, LoadingOptions, Numbers
from pipelines.interfaces import World


@dataclass(frozen=True)
class TrainStep:
    """One global batch as this rank sees it.

    `batch` is this rank's rows, as `batches.py` says; the rest is as in `order.RankPart`.
    """

    batch: Batch
    counted: int
    total: int
    rows: slice
    consumed: int


class TrainLoader:
    """The training batches of one rank. Every rank gets the same number of steps, and every sample
    is in exactly one of them."""

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
        **options: Unpack[LoadingOptions],
    ) -> None:
        self._batch_size, self._world = batch_size, world
        self._rows = TrainRows(card, split, seed, batch_size, world)
        most = -(-batch_size // world.size)
        self._source = BatchSource(where, card, spec, split, world, self._rows, most, **options)
        self.samples = card.split(split).samples
        self.steps_per_epoch = -(-self.samples // batch_size)
        self.cache_choice = self._source.cache_choice
        """Where decoded images are kept, and why."""

    def close(self) -> None:
        """Ends the processes, which else wait for the next epoch. They also end with the loader."""
        self._source.close()

    def epoch(self, epoch: int, consumed: int = 0) -> Iterator[TrainStep]:
        """The epoch's steps after the first `consumed` samples, which are not read.

        `consumed` is a `TrainStep.consumed`, or 0: anything else is a TesseraError. Batches are made
        ahead in a thread or in processes; their errors are raised here.
        """
        inside = 0 <= consumed <= self.samples
        if not inside or (consumed % self._batch_size and consumed != self.samples):
            raise TesseraError(
                f"an epoch of {self.samples} samples can't go on after {consumed}",
                hint=f"with a batch size of {self._batch_size} it goes on after a multiple of that",
            )
        return self._steps(epoch, range(consumed, self.samples, self._batch_size))

    def _steps(self, epoch: int, starts: range) -> Iterator[TrainStep]:
        keys = ((epoch, start) for start in self._announced(epoch, starts))
        # In this order, or the end of the batches would never be asked for.
        for batch, start in zip(self._source.batches(keys), starts):
            yield TrainStep(batch, *rank_part(start, self.samples, self._batch_size, self._world))

    def _announced(self, epoch: int, starts: range) -> Iterator[int]:
        """The starts; with each new window of shards those of the next one are asked for."""
        order, window = self._rows.order(epoch), -1
        for start in starts:
            if order.window(start) != window:
                window = order.window(start)
                near = [s for w in (window, window + 1) for s in order.shards(w, self._world)]
                self._source.reader.prefetch(near)
            yield start


class TrainRows:
    """A rank's sample numbers of the batch that begins at (epoch, start)."""

    def __init__(self, card: Card, split: str, seed: int, batch_size: int, world: World) -> None:
        self._name = (card.digest, split)
        self._shards = np.array([shard.samples for shard in card.split(split).shards])
        self._seed, self._batch_size, self._world = seed, batch_size, world
        self._now: tuple[int, EpochOrder] | None = None

    def order(self, epoch: int) -> EpochOrder:
        return EpochOrder(*self._name, self._shards, self._seed, epoch)

    def __call__(self, key: tuple[int, int]) -> Numbers:
        epoch, start = key
        if self._now is None or self._now[0] != epoch:
            self._now = epoch, self.order(epoch)
        order = self._now[1]
        rows = rank_part(start, order.samples, self._batch_size, self._world).rows
        return order.batch(start, start + self._batch_size)[rows]


class EvalLoader:
    """Fixed batches in the split's own order, dealt out to the ranks: figures made of them can't
    depend on the number of ranks. Every sample once, nothing repeated."""

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
        """`only` are numbers of samples: these are given, in this order, instead of all."""
        numbers = np.arange(card.split(split).samples) if only is None else only
        self.samples = len(numbers)
        self._batch_size, self._world = batch_size, world
        rows = _EvalRows(numbers, batch_size)
        self._source = BatchSource(where, card, spec, split, world, rows, batch_size, **options)
        self.cache_choice = self._source.cache_choice
        """Where decoded images are kept, and why."""

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """(k, batch k) for this rank's k: rank, rank + size, …; a rank may get none."""
        count = -(-self.samples // self._batch_size)
        mine = range(self._world.rank, count, self._world.size)
        try:
            yield from ((k, batch) for batch, k in zip(self._source.batches(mine), mine))
        finally:
            self._source.close()


class _EvalRows:
    """The sample numbers of batch k."""

    def __init__(self, numbers: Numbers, batch_size: int) -> None:
        self._numbers, self._batch_size = numbers, batch_size

    def __call__(self, k: int) -> Numbers:
        start = k * self._batch_size
        return self._numbers[start : start + self._batch_size]
