"""The area under the ROC curve of several classes, for all samples or a bootstrap sample of them.

In: scores and true classes of samples. Out: the macro average, one class against the rest. Must not
know tasks.

    N samples, K classes
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class RocAuc:
    """`scores` float (N, K) and `truth` int64 (N,)."""

    def __init__(self, scores: Tensor, truth: Tensor) -> None:
        count, classes = scores.shape
        ordered, self._order = scores.sort(dim=0, stable=True)
        differs = torch.ones(count + 1, classes, dtype=torch.bool)
        differs[1:-1] = ordered[1:] != ordered[:-1]
        places = torch.arange(count + 1)[:, None].expand(-1, classes)
        # Of each place, where the equal scores around it begin and where they end.
        self._begins = places.where(differs, 0)[:-1].cummax(0).values
        ends = places.where(differs, count).flip(0).cummin(0).values.flip(0)
        self._ends = ends[1:]
        self._is_class = truth[self._order] == torch.arange(classes)

    def __call__(self, chosen: Sequence[int] | Tensor) -> float:
        """The mean over the classes that have samples and others beside them, of the probability
        that one of its samples has a higher score than one of the others; equal scores count half.
        `chosen` are the numbers of samples, repeated ones count as often. 0.5 if there is no such
        class. Exact, so the order of samples changes no digit."""
        numbers = torch.as_tensor(chosen, dtype=torch.int64)
        weights = torch.bincount(numbers, minlength=len(self._order))[self._order]
        positive = weights * self._is_class
        below = torch.zeros(len(weights) + 1, weights.shape[1], dtype=torch.int64)
        torch.cumsum(weights - positive, 0, out=below[1:])
        twice = below.gather(0, self._begins) + below.gather(0, self._ends)
        won, own, others = (positive * twice).sum(0), positive.sum(0), below[-1]
        areas = [
            w / (2 * p * n) for w, p, n in zip(won.tolist(), own.tolist(), others.tolist()) if p * n
        ]
        return math.fsum(areas) / len(areas) if areas else 0.5
