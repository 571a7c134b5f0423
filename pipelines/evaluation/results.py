"""What was found of a model on a split, and of one model beside another, as plain data.

In: figures with their intervals. Out: `EvaluationResult`, `Comparison`, and both as JSON. Must not know
how anything was measured. JSON has no NaN: what is not known is left out, or null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.evaluation.bootstrap import Difference, Estimate, McNemar


@dataclass(frozen=True)
class SliceMetrics:
    """Figures of a part of the images."""

    by: str
    name: str
    span: str
    samples: int
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True)
class Robustness:
    """The primary figure on `samples` images that were spoiled. `clean` is of the same images as
    they are; `corrupted` has a value for each strength; `attacked` one for each attack."""

    samples: int
    clean: float
    corrupted: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    attacked: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Over corruptions and strengths."""
        values = [value for values in self.corrupted.values() for value in values]
        return math.fsum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class EvaluationResult:
    """All that was found of one model. `metrics` are of all images; `costs` are named with their
    units."""

    model: str
    digest: str
    family: str
    task: str
    primary: str
    direction: str
    data: str
    data_digest: str
    split: str
    samples: int
    metrics: Mapping[str, Estimate]
    slices: tuple[SliceMetrics, ...] = ()
    robustness: Robustness | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    hardware: str = ""
    judge_digest: str = ""

    def values(self) -> dict[str, float]:
        """Every figure that a policy can speak of, by name."""
        found = {name: estimate.value for name, estimate in self.metrics.items()}
        if self.robustness:
            if self.robustness.corrupted:
                found["robustness"] = self.robustness.mean
            found |= dict(self.robustness.attacked)
        return found | dict(self.costs)


@dataclass(frozen=True)
class Comparison:
    """The first model less the second, on the same images."""

    first: str
    second: str
    metrics: Mapping[str, Difference]
    mcnemar: McNemar | None = None


def to_plain(found: EvaluationResult | Comparison) -> dict[str, Any]:
    """JSON without NaN or infinity."""
    plain: dict[str, Any] = _plain(asdict(found))
    return plain


def read_result(plain: Mapping[str, Any]) -> EvaluationResult:
    """`to_plain` read back."""
    given = dict(plain)
    given["metrics"] = _estimates(given["metrics"])
    given["slices"] = tuple(
        SliceMetrics(**{**one, "metrics": _estimates(one["metrics"])}) for one in given["slices"]
    )
    if given["robustness"]:
        robust = given["robustness"]
        given["robustness"] = Robustness(
            robust["samples"],
            _number(robust["clean"]),
            {kind: tuple(map(_number, values)) for kind, values in robust["corrupted"].items()},
            {kind: _number(value) for kind, value in robust["attacked"].items()},
        )
    given["costs"] = {name: _number(value) for name, value in given["costs"].items()}
    return EvaluationResult(**given)


def read_comparison(plain: Mapping[str, Any]) -> Comparison:
    """`to_plain` read back."""
    metrics = {
        name: Difference(*(_number(value[key]) for key in ("value", "low", "high")))
        for name, value in plain["metrics"].items()
    }
    test = McNemar(**plain["mcnemar"]) if plain["mcnemar"] else None
    return Comparison(plain["first"], plain["second"], metrics, test)


def _estimates(plain: Mapping[str, Any]) -> dict[str, Estimate]:
    return {
        name: Estimate(*(_number(value[key]) for key in ("value", "low", "high")))
        for name, value in plain.items()
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
