"""Population based training (Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846) as data.

In: a search space, and the members' scores after each generation. Out: which members copy whose
weights (exploit), and with which settings they continue (explore). Must not know what trains them.

All randomness is a function of seed, generation and member, and the whole state is one JSON file:
a population that is killed and resumed takes the same decisions. Eight members and generations of 5
epochs; the state is population.json:

    epoch  event                                              state
    0      begin: random settings for 1 to 8                  generation 0, ready, no scores
    1-5    members train; 3 fails, each score is written      generation 0, ready, 8 scores
    5      advance: 25 % of 8 are 2. The best are 7 and 2;    generation 1, not ready, no scores,
           3 (failed) and 5 (worst) copy from one of them,    donors {3: 7, 5: 2}
           each with the donor's settings changed a little
    5      weights of 7 are copied to 3
           the driver is killed and resumed
    5      not ready: the copies to 3 and to 5 are made       generation 1, ready, no scores
           again. No donor has trained since, so they are
           the same.
    6-10   all members train, with their own settings         generation 1, ready, 8 scores

Generations are synchronous (appendix A.1 of the paper): a member is compared with the others after
the same number of epochs, and none goes back in its own record.
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
from models.core.spaces import Choice, Integer, LogInteger, LogUniform, Range, Space, examples
from pipelines.recipe import Recipe
from pipelines.search.trials import SettingsChange, is_better
from pipelines.storage.atomic import write_json_atomic

QUANTILE = 0.25
"""The share of the population that exploits after a generation, and that of the donors."""
RESAMPLE = 0.25
"""The probability that a setting is resampled; otherwise it is multiplied by one of `FACTORS`."""
FACTORS = (0.8, 1.2)
OPTIMIZER = ("lr", "momentum", "weight_decay")
MIN_SIZE = 2


@dataclass
class Member:
    """`settings` are the current ones, `changes` has all since the first."""

    id: str
    settings: dict[str, Any]
    changes: list[SettingsChange] = field(default_factory=list)


@dataclass
class Population:
    """`scores` has the members that have finished this generation, None for one that failed.
    `donors` maps a member to the one whose weights it starts the generation with; `ready` is True
    once they are copied."""

    members: list[Member]
    generation: int = 0
    ready: bool = True
    scores: dict[str, float | None] = field(default_factory=dict)
    donors: dict[str, str] = field(default_factory=dict)

    def member(self, name: str) -> Member:
        return next(m for m in self.members if m.id == name)


def begin(space: Mapping[str, Space], count: int, seed: int) -> Population:
    """Returns `count` members with random settings."""
    members = []
    for number in range(1, count + 1):
        name = f"{number:05d}"
        rng = _rng(seed, 0, name)
        settings = {path: sample(values, rng) for path, values in space.items()}
        members.append(Member(name, settings, [{"epoch": 1, "settings": settings}]))
    return Population(members)


def advance(
    population: Population, space: Mapping[str, Space], *, direction: str, seed: int, epoch: int
) -> None:
    """Begins the next generation with the epoch `epoch`. Requires a score for every member."""
    generation = population.generation + 1
    donors = exploits(population.scores, direction=direction, seed=seed, generation=generation)
    before = {m.id: m.settings for m in population.members}
    for name, donor in donors.items():
        member = population.member(name)
        rng = _rng(seed, generation, f"{name}/explore")
        member.settings = explore(before[donor], space, rng)
        member.changes.append({"epoch": epoch, "settings": member.settings, "donor": donor})
    population.generation, population.donors = generation, donors
    population.scores, population.ready = {}, not donors


def exploits(
    scores: Mapping[str, float | None], *, direction: str, seed: int, generation: int
) -> dict[str, str]:
    """Maps a member to the donor whose weights it copies: members of the worst quarter and those
    that failed copy from a better one of the best quarter (truncation selection)."""
    sign = -1.0 if direction == "max" else 1.0
    known = {name: value for name, value in scores.items() if value is not None}
    order = sorted(known, key=lambda name: (sign * known[name], name))
    count = min(math.ceil(len(scores) * QUANTILE), len(scores) // 2)
    best = order[:count]
    failed = [name for name in scores if name not in known]
    worst = order[len(order) - max(0, count - len(failed)) :]
    donors = {}
    for name in sorted([*failed, *worst]):
        rng = _rng(seed, generation, f"{name}/exploit")
        candidates = [
            d for d in best if name in failed or is_better(known[d], known[name], direction)
        ]
        if candidates:
            donors[name] = _pick(candidates, rng)
    return donors


def explore(
    settings: Mapping[str, Any], space: Mapping[str, Space], rng: random.Random
) -> dict[str, Any]:
    """Returns changed settings: each is resampled, or moved a step that stays in the space."""
    return {path: _near(settings[path], values, rng) for path, values in space.items()}


def sample(values: Space, rng: random.Random) -> Any:
    """Returns a random value of the space."""
    if isinstance(values, Choice):
        return _pick(values.values, rng)
    share = rng.random()
    if isinstance(values, LogUniform | LogInteger):
        low, high = math.log(values.low), math.log(values.high)
        return _clipped(math.exp(low + share * (high - low)), values)
    return _clipped(values.low + share * (values.high - values.low), values)


def _near(value: Any, values: Space, rng: random.Random) -> Any:
    if rng.random() < RESAMPLE:
        return sample(values, rng)
    if isinstance(values, Choice):
        index = values.values.index(value) + _pick((-1, 1), rng)
        return values.values[min(max(index, 0), len(values.values) - 1)]
    factor = _pick(FACTORS, rng)
    if isinstance(values, Integer | LogInteger) and round(value * factor) == value:
        return _clipped(value + (1 if factor > 1 else -1), values)
    return _clipped(value * factor, values)


def _clipped(value: float, values: Range) -> float:
    nearest = min(max(value, values.low), values.high)
    return round(nearest) if isinstance(values, Integer | LogInteger) else float(nearest)


def _rng(seed: int, generation: int, name: str) -> random.Random:
    return random.Random(f"{seed}/{generation}/{name}")


def _pick(values: Sequence[Any], rng: random.Random) -> Any:
    return values[
        int(rng.random() * len(values))
    ]  # only random() is guaranteed not to change between Python versions


def default_interval_epochs(epochs: int) -> int:
    """Epochs of a generation, unless set: a tenth of the training."""
    return max(1, math.ceil(epochs / 10))


def check_size(count: int, epochs: int, interval_epochs: int) -> None:
    """Raises UsageError if no member could ever copy from another."""
    if count < MIN_SIZE:
        raise UsageError(f"PBT needs at least {MIN_SIZE} trials, not {count}", hint="--trials 8")
    if interval_epochs >= epochs:
        raise UsageError(
            f"{epochs} epochs in generations of {interval_epochs} are a single generation",
            hint="train for more epochs (--set train.epochs=…), or give a shorter --interval",
        )


def check_space(recipe: Recipe, space: Mapping[str, Space], data: DataSpec) -> None:
    """Raises UsageError that names each setting that can't change during a training."""
    wrong = {path: why for path in space if (why := _fixed(recipe, path, space[path], data))}
    if wrong:
        raise UsageError(
            "PBT changes settings during a training, and these can't change: "
            + "; ".join(f"{path} {why}" for path, why in wrong.items()),
            hint="use a space without them (--space FILE). These can change: the optimizer's "
            f"{', '.join(OPTIMIZER)}, the augmentation, dropout",
        )


def _fixed(recipe: Recipe, path: str, values: Space, data: DataSpec) -> str:
    """Why the setting can't change during a training; empty if it can."""
    parts = path.split(".")
    top, last = parts[0], parts[-1]
    if top == "augment" or (top == "optim" and last in OPTIMIZER):
        return ""
    if top != "model":
        is_order = path in ("train.batch_size", "seed") or top == "data"
        return "decides which samples are in a batch" if is_order else "holds for a whole training"
    shapes = [_shapes(recipe.with_overrides({path: v}), data) for v in examples(values)]
    if any(other != shapes[0] for other in shapes):
        return "changes the network's weights"
    return "" if "drop" in last else "changes the network"


def _shapes(recipe: Recipe, data: DataSpec) -> dict[str, tuple[int, ...]]:
    module = models.get(recipe.family).build(recipe.config(), data)
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


def write(population: Population, file: Path) -> None:
    """Writes the population atomically."""
    write_json_atomic(file, asdict(population))


def read(file: Path) -> Population | None:
    """Reads the state; None if there is no file."""
    if not file.exists():
        return None
    state = json.loads(file.read_text(encoding="utf-8"))
    return Population(**{**state, "members": [Member(**m) for m in state["members"]]})
