"""Runs with a name that the caller gives, for a command that may be repeated after any failure.

In: the name, and what is to be trained. Out: a new run, the run that a call before has begun, or
the `Outcome` of one that is finished. Must not train.

    the run    its settings   what `train(run=NAME)` does
    isn't      -              begins a run of this name
    is begun   the same       resumes it, in the same run in MLflow
    is ended   the same       returns its registered version, and trains nothing
    is there   others         raises UsageError
"""

from __future__ import annotations

import json
import unicodedata
from typing import TYPE_CHECKING

from models.core.errors import UsageError
from pipelines import recipe as recipes
from pipelines import tag_names
from pipelines.workflows import services

if TYPE_CHECKING:
    from pipelines.recipe import Recipe
    from pipelines.training.driver import Outcome
    from pipelines.training.run import Run
    from pipelines.training.setup import TrainingSetup
    from pipelines.workflows.context import Context

PATIENCE_SECONDS = 10.0
"""How long a repeated command waits for the lock of a run: its driver may be about to end."""
_MOST_BYTES = 180
"""A folder's name has at most 255, and those of a search's trials are longer than its own."""


def check_name(name: str) -> str:
    """Returns the name of a run or a search, composed (NFC). Raises UsageError if it is no name of
    a folder, or if MLflow can't search for it."""
    composed = unicodedata.normalize("NFC", name)
    if (
        not composed
        or composed != composed.strip()
        or composed[0] in ".-"
        or not composed.isprintable()
        or any(c in composed for c in "/\\")
        or ("'" in composed and '"' in composed)
        or len(composed.encode(errors="replace")) > _MOST_BYTES
    ):
        raise UsageError(
            f"{name[:80]!r} is not a valid name of a run",
            hint=f"use up to {_MOST_BYTES} bytes of letters of any alphabet, digits, spaces and "
            "signs, but not / and \\, not both kinds of quotes, and no . or - at the start",
        )
    return composed


def begin_or_find(context: Context, name: str, recipe: Recipe, model: str, given: bool) -> Run:
    """The run called `name`, created if it doesn't exist. `model` is the name in the registry, and
    `given` whether the caller asked for it. Raises UsageError if the run has other settings."""
    from pipelines.training import run as training_run
    from pipelines.training.run_storage import address_of

    address = address_of(context.remote_storage, "runs", name)
    run = training_run.find_or_create(
        context.runs_dir, recipe, name=name, model=model, storage=address
    )
    refuse_changes(name, recipes.differences(run.recipe(), recipe, run.changing))
    if given and run.model != model:
        refuse_changes(name, [f"model was {run.model}, is {model}"])
    return run


def refuse_changes(name: str, changes: list[str]) -> None:
    """Raises UsageError that lists the changes, if there are any."""
    if changes:
        raise UsageError(
            f"{name} was begun with other settings: {'; '.join(changes)}",
            hint="give the settings that it has, or another name",
        )


def finished(context: Context, run: Run, setup: TrainingSetup) -> Outcome | None:
    """The outcome of a run that has ended and registered its version; None of any other, also if
    its last events are not in MLflow yet."""
    from pipelines.training.driver import Outcome
    from pipelines.training.run import median_speed

    if not run.run_id:
        return None
    versions = services.open_registry(context).versions(run.model)
    ours = [version for version in versions if version.tags.get(tag_names.RUN) == run.name]
    if not ours:
        return None
    version = ours[-1]
    tracker = services.attach_tracker(context, version.run_id)
    if tracker.status() != "FINISHED":
        return None
    metrics = json.loads(version.tags[tag_names.METRICS])
    step = int(version.tags[tag_names.CHECKPOINT].rpartition("-")[2])
    steps_per_epoch = -(-setup.card.split("train").samples // setup.recipe.train.batch_size)
    return Outcome(
        run=run,
        metrics={name.removeprefix("val/"): value for name, value in metrics.items()},
        epoch=-(-step // steps_per_epoch),
        images_per_second=median_speed(run),
        failed_events=0,
        link=tracker.link(),
        version=version,
    )
