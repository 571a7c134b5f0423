"""Runs a search: its trials, its leaderboard, its run in MLflow, and the files of its folder.

In: a `SearchSpec`. Out: a `FinishedSearch`, and a folder from which the search can be resumed. Must
not know how a trial is trained.

    search.json    the spec: recipe, space, tuner, MLflow's run
    trials.json    the state of every trial        population.json   of a population: its generation
    trials/        a run folder for each           tune/             Ray Tune's own state
    pictures/      plots, also in MLflow           winner.yaml       the best trial's recipe
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from models.core.errors import TesseraError
from pipelines import tag_names
from pipelines.search import space as search_space
from pipelines.search import trials as search_trials
from pipelines.search.trials import Trial
from pipelines.workflows import generations, search_files, services
from pipelines.workflows import trial as workflows_trial
from pipelines.workflows.search_board import Leaderboard, SearchSpec
from pipelines.workflows.trial import TrialPayload

if TYPE_CHECKING:
    from models.core.family import Metric
    from pipelines.cluster.connection import Resources
    from pipelines.cluster.tuner import KnownTrial, TunerOptions
    from pipelines.interfaces import Listener
    from pipelines.recipe import Recipe
    from pipelines.search.space import TrialCapacity
    from pipelines.tracking.mlflow_runs import MlflowTracker
    from pipelines.training.run import Run
    from pipelines.workflows.context import Context


WINNER = "winner.yaml"
"""The recipe of the best trial, in the folder of the search."""


@dataclass(frozen=True)
class FinishedSearch:
    """The best trial, all trials with the best first, and the page of the search in MLflow."""

    winner: Trial
    trials: tuple[Trial, ...]
    page: str


def run(
    context: Context,
    spec: SearchSpec,
    recipe: Recipe,
    *,
    restore: bool,
    verbose: bool,
    listener: Listener,
) -> FinishedSearch:
    """Runs a search to its end; with `restore` it resumes an interrupted one.

    Raises TesseraError if no trial fits into the cluster, or if every trial failed.
    """
    from pipelines.cluster import connection, shared_folder
    from pipelines.training import run as training_run

    def say(text: str) -> None:
        listener({"kind": "message", "text": text})

    job = connection.submission_id() or ""
    with ExitStack() as stack:
        if restore:  # locked before anything is changed
            stack.enter_context(training_run.leased(spec, spec.storage, job=job, say=say))
        stack.enter_context(services.joined(context, verbose=verbose))
        if recipe.workers.count and not spec.storage:
            shared_folder.check_shared(spec.folder.parent, cpus=recipe.workers.cpus)
        capacity = trial_capacity(recipe, spec.trials, connection.cluster_resources())
        parent = stack.enter_context(_parent_run(context, spec, recipe))
        spec = replace(spec, parent=parent.run_id)
        spec.write()
        if not restore:
            stack.enter_context(training_run.leased(spec, spec.storage, job=job, say=say))
        say(f"search {spec.name}")
        say(f"watch {services.page(context, parent.link())}")
        say(f"{spec.trials} trials, {capacity.at_once} at a time: {capacity.reason}")
        metric = recipe.primary()
        board = Leaderboard(context, spec, metric, recipe.train.epochs, parent, say)
        board.end_runs_again()
        try:
            _run_trials(context, spec, recipe, board, capacity, restore=restore)
        except KeyboardInterrupt:
            say(f"resume with: tessera tune --resume {shlex.quote(spec.name)}")
            raise
        finally:
            board.close()
        return _conclude(spec, recipe, board, metric, parent)


def finished(context: Context, spec: SearchSpec, recipe: Recipe) -> FinishedSearch | None:
    """The result of a search that has ended; None of any other."""

    trials = search_trials.read(spec.folder / search_trials.TRIALS)
    if not (spec.folder / WINNER).exists() or not all(trial.over for trial in trials):
        return None
    tracker = services.attach_tracker(context, spec.parent)
    if tracker.status() != "FINISHED":
        return None
    metric = recipe.primary()
    ranked = search_trials.ranked(trials, metric)
    return FinishedSearch(
        winner=search_trials.winner(trials, metric), trials=tuple(ranked), page=tracker.link()
    )


def trial_capacity(recipe: Recipe, trials: int, resources: Resources) -> TrialCapacity:
    """How many trials run at a time. Raises TesseraError if not even one fits."""
    from pipelines.cluster.worker_count import gpus_per_worker
    from pipelines.training.setup import worker_group

    group = worker_group(recipe)
    return search_space.trial_capacity(
        cpus=resources.cpus,
        gpus=resources.gpus,
        workers=max(group.workers, 1),
        cpus_each=group.cpus,
        gpus_each=gpus_per_worker(group, resources),
        trials=trials,
    )


def _run_trials(
    context: Context,
    spec: SearchSpec,
    recipe: Recipe,
    board: Leaderboard,
    capacity: TrialCapacity,
    *,
    restore: bool,
) -> None:
    from pipelines.cluster import tuner

    metric = recipe.primary()
    payload = TrialPayload(
        context=context,
        search=spec.name,
        recipe=spec.recipe,
        folder=spec.folder,
        parent=spec.parent,
        experiment=spec.experiment,
        metric=metric.name,
        storage=spec.storage,
    )
    if spec.scheduler == "pbt":
        generations.run(spec, metric, recipe.train.epochs, payload, board, capacity.at_once)
        return
    options = _tuner_options(spec, recipe, capacity)
    again = restore and not spec.storage and tuner.can_restore(options.folder)
    if spec.storage and sum(trial.over for trial in board.trials) >= spec.trials:
        return
    if spec.storage:
        # Tune's record may be another machine's, or older than what another machine did since.
        options = replace(options, known=_known(board.trials))
        shutil.rmtree(options.folder, ignore_errors=True)
    tuner.run(workflows_trial.run_trial, payload, options, board.on_event, restore=again)
    for trial in board.trials:
        # Tune's record may be older than ours: it samples the settings of such a trial again.
        if restore and not trial.over:
            board.on_event(
                "error", trial.id, {"reason": "it had just started when the search was killed"}
            )


def _known(trials: Sequence[Trial]) -> list[KnownTrial]:
    from pipelines.cluster.tuner import KnownTrial

    return [
        KnownTrial(t.id, dict(t.settings), t.over, None if t.status == "failed" else t.value)
        for t in trials
    ]


def _tuner_options(spec: SearchSpec, recipe: Recipe, capacity: TrialCapacity) -> TunerOptions:
    from pipelines.cluster import tuner

    return tuner.TunerOptions(
        folder=spec.folder / "tune",
        space=spec.parsed_space(),
        search=spec.search,
        scheduler=spec.scheduler,
        trials=spec.trials,
        at_once=capacity.at_once,
        direction=recipe.primary().direction,
        most_epochs=recipe.train.epochs,
        grace_epochs=spec.grace_epochs,
        reduction=spec.reduction,
        seed=spec.seed,
        budget_seconds=spec.budget_seconds,
        # A training on Ray Train's workers can't be stopped, it ends with its process.
        keep_processes=recipe.workers.count == 0,
    )


def _conclude(
    spec: SearchSpec, recipe: Recipe, board: Leaderboard, metric: Metric, parent: MlflowTracker
) -> FinishedSearch:
    """Writes the best trial's recipe and the plots to the search's folder and its run."""
    import yaml

    from pipelines.search import plots

    best = search_trials.winner(board.trials, metric)
    winner = recipe.with_overrides(best.settings).model_dump(mode="json")
    (spec.folder / WINNER).write_text(yaml.safe_dump(winner, sort_keys=False), "utf-8")
    folder = spec.folder / "pictures"
    for file in plots.draw(board.trials, spec.parsed_space(), metric, folder):
        parent.artifact(file, "pictures")
    for name in (search_trials.TRIALS, WINNER):
        parent.artifact(spec.folder / name, "")
    search_files.publish_results(spec.storage, spec.folder)
    ranked = search_trials.ranked(board.trials, metric)
    return FinishedSearch(winner=best, trials=tuple(ranked), page=parent.link())


@contextmanager
def _parent_run(context: Context, spec: SearchSpec, recipe: Recipe) -> Iterator[MlflowTracker]:
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


def run_of(spec: SearchSpec, trial: Trial) -> Run:
    """The run of a trial."""
    from pipelines.training import run as training_run

    run = training_run.open_existing(
        spec.folder / "trials" / trial.run, spec.trial_storage(trial.run)
    )
    if run is None:
        raise TesseraError(f"the run of trial {trial.number} of {spec.name} is missing")
    return run
