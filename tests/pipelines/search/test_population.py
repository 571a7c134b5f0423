"""Population based training as data: which trials exploit, and which settings may change."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Choice, Integer, LogInteger, LogUniform, Space, Uniform
from pipelines import recipe as recipes
from pipelines.search import population
from pipelines.search import space as search_space

SPACE: dict[str, Space] = {
    "optim.model.lr": LogUniform(1e-4, 1.0),
    "augment.label_smoothing": Uniform(0.0, 0.2),
    "augment.crop_padding": Choice((0, 1, 2)),
}
DATA = DataSpec(
    "classification", channels=1, height=8, width=8, classes=("a", "b"), mean=(0.5,), std=(0.5,)
)


def exploits(scores: dict[str, float | None], direction: str = "max", seed: int = 0) -> Any:
    return population.exploits(scores, direction=direction, seed=seed, generation=1)


def test_first_settings_cover_the_space_and_depend_on_the_seed() -> None:
    members = population.begin(SPACE, 200, 3).members
    rates = sorted(m.settings["optim.model.lr"] for m in members)
    assert 1e-4 <= rates[0] < 2e-4
    assert 0.5 < rates[-1] <= 1.0
    assert 3e-3 < rates[100] < 3e-2, "not drawn by its logarithm"
    smoothing = [m.settings["augment.label_smoothing"] for m in members]
    assert 0 <= min(smoothing) < 0.01 < 0.19 < max(smoothing) <= 0.2
    assert {m.settings["augment.crop_padding"] for m in members} == {0, 1, 2}
    assert population.begin(SPACE, 200, 3).members == members
    assert population.begin(SPACE, 200, 4).members != members


@pytest.mark.parametrize("values", [Integer(2, 9), LogInteger(1, 64), Integer(-1, 0)])
def test_whole_numbers_stay_whole_in_the_space_and_always_move(
    values: Integer | LogInteger,
) -> None:
    rng = random.Random(0)
    drawn = [population.sample(values, rng) for _ in range(2000)]
    assert {type(value) for value in drawn} == {int}
    assert (min(drawn), max(drawn)) == (values.low, values.high)
    stuck = 0
    for value in drawn[:500]:
        moved = population.explore({"x": value}, {"x": values}, rng)["x"]
        assert type(moved) is int
        assert values.low <= moved <= values.high
        stuck += moved == value
    assert stuck < 350, "a small number never leaves its place"


def test_the_worst_quarter_copies_from_the_best() -> None:
    scores: dict[str, float | None] = {str(i): i / 10 for i in range(8)}
    for seed in range(20):
        donors = exploits(scores, seed=seed)
        assert donors.keys() == {"0", "1"}
        assert set(donors.values()) <= {"6", "7"}
        assert exploits(scores, "min", seed).keys() == {"6", "7"}
    assert len({tuple(exploits(scores, seed=seed).values()) for seed in range(20)}) > 1


def test_a_failed_trial_copies_from_one_that_did_not_fail() -> None:
    assert exploits({"a": 0.5, "b": None, "c": None, "d": None}) == dict.fromkeys("bcd", "a")
    assert exploits({"a": 0.5, "b": 0.4, "c": 0.3, "d": None}) == {"d": "a"}
    assert exploits({"a": None, "b": None}) == {}


def test_no_trial_copies_from_one_that_is_not_better() -> None:
    assert exploits(dict.fromkeys("abcd", 0.5)) == {}
    assert exploits({"a": 0.1}) == {}
    assert exploits({"a": 0.1, "b": 0.2}) == {"a": "b"}


def test_settings_stay_near_and_within_the_space() -> None:
    settings = {
        "optim.model.lr": 0.9,
        "augment.label_smoothing": 0.1,
        "augment.crop_padding": 0,
    }
    result = [population.explore(settings, SPACE, random.Random(str(i))) for i in range(400)]
    rates = [f["optim.model.lr"] for f in result]
    assert max(rates) == 1.0, "1.2 times 0.9 left the space"
    near = sum(rate in (1.0, pytest.approx(0.72)) for rate in rates) / len(rates)
    assert 0.65 < near < 0.85, "three quarters are a step away, the others drawn anew"
    assert {round(f["augment.label_smoothing"], 9) for f in result} >= {0.08, 0.12}
    assert {f["augment.crop_padding"] for f in result} == {0, 1, 2}
    assert all(0 <= f["augment.label_smoothing"] <= 0.2 for f in result)


def test_a_generation_is_a_function_of_the_state_and_the_seed(tmp_path: Path) -> None:
    def next_of(state: population.Population) -> population.Population:
        state.scores = {m.id: float(i) for i, m in enumerate(state.members)}
        population.advance(state, SPACE, direction="max", seed=1, epoch=3)
        return state

    one, other = (next_of(population.begin(SPACE, 4, 1)) for _ in range(2))
    assert one == other
    assert (one.generation, one.ready, one.scores) == (1, False, {})
    ((taker, donor),) = one.donors.items()
    assert (taker, donor) == ("00001", "00004")
    member = one.member(taker)
    assert [c["epoch"] for c in member.changes] == [1, 3]
    assert member.changes[-1] == {"epoch": 3, "settings": member.settings, "donor": donor}
    assert one.member("00002").settings == population.begin(SPACE, 4, 1).members[1].settings
    file = tmp_path / "population.json"
    assert population.read(file) is None
    population.write(one, file)
    assert population.read(file) == one


@pytest.mark.parametrize(
    ("path", "values", "why"),
    [
        ("model.channels", Choice(([8, 16], [16, 32])), "changes the network's weights"),
        ("model.norm", Choice((True, False)), "changes the network's weights"),
        ("model.pools", Choice((1, 2)), "changes the network"),
        ("train.batch_size", Choice((64, 128)), "which samples are in a batch"),
        ("seed", Choice((1, 2)), "which samples are in a batch"),
        ("schedule.final", Uniform(0.0, 0.1), "holds for a whole training"),
        ("optim.model.kind", Choice(("sgd", "adamw")), "holds for a whole training"),
    ],
)
def test_settings_that_cannot_change_during_a_training_are_refused(
    path: str, values: Space, why: str
) -> None:
    recipe = recipes.start("cnn", "tiny")
    with pytest.raises(UsageError, match=f"these can't change: {path} .*{why}"):
        population.check_space(recipe, {**SPACE, path: values}, DATA)


def test_settings_that_can_change_are_accepted() -> None:
    space = {
        **SPACE,
        "model.dropout": Uniform(0.0, 0.5),
        "optim.model.momentum": Uniform(0.5, 0.99),
        "optim.model.weight_decay": LogUniform(1e-5, 1e-2),
    }
    population.check_space(recipes.start("cnn", "tiny"), space, DATA)


def test_a_population_that_could_never_exploit_is_refused() -> None:
    population.check_size(2, 10, population.default_interval_epochs(10))
    with pytest.raises(UsageError, match="PBT needs at least 2 trials"):
        population.check_size(1, 10, 1)
    with pytest.raises(UsageError, match="single generation"):
        population.check_size(4, 10, 10)
    for kind in ("grid", "optuna"):
        with pytest.raises(UsageError, match=f"excludes --search {kind}"):
            search_space.check_choices(kind, "pbt")
