"""A search as plain data: search spaces, grids, how many trials fit, and the best trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import models
from models.core.errors import TesseraError, UsageError
from models.core.family import Metric
from models.core.spaces import Choice, Integer, LogInteger, LogUniform, Uniform, examples
from pipelines import recipe as recipes
from pipelines.search import space as search_space
from pipelines.search.space import SearchSettings
from pipelines.training import setup as training_setup

UP, DOWN = Metric("accuracy", "max"), Metric("loss", "min")


def space_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return path


def test_a_space_is_read_from_a_file(tmp_path: Path) -> None:
    text = """
optim.model.lr: {log_uniform: [1e-4, 1]}
optim.model.weight_decay: {uniform: [0, 1e-3]}
model.norm: [true, false]
model.channels: [[8, 16], [16, 32]]
train.batch_size: {integer: [8, 64]}
train.log_every_steps: {log_integer: [1, 1000.0]}
"""
    space = search_space.space_of(recipes.start("cnn"), space_file(tmp_path, text))
    assert space == {
        "optim.model.lr": LogUniform(1e-4, 1.0),
        "optim.model.weight_decay": Uniform(0.0, 1e-3),
        "model.norm": Choice((True, False)),
        "model.channels": Choice(([8, 16], [16, 32])),
        "train.batch_size": Integer(8, 64),
        "train.log_every_steps": LogInteger(1, 1000),
    }
    plain = json.loads(json.dumps(search_space.to_plain(space)))
    assert {path: search_space.parse(path, given) for path, given in plain.items()} == space
    again = space_file(tmp_path, yaml.safe_dump(plain))
    assert search_space.read_space(again) == space


@pytest.mark.parametrize("family", models.names())
def test_the_default_space_of_every_family_can_be_stored(family: str) -> None:
    space = search_space.space_of(recipes.start(family))
    plain = json.loads(json.dumps(search_space.to_plain(space)))
    result = {path: search_space.parse(path, given) for path, given in plain.items()}
    assert search_space.to_plain(result) == search_space.to_plain(space)


def test_settings_that_are_set_are_not_searched(tmp_path: Path) -> None:
    own = search_space.space_of(recipes.start("cnn"))
    fixed = {"optim.model.lr": 0.1, "train.epochs": 3}
    assert set(search_space.space_of(recipes.start("cnn"), fixed=fixed)) == set(own) - {
        "optim.model.lr"
    }
    with pytest.raises(UsageError, match="without the settings that are set is empty"):
        search_space.space_of(recipes.start("cnn"), fixed=own)
    file = space_file(tmp_path, "optim.model.lr: [0.1, 0.2]")
    with pytest.raises(UsageError, match=r"optim.model.lr is set, but .*space.* searches it"):
        search_space.space_of(recipes.start("cnn"), file, fixed=fixed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.model.rl: {uniform: [0, 1]}", "unknown setting 'optim.model.rl'"),
        ("optim.model.lr: {uniform: [1, 0]}", "uniform from 1 to 0"),
        ("optim.model.lr: {log_uniform: [0, 1]}", "low must be above 0"),
        ("optim.model.lr: {uniform: [0, .inf]}", "takes two numbers"),
        ("optim.model.lr: {uniform: [0, true]}", "takes two numbers"),
        ("optim.model.lr: {uniform: [0, 1, 2]}", "takes two numbers"),
        ("optim.model.lr: {normal: [0, 1]}", "unknown kind of space for optim.model.lr"),
        ("optim.model.lr: 0.1", "is not a valid space"),
        ("optim.model.lr: []", "is not a valid space"),
        ("model.norm: [maybe]", "model.norm"),
        ("train.batch_size: {integer: [8, 64.5]}", "both must be whole numbers"),
        ("train.batch_size: {integer: [64, 8]}", "integer from 64 to 8"),
        ("train.batch_size: {log_integer: [0, 8]}", "low must be above 0"),
        ("train.batch_size: {integer: [1, 1e300]}", "both must be whole numbers"),
        ("train.batch_size: {uniform: [8, 64]}", "train.batch_size = "),
        ("workers.cpus: {uniform: [1, 2]}", "workers.cpus = "),
        ("seed: {log_uniform: [1, 1000]}", "seed = "),
        ("train.batch_size: {integer: [0, 8]}", "train.batch_size = 0"),
        ("schedule.warmup: {integer: [0, 1]}", "schedule.warmup = 1"),
        ("- optim.model.lr", "is not a mapping of settings"),
        ("{}", "nothing to search"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_an_invalid_space_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        search_space.space_of(recipes.start("cnn"), space_file(tmp_path, text))


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ("train.batch_size: {uniform: [8, 64]}", "train.batch_size: {integer: [8, 64]}"),
        ("train.epochs: {log_uniform: [1.5, 9.5]}", "train.epochs: {log_integer: [2, 9]}"),
        ("train.patience: {uniform: [-0.5, 3]}", "train.patience: {integer: [0, 3]}"),
    ],
)
def test_a_range_for_a_whole_setting_is_refused_with_the_form_that_works(
    tmp_path: Path, given: str, form: str
) -> None:
    recipe = recipes.start("cnn")
    with pytest.raises(UsageError) as caught:
        search_space.space_of(recipe, space_file(tmp_path, given))
    assert caught.value.hint == f"for whole numbers write: {form}"
    assert search_space.space_of(recipe, space_file(tmp_path, form))


def test_examples_are_all_whole_numbers_of_a_small_range_and_both_parities_of_a_large_one() -> None:
    assert examples(Integer(3, 40)) == tuple(range(3, 41))
    many = examples(LogInteger(1, 100_001))
    assert {many[0], many[-1]} == {1, 100_001}
    assert {n % 2 for n in many} == {0, 1}
    assert len(many) <= 500
    assert not examples(Uniform(8, 64))[1].is_integer()


def test_a_value_with_which_nothing_can_train_is_refused(digits: Path) -> None:
    recipe = recipes.start("cnn").with_overrides({"data.path": str(digits), "workers.count": 3})
    setup = training_setup.prepare(recipe)
    search_space.check_trainable(setup, {"train.batch_size": Integer(3, 16)})
    for space in ({"train.batch_size": Integer(2, 16)}, {"train.batch_size": Choice((8, 2))}):
        with pytest.raises(UsageError, match=r"the space has train\.batch_size = 2: a batch of 2"):
            search_space.check_trainable(setup, space)
    search_space.check_trainable(setup, {"model.channels": Choice(([4, 4], [8, 4]))})


def test_a_missing_space_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read: No such file"):
        search_space.read_space(tmp_path / "none.yaml")


def test_a_grid_is_every_combination() -> None:
    result = search_space.grid({"a": Choice((1, 2)), "b": Choice(("x", "y", "z"))})
    assert result == [{"a": a, "b": b} for a in (1, 2) for b in "xyz"]
    with pytest.raises(UsageError, match="b is a range"):
        search_space.grid({"a": Choice((1,)), "b": Uniform(0, 1)})
    with pytest.raises(UsageError, match="1,000,000 combinations"):
        search_space.grid({str(i): Choice(tuple(range(10))) for i in range(6)})


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "each", "trials", "at_once"),
    [
        (2, 0, 1, (1, 0), 20, 2),
        (2, 0, 2, (1, 0), 20, 1),
        (16, 0, 2, (3, 0), 20, 2),
        (16, 4, 2, (1, 1), 20, 2),
        (16, 4, 1, (8, 1), 20, 2),
        (16, 0, 1, (1, 0), 3, 3),
    ],
)
def test_as_many_trials_run_at_once_as_fit(
    cpus: int, gpus: int, workers: int, each: tuple[int, int], trials: int, at_once: int
) -> None:
    capacity = search_space.trial_capacity(
        cpus=cpus, gpus=gpus, workers=workers, cpus_each=each[0], gpus_each=each[1], trials=trials
    )
    assert capacity.at_once == at_once


def test_a_trial_that_needs_more_than_the_cluster_has_is_refused() -> None:
    with pytest.raises(TesseraError, match=r"takes 4 CPUs \(4 workers\).*cluster has 2"):
        search_space.trial_capacity(cpus=2, gpus=0, workers=4, cpus_each=1, gpus_each=0, trials=1)
    with pytest.raises(TesseraError, match=r"takes 2 GPUs \(2 workers\).*cluster has 1"):
        search_space.trial_capacity(cpus=8, gpus=1, workers=2, cpus_each=1, gpus_each=1, trials=1)


def test_the_grace_period_covers_the_warm_up() -> None:
    recipe = recipes.start("cnn").with_overrides({"train.epochs": 10, "schedule.warmup": 0.2})
    assert search_space.default_grace_epochs(recipe) == 2
    assert search_space.default_grace_epochs(recipe.with_overrides({"schedule.warmup": 0.0})) == 2
    assert search_space.default_grace_epochs(recipe.with_overrides({"train.epochs": 1})) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"search": "grid", "trials": 4}, "excludes --trials"),
        ({"scheduler": "none", "grace": 2}, "--grace has no effect with --scheduler none"),
        ({"scheduler": "none", "reduction": 2.0}, "--reduction has no effect"),
        ({"scheduler": "pbt", "grace": 2}, "--grace has no effect with --scheduler pbt"),
        ({"interval": 2}, "--interval has no effect with --scheduler asha"),
        ({"trials": 0}, "--trials 0 is too small"),
        ({"grace": 0}, "--grace 0 is too small"),
        ({"scheduler": "pbt", "interval": -1}, "--interval -1 is too small"),
        ({"reduction": 1.0}, "--reduction 1 keeps every trial"),
        ({"reduction": float("nan")}, "keeps every trial"),
        ({"scheduler": "asha", "epochs": 1}, "asha stops trials after epochs"),
        ({"grace": 10}, "--grace 10 is more than the 9 epochs"),
    ],
)
def test_settings_of_a_search_that_make_no_sense_together_are_refused(
    given: dict[str, Any], message: str
) -> None:
    epochs = given.pop("epochs", 9)
    with pytest.raises(UsageError, match=message):
        search_space.check_settings(SearchSettings(**given), epochs)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"epochs": 1},
        {"search": "grid"},
        {"scheduler": "none", "epochs": 1},
        {"scheduler": "asha", "grace": 9, "reduction": 1.5},
        {"scheduler": "pbt", "interval": 3, "trials": 4},
    ],
)
def test_settings_that_make_sense_are_taken(given: dict[str, Any]) -> None:
    """The control."""
    epochs = given.pop("epochs", 9)
    search_space.check_settings(SearchSettings(**given), epochs)


def test_unknown_searches_and_schedulers_are_refused() -> None:
    search_space.check_choices("optuna", "none")
    with pytest.raises(UsageError, match="did you mean 'random'"):
        search_space.check_choices("radnom", "asha")
    with pytest.raises(UsageError, match="unknown scheduler"):
        search_space.check_choices("random", "hyperband")
