"""Confidence intervals of metrics, by resampling the evaluated images.

In: a `Task.bootstrap_metrics`, which computes metrics of any subset of the images. Out: confidence
intervals, differences of two models with theirs, and McNemar's test. Must not know the metrics.

The images of a test split are a sample of all possible images. Drawing as many of them again, with
replacement, shows how much a metric varies with the sample (the percentile bootstrap: Efron,
Bootstrap Methods: Another Look at the Jackknife, 1979). Some tasks compare images with each
other, where a copy of an image would be its own nearest neighbour. There each sample is half of the
images, without replacement, which has the same variance (the delete-half jackknife: Shao and Wu,
A General Theory for Jackknife Variance Estimation, 1989). Two models are compared on the same
samples, so what is common to both cancels out.

    N images, R bootstrap samples
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
"""The same images always give the same intervals."""
Array = np.ndarray[Any, Any]
SubsetMetrics = Callable[[Sequence[int]], dict[str, float]]


@dataclass(frozen=True)
class Estimate:
    """A metric of all images, and its 95 % bootstrap confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A metric of one model minus that of another on the same images, with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """How many images only the first and only the second model classifies correctly, and the exact
    two-sided p-value of the hypothesis that both are equally good."""

    only_first: int
    only_second: int
    p_value: float


def resample_indices(
    count: int, bootstrap_samples: int, *, with_replacement: bool = True
) -> Iterator[Array]:
    """Yields indices of images, int64: N with replacement, or N / 2 different ones without."""
    rng = np.random.Generator(np.random.Philox(SEED))
    for _ in range(bootstrap_samples):
        if with_replacement:
            yield rng.integers(0, count, count)
        else:
            yield np.sort(rng.permutation(count)[: max(count // 2, 1)])


def resampled_metrics(
    select: SubsetMetrics, count: int, bootstrap_samples: int, *, with_replacement: bool = True
) -> dict[str, Array]:
    """Computes each metric in each bootstrap sample, float64 (R,). It is NaN in samples where it
    isn't defined: a class may be missing, or there may be too few images to compare."""
    resampled: dict[str, Array] = {}
    samples = resample_indices(count, bootstrap_samples, with_replacement=with_replacement)
    for number, indices in enumerate(samples):
        try:
            metrics = select(indices.tolist())
        except TesseraError:
            continue
        for name, value in metrics.items():
            if name not in resampled:
                resampled[name] = np.full(bootstrap_samples, np.nan)
            resampled[name][number] = value
    return resampled


def interval(values: Array, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile interval of the samples that have the metric; NaN if none has."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    rest = (1 - confidence) / 2
    low, high = np.quantile(values, [rest, 1 - rest]).tolist()
    return low, high


def estimates(metrics: Mapping[str, float], resampled: Mapping[str, Array]) -> dict[str, Estimate]:
    """Each metric of all images with its interval."""
    missing = np.empty(0)
    return {
        name: Estimate(value, *interval(resampled.get(name, missing)))
        for name, value in metrics.items()
    }


def differences(
    metrics: tuple[Mapping[str, float], Mapping[str, float]],
    resampled: tuple[Mapping[str, Array], Mapping[str, Array]],
    confidence: float = CONFIDENCE,
) -> dict[str, Difference]:
    """First minus second, for each metric that both have, with an interval of `confidence`."""
    result = {}
    for name, value in metrics[0].items():
        if name in metrics[1] and name in resampled[0] and name in resampled[1]:
            difference = resampled[0][name] - resampled[1][name]
            result[name] = Difference(value - metrics[1][name], *interval(difference, confidence))
    return result


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's test (Note on the sampling error of the difference between correlated proportions,
    1947), exact: a binomial test of the images on which the two models differ."""
    from scipy.stats import binomtest

    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    total = only_first + only_second
    p_value = float(binomtest(only_first, total).pvalue) if total else 1.0
    return McNemar(only_first, only_second, p_value)
