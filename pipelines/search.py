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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

import models
from models.core.errors import TesseraError, UsageError, unknown
from models.core.family import Figure
from models.core.spaces import Choice, LogUniform, Space, Uniform, examples
from pipelines.recipe import Recipe

Search = Literal["random", "optuna", "grid"]
Scheduler = Literal["asha", "pbt", "none"]
Status = Literal["waiting", "running", "finished", "stopped", "failed"]

KINDS: dict[str, type[Uniform] | type[LogUniform]] = {
    "uniform": Uniform,
    "log_uniform": LogUniform,
}
TRIALS = "trials.json"
"""In a search's folder: the standing of its trials."""
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
        space = {path: values for path, values in own.items() if path not in fixed}
        source = f"the space of {recipe.family}" + (", without what is set," if own else "")
    else:
        space, source = read_space(file), str(file)
        if both := sorted(set(space) & set(fixed)):
            raise UsageError(
                f"{both[0]} is set, and searched by {file}", mend="leave it out of one of them"
            )
    if not space:
        raise UsageError(f"{source} is empty: there is nothing to search")
    for path, values in space.items():
        for value in examples(values):
            try:
                recipe.with_overrides({path: value})
            except UsageError as error:
                raise UsageError(f"{source}: {error.message}", mend=error.mend) from None
    return space


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
            mend="write a line for each, like: optim.model.lr: {log_uniform: [1e-4, 1]}",
        )
    return {path: parse(path, given) for path, given in tree.items()}


def parse(path: str, given: Any) -> Space:
    """A space from what a YAML file has for it."""
    form = "give a list of values, {uniform: [low, high]} or {log_uniform: [low, high]}"
    if isinstance(given, list) and given:
        return Choice(tuple(_number(value) for value in given))
    if not isinstance(given, dict) or len(given) != 1:
        raise UsageError(f"{path}: {json.dumps(given, default=str)} is no space", mend=form)
    ((kind, ends),) = given.items()
    if kind not in KINDS:
        raise unknown(f"kind of space for {path}:", str(kind), KINDS)
    ends = [_number(end) for end in ends] if isinstance(ends, list) else []
    numbers = [e for e in ends if isinstance(e, int | float) and not isinstance(e, bool)]
    if len(ends) != 2 or len(numbers) != 2 or not all(map(math.isfinite, numbers)):
        raise UsageError(f"{path}: {kind} takes two numbers", mend=form)
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
            mend="give a space of lists: --space FILE, or search at random",
        )
    choices = {path: values.values for path, values in space.items() if isinstance(values, Choice)}
    count = math.prod(len(values) for values in choices.values())
    if count > MOST_GRID:
        raise UsageError(f"the grid has {count:,} combinations", mend=f"at most {MOST_GRID:,}")
    return [dict(zip(choices, found)) for found in itertools.product(*choices.values())]


def grace(recipe: Recipe) -> int:
    """Epochs that every trial is given: the rate has risen, and a ninth of the training is over."""
    epochs = recipe.train.epochs
    return max(1, math.ceil(epochs / 9), math.ceil(epochs * recipe.schedule.warmup))


@dataclass(frozen=True)
class Room:
    """How many trials run at once, and why not more."""

    at_once: int
    because: str


def room(
    *, cpus: float, gpus: float, workers: int, cpus_each: int, gpus_each: int, trials: int
) -> Room:
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
            mend="use fewer --workers-per-trial, or a larger cluster",
        )
    return Room(min(most, trials), f"{each}, the cluster has {has[tight]:g}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


@dataclass
class Trial:
    """One training of a search. `settings` are what was sampled, `value` the best of the figure so
    far and `epoch` where it was reached; `curve` has the figure of each epoch. A member of a
    population waits for the others between its generations; `settings` are then those in effect,
    and `changes` has all of them (`population.Member`)."""

    id: str
    number: int
    settings: dict[str, Any]
    run: str = ""
    run_id: str = ""
    status: Status = "waiting"
    value: float | None = None
    epoch: int = 0
    seconds: float = 0.0
    reason: str = ""
    curve: list[tuple[int, float]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether anything more can become of it."""
        return self.status not in ("waiting", "running")

    def note(self, epoch: int, value: float, figure: Figure) -> None:
        """What was found after an epoch; one that is told again counts once, and what is not finite
        not at all."""
        if not math.isfinite(value) or any(seen == epoch for seen, _ in self.curve):
            return
        self.curve.append((epoch, value))
        if self.value is None or better(value, self.value, figure.direction):
            self.value, self.epoch = value, epoch

    def take_over(self, donor: Trial) -> None:
        """Its weights are the donor's now, and so is the best that they came to."""
        self.value, self.epoch = donor.value, donor.epoch


def better(one: float, other: float, direction: str) -> bool:
    return one > other if direction == "max" else one < other


def ranked(trials: Iterable[Trial], figure: Figure) -> list[Trial]:
    """The best first; those without a figure last, in their order."""
    sign = -1.0 if figure.direction == "max" else 1.0
    return sorted(
        trials,
        key=lambda t: (t.value is None, sign * t.value if t.value is not None else 0.0, t.number),
    )


def winner(trials: Sequence[Trial], figure: Figure) -> Trial:
    """Raises TesseraError where no trial came to a figure."""
    first = next((t for t in ranked(trials, figure) if t.value is not None), None)
    if first is None:
        reasons = sorted({t.reason for t in trials if t.reason})
        said = f": {reasons[0]}" if reasons else ""
        raise TesseraError(f"none of {len(trials)} trials came to a figure{said}")
    return first


def write(trials: Sequence[Trial], file: Path) -> None:
    """All or nothing."""
    scratch = file.with_name(f".{file.name}")
    scratch.write_text(json.dumps([asdict(t) for t in trials], indent=1), encoding="utf-8")
    scratch.replace(file)


def read(file: Path) -> list[Trial]:
    if not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    return [Trial(**{**t, "curve": [(int(e), float(v)) for e, v in t["curve"]]}) for t in found]


def check_choices(search: str, scheduler: str) -> None:
    if scheduler == "pbt" and search in ("grid", "optuna"):
        raise UsageError(
            f"--scheduler pbt moves its settings itself, and can't go with --search {search}",
            mend="leave --search out, or use --scheduler asha",
        )
    for what, given, known in (
        ("search", search, get_args(Search)),
        ("scheduler", scheduler, get_args(Scheduler)),
    ):
        if given not in known:
            raise unknown(what, given, known)
