"""The plots of a search."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models.core.family import Metric
from models.core.spaces import Choice, LogUniform
from pipelines.search import plots
from pipelines.search.trials import Trial

UP, DOWN = Metric("accuracy", "max"), Metric("loss", "min")


def trial(number: int, values: list[float], metric: Metric = UP, **about: Any) -> Trial:
    one = Trial(f"t{number}", number, {"lr": 0.1 * number}, **about)
    for epoch, value in enumerate(values, 1):
        one.note(epoch, value, metric)
    return one


@pytest.mark.slow
def test_plots_that_need_more_trials_are_omitted(tmp_path: Path) -> None:
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
