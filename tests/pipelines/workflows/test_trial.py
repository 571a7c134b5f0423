"""One trial of a search, in its own process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.core.family import Metric
from pipelines.search import trials as search_trials
from pipelines.search.trials import Trial
from pipelines.workflows import trial as workflows_trial
from pipelines.workflows.context import Context

UP, DOWN = Metric("accuracy", "max"), Metric("loss", "min")


def test_a_finished_trial_is_reported_again_and_not_trained(tmp_path: Path) -> None:
    """Tune's record may be older than the end of a trial. Control: a trial that hasn't ended is
    trained, which fails because the recipe is invalid."""
    ended = Trial("a", 1, {}, status="stopped", curve=[(1, 0.5), (2, 0.6)])
    search_trials.write(
        [ended, Trial("b", 2, {}, status="running")], tmp_path / search_trials.TRIALS
    )
    payload = workflows_trial.TrialPayload(
        Context.from_environment(), "s", "not JSON", tmp_path, "", "e", "accuracy"
    )
    reported: list[tuple[int, float]] = []

    def report(epoch: int, value: float) -> None:
        reported.append((epoch, value))

    workflows_trial.run_trial(payload, "a", {}, report)
    assert reported == ended.curve
    with pytest.raises(json.JSONDecodeError):
        workflows_trial.run_trial(payload, "b", {}, report)


def test_a_long_history_keeps_its_newest_changes() -> None:
    changes = [{"epoch": e, "settings": {"optim.model.lr": 1 / 3}} for e in range(1, 500)]
    assert json.loads(workflows_trial.changes_text(changes[:5])) == changes[:5]
    text = workflows_trial.changes_text(changes)
    assert len(text) <= workflows_trial.MAX_TAG_LENGTH
    kept = json.loads(text)
    assert kept == changes[-len(kept) :]
    assert len(kept) > 50
