"""Population based training (Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846) as plain data.

In: a space, and the members' figures after each generation. Out: who takes whose weights, and with
which settings a member goes on. Every draw is a function of seed, generation and member, and the
whole state is one JSON file, so a population that was killed goes on as if it had not been. Must not
know what trains the members.

Generations are synchronous (appendix A.1 there): a member is compared with the others after the same
epochs, and none goes back in its own record.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import models
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Choice, LogUniform, Space, examples
from pipelines.recipe import Recipe
from pipelines.search.trials import better
from pipelines.storage.atomic import write_json_atomic

QUANTILE = 0.25
"""The share of the population that is replaced after a generation, and that it is replaced from."""
RESAMPLE = 0.25
"""How often a setting is drawn anew; else it becomes one of `FACTORS` times what it was."""
FACTORS = (0.8, 1.2)
OPTIMIZER = ("lr", "momentum", "weight_decay")
LEAST = 2


@dataclass
class Member:
    """`settings` are those in effect. `changes` has them all, each with the first epoch that was
    trained with them (from 1), and for weights that were taken from another member its id and the
    digest of the checkpoint."""

    id: str
    settings: dict[str, Any]
    changes: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Population:
    """`scores` has the members that are through with this generation, None for one that failed;
    `donors` says whose weights a member begins it with, and `ready` that they have been copied."""

    members: list[Member]
    generation: int = 0
    ready: bool = True
    scores: dict[str, float | None] = field(default_factory=dict)
    donors: dict[str, str] = field(default_factory=dict)

    def member(self, name: str) -> Member:
        return next(m for m in self.members if m.id == name)


def begin(space: Mapping[str, Space], count: int, seed: int) -> Population:
    members = []
    for number in range(1, count + 1):
        name = f"{number:05d}"
        draws = _draws(seed, 0, name)
        settings = {path: sample(values, draws) for path, values in space.items()}
        members.append(Member(name, settings, [{"epoch": 1, "settings": settings}]))
    return Population(members)


def advance(
    population: Population, space: Mapping[str, Space], *, direction: str, seed: int, epoch: int
) -> None:
    """Begins the next generation, whose first epoch is `epoch`. Every member must have a score."""
    generation = population.generation + 1
    donors = exploits(population.scores, direction=direction, seed=seed, generation=generation)
    before = {m.id: m.settings for m in population.members}
    for name, donor in donors.items():
        member = population.member(name)
        draws = _draws(seed, generation, f"{name}/explore")
        member.settings = explore(before[donor], space, draws)
        member.changes.append({"epoch": epoch, "settings": member.settings, "donor": donor})
    population.generation, population.donors = generation, donors
    population.scores, population.ready = {}, not donors


def exploits(
    scores: Mapping[str, float | None], *, direction: str, seed: int, generation: int
) -> dict[str, str]:
    """Member -> the better one whose weights it takes. The worst quarter take from the best, and
    whoever failed from them too (truncation selection)."""
    sign = -1.0 if direction == "max" else 1.0
    found = {name: value for name, value in scores.items() if value is not None}
    order = sorted(found, key=lambda name: (sign * found[name], name))
    count = min(math.ceil(len(scores) * QUANTILE), len(scores) // 2)
    best = order[:count]
    failed = [name for name in scores if name not in found]
    worst = order[len(order) - max(0, count - len(failed)) :]
    taken = {}
    for name in sorted([*failed, *worst]):
        draws = _draws(seed, generation, f"{name}/exploit")
        able = [d for d in best if name in failed or better(found[d], found[name], direction)]
        if able:
            taken[name] = _pick(able, draws)
    return taken


def explore(
    settings: Mapping[str, Any], space: Mapping[str, Space], draws: random.Random
) -> dict[str, Any]:
    """Settings near these: each drawn anew, or a step to either side that stays in the space."""
    return {path: _near(settings[path], values, draws) for path, values in space.items()}


def sample(values: Space, draws: random.Random) -> Any:
    if isinstance(values, Choice):
        return _pick(values.values, draws)
    share = draws.random()
    if isinstance(values, LogUniform):
        low, high = math.log(values.low), math.log(values.high)
        return _clipped(math.exp(low + share * (high - low)), values)
    return _clipped(values.low + share * (values.high - values.low), values)


def _near(value: Any, values: Space, draws: random.Random) -> Any:
    if draws.random() < RESAMPLE:
        return sample(values, draws)
    if isinstance(values, Choice):
        place = values.values.index(value) + _pick((-1, 1), draws)
        return values.values[min(max(place, 0), len(values.values) - 1)]
    return _clipped(value * _pick(FACTORS, draws), values)


def _clipped(value: float, values: Any) -> float:
    return float(min(max(value, values.low), values.high))


def _draws(seed: int, generation: int, name: str) -> random.Random:
    return random.Random(f"{seed}/{generation}/{name}")


def _pick(values: Sequence[Any], draws: random.Random) -> Any:
    return values[int(draws.random() * len(values))]  # random() alone is promised to stay as it is


def default_interval_epochs(epochs: int) -> int:
    """Epochs of a generation: a tenth of the training."""
    return max(1, math.ceil(epochs / 10))


def check_size(count: int, epochs: int, interval_epochs: int) -> None:
    """Raises UsageError where nobody could ever take anything over."""
    if count < LEAST:
        raise UsageError(f"a population of {count} has nobody to learn from", hint="--trials 8")
    if interval_epochs >= epochs:
        raise UsageError(
            f"with {epochs} epochs and generations of {interval_epochs} there is only one generation",
            hint="train for more epochs (--set train.epochs=…), or give a shorter --interval",
        )


def check_space(recipe: Recipe, space: Mapping[str, Space], data: DataSpec) -> None:
    """Raises UsageError that names each path which can't change in mid-training."""
    wrong = {path: why for path in space if (why := _fixed(recipe, path, space[path], data))}
    if wrong:
        raise UsageError(
            "population based training changes settings in mid-training, which these can't: "
            + "; ".join(f"{path} {why}" for path, why in wrong.items()),
            hint="give a space without them (--space FILE): the optimizer's "
            f"{', '.join(OPTIMIZER)}, the augmentation, dropout",
        )


def _fixed(recipe: Recipe, path: str, values: Space, data: DataSpec) -> str:
    """Why the setting must stay as it is all through a training; empty where it needn't."""
    parts = path.split(".")
    top, last = parts[0], parts[-1]
    if top == "augment" or (top == "optim" and last in OPTIMIZER):
        return ""
    if top != "model":
        is_order = path in ("train.batch_size", "seed") or top == "data"
        return "decides which samples are in a batch" if is_order else "is set for a whole training"
    shapes = [_shapes(recipe.with_overrides({path: v}), data) for v in examples(values)]
    if any(found != shapes[0] for found in shapes):
        return "changes the network's weights"
    return "" if "drop" in last else "changes the network"


def _shapes(recipe: Recipe, data: DataSpec) -> dict[str, tuple[int, ...]]:
    module = models.get(recipe.family).build(recipe.config(), data)
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


def write(population: Population, file: Path) -> None:
    """Writes the population atomically."""
    write_json_atomic(file, asdict(population))


def read(file: Path) -> Population | None:
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return Population(**{**found, "members": [Member(**m) for m in found["members"]]})
