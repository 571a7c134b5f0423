"""Searches the settings of a family or a recipe, and trains the best ones in full if wanted.

In: a family or a recipe, a packed data set, and how to search. Out: a `SearchResult` with all
trials, the best first. How a search runs is in `search_driver`. Must not print, nor read the
environment.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import time
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import tag_names
from pipelines.search import space as search_space
from pipelines.search.space import SearchSettings
from pipelines.workflows import search_driver
from pipelines.workflows.search_board import SearchSpec

if TYPE_CHECKING:
    from pipelines.interfaces import Listener
    from pipelines.recipe import Recipe
    from pipelines.search.trials import Trial
    from pipelines.training.driver import Outcome
    from pipelines.training.setup import TrainingSetup
    from pipelines.workflows.context import Context


_DATA_BYTES = 100
"""So many bytes of the data set's name are in a search's: a folder's name has at most 255."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        name: Name of the search, for `resume`.
        folder: Has the best trial's recipe as `winner.yaml`, and a run folder for each trial.
        metric: The metric that ranks the trials, on the validation split.
        winner: The best trial.
        trials: All trials, the best first.
        page: The search in MLflow.
        outcome: The training with the best settings in full; None without `refit`.
    """

    name: str
    folder: Path
    metric: str
    winner: Trial
    trials: tuple[Trial, ...]
    page: str
    outcome: Outcome | None = None

    @property
    def recipe(self) -> Path:
        """A file with the best trial's recipe, which `train` takes."""
        return self.folder / "winner.yaml"


def tune(
    what: str | os.PathLike[str] | Recipe,
    *,
    data: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    set: Mapping[str, Any] | None = None,
    trials: int | None = None,
    workers_per_trial: int = 1,
    search: str = "random",
    scheduler: str | None = None,
    space: str | os.PathLike[str] | None = None,
    budget: str | float | None = None,
    grace: int | None = None,
    reduction: float | None = None,
    interval: int | None = None,
    seed: int = 0,
    refit: bool = False,
    model: str | None = None,
    run: str | None = None,
    experiment: str = "tessera",
    verbose: bool = False,
    progress: bool | Listener = True,
    context: Context | None = None,
) -> SearchResult:
    """Searches the settings of a family, or of a recipe, with a training for each trial.

    Args:
        what: A family, the name or the file of a recipe, or a recipe.
        data: A packed data set: a folder, an address, or what `pack` returned.
        variant: A variant of the family.
        set: Settings that are the same in all trials, by dotted path.
        trials: Number of trials; 20 by default, and those of a grid.
        workers_per_trial: Data-parallel workers of a trial; 0 trains in the trial's own process.
        search: `random`, `optuna` or `grid`.
        scheduler: What stops weak trials early: `asha` (default), `pbt` or `none`.
        space: The search space as a YAML file; the family's own by default.
        budget: Time after which no more trials start: seconds, or a text such as "30m".
        grace: Epochs before a trial may be stopped.
        reduction: ASHA keeps one of this many trials at each rung; 3 by default.
        interval: Epochs of a generation of PBT.
        seed: Random seed of the search.
        refit: Whether the best settings are trained in full and registered, as `model`.
        run: Name of the search. If it exists it is resumed, or its result returned if it has
            finished, so that a call may be repeated. By default a name with the time.
        experiment: MLflow experiment of the search and its trials.
        verbose: Whether to show Ray's own output.
        progress: True for a display on stderr, False for none, or a `Listener`.
        context: Where runs, MLflow and Ray are; from the environment by default.

    Raises TesseraError if the recipe can't be searched, or if every trial failed. With `run`, also
    if the search of this name was begun with other settings.
    """
    from pipelines.workflows import named_runs, train
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    settings = SearchSettings(
        search=search,
        scheduler=scheduler,
        trials=trials,
        grace=grace,
        reduction=reduction,
        interval=interval,
        seed=seed,
        budget_seconds=None if budget is None else _parse_seconds(budget),
    )
    search_space.check_choices(search, settings.chosen_scheduler)
    if run is not None:
        run = named_runs.check_name(run)
    changes = {**(set or {}), "workers.count": workers_per_trial}
    spec = _make_spec(
        context,
        train.fit_recipe(what, data, variant, changes)[0],
        settings,
        space=space,
        fixed=changes,
        experiment=experiment,
        name=run,
    )
    if run is not None:
        spec = _begin_or_find(context, spec)
    return _run(context, spec, run is not None, refit, model, verbose, progress)


def resume(
    search: str,
    *,
    refit: bool = False,
    model: str | None = None,
    verbose: bool = False,
    progress: bool | Listener = True,
    context: Context | None = None,
) -> SearchResult:
    """Resumes an interrupted search, by its name. The arguments are those of `tune`."""
    from pipelines.workflows import search_board
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    spec = search_board.find(context, unicodedata.normalize("NFC", search))
    return _run(context, spec, True, refit, model, verbose, progress)


def _run(
    context: Context,
    spec: SearchSpec,
    restore: bool,
    refit_winner: bool,
    model: str | None,
    verbose: bool,
    progress: bool | Listener,
) -> SearchResult:
    from pipelines import recipe as recipes
    from pipelines.visuals.progress import show_progress

    recipe = recipes.build(json.loads(spec.recipe))
    with show_progress(progress) as listener:
        search = search_driver.finished(context, spec, recipe) if restore else None
        if search is not None:
            listener({"kind": "message", "text": f"{spec.name} is finished: nothing to search"})
        else:
            search = search_driver.run(
                context, spec, recipe, restore=restore, verbose=verbose, listener=listener
            )
    result = SearchResult(
        name=spec.name,
        folder=spec.folder,
        metric=recipe.primary().name,
        winner=search.winner,
        trials=search.trials,
        page=search.page,
    )
    if not refit_winner:
        return result
    outcome = _refit(
        context, spec, recipe, result.winner, model=model, verbose=verbose, progress=progress
    )
    return replace(result, outcome=outcome)


def _parse_seconds(budget: str | float) -> float:
    """Seconds from a text such as "90s", "30m", "2h" or "1d". Raises UsageError otherwise."""
    from models.core.errors import UsageError

    if isinstance(budget, int | float):
        seconds = float(budget)
    else:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", budget.strip())
        seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(f"--budget {budget}", hint="give a time like 90s, 30m or 2h")
    return seconds


def _refit(
    context: Context,
    spec: SearchSpec,
    recipe: Recipe,
    best: Trial,
    *,
    model: str | None,
    verbose: bool,
    progress: bool | Listener,
) -> Outcome:
    """Trains the best settings in full and registers the model. A member of a population changed
    its settings while it trained, so its own run is resumed to the last epoch and registered."""
    from pipelines.workflows import train

    winner = recipe.with_overrides(best.settings)
    options: dict[str, Any] = {
        "experiment": spec.experiment,
        "verbose": verbose,
        "progress": progress,
        "tags": {tag_names.SEARCH: spec.name, tag_names.TRIAL: best.id},
    }
    if spec.scheduler == "pbt":
        return train.continue_run(
            context, search_driver.run_of(spec, best), winner, model=model, **options
        )
    return train.train(winner, context=context, model=model, run=f"{spec.name}-refit", **options)


def _make_spec(
    context: Context,
    recipe: Recipe,
    settings: SearchSettings,
    *,
    space: str | os.PathLike[str] | None,
    fixed: Collection[str],
    experiment: str,
    name: str | None,
) -> SearchSpec:
    """Builds the spec of a search. `fixed` are the paths that the space may not change. Raises
    UsageError if it can't be searched."""
    from pipelines.search import population
    from pipelines.workflows import search_files, services, train

    search_space.check_settings(settings, recipe.train.epochs)
    trials, reduction = settings.trials or search_space.DEFAULT_TRIALS, settings.reduction
    resources = services.known_resources(context) if recipe.workers.count else None
    if resources is not None:  # otherwise it is checked once the cluster is joined
        search_driver.trial_capacity(recipe, trials, resources)
    setup = train.prepare(context, recipe, check_resources=False)
    recipe = setup.recipe
    parsed = search_space.space_of(recipe, Path(space) if space else None, fixed=fixed)
    search_space.check_trainable(setup, parsed)
    epochs = recipe.train.epochs
    length = settings.interval or population.default_interval_epochs(epochs)
    if settings.chosen_scheduler == "pbt":
        population.check_size(trials, epochs, length)
        population.check_space(recipe, parsed, setup.data)
    name = name or _name(setup)
    return SearchSpec(
        folder=context.searches_dir / name,
        storage=search_files.address(context.remote_storage, name),
        name=name,
        recipe=recipe.to_json(),
        space=search_space.to_plain(parsed),
        search=settings.search,
        scheduler=settings.chosen_scheduler,
        reduction=search_space.DEFAULT_REDUCTION if reduction is None else reduction,
        trials=len(search_space.grid(parsed)) if settings.search == "grid" else trials,
        grace_epochs=min(settings.grace or search_space.default_grace_epochs(recipe), epochs),
        interval_epochs=length,
        seed=settings.seed,
        experiment=experiment,
        budget_seconds=settings.budget_seconds,
    )


def _begin_or_find(context: Context, spec: SearchSpec) -> SearchSpec:
    """The search of this name, begun if it doesn't exist. Raises UsageError if it has other
    settings."""
    from pipelines import recipe as recipes
    from pipelines.workflows import named_runs, search_board, search_files

    if spec.storage:
        exists = spec.name in search_files.names(context.remote_storage)
    else:
        exists = (spec.folder / search_files.SPEC).exists()
    if not exists:
        spec.write()
        return spec
    known = search_board.find(context, spec.name)
    before, now = (recipes.build(json.loads(each.recipe)) for each in (known, spec))
    changes = recipes.differences(before, now) + [
        f"{name} was {value}, is {vars(spec)[name]}"
        for name, value in vars(known).items()
        if name not in ("recipe", "parent") and value != vars(spec)[name]
    ]
    named_runs.refuse_changes(spec.name, changes)
    return known


def _name(setup: TrainingSetup) -> str:
    from pipelines.workflows import train

    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = train.model_name(setup.recipe, setup.card)
    short = name.encode()[:_DATA_BYTES].decode(errors="ignore")
    return f"{setup.recipe.family}-{short}-search-{stamp}-{secrets.token_hex(2)}"
