"""One trial of a search, in a process of its own beside the driver.

In: what it must know of the search (`searching.told`), a trial's id and its settings. Out: a
training in the search's folder, a run in MLflow below the search's own, and figures to whoever
asked. Must not know who chooses the settings.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.core.errors import TesseraError
from pipelines import tag_names
from pipelines.workflows import services

if TYPE_CHECKING:
    from pipelines.cluster.tuner import Report
    from pipelines.recipe import Recipe
    from pipelines.training.run import Run

MOST_TAG = 5000
END_SECONDS = 60.0
"""How long whoever goes on with a trial's run, or ends it, waits for who had it before."""
FAILURE = "failure.json"
"""In a trial's folder: why it came to nothing, where the reason is its own."""


def run_trial(
    told: dict[str, Any], trial_id: str, settings: dict[str, Any], report: Report
) -> None:
    """One trial, from its last checkpoint where it has one. Called by Ray Tune, in a process that
    may have had another trial before; `report` raises SystemExit when the trial is to stop.

    Tune's record of a search that was killed lags behind: a trial that was over may be called once
    more, and one that goes on be known with fewer epochs than it has. So what it had is told again,
    which Tune and the board take once; and one that is over in the board's record isn't trained."""
    from pipelines import recipe as recipes
    from pipelines.search import trials
    from pipelines.training import driver as training_driver
    from pipelines.training import run as training_run

    standing = trials.read(Path(told["folder"]) / trials.TRIALS)
    before = next((trial for trial in standing if trial.id == trial_id), None)
    if before is not None and before.over:
        for epoch, value in before.curve:
            report(epoch, value)
        return
    recipe = recipes.build(json.loads(told["recipe"])).with_overrides(settings)
    name = run_name(told["search"], trial_id)
    run = training_run.find_or_create(trials_dir(told), recipe, name=name, model=told["search"])
    metric = f"val/{told['metric']}"
    for epoch, value in training_run.history(run).get(metric, []):
        report(epoch, value)
    found: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
    ended: list[BaseException | None] = []
    # Ray Train's workers can't be told; they end with this process, which then isn't kept.
    stop = threading.Event() if recipe.workers.count == 0 else None

    def listen(event: Mapping[str, Any]) -> None:
        if event["kind"] == "metrics" and metric in event["values"]:
            found.put((int(event["epoch"]), float(event["values"][metric])))

    def train() -> None:
        try:
            _train(told, trial_id, run, recipe, listeners=[listen], stop=stop)
            ended.append(None)
        except training_driver.Stopped:
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    # Figures are reported by the thread that Tune called, which may wait there.
    thread = threading.Thread(target=train, name="trial", daemon=True)
    thread.start()
    try:
        while thread.is_alive() or not found.empty():
            try:
                epoch, value = found.get(timeout=0.2)
            except queue.Empty:
                continue
            report(epoch, value)
    finally:
        if stop:
            stop.set()
            thread.join()
    error = ended[0]
    if isinstance(error, TesseraError):  # it would come again: Tune is not to try once more
        (run.folder / FAILURE).write_text(json.dumps({"reason": error.message}), "utf-8")
    elif error is not None:
        raise error


def run_segment(told: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """A member of a population, from its newest checkpoint to the end of a generation.

    part: the member's `id`, `settings` and `changes`, and the epochs it has then, `until_epoch`.
    Gives its `curve`, [epoch, figure] as far as it came, and where it came to nothing the `reason`.
    """
    from pipelines import recipe as recipes
    from pipelines.training import run as training_run

    recipe = recipes.build(json.loads(told["recipe"])).with_overrides(part["settings"])
    name = run_name(told["search"], part["id"])
    run = training_run.find_or_create(
        trials_dir(told), recipe, name=name, model=told["search"], changing=list(part["settings"])
    )
    _note_settings(run, part)
    reason = ""
    try:
        tags = {tag_names.SETTINGS: changes_text(part["changes"])}
        _train(told, part["id"], run, recipe, until_epoch=part["until_epoch"], tags=tags)
    except TesseraError as error:
        reason = error.message
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
    # From the file: a process that was killed may have told some of it before.
    return {"curve": training_run.history(run).get(f"val/{told['metric']}", []), "reason": reason}


def _note_settings(run: Run, part: Mapping[str, Any]) -> None:
    """The settings in effect as metrics of the epochs that they are for; MLflow's params, which
    can't change, have the first."""
    from pipelines.tracking.events import EventLog

    values = {
        f"settings/{path}": float(value)
        for path, value in part["settings"].items()
        if isinstance(value, int | float)
    }
    first = part["from_epoch"] + 1
    event_log = EventLog(run.event_log)
    for epoch in range(first, part["until_epoch"] + 1) if values else ():
        event_log({"kind": "metrics", "step": epoch, "epoch": epoch, "values": values})
    event_log.close()


def changes_text(changes: Sequence[Mapping[str, Any]]) -> str:
    """The changes as JSON, the newest of them where all are longer than MLflow takes."""
    kept = list(changes)
    while len(text := json.dumps(kept)) > MOST_TAG and len(kept) > 1:
        kept.pop(0)
    return text


def run_name(search: str, trial_id: str) -> str:
    return f"{search}-{trial_id}"


def trials_dir(told: Mapping[str, Any]) -> Path:
    return Path(told["folder"]) / "trials"


def _train(
    told: Mapping[str, Any],
    trial_id: str,
    run: Run,
    recipe: Recipe,
    *,
    listeners: Sequence[Callable[[dict[str, Any]], None]] = (),
    until_epoch: int | None = None,
    tags: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
) -> None:
    from pipelines.tracking import mlflow_runs
    from pipelines.training import driver as training_driver
    from pipelines.training import run as training_run
    from pipelines.training import worker
    from pipelines.training.setup import open_setup, worker_group
    from pipelines.workflows import judges

    if recipe.judge:
        judges.fetch(
            recipe, services.open_registry(told["context"]), run.folder / training_run.JUDGE
        )
    tags = {
        **(tags or {}),
        **services.tags_of(recipe),
        "mlflow.parentRunId": told["parent"],
        tag_names.SEARCH: told["search"],
        tag_names.TRIAL: trial_id,
    }
    with (
        training_run.locked(run, patience_seconds=END_SECONDS),
        services.executor(
            told["context"],
            worker.run,
            worker_group(recipe),
            name=run.name,
            storage=run.folder / "ray",
        ) as execute,
    ):
        training_driver.train(
            run,
            open_setup(recipe),
            tracker=services.open_tracker(
                told["context"], run.name, experiment=told["experiment"], tags=tags
            ),
            execute=execute,
            is_permanent=mlflow_runs.is_permanent,
            listeners=listeners,
            tags=tags,
            until_epoch=until_epoch,
            stop=stop,
        )
