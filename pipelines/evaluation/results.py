"""The results of an evaluation as plain data.

In: metrics with their intervals. Out: `EvaluationResult` of a model, `Comparison` of two, and both
as JSON. Must not know how anything was measured. JSON has no NaN: an unknown value is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.evaluation.bootstrap import Difference, Estimate, McNemar


@dataclass(frozen=True)
class SliceMetrics:
    """Headline metrics of a part of the images."""

    by: str
    name: str
    span: str
    samples: int
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True)
class Robustness:
    """The primary metric of `samples` images: `clean`, `corrupted` by each kind at each strength,
    and after each attack (`attacked`)."""

    samples: int
    clean: float
    corrupted: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    attacked: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """The mean over all corruptions and strengths."""
        values = [value for values in self.corrupted.values() for value in values]
        return math.fsum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class EvaluationResult:
    """Everything measured of a model. `metrics` are of all images; names of `costs` have units.
    `direction` is "max" or "min": whether higher or lower values of the primary metric are better;
    `class_direction` is that of metrics by class."""

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
    class_direction: str = "max"

    def values(self) -> dict[str, float]:
        """Every value that a policy can limit, by name."""
        values = {name: estimate.value for name, estimate in self.metrics.items()}
        if self.robustness:
            if self.robustness.corrupted:
                values["robustness"] = self.robustness.mean
            values |= dict(self.robustness.attacked)
        return values | dict(self.costs)


@dataclass(frozen=True)
class Comparison:
    """The first model minus the second, on the same images."""

    first: str
    second: str
    metrics: Mapping[str, Difference]
    mcnemar: McNemar | None = None


def to_plain(result: EvaluationResult | Comparison) -> dict[str, Any]:
    """Converts to JSON values, without NaN and infinity."""
    plain: dict[str, Any] = _plain(asdict(result))
    return plain


def read_result(plain: Mapping[str, Any]) -> EvaluationResult:
    """Reads what `to_plain` returned."""
    fields = dict(plain)
    fields["metrics"] = _estimates(fields["metrics"])
    fields["slices"] = tuple(
        SliceMetrics(**{**one, "metrics": _estimates(one["metrics"])}) for one in fields["slices"]
    )
    if fields["robustness"]:
        robust = fields["robustness"]
        fields["robustness"] = Robustness(
            robust["samples"],
            _number(robust["clean"]),
            {kind: tuple(map(_number, values)) for kind, values in robust["corrupted"].items()},
            {kind: _number(value) for kind, value in robust["attacked"].items()},
        )
    fields["costs"] = {name: _number(value) for name, value in fields["costs"].items()}
    return EvaluationResult(**fields)


def read_comparison(plain: Mapping[str, Any]) -> Comparison:
    """Reads what `to_plain` returned."""
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
