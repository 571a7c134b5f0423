"""The spec of a search, as it is written and found again."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import tune
from models.core.errors import TesseraError, UsageError
from models.core.spaces import Choice
from pipelines import recipe as recipes
from pipelines.training import run
from pipelines.workflows import search_board
from pipelines.workflows.context import Context
from pipelines.workflows.search_board import SearchSpec


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path / "home"))
    return Context.from_environment()


@pytest.fixture
def spec(context: Context) -> SearchSpec:
    made = SearchSpec(
        folder=context.searches_dir / "one",
        name="one",
        recipe=recipes.start("cnn").to_json(),
        space={"seed": [1, 2]},
        search="random",
        scheduler="pbt",
        trials=2,
        seed=0,
        experiment="tessera",
        grace_epochs=1,
        reduction=3.0,
        budget_seconds=None,
    )
    made.write()
    return made


def test_a_search_is_found_by_its_name(context: Context, spec: SearchSpec, tmp_path: Path) -> None:
    assert search_board.find(context, "one") == spec
    assert spec.parsed_space() == {"seed": Choice((1, 2))}
    assert stat.S_IMODE(spec.folder.stat().st_mode) == 0o700
    with pytest.raises(UsageError, match="unknown search 'two'"):
        search_board.find(context, "two")
    elsewhere = replace(context, home=tmp_path / "other")
    with pytest.raises(TesseraError, match="no search has run here yet"):
        search_board.find(elsewhere, "one")


def test_a_home_that_was_moved_has_its_searches(context: Context, spec: SearchSpec) -> None:
    moved = context.home.rename(context.home.with_name("moved"))
    found = search_board.find(replace(context, home=moved), "one")
    assert found == replace(spec, folder=moved / "searches" / "one")


def test_a_search_has_only_one_driver(spec: SearchSpec) -> None:
    with (
        run.locked(spec),
        pytest.raises(TesseraError, match=r"one is being trained by host .*, process \d+"),
    ):
        tune.command.main(["--resume", "one"], standalone_mode=False)
