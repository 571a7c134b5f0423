"""Trains a recipe as a new or a resumed run, and registers the best checkpoint.

In: a family, a recipe file or a recipe, and a packed data set. Out: an `Outcome` with the
registered version, or a `TrainingPlan` of what would be trained. Must not print, nor read the
environment.
"""

from __future__ import annotations

import os
import shlex
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipelines import tag_names

if TYPE_CHECKING:
    from models.core.fitted import Fitted
    from pipelines.data.card import Card
    from pipelines.interfaces import Listener
    from pipelines.recipe import Recipe
    from pipelines.training.driver import Outcome
    from pipelines.training.estimate import Estimate
    from pipelines.training.run import Run
    from pipelines.training.setup import TrainingSetup
    from pipelines.workflows.context import Context

EXPERIMENT = "tessera"
"""Default MLflow experiment of trainings."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a call of `train` would train. `shape` is one image as the network sees it: (channels,
    height, width); `samples` is the size of the training split; `fitted` are the settings that were
    chosen to fit the data set; `estimate` is None unless the data set is on this machine."""

    recipe: Recipe
    data: str
    samples: int
    shape: tuple[int, ...]
    fitted: tuple[Fitted, ...] = ()
    estimate: Estimate | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.recipe.train.batch_size)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.recipe.train.epochs


def train(
    what: str | os.PathLike[str] | Recipe,
    *,
    data: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    workers: int | str | None = None,
    set: Mapping[str, Any] | None = None,
    model: str | None = None,
    run: str | None = None,
    experiment: str = EXPERIMENT,
    tags: Mapping[str, str] | None = None,
    verbose: bool = False,
    progress: bool | Listener = True,
    context: Context | None = None,
) -> Outcome:
    """Trains a new run and registers its best checkpoint as `challenger`.

    Args:
        what: A family, the name or the file of a recipe, or a recipe. For a family, settings that
            you don't give are fitted to the data set; `plan` says to which values and why. A recipe
            is trained as it is.
        data: A packed data set: a folder, an address, or what `pack` returned. May be left out if
            the recipe names one.
        variant: A variant of the family.
        workers: Data-parallel workers; 0 trains in this process; "2:8" is a group that grows and
            shrinks with the cluster. By default those of the recipe.
        set: New values for settings of the recipe, by dotted path: `{"train.epochs": 3}`.
        model: Name in the registry; the data set's name by default.
        run: Name of the run. If it exists it is resumed, or its result returned if it has
            finished, so that a call may be repeated. By default a name with the time.
        experiment: MLflow experiment of the run.
        tags: Additional tags for the run and the registered version.
        verbose: Whether to show Ray's own output.
        progress: True for a display on stderr, False for none, or a `Listener`.
        context: Where runs, MLflow and Ray are; from the environment by default.

    Raises TesseraError if the recipe, the data set or the workers can't train. Then nothing is left
    behind. With `run`, also if the run of this name was begun with other settings.
    """
    recipe, fitted = fit_recipe(what, data, variant, _changes(set, workers))

    from pipelines.tracking import mlflow_registry
    from pipelines.training import run as training_run
    from pipelines.visuals.progress import show_progress
    from pipelines.workflows import named_runs
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    if run is not None:
        run = named_runs.check_name(run)
    setup = prepare(context, recipe)
    name = model_name(setup.recipe, setup.card) if model is None else model
    name = mlflow_registry.check_name(name)
    storage = context.remote_storage
    if run is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        new = training_run.create(
            context.runs_dir, setup.recipe, model=name, stamp=stamp, storage=storage
        )
    else:
        new = named_runs.begin_or_find(context, run, setup.recipe, name, model is not None)
        if (outcome := named_runs.finished(context, new, setup)) is not None:
            with show_progress(progress) as listener:
                listener({"kind": "message", "text": f"{run} is finished: nothing to train"})
            return outcome
    try:
        return execute(
            context,
            new,
            setup,
            fitted=fitted,
            experiment=experiment,
            tags=tags,
            verbose=verbose,
            progress=progress,
            patience_seconds=named_runs.PATIENCE_SECONDS if run else 0.0,
        )
    except BaseException:
        training_run.discard_untracked(new)
        raise


def resume(
    run: str,
    *,
    data: str | os.PathLike[str] | None = None,
    workers: int | str | None = None,
    set: Mapping[str, Any] | None = None,
    experiment: str = EXPERIMENT,
    verbose: bool = False,
    progress: bool | Listener = True,
    context: Context | None = None,
) -> Outcome:
    """Resumes a run from its newest checkpoint. A finished run is not trained again.

    Args:
        run: Its name, or the id of its run in MLflow.
        data: Location of the run's data set, if it was moved.
        workers: Another number of workers.
        set: New values for settings that may change in a resumed run.

    The other arguments are those of `train`. Raises TesseraError if there is no such run, or if a
    setting is changed that must not change.
    """
    from pipelines import recipe as recipes
    from pipelines.storage.base import absolute_location
    from pipelines.training import run as training_run
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    name = unicodedata.normalize("NFC", run)
    existing = training_run.find(context.runs_dir, name, context.remote_storage)
    changes = _changes(set, workers)
    if data:
        changes["data.path"] = absolute_location(os.fspath(data))
    recipe = existing.recipe().with_overrides(changes)
    recipes.check_resumable(existing.recipe(), recipe)
    setup = prepare(context, recipe, resumed=True)
    return execute(
        context, existing, setup, experiment=experiment, verbose=verbose, progress=progress
    )


def plan(
    what: str | os.PathLike[str] | Recipe,
    *,
    data: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    workers: int | str | None = None,
    set: Mapping[str, Any] | None = None,
    context: Context | None = None,
) -> TrainingPlan:
    """What `train` would train with the same arguments, and how long it would take: two steps are
    tried. Creates nothing, raises as `train`."""
    from pipelines.cluster import connection
    from pipelines.cluster.worker_count import check_fits
    from pipelines.training.estimate import estimate
    from pipelines.training.setup import worker_group
    from pipelines.workflows import services
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    recipe, fitted = fit_recipe(what, data, variant, _changes(set, workers))
    setup = prepare(context, recipe)
    if context.ray_address and setup.recipe.workers.count:
        with services.joined(context):
            check_fits(worker_group(setup.recipe), connection.cluster_resources())
    return TrainingPlan(
        recipe=setup.recipe,
        data=setup.card.name,
        samples=setup.card.split("train").samples,
        shape=tuple(setup.data.shape),
        fitted=fitted,
        estimate=estimate(setup) if "://" not in setup.recipe.data.path else None,
    )


def fit_recipe(
    what: str | os.PathLike[str] | Recipe,
    data: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Recipe, tuple[Fitted, ...]]:
    """The recipe for arguments of `train`, as `make_recipe`. If `what` is a family, the settings
    that `changes` doesn't name are fitted to the data set; they are returned, too.

    Raises TesseraError also if there is no data set.
    """
    from pipelines.workflows import packaged_recipes

    recipe = make_recipe(what, data, variant, changes)  # before torch is loaded
    if not isinstance(what, str) or not packaged_recipes.is_family(what):
        return recipe, ()

    from pipelines.data import card as cards
    from pipelines.training import fitting

    changes = {**(changes or {}), "data.path": recipe.data.path}
    card = cards.read(recipe.data.path)
    return fitting.fit(packaged_recipes.start(what, variant), card, changes)


def make_recipe(
    what: str | os.PathLike[str] | Recipe,
    data: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe for arguments of `train`. The data set is not opened.

    Raises UsageError if there is no such family, file or setting, or if no data set is named.
    """
    import models
    from models.core.errors import UsageError
    from pipelines import recipe as recipes
    from pipelines.storage.base import absolute_location
    from pipelines.workflows import packaged_recipes

    changes = dict(changes or {})
    if data:
        changes["data.path"] = os.fspath(data)
    no_data = UsageError("no data set", hint="name a packed one: --data DIR")
    if isinstance(what, recipes.Recipe):
        recipe = what
    elif os.fspath(what) in models.names() and not changes.get("data.path"):
        raise no_data  # before the family, which loads torch
    else:
        recipe = packaged_recipes.start(os.fspath(what), variant)
    recipe = recipe.with_overrides(changes)
    if not recipe.data.path:
        raise no_data
    return recipe.with_overrides({"data.path": absolute_location(recipe.data.path)})


def _changes(set: Mapping[str, Any] | None, workers: int | str | None) -> dict[str, Any]:
    changes = dict(set or {})
    return changes if workers is None else {**changes, "workers.count": workers}


def prepare(
    context: Context, recipe: Recipe, *, resumed: bool = False, check_resources: bool = True
) -> TrainingSetup:
    """Reads and checks everything that a training of the recipe needs. Creates nothing.

    Raises TesseraError if the recipe can't train or, with `check_resources`, if its workers don't
    fit on this machine. The resources of a remote cluster are checked once it is joined.
    """
    from pipelines.training import setup
    from pipelines.workflows import services, used_models

    if check_resources and not recipe.workers.count:
        _check_own_gpu(recipe)
    checked = check_resources and recipe.workers.count
    resources = services.known_resources(context) if checked else None
    recipe = used_models.pin(context, recipe)
    return setup.prepare(recipe, resources=resources, check_weights=not resumed)


def _check_own_gpu(recipe: Recipe) -> None:
    """Raises TesseraError if this process is to train on a GPU and sees none."""
    import torch

    from models.core.errors import TesseraError

    if recipe.workers.gpus not in ("auto", 0) and not torch.cuda.is_available():
        raise TesseraError(
            "workers.gpus asks for a GPU, and this process, which trains, sees none",
            hint="leave workers.gpus out to train on the CPU; tessera doctor shows the GPUs",
        )


def model_name(recipe: Recipe, card: Card) -> str:
    """The default name in the registry: the name of the data set, followed by the task if the data
    set was made for another one. Characters that the registry doesn't take become -."""
    import models
    from pipelines.tracking import mlflow_registry

    task = models.get(recipe.family).task.name
    name = card.name if task == card.task else f"{card.name}-{task}"
    return mlflow_registry.valid_name(name)


def continue_run(
    context: Context,
    run: Run,
    recipe: Recipe,
    *,
    model: str | None = None,
    experiment: str = EXPERIMENT,
    tags: Mapping[str, str] | None = None,
    verbose: bool = False,
    progress: bool | Listener = True,
) -> Outcome:
    """Trains a run of a search to its last epoch and registers it as `model`. Unlike in `resume`,
    the recipe may differ from the one that the run started with."""
    from pipelines.tracking import mlflow_registry

    setup = prepare(context, recipe, resumed=True)
    name = model_name(setup.recipe, setup.card) if model is None else model
    name = mlflow_registry.check_name(name)
    return execute(
        context,
        replace(run, model=name),
        setup,
        experiment=experiment,
        tags=tags,
        verbose=verbose,
        progress=progress,
    )


def execute(
    context: Context,
    run: Run,
    setup: TrainingSetup,
    *,
    experiment: str,
    tags: Mapping[str, str] | None = None,
    verbose: bool = False,
    progress: bool | Listener = True,
    patience_seconds: float = 0.0,
    fitted: Sequence[Fitted] = (),
) -> Outcome:
    """Trains a run from its newest checkpoint to its last epoch, and registers it. Another driver
    that works on it is waited for as `training_run.leased` does. `fitted` are only shown."""
    from concurrent.futures import ThreadPoolExecutor

    from pipelines.cluster import connection
    from pipelines.tracking import mlflow_model, mlflow_runs
    from pipelines.training import driver as training_driver
    from pipelines.training import run as training_run
    from pipelines.training import worker
    from pipelines.training.setup import worker_group
    from pipelines.visuals.progress import show_progress
    from pipelines.workflows import services, used_models

    recipe, group = setup.recipe, worker_group(setup.recipe)
    tags = {**services.tags_of(recipe), tag_names.MODEL: run.model, **(tags or {})}
    storage = run.folder / "ray"
    # Opening the cluster and the registry takes seconds each, mostly waiting for other processes.
    # The run is opened after both, so that a refused training leaves nothing in MLflow.
    with (
        show_progress(progress) as listener,
        training_run.driven(
            run,
            job=connection.submission_id() or "",
            patience_seconds=patience_seconds,
            say=lambda text: listener({"kind": "notice", "text": text}),
        ) as run,
        ThreadPoolExecutor(1) as pool,
    ):
        opening = pool.submit(services.open_registry, context, create=True)
        with services.executor(
            context,
            worker.run,
            group,
            name=run.name,
            storage=storage,
            verbose=verbose,
            say=lambda text: listener({"kind": "notice", "text": text}),
        ) as execute_work:
            versions = opening.result()
            used_models.fetch(recipe, versions, run.folder)
            tracker = services.open_tracker(
                context, run.name, experiment=experiment, tags=tags, run_id=run.run_id
            )
            with training_driver.ended_on_error(tracker, [listener]):
                tracker.start_system_metrics()
                if group.workers:
                    tags[tag_names.RAY_JOB] = connection.job_id()
                primary = setup.recipe.primary().name
                page = services.page(context, tracker.link())
                listener({"kind": "run", "name": run.name, "metric": primary, "page": page})
                if fitted:
                    values = ", ".join(f"{one.path}={one.value}" for one in fitted)
                    text = f"fitted to the data: {values} (--dry-run says why)"
                    listener({"kind": "message", "text": text})
            try:
                return training_driver.launch(
                    run,
                    setup,
                    tracker=tracker,
                    registry=versions,
                    execute=execute_work,
                    save_exportable=mlflow_model.save_exportable,
                    is_permanent=mlflow_runs.is_permanent,
                    listeners=[listener],
                    tags=tags,
                )
            except (KeyboardInterrupt, SystemExit):
                if not run.is_ours:
                    raise
                text = f"resume with: tessera train --resume {shlex.quote(run.name)}"
                listener({"kind": "message", "text": text})
                raise KeyboardInterrupt from None  # Ray makes SystemExit(1) of a Ctrl-C
