"""The trials of a search: ranking, values and file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from models.core.errors import TesseraError
from models.core.family import Metric
from pipelines.search import trials as search_trials
from pipelines.search.trials import Trial

UP, DOWN = Metric("accuracy", "max"), Metric("loss", "min")


def trial(number: int, values: list[float], metric: Metric = UP, **about: Any) -> Trial:
    one = Trial(f"t{number}", number, {"lr": 0.1 * number}, **about)
    for epoch, value in enumerate(values, 1):
        one.note(epoch, value, metric)
    return one


def test_a_trial_is_ranked_by_its_best_epoch() -> None:
    one = trial(1, [0.5, 0.9, 0.7, math.nan, math.inf])
    assert (one.value, one.epoch, len(one.curve)) == (0.9, 2, 3)
    one.note(2, 0.99, UP)  # repeated after a restart
    assert (one.value, len(one.curve)) == (0.9, 3)
    assert trial(1, [0.5, 0.2, 0.7], DOWN).epoch == 2


def test_the_best_comes_first_and_trials_without_a_metric_last() -> None:
    trials = [trial(1, [0.5]), trial(2, []), trial(3, [0.9]), trial(4, [0.5])]
    assert [t.number for t in search_trials.ranked(trials, UP)] == [3, 1, 4, 2]
    assert [t.number for t in search_trials.ranked(trials, DOWN)] == [1, 4, 3, 2]
    assert search_trials.winner(trials, UP).number == 3
    with pytest.raises(TesseraError, match=r"none of 1 trials succeeded: it burned \(trial 2\)"):
        search_trials.winner([trial(2, [], reason="it burned")], UP)


@pytest.mark.parametrize(
    ("failed", "other", "wins"),
    [
        ([0.9], [0.5], 2),  # over a worse one
        ([0.5], [0.5], 2),  # on a tie, although its number is lower
        ([0.9], [], None),  # over none
        ([], [0.0], 2),
    ],
)
@pytest.mark.parametrize("metric", [UP, DOWN])
def test_a_failed_trial_never_wins(
    metric: Metric, failed: list[float], other: list[float], wins: int | None
) -> None:
    sign = 1 if metric is UP else -1
    trials = [
        trial(1, [sign * v for v in failed], metric, status="failed", reason="it burned"),
        trial(2, [sign * v for v in other], metric, status="finished"),
    ]
    best = search_trials.best(trials, metric)
    assert (best and best.number) == wins
    trials[0].status = "finished"  # the control: otherwise it wins
    control = search_trials.best(trials, metric)
    assert (control and control.number) == (1 if failed else 2)


def test_all_failed_is_an_error_that_groups_the_reasons() -> None:
    reasons = ["no memory", "not finite", "no memory", "not finite", "not finite", ""]
    trials = [trial(n, [0.1], status="failed", reason=r) for n, r in enumerate(reasons, 1)]
    with pytest.raises(TesseraError) as caught:
        search_trials.winner(trials, UP)
    assert caught.value.message == (
        "none of 6 trials succeeded: not finite (trials 2, 4, 5); no memory (trials 1, 3); "
        "failed, without a metric (trial 6)"
    )
    many = [trial(n, [], status="failed", reason=f"reason {n}") for n in range(1, 21)]
    assert search_trials.reasons(many).endswith("; and 15 other reasons")
    same = [trial(n, [], status="failed", reason="one") for n in range(1, 21)]
    assert search_trials.reasons(same) == "one (trials 1, 2, 3, 4, 5, …)"


def test_trials_are_stored_in_a_file(tmp_path: Path) -> None:
    trials = [trial(1, [0.5, 0.6], status="stopped"), trial(2, [], reason="no")]
    search_trials.write(trials, tmp_path / "trials.json")
    assert search_trials.read(tmp_path / "trials.json") == trials
    assert search_trials.read(tmp_path / "none.json") == []


def test_every_field_of_a_trial_is_stored() -> None:
    assert {f.name for f in dataclasses.fields(Trial)} == set(vars(trial(1, [0.5])))


def test_a_trial_that_copied_has_the_best_value_of_the_donor_and_its_own_curve() -> None:
    copier, donor = trial(1, [0.5, 0.7]), trial(2, [0.6, 0.9])
    copier.copy_from(donor)
    assert (copier.value, copier.epoch, copier.curve) == (0.9, 2, [(1, 0.5), (2, 0.7)])
    copier.note(3, 0.8, UP)
    assert (copier.value, copier.epoch) == (0.9, 2)
    assert search_trials.winner([copier, donor], UP).number == 1, "both have that checkpoint"
