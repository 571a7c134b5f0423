"""A search as plain data: spaces, grids, how many trials fit, and who won."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import models
from jobs import tune
from models.core.errors import TesseraError, UsageError
from models.core.family import Metric
from models.core.spaces import Choice, LogUniform, Uniform
from pipelines import recipe as recipes
from pipelines.cluster import tuner
from pipelines.search import plots
from pipelines.search import space as search_space
from pipelines.search import trials as search_trials
from pipelines.search.trials import Trial
from pipelines.training import run
from pipelines.workflows import search_board
from pipelines.workflows import trial as workflows_trial

UP, DOWN = Metric("accuracy", "max"), Metric("loss", "min")


def space_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return path


def test_a_space_is_read_as_it_is_written(tmp_path: Path) -> None:
    text = """
optim.model.lr: {log_uniform: [1e-4, 1]}
optim.model.weight_decay: {uniform: [0, 1e-3]}
model.norm: [true, false]
model.channels: [[8, 16], [16, 32]]
"""
    space = search_space.space_of(recipes.start("cnn"), space_file(tmp_path, text))
    assert space == {
        "optim.model.lr": LogUniform(1e-4, 1.0),
        "optim.model.weight_decay": Uniform(0.0, 1e-3),
        "model.norm": Choice((True, False)),
        "model.channels": Choice(([8, 16], [16, 32])),
    }
    plain = json.loads(json.dumps(search_space.to_plain(space)))
    assert {path: search_space.parse(path, given) for path, given in plain.items()} == space
    again = space_file(tmp_path, yaml.safe_dump(plain))
    assert search_space.read_space(again) == space


@pytest.mark.parametrize("family", models.names())
def test_every_family_s_own_space_can_be_kept(family: str) -> None:
    space = search_space.space_of(recipes.start(family))
    plain = json.loads(json.dumps(search_space.to_plain(space)))
    found = {path: search_space.parse(path, given) for path, given in plain.items()}
    assert search_space.to_plain(found) == search_space.to_plain(space)


def test_what_is_set_is_not_searched(tmp_path: Path) -> None:
    own = search_space.space_of(recipes.start("cnn"))
    fixed = {"optim.model.lr": 0.1, "train.epochs": 3}
    assert set(search_space.space_of(recipes.start("cnn"), fixed=fixed)) == set(own) - {
        "optim.model.lr"
    }
    with pytest.raises(UsageError, match=r"without what is set, is empty"):
        search_space.space_of(recipes.start("cnn"), fixed=own)
    file = space_file(tmp_path, "optim.model.lr: [0.1, 0.2]")
    with pytest.raises(UsageError, match=r"optim.model.lr is set, and searched by .*space"):
        search_space.space_of(recipes.start("cnn"), file, fixed=fixed)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim.model.rl: {uniform: [0, 1]}", "unknown setting 'optim.model.rl'"),
        ("optim.model.lr: {uniform: [1, 0]}", "uniform from 1 to 0"),
        ("optim.model.lr: {log_uniform: [0, 1]}", "low is above 0"),
        ("optim.model.lr: {uniform: [0, .inf]}", "takes two numbers"),
        ("optim.model.lr: {uniform: [0, true]}", "takes two numbers"),
        ("optim.model.lr: {uniform: [0, 1, 2]}", "takes two numbers"),
        ("optim.model.lr: {normal: [0, 1]}", "unknown kind of space for optim.model.lr"),
        ("optim.model.lr: 0.1", "is no space"),
        ("optim.model.lr: []", "is no space"),
        ("model.norm: [maybe]", "model.norm"),
        ("- optim.model.lr", "is no list of settings"),
        ("{}", "nothing to search"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_wrong_space_is_refused_in_words(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        search_space.space_of(recipes.start("cnn"), space_file(tmp_path, text))


def test_a_space_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read: No such file"):
        search_space.read_space(tmp_path / "none.yaml")


def test_a_grid_is_every_combination() -> None:
    found = search_space.grid({"a": Choice((1, 2)), "b": Choice(("x", "y", "z"))})
    assert found == [{"a": a, "b": b} for a in (1, 2) for b in "xyz"]
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
def test_as_many_trials_run_as_fit(
    cpus: int, gpus: int, workers: int, each: tuple[int, int], trials: int, at_once: int
) -> None:
    capacity = search_space.trial_capacity(
        cpus=cpus, gpus=gpus, workers=workers, cpus_each=each[0], gpus_each=each[1], trials=trials
    )
    assert capacity.at_once == at_once


def test_a_trial_that_can_never_be_placed_is_refused_with_the_numbers() -> None:
    with pytest.raises(TesseraError, match=r"takes 4 CPUs \(4 workers\).*cluster has 2"):
        search_space.trial_capacity(cpus=2, gpus=0, workers=4, cpus_each=1, gpus_each=0, trials=1)
    with pytest.raises(TesseraError, match=r"takes 2 GPUs \(2 workers\).*cluster has 1"):
        search_space.trial_capacity(cpus=8, gpus=1, workers=2, cpus_each=1, gpus_each=1, trials=1)


def trial(number: int, values: list[float], metric: Metric = UP, **about: Any) -> Trial:
    made = Trial(f"t{number}", number, {"lr": 0.1 * number}, **about)
    for epoch, value in enumerate(values, 1):
        made.note(epoch, value, metric)
    return made


def test_a_trial_stands_by_its_best_epoch() -> None:
    made = trial(1, [0.5, 0.9, 0.7, math.nan, math.inf])
    assert (made.value, made.epoch, len(made.curve)) == (0.9, 2, 3)
    made.note(2, 0.99, UP)  # told again after a restart
    assert (made.value, len(made.curve)) == (0.9, 3)
    assert trial(1, [0.5, 0.2, 0.7], DOWN).epoch == 2


def test_the_best_comes_first_and_those_without_a_figure_last() -> None:
    trials = [trial(1, [0.5]), trial(2, []), trial(3, [0.9]), trial(4, [0.5])]
    assert [t.number for t in search_trials.ranked(trials, UP)] == [3, 1, 4, 2]
    assert [t.number for t in search_trials.ranked(trials, DOWN)] == [1, 4, 3, 2]
    assert search_trials.winner(trials, UP).number == 3
    with pytest.raises(TesseraError, match="none of 1 trials came to a figure: it burned"):
        search_trials.winner([trial(2, [], reason="it burned")], UP)


def test_the_standing_is_kept(tmp_path: Path) -> None:
    trials = [trial(1, [0.5, 0.6], status="stopped"), trial(2, [], reason="no")]
    search_trials.write(trials, tmp_path / "trials.json")
    assert search_trials.read(tmp_path / "trials.json") == trials
    assert search_trials.read(tmp_path / "none.json") == []


def test_grace_covers_the_warm_up() -> None:
    recipe = recipes.start("cnn").with_overrides({"train.epochs": 10, "schedule.warmup": 0.2})
    assert search_space.default_grace_epochs(recipe) == 2
    assert search_space.default_grace_epochs(recipe.with_overrides({"schedule.warmup": 0.0})) == 2
    assert search_space.default_grace_epochs(recipe.with_overrides({"train.epochs": 1})) == 1


def test_unknown_ways_to_search_are_refused() -> None:
    search_space.check_choices("optuna", "none")
    with pytest.raises(UsageError, match="did you mean 'random'"):
        search_space.check_choices("radnom", "asha")
    with pytest.raises(UsageError, match="unknown scheduler"):
        search_space.check_choices("random", "hyperband")


def test_a_population_of_what_can_not_change_leaves_nothing_behind(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The family's own space has such paths: each is named, before anything is started."""
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path / "home"))
    arguments = ["cnn", "--data", str(digits), "--scheduler", "pbt", "--set", "train.epochs=4"]
    with pytest.raises(UsageError, match=r"train\.batch_size .*; model\.convs changes"):
        tune.command.main(arguments, standalone_mode=False)
    space = space_file(tmp_path, "optim.model.lr: {log_uniform: [1e-4, 1]}")
    for more, said in (("--trials=1", "nobody to learn"), ("--interval=4", "one generation")):
        with pytest.raises(UsageError, match=said):
            tune.command.main([*arguments, "--space", str(space), more], standalone_mode=False)
    assert not (tmp_path / "home").exists()


def test_never_two_drivers_on_one_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path / "home"))
    asked = search_board.SearchSpec(
        folder=tmp_path / "home" / "searches" / "one",
        name="one",
        recipe=recipes.start("cnn").to_json(),
        space={},
        search="random",
        scheduler="pbt",
        trials=2,
        seed=0,
        experiment="tessera",
        grace_epochs=1,
        reduction=3.0,
        budget_seconds=None,
    )
    asked.write()
    with (
        run.locked(asked),
        pytest.raises(TesseraError, match="one is being trained by another process"),
    ):
        tune.command.main(["--resume", "one"], standalone_mode=False)


def test_a_trial_that_is_over_is_told_again_and_not_trained(tmp_path: Path) -> None:
    """As when Tune's record is older than its end. The control: one that isn't over is trained, for
    which what is told here doesn't suffice."""
    ended = Trial("a", 1, {}, status="stopped", curve=[(1, 0.5), (2, 0.6)])
    search_trials.write(
        [ended, Trial("b", 2, {}, status="running")], tmp_path / search_trials.TRIALS
    )
    told = {"folder": str(tmp_path)}
    heard: list[tuple[int, float]] = []

    def report(epoch: int, value: float) -> None:
        heard.append((epoch, value))

    workflows_trial.run_trial(told, "a", {}, report)
    assert heard == ended.curve
    with pytest.raises(KeyError, match="recipe"):
        workflows_trial.run_trial(told, "b", {}, report)


def test_a_trial_has_no_field_that_is_lost() -> None:
    assert {f.name for f in dataclasses.fields(Trial)} == set(vars(trial(1, [0.5])))


def test_who_takes_over_has_the_donor_s_best_and_its_own_curve() -> None:
    taker, donor = trial(1, [0.5, 0.7]), trial(2, [0.6, 0.9])
    taker.take_over(donor)
    assert (taker.value, taker.epoch, taker.curve) == (0.9, 2, [(1, 0.5), (2, 0.7)])
    taker.note(3, 0.8, UP)
    assert (taker.value, taker.epoch) == (0.9, 2)
    assert search_trials.winner([taker, donor], UP).number == 1, "both have that checkpoint"


def test_a_long_history_keeps_its_newest_changes() -> None:
    changes = [{"epoch": e, "settings": {"optim.model.lr": 1 / 3}} for e in range(1, 500)]
    assert json.loads(workflows_trial.changes_text(changes[:5])) == changes[:5]
    text = workflows_trial.changes_text(changes)
    assert len(text) <= workflows_trial.MOST_TAG
    kept = json.loads(text)
    assert kept == changes[-len(kept) :]
    assert len(kept) > 50


def test_pictures_are_drawn_of_as_many_trials_as_say_something(tmp_path: Path) -> None:
    space = {"lr": LogUniform(1e-3, 1.0), "norm": Choice((True, False))}
    trials = []
    for number in range(1, 13):
        rate = 10 ** (-3 + number / 4)
        made = Trial(f"t{number}", number, {"lr": rate, "norm": number % 2 == 0})
        made.note(1, 1 - abs(math.log10(rate) + 1) / 4, UP)
        trials.append(made)
    assert plots.draw([trial(1, [])], space, UP, tmp_path / "none") == []
    few = plots.draw(trials[:3], space, UP, tmp_path / "few")
    assert {f.stem for f in few} == {"history", "learning_curves", "parallel_coordinates"}
    every = plots.draw(trials, space, UP, tmp_path / "all")
    assert {f.stem for f in every} - {f.stem for f in few} == {"importance"}
    assert all(Image.open(file).size > (400, 100) for file in every)
    shares, _ = plots.importance(trials, space)
    assert shares["lr"] > 0.8 > shares["norm"]
    assert sum(shares.values()) == pytest.approx(1.0)


def test_state_that_others_could_write_is_not_read(tmp_path: Path) -> None:
    """It is unpickled: reading it executes it."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "tune"
    folder.mkdir(mode=0o700)
    state = folder / "tuner.pkl"
    state.write_bytes(b"")
    state.chmod(0o600)
    tuner.check_owned(folder)
    state.chmod(0o622)
    with pytest.raises(TesseraError, match=r"tuner\.pkl can be written by others"):
        tuner.check_owned(folder)
    tmp_path.chmod(0o700)
    tuner.check_owned(folder)  # nobody else can get there
