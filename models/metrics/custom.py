"""Metrics from outside the project, which a recipe names as `MODULE:FUNCTION`.

In: names, and the records of a split. Out: their values. Such a metric is a function of the records
that the task makes (`Task.make_record`, one an image, in the data set's order) and the data spec.
It returns a number, or a dict of numbers:

    def worst_recall(records, data):
        return min(recall(records, k) for k in range(len(data.classes)))

It is reported under the function's name; of a dict each value as NAME_KEY. `@higher_is_better` or
`@lower_is_better` above the function says which values are better, so that a recipe can name it as
`primary_metric`. Must not know tasks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from models.core import outside
from models.core.errors import TesseraError, UsageError, unknown

if TYPE_CHECKING:  # loads torch, which nothing that only reads a recipe needs
    from models.core.family import DataSpec, Metric, Record, Task

    MetricFunction = Callable[[Sequence[Record], DataSpec], float | Mapping[str, float]]

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_Function = TypeVar("_Function", bound="Callable[..., Any]")


def higher_is_better(function: _Function) -> _Function:
    """Declares that higher values of a metric are better."""
    return _declare(function, "max")


def lower_is_better(function: _Function) -> _Function:
    """Declares that lower values of a metric are better."""
    return _declare(function, "min")


def _declare(function: _Function, direction: Literal["max", "min"]) -> _Function:
    function.direction = direction  # type: ignore[attr-defined]
    return function


def check_names(names: Sequence[str]) -> None:
    """Raises UsageError if a name isn't MODULE:FUNCTION, or if two have the same function name.
    Imports nothing: a trained model is usable where its metrics are not installed."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"metrics: {name!r} is not the name of a metric",
                hint="give MODULE:FUNCTION, like mylab.metrics:worst_recall",
            )
    functions = [_function_name(name) for name in names]
    for function in functions:
        if functions.count(function) > 1:
            raise UsageError(
                f"metrics: {function!r} is there twice", hint="rename one of the functions"
            )


@cache
def get(name: str) -> MetricFunction:
    """The metric called MODULE:FUNCTION. Raises UsageError if it can't be imported, or isn't a
    function."""
    module, _, attribute = name.partition(":")
    example = f"def {attribute}(records, data): ..."
    function: Any = outside.load("metric", name, module, attribute, example=example)
    if not callable(function):
        raise UsageError(
            f"the metric {name!r} is of type {type(function).__name__}, not a function",
            hint=f"define it like this: {example}",
        )
    return function  # type: ignore[no-any-return]


def choose_primary(task: Task, names: Sequence[str], chosen: str, direction: str = "") -> Metric:
    """The metric that selects the best checkpoint.

    Args:
        task: Its primary metric is the result if nothing is chosen.
        names: The recipe's metrics, as MODULE:FUNCTION.
        chosen: Name of a metric of the task, or of one of `names`; empty for the task's.
        direction: "max" or "min"; empty for the direction that the function declares, which is
            imported only to read that.

    Raises UsageError if there is no metric of this name, or if its direction is not known.
    """
    primary = task.primary
    if chosen in ("", primary.name):
        if chosen and direction not in ("", primary.direction):
            raise UsageError(
                f"primary_direction = {direction}: of {task.name}'s {chosen} "
                f"{_WORDS[primary.direction]} values are better",
                hint="leave primary_direction out",
            )
        return primary
    functions = {_function_name(name): name for name in names}
    function = next((f for f in functions if chosen == f or chosen.startswith(f"{f}_")), None)
    if function is None and chosen not in task.headline_metrics:
        raise unknown("metric", chosen, [*task.headline_metrics, *functions])
    if function is not None and not direction:
        direction = str(getattr(get(functions[function]), "direction", ""))
    if direction not in _WORDS:
        declare = "write @higher_is_better or @lower_is_better, from models.metrics, above it, or "
        raise UsageError(
            f"primary_metric = {chosen}: it isn't known whether higher or lower values are better",
            hint=f"{declare if function else ''}set primary_direction to max or min",
        )
    from models.core.family import Metric

    return Metric(chosen, "max" if direction == "max" else "min")


_WORDS = {"max": "higher", "min": "lower"}


def metrics(
    task: Task, names: Sequence[str], records: Sequence[Record], data: DataSpec
) -> dict[str, float]:
    """The task's own metrics and the named ones.

    Raises TesseraError if a named metric raises, returns something other than finite numbers, or
    has the name of one of the task's metrics.
    """
    values = task.metrics(records, data)
    for name in names:
        own = _compute(name, records, data)
        for metric in own.keys() & values.keys():
            raise TesseraError(
                f"the metric {name!r} is called {metric!r}, like one of {task.name}'s metrics",
                hint="rename the function",
            )
        values |= own
    return values


def bootstrap_metrics(
    task: Task, names: Sequence[str], records: Sequence[Record], data: DataSpec
) -> Callable[[Sequence[int]], dict[str, float]]:
    """As `Task.bootstrap_metrics`, with the named metrics. Raises as `metrics` does.

    A resample in which a named metric can't be computed doesn't count for its interval. Each
    resample calls the function: 1,000 times for an evaluation with intervals.
    """
    select = task.bootstrap_metrics(records, data)
    if names:
        metrics(task, names, records, data)

    def of(positions: Sequence[int]) -> dict[str, float]:
        values = select(positions)
        chosen = [records[position] for position in positions] if names else []
        for name in names:
            try:
                values |= _compute(name, chosen, data)
            except TesseraError:
                continue
        return values

    return of


def merge(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    """All metrics of two recipes; of two with the same function name, that of the first."""
    names = {_function_name(name): name for name in (*second, *first)}
    return tuple(names.values())


def _function_name(name: str) -> str:
    return name.partition(":")[2]


def _compute(name: str, records: Sequence[Record], data: DataSpec) -> dict[str, float]:
    function, own = get(name), _function_name(name)
    try:
        result = function(records, data)
        if isinstance(result, Mapping):
            values = {f"{own}_{key}": float(value) for key, value in result.items()}
        else:
            values = {own: float(result)}
    except Exception as error:  # whatever the function raises
        raise TesseraError(
            f"the metric {name!r} failed on {len(records)} records: "
            f"{type(error).__name__}: {error}",
            hint="correct it, or train without it: --set metrics=[]",
        ) from error
    for metric, value in values.items():
        if not math.isfinite(value):
            raise TesseraError(
                f"the metric {name!r} returned {value} for {metric}",
                hint="return a finite number for every set of records",
            )
        if not _KEY.fullmatch(metric):
            raise TesseraError(
                f"the metric {name!r} returned the key {metric!r}",
                hint="use letters, digits, _ and - in the keys",
            )
    return values
