"""Which samples form which batch, and the batches themselves.

In: a packed data set, what the network sees of it, and which rank of how many this is. Out: `Step`s
for training, batches for evaluation. Must not know tasks beyond their fields, nor Ray, MLflow or
how a shard is laid out.

The order is a pure function of data set, split, seed and epoch. Global batch k is rows k·B to
(k + 1)·B of it, whatever the number of ranks; a rank sees its cut of each. So resuming needs
(epoch, samples consumed) and nothing else, and the number of ranks may change on the way.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from models.core.errors import TesseraError
from models.core.family import Batch, DataSpec
from pipelines.data.card import Card
from pipelines.data.samples import decode_image, resize
from pipelines.data.shards import ShardReader
from pipelines.ports import World

WINDOW = 16
"""Shards whose samples are mixed with each other."""
PREFETCH = 4
"""Batches made ahead."""
CACHE_BYTES = 256 << 20
"""A split whose pixels fit stays decoded in the memory of each rank."""
_PUT_SECONDS = 0.1
T = TypeVar("T")


def order(
    digest: str,
    split: str,
    shard_sizes: Sequence[int],
    seed: int,
    epoch: int,
    window: int = WINDOW,
) -> np.ndarray[Any, Any]:
    """int64 permutation of the split's sample indices for one epoch.

    The shards are shuffled, then the samples within each `window` shards that follow each other, so
    that reading stays among few files. Made from the raw stream of Philox, whose stability NumPy
    guarantees, and a stable sort: every NumPy on every machine gives the same.
    """
    text = f"{digest}\0{split}\0{seed}\0{epoch}".encode()
    stream = np.random.Philox(key=int.from_bytes(hashlib.sha256(text).digest()[:16], "little"))
    sizes = np.asarray(shard_sizes, np.int64)
    starts = np.cumsum(sizes) - sizes
    shards = np.argsort(stream.random_raw(len(sizes)), kind="stable")
    parts = [np.zeros(0, np.int64)]
    for at in range(0, len(shards), window):
        ranges = [np.arange(starts[s], starts[s] + sizes[s]) for s in shards[at : at + window]]
        indices = np.concatenate(ranges)
        parts.append(indices[np.argsort(stream.random_raw(len(indices)), kind="stable")])
    return np.concatenate(parts)


def cut(total: int, world: World) -> slice:
    """This rank's rows of a global batch: contiguous, and sizes differ by at most one."""
    base, extra = divmod(total, world.size)
    start = world.rank * base + min(world.rank, extra)
    return slice(start, start + base + (world.rank < extra))


@dataclass(frozen=True)
class Step:
    """One global batch as this rank sees it.

    batch     this rank's rows: `image` uint8 (B, C, H, W) on the CPU, `label` int64 (B,), `key`
              list of B names, `index` int64 (B,), the place in the split
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


class _Samples:
    """Decoded samples of a split by index. They are kept where all of them fit in `cache_bytes`, so
    that each is read and decoded once."""

    def __init__(
        self, folder: Path, card: Card, spec: DataSpec, split: str, cache_bytes: int
    ) -> None:
        self._reader = ShardReader(folder, card, split)
        self._spec = spec
        count = len(self._reader)
        kept = count if count * math.prod(spec.shape) <= cache_bytes else 0
        # Memory of it is used only as far as it is written to.
        self._images = torch.empty((kept, *spec.shape), dtype=torch.uint8)
        self._labels = torch.empty(kept, dtype=torch.int64)
        self._keys: list[str | None] = [None] * kept
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reader)

    def batch(self, indices: np.ndarray[Any, Any]) -> Batch:
        with self._lock:  # an iterator given up and the next one may overlap
            wanted = indices.tolist()
            if not self._keys:
                images, labels, keys = zip(*map(self._sample, wanted))
                held = {"image": torch.stack(images), "label": torch.tensor(labels)}
                return {**held, "key": list(keys), "index": torch.tensor(wanted)}
            for index in wanted:
                if self._keys[index] is None:
                    image, label, key = self._sample(index)
                    self._images[index], self._labels[index], self._keys[index] = image, label, key
            rows = torch.tensor(wanted)
            held = {"image": self._images[rows], "label": self._labels[rows]}
            return {**held, "key": [self._keys[index] for index in wanted], "index": rows}

    def _sample(self, index: int) -> tuple[Tensor, int, str]:
        sample = self._reader.read(index)
        spec = self._spec
        where = f"the image of sample {sample.key}"
        image = decode_image(sample.image, spec.channels, where=where)
        if not 0 <= sample.label < len(spec.classes):
            raise TesseraError(
                f"sample {sample.key} has the class {sample.label}",
                mend=f"it must be a whole number from 0 to {len(spec.classes) - 1}",
            )
        return resize(image, spec.height, spec.width), sample.label, sample.key


class TrainLoader:
    """The training batches of one rank. Every rank gets the same number of steps, and every sample
    is in exactly one of them."""

    def __init__(
        self,
        folder: Path,
        card: Card,
        spec: DataSpec,
        *,
        batch_size: int,
        seed: int,
        world: World,
        split: str = "train",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._data = _Samples(folder, card, spec, split, cache_bytes)
        self._sizes = [shard.samples for shard in card.split(split).shards]
        self._digest, self._split, self._seed = card.digest, split, seed
        self._batch_size, self._world = batch_size, world
        self.samples = len(self._data)
        self.steps_per_epoch = -(-self.samples // batch_size)

    def epoch(self, epoch: int, consumed: int = 0) -> Iterator[Step]:
        """The epoch's steps after the first `consumed` samples, which are not read.

        `consumed` is a `Step.consumed`, or 0: anything else is a TesseraError. Batches are made
        ahead in a thread that ends with the iterator; its errors are raised here.
        """
        inside = 0 <= consumed <= self.samples
        if not inside or (consumed % self._batch_size and consumed != self.samples):
            raise TesseraError(
                f"an epoch of {self.samples} samples can't go on after {consumed}",
                mend=f"with a batch size of {self._batch_size} it goes on after a multiple of that",
            )
        indices = order(self._digest, self._split, self._sizes, self._seed, epoch)
        starts = range(consumed, self.samples, self._batch_size)
        return _ahead(lambda: (self._step(indices, start) for start in starts))

    def _step(self, indices: np.ndarray[Any, Any], start: int) -> Step:
        chosen = indices[start : start + self._batch_size]
        rows = cut(len(chosen), self._world)
        counted = rows.stop - rows.start
        rows = rows if counted else slice(0, 1)
        return Step(self._data.batch(chosen[rows]), counted, len(chosen), rows, start + len(chosen))


class EvalLoader:
    """Fixed batches in the split's own order, dealt out to the ranks: figures made of them can't
    depend on the number of ranks. Every sample once, nothing repeated."""

    def __init__(
        self,
        folder: Path,
        card: Card,
        spec: DataSpec,
        *,
        batch_size: int,
        world: World,
        split: str,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._data = _Samples(folder, card, spec, split, cache_bytes)
        self._batch_size, self._world = batch_size, world
        self.samples = len(self._data)

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """(k, batch k) for this rank's k: rank, rank + size, …; a rank may get none."""
        count = -(-self.samples // self._batch_size)
        mine = range(self._world.rank, count, self._world.size)
        return _ahead(lambda: ((k, self._batch(k)) for k in mine))

    def _batch(self, k: int) -> Batch:
        start = k * self._batch_size
        return self._data.batch(np.arange(start, min(start + self._batch_size, self.samples)))


def _ahead(make: Callable[[], Iterator[T]]) -> Iterator[T]:
    """The items of `make()`, made in a thread a few ahead. The thread starts with the first item
    asked for and has ended when this iterator has, however that comes."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(PREFETCH)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, value), timeout=_PUT_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        # A second pool of OpenMP threads beside the training's would fight it for the cores.
        torch.set_num_threads(1)
        try:
            for item in make():
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # it belongs to whoever waits for the batch
            put("error", error)

    thread = threading.Thread(target=work, name="tessera-loading", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
        thread.join()
