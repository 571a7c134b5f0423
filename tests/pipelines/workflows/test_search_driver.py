"""What a search gets from its recipe: the metric with its direction, and trials that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.cluster.connection import Resources
from pipelines.search.space import TrialCapacity
from pipelines.workflows import search_driver
from pipelines.workflows.search_board import SearchSpec


def spec(**changes: Any) -> SearchSpec:
    values: dict[str, Any] = {
        "folder": Path("searches/one"),
        "name": "one",
        "recipe": "",
        "space": {},
        "search": "random",
        "scheduler": "asha",
        "trials": 4,
        "seed": 0,
        "experiment": "tessera",
        "grace_epochs": 1,
        "reduction": 3.0,
        "budget_seconds": None,
    }
    return SearchSpec(**{**values, **changes})


@pytest.mark.parametrize(
    ("family", "settings", "direction"),
    [
        ("cnn", {}, "max"),
        ("autoencoder", {}, "min"),
        ("autoencoder", {"primary_metric": "psnr", "primary_direction": "max"}, "max"),
    ],
)
def test_the_tuner_gets_the_direction_of_the_primary_metric(
    family: str, settings: dict[str, Any], direction: str
) -> None:
    recipe = recipes.start(family).with_overrides(settings)
    options = search_driver._tuner_options(spec(), recipe, TrialCapacity(2, ""))
    assert options.direction == direction


def test_as_many_trials_run_at_once_as_fit() -> None:
    recipe = recipes.start("cnn").with_overrides({"workers.count": 2, "workers.cpus": 2})
    assert search_driver.trial_capacity(recipe, 20, Resources(cpus=9)).at_once == 2
    assert search_driver.trial_capacity(recipe, 1, Resources(cpus=9)).at_once == 1
    with pytest.raises(TesseraError, match="no trial fits"):
        search_driver.trial_capacity(recipe, 20, Resources(cpus=3))
