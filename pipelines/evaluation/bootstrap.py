"""How sure a figure is: figures of other draws of the same images.

In: a `Task.bootstrap_metrics`, which makes figures of any of the images. Out: intervals, differences of two
models with theirs, and McNemar's test. Must not know what is figured.

The images that were tested stand for all that could have been. Drawing as many of them again, some
twice and some not at all, shows how a figure moves with the images (the percentile bootstrap: Efron,
Bootstrap Methods: Another Look at the Jackknife, 1979). Where images are compared with each other a
copy would be its own nearest; there each draw is a half of the images, none twice, which moves as
much (the delete-half jackknife: Shao and Wu, A General Theory for Jackknife Variance Estimation,
1989). Two models are compared on the same draws, so what an image does to both cancels out.

    N images, R draws
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.core.errors import TesseraError

CONFIDENCE = 0.95
SEED = 20_240_229
"""Of the draws: the same images always give the same intervals."""
Array = np.ndarray[Any, Any]
Selector = Callable[[Sequence[int]], dict[str, float]]


@dataclass(frozen=True)
class Estimate:
    """A figure of all images, and between what it lies in 95 % of the draws."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One model's figure less another's on the same images. `low` and `high` as in `Estimate`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """How many images only the one and only the other classified rightly, and how probable it is
    that these, or any more uneven, come of two that are as good (exact, two-sided)."""

    only_first: int
    only_second: int
    p_value: float


def resample_indices(count: int, bootstrap_samples: int, *, twice: bool = True) -> Iterator[Array]:
    """Places of images, int64: N of them, or N / 2 different ones without `twice`."""
    source = np.random.Generator(np.random.Philox(SEED))
    for _ in range(bootstrap_samples):
        if twice:
            yield source.integers(0, count, count)
        else:
            yield np.sort(source.permutation(count)[: max(count // 2, 1)])


def resampled_metrics(
    select: Selector, count: int, bootstrap_samples: int, *, twice: bool = True
) -> dict[str, Array]:
    """Each figure in each draw, float64 (R,); NaN in the draws that don't have it: a class may not
    occur in one, and half of the images may be too few to be compared."""
    found: dict[str, Array] = {}
    for place, places in enumerate(resample_indices(count, bootstrap_samples, twice=twice)):
        try:
            metrics = select(places.tolist())
        except TesseraError:
            continue
        for name, value in metrics.items():
            column = found.setdefault(name, np.full(bootstrap_samples, np.nan))
            column[place] = value
    return found


def bounds(values: Array, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The middle `confidence` of the draws that have the figure; NaN where none has."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    rest = (1 - confidence) / 2
    low, high = np.quantile(values, [rest, 1 - rest]).tolist()
    return low, high


def estimates(whole: Mapping[str, float], drawn: Mapping[str, Array]) -> dict[str, Estimate]:
    """Each figure of all images with its interval."""
    nothing = np.empty(0)
    return {
        name: Estimate(value, *bounds(drawn.get(name, nothing))) for name, value in whole.items()
    }


def differences(
    whole: tuple[Mapping[str, float], Mapping[str, float]],
    drawn: tuple[Mapping[str, Array], Mapping[str, Array]],
    confidence: float = CONFIDENCE,
) -> dict[str, Difference]:
    """First less second, for each figure that both have; between what it lies with `confidence`."""
    found = {}
    for name, value in whole[0].items():
        if name in whole[1] and name in drawn[0] and name in drawn[1]:
            moved = drawn[0][name] - drawn[1][name]
            found[name] = Difference(value - whole[1][name], *bounds(moved, confidence))
    return found


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar, Note on the sampling error of the difference between correlated proportions, 1947;
    exact, as a binomial test of the images on which the two differ."""
    from scipy.stats import binomtest

    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    total = only_first + only_second
    p_value = float(binomtest(only_first, total).pvalue) if total else 1.0
    return McNemar(only_first, only_second, p_value)
