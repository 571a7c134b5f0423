"""Which samples form which global batch: a pure function of data set, split, seed and epoch.

In: the number of samples of each shard. Out: sample numbers. Must not know what a sample is, nor
how many ranks or loader processes there are; `rank_part` says which rows of a global batch a rank
gets.

The shards are shuffled, then the samples within each window of `WINDOW` consecutive shards, so that
reading stays within few files. Each window has its own random numbers, so a batch in the middle of
an epoch costs the same as one at its start. The random numbers are the raw stream of Philox, whose
stability NumPy guarantees, and the sort is stable: every NumPy on every machine gives the same
order.

The rows of a global batch are sorted by the position of their shard in the window. A rank takes a
contiguous range of rows, so with four nodes the first node reads mostly from the first quarter of
each window's shards. It can't be exactly one node a shard: how many rows of a batch come from a
shard is random, the range of a rank begins at a fixed row, and the rows of a batch must not depend
on the number of nodes. `nodes_per_shard` measures it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.interfaces import World

WINDOW = 16
"""Number of consecutive shards whose samples are shuffled together."""
_KEPT_WINDOWS = 3
Numbers = np.ndarray[Any, Any]


def rank_slice(total: int, world: World) -> slice:
    """The rows of a global batch of `total` rows that this rank gets: contiguous, and the numbers
    of rows of two ranks differ by at most one."""
    base, extra = divmod(total, world.size)
    start = world.rank * base + min(world.rank, extra)
    return slice(start, start + base + (world.rank < extra))


class RankPart(NamedTuple):
    """A rank's part of a global batch.

    counted   number of this rank's rows that count. A rank for which a short global batch has no
              row gets the first row and `counted` 0, because collectives need every rank
    total     number of rows of the global batch, over all ranks
    rows      which of them this rank has
    consumed  number of samples of the epoch up to the end of this batch
    """

    counted: int
    total: int
    rows: slice
    consumed: int


def rank_part(start: int, samples: int, batch_size: int, world: World) -> RankPart:
    """This rank's part of the global batch that begins at position `start` of an epoch of
    `samples`."""
    total = min(batch_size, samples - start)
    rows = rank_slice(total, world)
    counted = rows.stop - rows.start
    return RankPart(counted, total, rows if counted else slice(0, 1), start + total)


class EpochOrder:
    """One epoch's permutation of a split's sample numbers, computed window by window on demand.

    `shard_sizes` is the number of samples of each shard. With `repeats`, int64, the epoch has each
    sample so many times. Not thread-safe.
    """

    def __init__(
        self,
        digest: str,
        split: str,
        shard_sizes: Sequence[int] | Numbers,
        seed: int,
        epoch: int,
        window: int = WINDOW,
        repeats: Numbers | None = None,
    ) -> None:
        self._name = f"{digest}\0{split}\0{seed}\0{epoch}"
        self._window = window
        sizes, self._samples = np.asarray(shard_sizes, np.int64), None
        if repeats is not None:  # the order is that of a data set that has each sample so often
            self._samples = np.repeat(np.arange(len(repeats)), repeats)
            ends = np.concatenate([[0], np.cumsum(repeats)])[np.cumsum(sizes)]
            sizes = np.diff(ends, prepend=0)
        self._shards = np.argsort(self._draw("shards", len(sizes)), kind="stable")
        self._sizes = sizes[self._shards]
        self._firsts = (np.cumsum(sizes) - sizes)[self._shards]
        ends = np.concatenate([[0], np.cumsum(self._sizes)])
        self.samples = int(ends[-1])
        # The position where each window begins, and where the last one ends.
        self._bounds = np.append(ends[: len(sizes) : window], self.samples)
        self._kept: OrderedDict[int, tuple[Numbers, Numbers]] = OrderedDict()

    def rows(self, start: int, stop: int) -> Numbers:
        """Sample numbers at positions `start` to `stop` of the epoch: int64 (stop - start,),
        shorter at the end of the epoch."""
        return self._slice(start, stop)[0]

    def batch(self, start: int, stop: int) -> Numbers:
        """The numbers of `rows`, sorted by the position of each one's shard in its window."""
        rows, positions = self._slice(start, stop)
        return rows[np.argsort(positions, kind="stable")]

    def window(self, position: int) -> int:
        """The number of the window that contains a position of the epoch."""
        return int(np.searchsorted(self._bounds, position, side="right")) - 1

    def shards(self, window: int, world: World) -> list[int]:
        """The shards of a window that this rank will probably read from, in order. Empty after the
        last window."""
        inside = slice(window * self._window, (window + 1) * self._window)
        sizes = self._sizes[inside]
        ends = np.cumsum(sizes)
        # A batch's share of a shard varies, so the shard next to the boundary is likely read, too.
        low = world.rank / world.size * ends[-1:] - sizes
        high = (world.rank + 1) / world.size * ends[-1:] + sizes
        chosen: list[int] = self._shards[inside][(ends > low) & (ends - sizes < high)].tolist()
        return chosen

    def _slice(self, start: int, stop: int) -> tuple[Numbers, Numbers]:
        parts = [(np.zeros(0, np.int64), np.zeros(0))]
        window = self.window(start)
        while start < min(stop, self.samples):
            first, end = int(self._bounds[window]), int(self._bounds[window + 1])
            rows, positions = self._make(window)
            inside = slice(start - first, stop - first)
            parts.append((rows[inside], positions[inside]))
            start, window = max(start, end), window + 1
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _make(self, window: int) -> tuple[Numbers, Numbers]:
        """A window's sample numbers in order, and where in the window each one's shard begins, from
        0 to 1."""
        kept = self._kept.get(window)
        if kept is not None:
            return kept
        inside = slice(window * self._window, (window + 1) * self._window)
        sizes, firsts = self._sizes[inside], self._firsts[inside]
        total = int(sizes.sum())
        begins = np.cumsum(sizes) - sizes
        numbers = np.repeat(firsts - begins, sizes) + np.arange(total)
        chosen = np.argsort(self._draw(str(window), total), kind="stable")
        if self._samples is not None:
            numbers = self._samples[numbers]
        positions = np.repeat(begins / max(total, 1), sizes)
        kept = self._kept[window] = numbers[chosen], positions[chosen]
        if len(self._kept) > _KEPT_WINDOWS:
            self._kept.popitem(last=False)
        return kept

    def _draw(self, what: str, count: int) -> Numbers:
        key = hashlib.sha256(f"{self._name}\0{what}".encode()).digest()[:16]
        drawn: Numbers = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
        return drawn


def nodes_per_shard(order: EpochOrder, shard_sizes: Sequence[int], batch: int, nodes: int) -> float:
    """The mean number of nodes that read from a shard in one epoch. `batch` is the global batch
    size."""
    ends = np.cumsum(shard_sizes)
    readers = np.zeros((len(ends), nodes), bool)
    for start in range(0, order.samples, batch):
        rows = order.batch(start, start + batch)
        shards = np.searchsorted(ends, rows, side="right")
        for node in range(nodes):
            readers[shards[rank_slice(len(rows), World(node, nodes))], node] = True
    return float(readers.sum() / len(ends))
