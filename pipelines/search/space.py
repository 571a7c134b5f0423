"""A search over settings, as plain data: its space, its trials, how many fit, and who won.

In: a family's own space or a YAML file, the cluster's resources, what was reported of each trial.
Out: what a tuner is asked for, and the standing of the trials. Must not know Ray or MLflow; the
tuner is in ray_tune.py.

    space.yaml          optim.model.lr: {log_uniform: [1e-4, 1]}
                        optim.model.weight_decay: {uniform: [0, 1e-3]}
                        model.norm: [true, false]
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

import models
from models.core.errors import TesseraError, UsageError, unknown
from models.core.spaces import Choice, LogUniform, Space, Uniform, examples
from pipelines.recipe import Recipe

Search = Literal["random", "optuna", "grid"]
Scheduler = Literal["asha", "pbt", "none"]

KINDS: dict[str, type[Uniform] | type[LogUniform]] = {
    "uniform": Uniform,
    "log_uniform": LogUniform,
}
MOST_GRID = 10_000
"""Trials that a grid may have."""


def space_of(
    recipe: Recipe, file: Path | None = None, *, fixed: Collection[str] = ()
) -> dict[str, Space]:
    """What is searched, by dotted path of the recipe: the file's space, or the family's own but for
    what is `fixed`.

    Raises UsageError for a path that the recipe hasn't, for values that it doesn't take, and for one
    of the file that is fixed.
    """
    if file is None:
        own = models.get(recipe.family).search_space()
        space = {path: values for path, values in own.items() if not _is_set(path, fixed)}
        source = f"the space of {recipe.family}" + (", without what is set," if own else "")
    else:
        space, source = read_space(file), str(file)
        if both := sorted(path for path in space if _is_set(path, fixed)):
            raise UsageError(
                f"{both[0]} is set, and searched by {file}", hint="leave it out of one of them"
            )
    if not space:
        raise UsageError(f"{source} is empty: there is nothing to search")
    for path, values in space.items():
        for value in examples(values):
            try:
                recipe.with_overrides({path: value})
            except UsageError as error:
                raise UsageError(f"{source}: {error.message}", hint=error.hint) from None
    return space


def _is_set(path: str, fixed: Collection[str]) -> bool:
    """Whether one of the `fixed` paths, in which `*` stands for any name, is this one."""
    return any(fnmatchcase(path, pattern) for pattern in fixed)


def read_space(file: Path) -> dict[str, Space]:
    """A space from a YAML file."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"space {file} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"space {file} is no YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict) or not all(isinstance(path, str) for path in tree):
        raise UsageError(
            f"space {file} is no list of settings",
            hint="write a line for each, like: optim.model.lr: {log_uniform: [1e-4, 1]}",
        )
    return {path: parse(path, given) for path, given in tree.items()}


def parse(path: str, given: Any) -> Space:
    """A space from what a YAML file has for it."""
    form = "give a list of values, {uniform: [low, high]} or {log_uniform: [low, high]}"
    if isinstance(given, list) and given:
        return Choice(tuple(_number(value) for value in given))
    if not isinstance(given, dict) or len(given) != 1:
        raise UsageError(f"{path}: {json.dumps(given, default=str)} is no space", hint=form)
    ((kind, ends),) = given.items()
    if kind not in KINDS:
        raise unknown(f"kind of space for {path}:", str(kind), KINDS)
    ends = [_number(end) for end in ends] if isinstance(ends, list) else []
    numbers = [e for e in ends if isinstance(e, int | float) and not isinstance(e, bool)]
    if len(ends) != 2 or len(numbers) != 2 or not all(map(math.isfinite, numbers)):
        raise UsageError(f"{path}: {kind} takes two numbers", hint=form)
    low, high = map(float, numbers)
    if not low < high or (kind == "log_uniform" and low <= 0):
        least = "above 0 and " if kind == "log_uniform" else ""
        raise UsageError(f"{path}: {kind} from {low:g} to {high:g}: low is {least}below high")
    return KINDS[kind](low, high)


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-3 for a word."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def to_plain(space: Mapping[str, Space]) -> dict[str, Any]:
    """The space as the YAML file has it."""
    names = {kind: name for name, kind in KINDS.items()}
    return {
        path: list(values.values)
        if isinstance(values, Choice)
        else {names[type(values)]: [values.low, values.high]}
        for path, values in space.items()
    }


def grid(space: Mapping[str, Space]) -> list[dict[str, Any]]:
    """Every combination of the values, the last path's changing fastest."""
    ranges = [path for path, values in space.items() if not isinstance(values, Choice)]
    if ranges:
        raise UsageError(
            f"a grid needs lists of values, and {', '.join(ranges)} "
            + ("is a range" if len(ranges) == 1 else "are ranges"),
            hint="give a space of lists: --space FILE, or search at random",
        )
    choices = {path: values.values for path, values in space.items() if isinstance(values, Choice)}
    count = math.prod(len(values) for values in choices.values())
    if count > MOST_GRID:
        raise UsageError(f"the grid has {count:,} combinations", hint=f"at most {MOST_GRID:,}")
    return [dict(zip(choices, found)) for found in itertools.product(*choices.values())]


def default_grace_epochs(recipe: Recipe) -> int:
    """Epochs that every trial is given: the rate has risen, and a ninth of the training is over."""
    epochs = recipe.train.epochs
    return max(1, math.ceil(epochs / 9), math.ceil(epochs * recipe.schedule.warmup))


@dataclass(frozen=True)
class TrialCapacity:
    """How many trials run at once, and why not more."""

    at_once: int
    reason: str


def trial_capacity(
    *, cpus: float, gpus: float, workers: int, cpus_each: int, gpus_each: int, trials: int
) -> TrialCapacity:
    """From what the cluster has and what a trial takes. Raises TesseraError where none fits, so
    that no search waits for what never comes."""
    wanted = {"CPU": workers * cpus_each, "GPU": workers * gpus_each}
    has = {"CPU": cpus, "GPU": gpus}
    fits = {kind: math.floor(has[kind] / count) for kind, count in wanted.items() if count}
    tight, most = min(fits.items(), key=lambda item: item[1])
    each = f"a trial takes {_count(wanted[tight], tight)} ({_count(workers, 'worker')})"
    if most < 1:
        raise TesseraError(
            f"no trial can be placed: {each}, but the cluster has {has[tight]:g}",
            hint="use fewer --workers-per-trial, or a larger cluster",
        )
    return TrialCapacity(min(most, trials), f"{each}, the cluster has {has[tight]:g}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def check_choices(search: str, scheduler: str) -> None:
    if scheduler == "pbt" and search in ("grid", "optuna"):
        raise UsageError(
            f"--scheduler pbt moves its settings itself, and can't go with --search {search}",
            hint="leave --search out, or use --scheduler asha",
        )
    for what, given, known in (
        ("search", search, get_args(Search)),
        ("scheduler", scheduler, get_args(Scheduler)),
    ):
        if given not in known:
            raise unknown(what, given, known)
