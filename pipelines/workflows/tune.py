"""A search: its folder, its run in MLflow, and what becomes of its trials.

In: a `SearchSpec`. Out: the best trial, and a folder from which the search can be resumed. Must not
know how a trial is trained.

    search.json    the spec: recipe, space, tuner, MLflow's run
    trials.json    the state of every trial        population.json   of a population: its generation
    trials/        a run folder for each           tune/             Ray Tune's own state
    pictures/      plots, also in MLflow           winner.yaml       the best trial's recipe
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.recipe import Recipe
    from pipelines.search.trials import Trial
    from pipelines.training.driver import Outcome
    from pipelines.workflows.search_board import SearchSpec

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipelines import tag_names
from pipelines.search import space as search_space
from pipelines.search import trials as search_trials
from pipelines.search.trials import Trial
from pipelines.workflows import generations, services
from pipelines.workflows import trial as workflows_trial
from pipelines.workflows.search_board import Leaderboard, SearchSpec
from pipelines.workflows.trial import TrialPayload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from models.core.family import Metric
    from pipelines.cluster.tuner import TunerOptions
    from pipelines.interfaces import Listener
    from pipelines.recipe import Recipe
    from pipelines.search.space import TrialCapacity
    from pipelines.tracking.mlflow_runs import MlflowTracker
    from pipelines.training.run import Run
    from pipelines.training.setup import TrainingSetup
    from pipelines.workflows.context import Context


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        name: The search, as `resume` takes it.
        folder: Has the best trial's recipe as `winner.yaml`, and a run folder for each trial.
        metric: What was compared, on the validation split.
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
    trials: int = 20,
    workers_per_trial: int = 1,
    search: str = "random",
    scheduler: str = "asha",
    space: str | os.PathLike[str] | None = None,
    budget: str | float | None = None,
    grace: int | None = None,
    reduction: float = 3.0,
    interval: int | None = None,
    seed: int = 0,
    refit: bool = False,
    model: str | None = None,
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
        trials: How many.
        workers_per_trial: Data-parallel workers of a trial; 0 trains in the trial's own process.
        search: `random`, `optuna` or `grid`.
        scheduler: What stops weak trials early: `asha`, `pbt` or `none`.
        space: The search space as a YAML file; the family's own by default.
        budget: Seconds after which no more trials begin, or a text such as "30m".
        grace: Epochs before a trial may be stopped.
        reduction: ASHA keeps one of this many trials at each rung.
        interval: Epochs of a generation of PBT.
        seed: Of the search.
        refit: Whether the best settings are trained in full and registered, as `model`.
        experiment: MLflow experiment of the search and its trials.
        verbose: Whether to show Ray's own output.
        progress: True for a display on stderr, False for none, or a `Listener`.
        context: Where runs, MLflow and Ray are; from the environment by default.

    Raises TesseraError if the recipe can't be searched, or if every trial failed.
    """
    from pipelines.workflows import train
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    search_space.check_choices(search, scheduler)
    changes = {**(set or {}), "workers.count": workers_per_trial}
    spec = make_spec(
        context,
        train.make_recipe(what, data, variant, changes),
        space=space,
        search=search,
        scheduler=scheduler,
        trials=trials,
        seed=seed,
        experiment=experiment,
        grace=grace,
        reduction=reduction,
        interval=interval,
        fixed=changes,
        budget_seconds=parse_seconds(budget) if budget else None,
    )
    return _finish(context, spec, False, refit, model, verbose, progress)


def resume(
    search: str,
    *,
    refit: bool = False,
    model: str | None = None,
    verbose: bool = False,
    progress: bool | Listener = True,
    context: Context | None = None,
) -> SearchResult:
    """Continues an interrupted search, by its name. The arguments are those of `tune`."""
    from pipelines.workflows import search_board
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    spec = search_board.find(context, search)
    return _finish(context, spec, True, refit, model, verbose, progress)


def _finish(
    context: Context,
    spec: SearchSpec,
    restore: bool,
    refit_winner: bool,
    model: str | None,
    verbose: bool,
    progress: bool | Listener,
) -> SearchResult:
    import models
    from pipelines import recipe as recipes
    from pipelines.visuals.progress import show_progress

    recipe = recipes.build(json.loads(spec.recipe))
    with show_progress(progress) as listener:
        facts = run(context, spec, recipe, restore=restore, verbose=verbose, listener=listener)
    result = SearchResult(
        name=spec.name,
        folder=spec.folder,
        metric=models.get(recipe.family).task.primary.name,
        winner=facts["winner"],
        trials=tuple(facts["trials"]),
        page=facts["page"],
    )
    if not refit_winner:
        return result
    outcome = refit(
        context, spec, recipe, result.winner, model=model, verbose=verbose, progress=progress
    )
    return replace(result, outcome=outcome)


def parse_seconds(budget: str | float) -> float:
    """Seconds from a text such as "90s", "30m", "2h" or "1d". Raises UsageError otherwise."""
    from models.core.errors import UsageError

    if isinstance(budget, int | float):
        return float(budget)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", budget.strip())
    if not match or not float(match[1]):
        raise UsageError(f"--budget {budget}", hint="give a time like 90s, 30m or 2h")
    return float(match[1]) * _SECONDS[match[2]]


def run(
    context: Context,
    spec: SearchSpec,
    recipe: Recipe,
    *,
    restore: bool,
    verbose: bool,
    listener: Listener,
) -> dict[str, Any]:
    """Runs a search to its end. Returns `search`, `winner`, `trials` (best first) and `page`."""
    import models
    from pipelines.cluster import connection, workers
    from pipelines.training import run as training_run
    from pipelines.training.setup import worker_group

    def tell(text: str) -> None:
        listener({"kind": "message", "text": text})

    group = worker_group(recipe)
    with ExitStack() as held:
        if restore:  # before anything is changed
            held.enter_context(training_run.locked(spec))
        held.enter_context(services.joined(context, verbose=verbose))
        resources = connection.cluster_resources()
        capacity = search_space.trial_capacity(
            cpus=resources.cpus,
            gpus=resources.gpus,
            workers=max(group.workers, 1),
            cpus_each=group.cpus,
            gpus_each=workers.gpus_per_worker(group, resources),
            trials=spec.trials,
        )
        parent = held.enter_context(parent_run(context, spec, recipe))
        spec = replace(spec, parent=parent.run_id)
        spec.write()
        if not restore:
            held.enter_context(training_run.locked(spec))
        tell(f"search {spec.name}")
        tell(f"watch {services.page(parent.link())}")
        tell(f"{spec.trials} trials, {capacity.at_once} at once: {capacity.reason}")
        metric = models.get(recipe.family).task.primary
        board = Leaderboard(context, spec, metric, recipe.train.epochs, parent, tell)
        board.end_runs_again()
        try:
            _train(context, spec, recipe, board, capacity, restore=restore)
        except KeyboardInterrupt:
            tell(f"resume with: tessera tune --resume {spec.name}")
            raise
        finally:
            board.close()
        return _conclude(spec, recipe, board, metric, parent)


def _train(
    context: Context,
    spec: SearchSpec,
    recipe: Recipe,
    board: Leaderboard,
    capacity: TrialCapacity,
    *,
    restore: bool,
) -> None:
    import models
    from pipelines.cluster import tuner

    metric = models.get(recipe.family).task.primary
    payload = TrialPayload(
        context=context,
        search=spec.name,
        recipe=spec.recipe,
        folder=spec.folder,
        parent=spec.parent,
        experiment=spec.experiment,
        metric=metric.name,
    )
    if spec.scheduler == "pbt":
        generations.run(spec, metric, recipe.train.epochs, payload, board, capacity.at_once)
        return
    options = _tuner_options(spec, recipe, capacity)
    again = restore and tuner.can_restore(options.folder)
    tuner.run(workflows_trial.run_trial, payload, options, board.on_event, restore=again)
    for trial in board.trials:
        if again and not trial.over:  # Tune's record is older: it samples these settings again
            board.on_event(
                "error", trial.id, {"reason": "it had just started when the search was killed"}
            )


def run_of(spec: SearchSpec, trial: Trial) -> Run:
    """The run of a trial."""
    from pipelines.training import run as training_run

    return training_run.find(spec.folder / "trials", trial.run)


def _tuner_options(spec: SearchSpec, recipe: Recipe, capacity: TrialCapacity) -> TunerOptions:
    import models
    from pipelines.cluster import tuner

    return tuner.TunerOptions(
        folder=spec.folder / "tune",
        space=spec.parsed_space(),
        search=spec.search,
        scheduler=spec.scheduler,
        trials=spec.trials,
        at_once=capacity.at_once,
        direction=models.get(recipe.family).task.primary.direction,
        most_epochs=recipe.train.epochs,
        grace_epochs=spec.grace_epochs,
        reduction=spec.reduction,
        seed=spec.seed,
        budget_seconds=spec.budget_seconds,
        # A training on Ray Train's workers can't be stopped: it ends with its process.
        keep_processes=recipe.workers.count == 0,
    )


def _conclude(
    spec: SearchSpec, recipe: Recipe, board: Leaderboard, metric: Metric, parent: MlflowTracker
) -> dict[str, Any]:
    """Writes the best trial's recipe and the plots to the search's folder and its run."""
    import yaml

    from pipelines.search import plots

    best = search_trials.winner(board.trials, metric)
    winner = recipe.with_overrides(best.settings).model_dump(mode="json")
    (spec.folder / "winner.yaml").write_text(yaml.safe_dump(winner, sort_keys=False), "utf-8")
    pictures = spec.folder / "pictures"
    for file in plots.draw(board.trials, spec.parsed_space(), metric, pictures):
        parent.artifact(file, "pictures")
    for name in (search_trials.TRIALS, "winner.yaml"):
        parent.artifact(spec.folder / name, "")
    return {
        "search": spec.name,
        "winner": best,
        "trials": search_trials.ranked(board.trials, metric),
        "page": parent.link(),
    }


@contextmanager
def parent_run(context: Context, spec: SearchSpec, recipe: Recipe) -> Iterator[MlflowTracker]:
    """The search's run in MLflow, ended with the status of the search."""
    tracker = services.open_tracker(
        context,
        spec.name,
        experiment=spec.experiment,
        tags={**services.tags_of(recipe), tag_names.SEARCH: spec.name},
    )
    tracker.params(
        {
            "search": spec.search,
            "scheduler": spec.scheduler,
            "trials": str(spec.trials),
            "seed": str(spec.seed),
            **({"interval_epochs": str(spec.interval_epochs)} if spec.scheduler == "pbt" else {}),
            "family": recipe.family,
            "data.path": recipe.data.path,
            "data.digest": recipe.data.digest,
            **{f"space.{path}": json.dumps(values) for path, values in spec.space.items()},
        }
    )
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def refit(
    context: Context,
    spec: SearchSpec,
    recipe: Recipe,
    best: Trial,
    *,
    model: str | None,
    verbose: bool,
    progress: bool | Listener,
) -> Outcome:
    """Trains the best settings in full and registers the model. A population's member changed its
    settings on the way: its own run is continued to its last epoch and registered."""
    from pipelines.workflows import train

    winner = recipe.with_overrides(best.settings)
    options: dict[str, Any] = {
        "experiment": spec.experiment,
        "verbose": verbose,
        "progress": progress,
        "tags": {tag_names.SEARCH: spec.name, tag_names.TRIAL: best.id},
    }
    if spec.scheduler == "pbt":
        return train.continue_run(context, run_of(spec, best), winner, model=model, **options)
    return train.train(winner, context=context, model=model, **options)


def make_spec(
    context: Context,
    recipe: Recipe,
    *,
    space: str | os.PathLike[str] | None,
    scheduler: str,
    trials: int,
    grace: int | None,
    interval: int | None,
    fixed: Collection[str],
    **more: Any,
) -> SearchSpec:
    """Builds the spec of a search. Raises UsageError if it can't be searched."""
    from pipelines.search import population
    from pipelines.search import space as search_space
    from pipelines.workflows import search_board, train

    setup = train.prepare(context, recipe)
    recipe = setup.recipe
    found = search_space.space_of(recipe, Path(space) if space else None, fixed=fixed)
    epochs = recipe.train.epochs
    length = interval or population.default_interval_epochs(epochs)
    if scheduler == "pbt":
        population.check_size(trials, epochs, length)
        population.check_space(recipe, found, setup.data)
    name = _name(setup)
    return search_board.SearchSpec(
        folder=context.searches_dir / name,
        name=name,
        recipe=recipe.to_json(),
        space=search_space.to_plain(found),
        scheduler=scheduler,
        trials=len(search_space.grid(found)) if more["search"] == "grid" else trials,
        grace_epochs=min(grace or search_space.default_grace_epochs(recipe), epochs),
        interval_epochs=length,
        **more,
    )


def _name(setup: TrainingSetup) -> str:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return f"{setup.recipe.family}-{setup.card.name}-search-{stamp}-{secrets.token_hex(2)}"
