"""What Ray Tune's classes are given: what Optuna draws, and the trials of a search that is resumed
without Tune's own record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.core.errors import TesseraError
from models.core.spaces import Choice, Integer, LogInteger, LogUniform, Space, Uniform
from pipelines.cluster import tuner
from pipelines.cluster.tuner import KnownTrial, TunerOptions

SPACE = {"train.batch_size": Choice((32, 64)), "optim.model.lr": Uniform(0.01, 0.1)}
OPTUNA_SPACE: dict[str, Space] = {
    "model.channels": Choice(([4, 8], [8, 16])),
    "optim.model.lr": LogUniform(1e-3, 0.1),
}
KNOWN = [
    KnownTrial("aaaaa_00000", {"train.batch_size": 32, "optim.model.lr": 0.05}, True, 0.5),
    KnownTrial("aaaaa_00001", {"train.batch_size": 64, "optim.model.lr": 0.02}, True, None),
    KnownTrial("aaaaa_00002", {"train.batch_size": 64, "optim.model.lr": 0.03}, False, 0.4),
]


def options(**changes: Any) -> TunerOptions:
    given: dict[str, Any] = {
        "folder": Path("tune"),
        "space": SPACE,
        "search": "random",
        "scheduler": "none",
        "trials": 5,
        "at_once": 1,
        "direction": "max",
        "most_epochs": 4,
        "grace_epochs": 1,
        "reduction": 3.0,
        "seed": 0,
        "known": KNOWN,
    }
    return TunerOptions(**{**given, **changes})


def test_a_trial_of_an_earlier_tuner_keeps_its_id() -> None:
    settings = dict(KNOWN[0].settings)
    assert tuner._id_of("ccccc_00000", settings, KNOWN) == "aaaaa_00000"
    assert tuner._id_of("ccccc_00001", settings, KNOWN) == "ccccc_00001", "another number"
    changed = {**settings, "optim.model.lr": 0.06}
    assert tuner._id_of("ccccc_00000", changed, KNOWN) == "ccccc_00000", "other settings"


@pytest.mark.slow
def test_tune_draws_whole_numbers_with_both_ends() -> None:
    space: dict[str, Space] = {"a": Integer(3, 5), "b": LogInteger(1, 4)}
    encoded = tuner._encode(space, grid=False)
    drawn = [{path: domain.sample() for path, domain in encoded.items()} for _ in range(300)]
    settings = [tuner.decode(config, space) for config in drawn]
    assert {each["a"] for each in settings} == {3, 4, 5}
    assert {each["b"] for each in settings} == {1, 2, 3, 4}
    assert {type(value) for each in settings for value in each.values()} == {int}


def test_all_trials_are_sampled_again_except_by_optuna() -> None:
    assert tuner._samples(options()) == 5
    assert tuner._samples(options(search="grid")) == 1
    assert tuner._samples(options(search="optuna")) == 3, "two are over"


@pytest.mark.slow
def test_optuna_is_told_the_trials_that_ended() -> None:
    pytest.importorskip("optuna")
    algorithm = tuner._search_algorithm(options(search="optuna"))
    assert algorithm.set_search_properties(tuner.VALUE, "max", tuner._encode(SPACE, grid=False))
    told = algorithm._ot_study.trials
    assert [(trial.value, trial.params["optim.model.lr"]) for trial in told] == [(0.5, 0.05)]


@pytest.mark.slow
def test_the_settings_are_those_that_optuna_samples() -> None:
    """Optuna alone samples the same settings with the same seed and results; one is a list."""
    optuna = pytest.importorskip(
        "optuna", reason="optuna isn't installed: pip install 'tessera-train[optuna]'"
    )
    drawn = options(space=OPTUNA_SPACE, search="optuna", trials=12, seed=5, known=())
    tunes = tuner._search_algorithm(drawn)
    assert tunes.set_search_properties(None, None, tuner._encode(OPTUNA_SPACE, grid=False))
    sampled = []
    for trial in map(str, range(drawn.trials)):
        sampled.append(tuner.decode(tunes.suggest(trial), OPTUNA_SPACE))
        tunes.on_trial_complete(trial, {tuner.VALUE: score(sampled[-1])})

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=5))
    for settings in sampled:
        asked = study.ask()
        channels = asked.suggest_categorical("model.channels", ["[4, 8]", "[8, 16]"])
        rate = asked.suggest_float("optim.model.lr", 1e-3, 0.1, log=True)
        assert {"model.channels": json.loads(channels), "optim.model.lr": rate} == settings
        study.tell(asked, score(settings))
    assert len({json.dumps(settings) for settings in sampled}) == drawn.trials


def score(settings: dict[str, Any]) -> float:
    return float(settings["optim.model.lr"] * len(settings["model.channels"]))


def test_state_that_others_could_write_is_refused(tmp_path: Path) -> None:
    """The state is unpickled, which can run code."""
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
