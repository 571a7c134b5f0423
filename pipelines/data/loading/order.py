"""Which samples form which global batch: a pure function of data set, split, seed and epoch.

In: the shards' sizes. Out: sample numbers. Must not know what a sample is, nor how many ranks or
loader processes there are; `cut` says which rows of a global batch are a rank's.

The shards are shuffled, then the samples within each `WINDOW` shards that follow each other, so that
reading stays among few files. Each window has random numbers of its own: asking for a batch in the
middle of an epoch costs what it costs at the beginning. They are the raw stream of Philox, whose
stability NumPy guarantees, and the sort is stable: every NumPy on every machine gives the same.

Within a global batch the rows are sorted by where in its window a shard lies. A rank takes a
contiguous cut, so with four nodes the first mostly reads the first quarter of each window's shards.
It can't be exactly one node a shard: how many rows of a batch come from a shard is chance, the cut
goes through the middle of the batch whatever lies there, and the members of a batch must not depend
on the number of nodes. `nodes_per_shard` counts it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.interfaces import World

WINDOW = 16
"""Shards whose samples are mixed with each other."""
_KEPT_WINDOWS = 3
Numbers = np.ndarray[Any, Any]


def cut(total: int, world: World) -> slice:
    """This rank's rows of a global batch: contiguous, and sizes differ by at most one."""
    base, extra = divmod(total, world.size)
    start = world.rank * base + min(world.rank, extra)
    return slice(start, start + base + (world.rank < extra))


class RankPart(NamedTuple):
    """A rank's part of a global batch.

    counted   rows that count. A rank that a short global batch leaves without rows gets its first
              row with `counted` 0, so that collectives go on
    total     rows of the global batch, over all ranks
    rows      which of them the rank has
    consumed  samples of the epoch that are used up with this batch
    """

    counted: int
    total: int
    rows: slice
    consumed: int


def rank_part(start: int, samples: int, batch_size: int, world: World) -> RankPart:
    """Of the batch that begins at the place `start` of an epoch of so many samples."""
    total = min(batch_size, samples - start)
    rows = cut(total, world)
    counted = rows.stop - rows.start
    return RankPart(counted, total, rows if counted else slice(0, 1), start + total)


class EpochOrder:
    """One epoch's permutation of a split's sample numbers, made window by window when asked for.

    `shard_sizes` are the samples of each shard. Not for several threads.
    """

    def __init__(
        self,
        digest: str,
        split: str,
        shard_sizes: Sequence[int] | Numbers,
        seed: int,
        epoch: int,
        window: int = WINDOW,
    ) -> None:
        self._name = f"{digest}\0{split}\0{seed}\0{epoch}"
        self._window = window
        sizes = np.asarray(shard_sizes, np.int64)
        self._shards = np.argsort(self._draw("shards", len(sizes)), kind="stable")
        self._sizes = sizes[self._shards]
        self._firsts = (np.cumsum(sizes) - sizes)[self._shards]
        ends = np.concatenate([[0], np.cumsum(self._sizes)])
        self.samples = int(ends[-1])
        # Where each window begins, and where the last one ends.
        self._bounds = np.append(ends[: len(sizes) : window], self.samples)
        self._kept: OrderedDict[int, tuple[Numbers, Numbers]] = OrderedDict()

    def rows(self, start: int, stop: int) -> Numbers:
        """int64 sample numbers at the places `start` to `stop` of the epoch."""
        return self._slice(start, stop)[0]

    def batch(self, start: int, stop: int) -> Numbers:
        """The same numbers, sorted by where in its window each one's shard lies."""
        rows, places = self._slice(start, stop)
        return rows[np.argsort(places, kind="stable")]

    def window(self, place: int) -> int:
        """The number of the window that holds a place of the epoch."""
        return int(np.searchsorted(self._bounds, place, side="right")) - 1

    def shards(self, window: int, world: World) -> list[int]:
        """The shards of a window that this rank will read from, in their order. Empty behind the
        last window."""
        inside = slice(window * self._window, (window + 1) * self._window)
        sizes = self._sizes[inside]
        ends = np.cumsum(sizes)
        # A batch's share of a shard varies, so the shard beside the cut is likely read as well.
        low = world.rank / world.size * ends[-1:] - sizes
        high = (world.rank + 1) / world.size * ends[-1:] + sizes
        chosen: list[int] = self._shards[inside][(ends > low) & (ends - sizes < high)].tolist()
        return chosen

    def _slice(self, start: int, stop: int) -> tuple[Numbers, Numbers]:
        parts = [(np.zeros(0, np.int64), np.zeros(0))]
        window = self.window(start)
        while start < min(stop, self.samples):
            first, end = int(self._bounds[window]), int(self._bounds[window + 1])
            rows, places = self._make(window)
            inside = slice(start - first, stop - first)
            parts.append((rows[inside], places[inside]))
            start, window = max(start, end), window + 1
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _make(self, window: int) -> tuple[Numbers, Numbers]:
        """A window's sample numbers in their order, and how far in the window each one's shard
        begins, from 0 to 1."""
        found = self._kept.get(window)
        if found is not None:
            return found
        inside = slice(window * self._window, (window + 1) * self._window)
        sizes, firsts = self._sizes[inside], self._firsts[inside]
        total = int(sizes.sum())
        begins = np.cumsum(sizes) - sizes
        numbers = np.repeat(firsts - begins, sizes) + np.arange(total)
        chosen = np.argsort(self._draw(str(window), total), kind="stable")
        places = np.repeat(begins / max(total, 1), sizes)
        made = numbers[chosen], places[chosen]
        self._kept[window] = made
        if len(self._kept) > _KEPT_WINDOWS:
            self._kept.popitem(last=False)
        return made

    def _draw(self, what: str, count: int) -> Numbers:
        key = hashlib.sha256(f"{self._name}\0{what}".encode()).digest()[:16]
        drawn: Numbers = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
        return drawn


def nodes_per_shard(order: EpochOrder, shard_sizes: Sequence[int], batch: int, nodes: int) -> float:
    """How many of `nodes` read from a shard in one epoch, on the average. `batch` is global."""
    ends = np.cumsum(shard_sizes)
    readers = np.zeros((len(ends), nodes), bool)
    for start in range(0, order.samples, batch):
        rows = order.batch(start, start + batch)
        shards = np.searchsorted(ends, rows, side="right")
        for node in range(nodes):
            readers[shards[cut(len(rows), World(node, nodes))], node] = True
    return float(readers.sum() / len(ends))
