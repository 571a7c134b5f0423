"""Trains a recipe as a new or a resumed run, and registers the best checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pipelines import tag_names

if TYPE_CHECKING:
    from pipelines.data.card import Card
    from pipelines.recipe import Recipe
    from pipelines.training.driver import Outcome
    from pipelines.training.run import Run
    from pipelines.workflows.context import Context


def check_data(recipe: Recipe) -> Card:
    """The recipe's data set. Raises TesseraError where it can't feed the training, or a file of it
    is missing."""
    from models.metrics import custom as custom_metrics
    from pipelines.data.loading import preflight
    from pipelines.training.inputs import open_data

    card, _ = open_data(recipe)
    for metric in recipe.metrics:
        custom_metrics.get(metric)
    workers, batch_size = recipe.workers.count, recipe.train.batch_size
    where = recipe.data.path
    preflight.check_feedable(card, workers=workers, batch_size=batch_size, where=where)
    preflight.check_files(where, card, "val")
    return card


def changes_of(overrides: Sequence[str], workers: int | None) -> dict[str, Any]:
    from pipelines import recipe as recipes

    changes: dict[str, Any] = dict(recipes.parse_override(text) for text in overrides)
    return changes if workers is None else {**changes, "workers.count": workers}


def choose(
    context: Context,
    what: str,
    variant: str | None,
    data: str | None,
    changes: dict[str, Any],
) -> Recipe:
    return settle(context, _ask(what, variant, data, changes))


def _ask(what: str, variant: str | None, data: str | None, changes: dict[str, Any]) -> Recipe:
    """The recipe as it is asked for; the data set is not looked at."""
    from models.core.errors import UsageError
    from pipelines.storage.base import absolute_location
    from pipelines.workflows import packaged_recipes

    recipe = packaged_recipes.start(what, variant)
    if data:
        changes = {**changes, "data.path": data}
    recipe = recipe.with_overrides(changes)
    if not recipe.data.path:
        raise UsageError("no data set", hint="name a packed one: --data DIR")
    return recipe.with_overrides({"data.path": absolute_location(recipe.data.path)})


def settle(context: Context, recipe: Recipe) -> Recipe:
    """The recipe with the digests of what it depends on: the data set, and the judge's files."""
    from pipelines.data import card as cards
    from pipelines.workflows import judges

    recipe = judges.settle(context, recipe)
    if recipe.data.digest:
        return recipe
    return recipe.with_overrides({"data.digest": cards.read(recipe.data.path).digest})


def _resume(
    context: Context,
    ref: str,
    changes: dict[str, Any],
    data: str | None,
    experiment: str,
    verbose: bool,
    as_json: bool,
) -> Outcome:
    from pipelines import recipe as recipes
    from pipelines.storage.base import absolute_location
    from pipelines.training import run as training_run

    run = training_run.find(context.runs_dir, ref)
    if data:
        changes = {**changes, "data.path": absolute_location(data)}
    recipe = run.recipe().with_overrides(changes)
    recipes.check_resumable(run.recipe(), recipe)
    check_data(recipe)
    return _train(context, run, recipe, experiment=experiment, verbose=verbose, quiet=as_json)


def start(
    context: Context,
    recipe: Recipe,
    *,
    model: str | None = None,
    experiment: str = "tessera",
    verbose: bool = False,
    quiet: bool = False,
    tags: Mapping[str, str] | None = None,
) -> Outcome:
    """Trains a recipe as a new run."""
    from pipelines.tracking import mlflow_registry
    from pipelines.training import run as training_run

    recipe = settle(context, recipe)
    card = check_data(recipe)
    name = model_name(recipe, card) if model is None else model
    mlflow_registry.check_name(name)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run = training_run.create(context.runs_dir, recipe, model=name, stamp=stamp)
    try:
        return _train(
            context,
            run,
            recipe,
            experiment=experiment,
            verbose=verbose,
            quiet=quiet,
            more_tags=tags or {},
        )
    except BaseException:
        training_run.forget(run)
        raise


def go_on(
    context: Context,
    run: Run,
    recipe: Recipe,
    *,
    model: str | None = None,
    experiment: str = "tessera",
    verbose: bool = False,
    quiet: bool = False,
    tags: Mapping[str, str] | None = None,
) -> Outcome:
    """Trains a run that exists to its end, and registers it."""
    from pipelines.tracking import mlflow_registry

    name = model_name(recipe, check_data(recipe)) if model is None else model
    mlflow_registry.check_name(name)
    run = replace(run, model=name)
    return _train(
        context,
        run,
        recipe,
        experiment=experiment,
        verbose=verbose,
        quiet=quiet,
        more_tags=tags or {},
    )


def model_name(recipe: Recipe, card: Card) -> str:
    """The registered model's name where none is given: the data set's, and with it the task where
    that isn't what the data set is made for."""
    import models

    task = models.get(recipe.family).task.name
    return card.name if task == card.task else f"{card.name}-{task}"


def _train(
    context: Context,
    run: Run,
    recipe: Recipe,
    *,
    experiment: str,
    verbose: bool,
    quiet: bool,
    more_tags: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    from concurrent.futures import ThreadPoolExecutor

    import models
    from jobs.shared.progress import Display
    from pipelines.cluster import connection
    from pipelines.tracking import mlflow_model, mlflow_runs
    from pipelines.training import driver as training_driver
    from pipelines.training import inputs, worker
    from pipelines.training import run as training_run
    from pipelines.workflows import judges, services

    group = services.group_of(recipe)
    primary = models.get(recipe.family).task.primary.name
    tags = {**services.tags_of(recipe), tag_names.MODEL: run.model, **more_tags}
    storage = run.folder / "ray"
    # The cluster and the registry take seconds each, and wait mostly for other processes. The run
    # is opened after both: a training that is refused leaves nothing in MLflow.
    with (
        training_run.locked(run),
        Display(primary, quiet=quiet) as display,
        ThreadPoolExecutor(1) as pool,
    ):
        opening = pool.submit(services.open_registry, context)
        with services.executor(
            context, worker.run, group, name=run.name, storage=storage, verbose=verbose
        ) as execute:
            versions = opening.result()
            judges.fetch(recipe, versions, run.folder / inputs.JUDGE)
            tracker = services.open_tracker(context, run.name, experiment=experiment, tags=tags)
            tracker.start_system_metrics()
            if group.workers:
                tags[tag_names.RAY_JOB] = connection.job_id()
            display.say(f"run {run.name}")
            display.say(f"watch {services.page(tracker.link())}")
            try:
                return training_driver.launch(
                    run,
                    recipe,
                    tracker=tracker,
                    registry=versions,
                    execute=execute,
                    save_exportable=mlflow_model.save_exportable,
                    is_permanent=mlflow_runs.is_permanent,
                    listeners=[display],
                    tags=tags,
                )
            except (KeyboardInterrupt, SystemExit):
                display.say(f"go on with: tessera train --resume {run.name}")
                raise KeyboardInterrupt from None  # Ray makes SystemExit(1) of a Ctrl-C
