"""The space of a search as plain data, and how many trials run at once.

In: a family's own space or a YAML file, and the cluster's resources. Out: a checked space, and the
capacity. Must not know Ray or MLflow; the tuner is in cluster/tuner.py.

    space.yaml          optim.model.lr: {log_uniform: [1e-4, 1]}
                        optim.model.weight_decay: {uniform: [0, 1e-3]}
                        train.batch_size: {integer: [16, 64]}
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
from typing import TYPE_CHECKING, Any, Literal, get_args

import models
from models.core.errors import TesseraError, UsageError, unknown
from models.core.spaces import (
    Choice,
    Integer,
    LogInteger,
    LogUniform,
    Range,
    Space,
    Uniform,
    examples,
)
from pipelines import settings_file
from pipelines.recipe import Recipe

if TYPE_CHECKING:
    from pipelines.training.setup import TrainingSetup

Search = Literal["random", "optuna", "grid"]
Scheduler = Literal["asha", "pbt", "none"]

KINDS: dict[str, type[Range]] = {
    "uniform": Uniform,
    "log_uniform": LogUniform,
    "integer": Integer,
    "log_integer": LogInteger,
}
_WHOLE = {"uniform": "integer", "log_uniform": "log_integer"}
"""The kind of range that has the same values as far as they are whole numbers."""
MOST_GRID = 10_000
"""The largest number of trials of a grid."""
MOST_INTEGER = 10**15
"""The largest end of a range of whole numbers: all below are exact as floats, too."""


def space_of(
    recipe: Recipe, file: Path | None = None, *, fixed: Collection[str] = ()
) -> dict[str, Space]:
    """Returns what is searched, by dotted path of the recipe: the file's space, or the family's own
    without the `fixed` paths.

    Raises UsageError for a path that isn't in the recipe, for values that it doesn't accept, and
    for a path of the file that is fixed.
    """
    if file is None:
        own = models.get(recipe.family).search_space()
        space = {path: values for path, values in own.items() if not _is_set(path, fixed)}
        source = f"the space of {recipe.family}" + (
            " without the settings that are set" if own else ""
        )
    else:
        space, source = read_space(file), str(file)
        if both := sorted(path for path in space if _is_set(path, fixed)):
            raise UsageError(
                f"{both[0]} is set, but {file} searches it", hint="remove it from one of the two"
            )
    if not space:
        raise UsageError(f"{source} is empty: there is nothing to search")
    for path, values in space.items():
        _check_values(recipe, path, values, source)
    return space


def _check_values(recipe: Recipe, path: str, values: Space, source: str) -> None:
    """Raises UsageError for a value of the space that the recipe doesn't accept."""
    for value in examples(values):
        try:
            recipe.with_overrides({path: value})
        except UsageError as error:
            raise UsageError(
                f"{source}: {error.message}",
                hint=_whole_numbers_hint(recipe, path, values) or error.hint,
            ) from None


def check_trainable(setup: TrainingSetup, space: Mapping[str, Space]) -> None:
    """Raises UsageError for a value with which the data set is too small for the batch or for the
    workers, or with which the network can't be built. Each setting is tried with the others as they
    are in the recipe."""
    from pipelines.data.loading import preflight
    from pipelines.training.setup import TrainingSetup, check_network

    for path, values in space.items():
        top = path.partition(".")[0]
        if top not in ("model", "data", "train", "workers"):
            continue
        for value in examples(values):
            recipe = setup.recipe.with_overrides({path: value})
            try:
                preflight.check_feedable(
                    setup.card, workers=recipe.workers.largest, batch_size=recipe.train.batch_size
                )
                if top in ("model", "data"):
                    check_network(TrainingSetup.of(recipe, setup.card), check_weights=False)
            except TesseraError as error:
                raise UsageError(
                    f"the space has {path} = {json.dumps(value)}: {error.message}",
                    hint=error.hint,
                ) from error


def _whole_numbers_hint(recipe: Recipe, path: str, values: Space) -> str:
    """The range of whole numbers that the recipe accepts instead of a range; empty if none is."""
    if not isinstance(values, Uniform | LogUniform):
        return ""
    kind = next(name for name, each in KINDS.items() if each is type(values))
    low, high = math.ceil(values.low), math.floor(values.high)
    try:
        for value in (low, high):
            recipe.with_overrides({path: value})
    except UsageError:
        return ""
    form = f"{path}: {{{_WHOLE[kind]}: [{low}, {high}]}}"
    return f"for whole numbers write: {form}" if low < high else ""


def _is_set(path: str, fixed: Collection[str]) -> bool:
    """Whether one of the `fixed` paths, in which `*` stands for any name, is this one."""
    return any(fnmatchcase(path, pattern) for pattern in fixed)


def read_space(file: Path) -> dict[str, Space]:
    """Reads a space from a YAML file. Raises UsageError if it isn't one."""
    example = "optim.model.lr: {log_uniform: [1e-4, 1]}"
    tree = settings_file.read(file, "space", example=example, may_be_empty=True)
    return {path: parse(path, value) for path, value in tree.items()}


def parse(path: str, value: Any) -> Space:
    """Builds the space of one setting from its value in a YAML file."""
    form = "give a list of values, or {KIND: [low, high]} with the kind " + ", ".join(KINDS)
    if isinstance(value, list) and value:
        return Choice(tuple(_number(one) for one in value))
    if not isinstance(value, dict) or len(value) != 1:
        raise UsageError(f"{path}: {settings_file.short(value)} is not a valid space", hint=form)
    ((kind, ends),) = value.items()
    if kind not in KINDS:
        raise unknown(f"kind of space for {path}:", str(kind), KINDS)
    ends = [_number(end) for end in ends] if isinstance(ends, list) else []
    numbers = [e for e in ends if isinstance(e, int | float) and not isinstance(e, bool)]
    if len(ends) != 2 or len(numbers) != 2 or not all(map(math.isfinite, numbers)):
        raise UsageError(f"{path}: {kind} takes two numbers", hint=form)
    low, high = map(float, numbers)
    if not low < high or (kind.startswith("log_") and low <= 0):
        least = "above 0 and " if kind.startswith("log_") else ""
        raise UsageError(f"{path}: {kind} from {low:g} to {high:g}: low must be {least}below high")
    if kind in ("uniform", "log_uniform"):
        return Uniform(low, high) if kind == "uniform" else LogUniform(low, high)
    if not (low.is_integer() and high.is_integer()) or max(-low, high) > MOST_INTEGER:
        raise UsageError(
            f"{path}: {kind} from {low:g} to {high:g}: both must be whole numbers",
            hint=f"of at most {MOST_INTEGER:,}; for others use uniform or log_uniform",
        )
    whole = int(low), int(high)
    return Integer(*whole) if kind == "integer" else LogInteger(*whole)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def to_plain(space: Mapping[str, Space]) -> dict[str, Any]:
    """The space in the form of the YAML file."""
    names = {kind: name for name, kind in KINDS.items()}
    return {
        path: list(values.values)
        if isinstance(values, Choice)
        else {names[type(values)]: [values.low, values.high]}
        for path, values in space.items()
    }


def grid(space: Mapping[str, Space]) -> list[dict[str, Any]]:
    """Returns every combination of the values; the last path changes fastest. Raises UsageError
    for a range, or if there are more than `MOST_GRID`."""
    ranges = [path for path, values in space.items() if not isinstance(values, Choice)]
    if ranges:
        raise UsageError(
            f"a grid needs lists of values, and {', '.join(ranges)} "
            + ("is a range" if len(ranges) == 1 else "are ranges"),
            hint="use a space of lists (--space FILE) or --search random",
        )
    choices = {path: values.values for path, values in space.items() if isinstance(values, Choice)}
    count = math.prod(len(values) for values in choices.values())
    if count > MOST_GRID:
        raise UsageError(f"the grid has {count:,} combinations", hint=f"at most {MOST_GRID:,}")
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def default_grace_epochs(recipe: Recipe) -> int:
    """Epochs that every trial gets before it can be stopped: at least the warm-up of the learning
    rate and a ninth of the training."""
    epochs = recipe.train.epochs
    return max(1, math.ceil(epochs / 9), math.ceil(epochs * recipe.schedule.warmup))


@dataclass(frozen=True)
class TrialCapacity:
    """How many trials run at once, and what limits it."""

    at_once: int
    reason: str


def trial_capacity(
    *, cpus: float, gpus: float, workers: int, cpus_each: int, gpus_each: int, trials: int
) -> TrialCapacity:
    """Computes the capacity from the cluster's resources and those of a trial. Raises TesseraError
    if not even one trial fits: the search would wait forever."""
    wanted = {"CPU": workers * cpus_each, "GPU": workers * gpus_each}
    has = {"CPU": cpus, "GPU": gpus}
    fits = {kind: math.floor(has[kind] / count) for kind, count in wanted.items() if count}
    tight, most = min(fits.items(), key=lambda item: item[1])
    each = f"a trial takes {_count(wanted[tight], tight)} ({_count(workers, 'worker')})"
    if most < 1:
        raise TesseraError(
            f"no trial fits: {each}, but the cluster has {has[tight]:g}",
            hint="use fewer --workers-per-trial, or a larger cluster",
        )
    return TrialCapacity(min(most, trials), f"{each}, the cluster has {has[tight]:g}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


DEFAULT_SCHEDULER: Scheduler = "asha"
DEFAULT_TRIALS = 20
DEFAULT_REDUCTION = 3.0
_SCHEDULER_OF = {"grace": "asha", "reduction": "asha", "interval": "pbt"}


@dataclass(frozen=True)
class SearchSettings:
    """How a search runs, as it was asked for: what was not given is None.

    search, scheduler  one of `Search` and of `Scheduler`
    trials             their number
    grace              epochs before ASHA may stop a trial
    reduction          ASHA keeps one of this many trials at each rung
    interval           epochs of a generation of PBT
    seed               of the search
    budget_seconds     after which no more trials start
    """

    search: str = "random"
    scheduler: str | None = None
    trials: int | None = None
    grace: int | None = None
    reduction: float | None = None
    interval: int | None = None
    seed: int = 0
    budget_seconds: float | None = None

    @property
    def chosen_scheduler(self) -> str:
        return self.scheduler or DEFAULT_SCHEDULER


def check_settings(settings: SearchSettings, epochs: int) -> None:
    """Raises UsageError for settings of a search that don't go together, or of which one would have
    no effect. `epochs` are those of a trial."""
    scheduler, chosen = settings.scheduler, settings.chosen_scheduler
    trials, grace, interval = settings.trials, settings.grace, settings.interval
    reduction = settings.reduction
    if settings.search == "grid" and trials is not None:
        raise UsageError(
            "--search grid trains every combination and excludes --trials",
            hint="leave --trials out, or use --search random",
        )
    given = {"grace": grace, "reduction": reduction, "interval": interval}
    for name, value in given.items():
        if value is not None and chosen != _SCHEDULER_OF[name]:
            raise UsageError(
                f"--{name} has no effect with --scheduler {chosen}",
                hint=f"leave it out, or use --scheduler {_SCHEDULER_OF[name]}",
            )
    for name, number in {"trials": trials, "grace": grace, "interval": interval}.items():
        if number is not None and number < 1:
            raise UsageError(f"--{name} {number} is too small", hint="give 1 or more")
    if reduction is not None and not 1 < reduction < math.inf:
        raise UsageError(
            f"--reduction {reduction:g} keeps every trial", hint="give a number above 1, such as 3"
        )
    if scheduler == "asha" and epochs == 1:
        raise UsageError(
            "--scheduler asha stops trials after epochs, and a trial has only one here",
            hint="train for more (--set train.epochs=…), or use --scheduler none",
        )
    if grace is not None and grace > epochs:
        raise UsageError(
            f"--grace {grace} is more than the {epochs} epochs of a trial: none would be stopped",
            hint="give a shorter one, or use --scheduler none",
        )


def check_choices(search: str, scheduler: str) -> None:
    """Raises UsageError for an unknown search or scheduler, and for two that exclude each other."""
    if scheduler == "pbt" and search in ("grid", "optuna"):
        raise UsageError(
            f"--scheduler pbt chooses the settings itself and excludes --search {search}",
            hint="leave --search out, or use --scheduler asha",
        )
    for what, name, known in (
        ("search", search, get_args(Search)),
        ("scheduler", scheduler, get_args(Scheduler)),
    ):
        if name not in known:
            raise unknown(what, name, known)
