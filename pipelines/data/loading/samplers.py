"""How often each sample is used in an epoch, so that rare classes are seen more often.

In: the class of each training sample, seed and epoch. Out: how many times each sample is used; the
epoch keeps its length. Must not know files, batches or ranks.

The numbers are a function of data set, seed and epoch alone, as the order is. Of samples that
should be used 0.3 times, three in ten are used, others in each epoch; one that should be used 2.5
times is used two or three times.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, Any]


class ClassSampler:
    """`labels` are the classes of all samples, int64 (N,). With `kind` "balanced" each class that
    occurs is used equally often, with "sqrt" in proportion to the square root of its samples."""

    def __init__(self, labels: Numbers, kind: str, name: str, seed: int) -> None:
        counts = np.bincount(labels).astype(np.float64)
        wanted = {"balanced": np.minimum(counts, 1.0), "sqrt": np.sqrt(counts)}[kind]
        each = len(labels) * wanted / wanted.sum() / np.maximum(counts, 1.0)
        self._labels, self._weights = labels, each[labels]
        self._name, self._seed = name, seed

    def repeats(self, epoch: int) -> Numbers:
        """int64 (N,): how often each sample is used in the epoch; their sum is N."""
        count = len(self._weights)
        order = np.lexsort((self._draw(epoch, count), self._labels))  # class by class
        offset = float(self._draw(epoch, 1, "offset")[0] >> np.uint64(11)) * 2.0**-53
        ends = np.cumsum(self._weights[order])
        ends *= count / ends[-1]
        passed = np.floor(ends + offset).astype(np.int64)
        passed[-1] = count  # the sum, whatever was rounded
        repeats = np.empty(count, np.int64)
        repeats[order] = np.diff(passed, prepend=0)
        return repeats

    def _draw(self, epoch: int, count: int, what: str = "order") -> Numbers:
        text = f"sampler\0{self._name}\0{self._seed}\0{epoch}\0{what}"
        key = hashlib.sha256(text.encode()).digest()[:16]
        drawn: Numbers = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
        return drawn
