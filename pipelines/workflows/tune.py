"""A search as the driver has it: its folder, its entry in MLflow, and the standing of its trials.

In: what was asked for. Out: the winner, and a folder that a later process can go on from. Must not
know how a trial is trained.

    search.json    what was asked for: recipe, space, tuner, MLflow's run
    trials.json    the standing of every trial     population.json   of a population, its generation
    trials/        a run folder for each           tune/             Ray Tune's own state
    pictures/      what MLflow shows               winner.yaml
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.recipe import Recipe
    from pipelines.search.trials import Trial
    from pipelines.training.driver import Outcome
    from pipelines.workflows.search_board import Asked

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines import tag_names
from pipelines.search import space as search_space
from pipelines.search import trials as search_trials
from pipelines.search.trials import Trial
from pipelines.workflows import generations, services
from pipelines.workflows import trial as workflows_trial
from pipelines.workflows.search_board import Asked, Leaderboard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from models.core.family import Metric
    from pipelines.cluster.tuner import Order
    from pipelines.recipe import Recipe
    from pipelines.search.space import Room
    from pipelines.tracking.mlflow_runs import MlflowTracker
    from pipelines.training.run import Run
    from pipelines.workflows.context import Context


def run(
    context: Context, asked: Asked, recipe: Recipe, *, restore: bool, verbose: bool, quiet: bool
) -> dict[str, Any]:
    """Runs the search to its end; gives `search`, `winner`, `trials` (the best first) and `page`."""
    import models
    from jobs.shared.terminal import say
    from pipelines.cluster import connection, workers
    from pipelines.training import run as training_run

    tell: Callable[[str], None] = (lambda text: None) if quiet else say
    group = services.group_of(recipe)
    with ExitStack() as held:
        if restore:  # before anything is said of it anywhere
            held.enter_context(training_run.locked(asked))
        held.enter_context(services.joined(context, verbose=verbose))
        room = search_space.room(
            cpus=connection.cpus(),
            gpus=connection.gpus(),
            workers=max(group.workers, 1),
            cpus_each=group.cpus,
            gpus_each=workers.gpus_each(group),
            trials=asked.trials,
        )
        parent = held.enter_context(parent_run(context, asked, recipe))
        asked = replace(asked, parent=parent.run_id)
        asked.write()
        if not restore:
            held.enter_context(training_run.locked(asked))
        tell(f"search {asked.name}")
        tell(f"watch {services.page(parent.link())}")
        tell(f"{asked.trials} trials, {room.at_once} at once: {room.because}")
        metric = models.get(recipe.family).task.primary
        board = Leaderboard(context, asked, metric, recipe.train.epochs, parent, tell)
        board.settle_again()
        try:
            _train(context, asked, recipe, board, room, restore=restore)
        except KeyboardInterrupt:
            tell(f"go on with: tessera tune --resume {asked.name}")
            raise
        finally:
            board.close()
        return _conclude(asked, recipe, board, metric, parent)


def _train(
    context: Context,
    asked: Asked,
    recipe: Recipe,
    board: Leaderboard,
    room: Room,
    *,
    restore: bool,
) -> None:
    import models
    from pipelines.cluster import tuner

    metric = models.get(recipe.family).task.primary
    facts = told(context, asked, metric)
    if asked.scheduler == "pbt":
        generations.run(asked, metric, recipe.train.epochs, facts, board, room.at_once)
        return
    order = _order(asked, recipe, room)
    again = restore and tuner.can_restore(order.folder)
    tuner.run(workflows_trial.run_trial, facts, order, board.on_event, restore=again)
    for trial in board.trials:
        if again and not trial.over:  # Tune's record was older: it gave these settings anew
            board.on_event(
                "error", trial.id, {"reason": "it had only begun when the search was killed"}
            )


def told(context: Context, asked: Asked, metric: Metric) -> dict[str, Any]:
    """What a trial's process must know of its search."""
    return {
        "context": context,
        "search": asked.name,
        "recipe": asked.recipe,
        "folder": str(asked.folder),
        "parent": asked.parent,
        "experiment": asked.experiment,
        "metric": metric.name,
    }


def run_of(asked: Asked, trial: Trial) -> Run:
    """A trial's training."""
    from pipelines.training import run as training_run

    return training_run.find(asked.folder / "trials", trial.run)


def _order(asked: Asked, recipe: Recipe, room: Room) -> Order:
    import models
    from pipelines.cluster import tuner

    return tuner.Order(
        folder=asked.folder / "tune",
        space=asked.parsed_space(),
        search=asked.search,
        scheduler=asked.scheduler,
        trials=asked.trials,
        at_once=room.at_once,
        direction=models.get(recipe.family).task.primary.direction,
        most_epochs=recipe.train.epochs,
        grace_epochs=asked.grace_epochs,
        reduction=asked.reduction,
        seed=asked.seed,
        budget_seconds=asked.budget_seconds,
        # A training on Ray Train's workers can't be told to stop; it ends with the process.
        keep_processes=services.group_of(recipe).workers == 0,
    )


def _conclude(
    asked: Asked, recipe: Recipe, board: Leaderboard, metric: Metric, parent: MlflowTracker
) -> dict[str, Any]:
    """Names the winner, and leaves it and the pictures with the search."""
    import yaml

    from pipelines.search import plots

    best = search_trials.winner(board.trials, metric)
    made = recipe.with_overrides(best.settings).model_dump(mode="json")
    (asked.folder / "winner.yaml").write_text(yaml.safe_dump(made, sort_keys=False), "utf-8")
    pictures = asked.folder / "pictures"
    for file in plots.draw(board.trials, asked.parsed_space(), metric, pictures):
        parent.artifact(file, "pictures")
    for name in (search_trials.TRIALS, "winner.yaml"):
        parent.artifact(asked.folder / name, "")
    return {
        "search": asked.name,
        "winner": best,
        "trials": search_trials.ranked(board.trials, metric),
        "page": parent.link(),
    }


@contextmanager
def parent_run(context: Context, asked: Asked, recipe: Recipe) -> Iterator[MlflowTracker]:
    """The search's entry in MLflow, ended with what becomes of the search."""
    tracker = services.open_tracker(
        context,
        asked.name,
        experiment=asked.experiment,
        tags={**services.tags_of(recipe), tag_names.SEARCH: asked.name},
    )
    tracker.params(
        {
            "search": asked.search,
            "scheduler": asked.scheduler,
            "trials": str(asked.trials),
            "seed": str(asked.seed),
            **({"interval_epochs": str(asked.interval_epochs)} if asked.scheduler == "pbt" else {}),
            "family": recipe.family,
            "data.path": recipe.data.path,
            "data.digest": recipe.data.digest,
            **{f"space.{path}": json.dumps(values) for path, values in asked.space.items()},
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


def _refit(
    context: Context,
    asked: Asked,
    recipe: Recipe,
    best: Trial,
    *,
    model: str | None,
    verbose: bool,
    quiet: bool,
) -> Outcome:
    """The winner's settings, trained in full and registered. A member of a population had several:
    what is registered is what it has come to, and trained to the end where it wasn't."""
    from pipelines.workflows import train, tune

    again = recipe.with_overrides(best.settings)
    told: dict[str, Any] = {
        "experiment": asked.experiment,
        "verbose": verbose,
        "quiet": quiet,
        "tags": {tag_names.SEARCH: asked.name, tag_names.TRIAL: best.id},
    }
    if asked.scheduler == "pbt":
        return train.go_on(context, tune.run_of(asked, best), again, model=model, **told)
    return train.start(context, again, model=model, **told)


def _ask(
    context: Context,
    recipe: Recipe,
    *,
    space: Path | None,
    scheduler: str,
    trials: int,
    grace: int | None,
    interval: int | None,
    fixed: Collection[str],
    **more: Any,
) -> Asked:
    """What is asked for, or a UsageError where it can't be searched."""
    from pipelines.search import population
    from pipelines.search import space as search_space
    from pipelines.training import inputs
    from pipelines.workflows import search_board, train

    card = train.check_data(recipe)
    found = search_space.space_of(recipe, space, fixed=fixed)
    epochs = recipe.train.epochs
    length = interval or population.interval(epochs)
    if scheduler == "pbt":
        population.check_size(trials, epochs, length)
        population.check_space(recipe, found, inputs.seen_of(recipe, card))
    name = _name(recipe)
    return search_board.Asked(
        folder=context.searches_dir / name,
        name=name,
        recipe=recipe.to_json(),
        space=search_space.to_plain(found),
        scheduler=scheduler,
        trials=len(search_space.grid(found)) if more["search"] == "grid" else trials,
        grace_epochs=min(grace or search_space.grace(recipe), epochs),
        interval_epochs=length,
        **more,
    )


def _name(recipe: Recipe) -> str:
    from pipelines.data import card as cards

    stamp = time.strftime("%Y%m%d-%H%M%S")
    data = cards.read(recipe.data.path).name
    return f"{recipe.family}-{data}-search-{stamp}-{secrets.token_hex(2)}"
