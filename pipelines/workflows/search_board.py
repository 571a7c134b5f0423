"""The spec of a search, and the leaderboard of its trials.

In: events of the trials, from Ray Tune or from a population's generations. Out: trials.json in the
search's folder, a line per trial to `say`, and ended runs in MLflow. Must not know the tuner.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.core.errors import TesseraError, unknown
from pipelines import tag_names
from pipelines.search import space as search_space
from pipelines.search import trials as search_trials
from pipelines.search.trials import Trial
from pipelines.storage.atomic import write_json_atomic
from pipelines.workflows import search_files, services
from pipelines.workflows import trial as workflows_trial

if TYPE_CHECKING:
    from models.core.family import Metric
    from models.core.spaces import Space
    from pipelines.tracking.mlflow_runs import MlflowTracker
    from pipelines.workflows.context import Context


@dataclass(frozen=True)
class SearchSpec:
    """What is searched, and how. `recipe` is JSON, `space` as in a YAML file. `folder` isn't
    written to search.json, because the home folder may be moved. `storage` is the address of the
    search's files in an object store, empty if the folder has them."""

    folder: Path
    name: str
    recipe: str
    space: dict[str, Any]
    search: str
    scheduler: str
    trials: int
    seed: int
    experiment: str
    grace_epochs: int
    reduction: float
    budget_seconds: float | None
    interval_epochs: int = 1
    storage: str = ""
    parent: str = ""
    """The id of the search's run in MLflow."""

    def parsed_space(self) -> dict[str, Space]:
        return {path: search_space.parse(path, given) for path, given in self.space.items()}

    def write(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)  # private: reading Tune's state executes it
        facts = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_json_atomic(self.folder / search_files.SPEC, facts)
        search_files.publish(self.storage, self.folder, search_files.SPEC)

    def trial_storage(self, run: str) -> str:
        """The address of a trial's files; empty without a storage."""
        return f"{self.storage}/trials/{run}" if self.storage else ""


def find(context: Context, name: str) -> SearchSpec:
    """Reads the spec of a search. One in the storage is found from any machine. Raises TesseraError
    if there is none of that name."""
    folder, storage = context.searches_dir / name, context.remote_storage
    known = [file.parent.name for file in sorted(context.searches_dir.glob("*/search.json"))]
    stored = search_files.names(storage) if storage else []
    if name not in known and name not in stored:
        known = sorted({*known, *stored})
        if not known:
            raise TesseraError(f"there is no search {name!r}: no search has run here yet")
        raise unknown("search", name, known)
    address = search_files.address(storage, name) if name in stored else ""
    if not address:
        address = json.loads((folder / search_files.SPEC).read_text("utf-8"))["storage"]
    if address:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        search_files.fetch(address, folder)
    facts = json.loads((folder / search_files.SPEC).read_text(encoding="utf-8"))
    return SearchSpec(folder=folder, **{**facts, "storage": address})


class Leaderboard:
    """The state and ranking of a search's trials. Receives events (`on_event`), keeps trials.json
    up to date, reports each finished trial to `say`, and ends the trials' runs in MLflow."""

    def __init__(
        self,
        context: Context,
        spec: SearchSpec,
        metric: Metric,
        most_epochs: int,
        parent: MlflowTracker,
        say: Callable[[str], None],
    ) -> None:
        self.trials = search_trials.read(spec.folder / search_trials.TRIALS)
        self._context = context
        self._spec, self._metric, self._most_epochs = spec, metric, most_epochs
        self._parent, self._say = parent, say
        self._known = {trial.id: trial for trial in self.trials}
        self._started: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trial-end")
        self._published = search_files.LatestFile(spec.storage, spec.folder, search_trials.TRIALS)

    def end_runs_again(self) -> None:
        """After a search was killed, the end of a trial may be missing in MLflow."""
        for trial in self.trials:
            if trial.over:
                self._pool.submit(self._end_run, replace(trial), *self._progress())

    def on_event(self, what: str, trial_id: str, about: dict[str, Any]) -> None:
        """`what` is start, result, exploit, wait, complete or error; `about` has its details."""
        trial = self._known.get(trial_id)
        if trial is not None and trial.over:
            return  # a tuner that was killed and resumed may repeat the end of a trial
        if trial is None:
            settings = about.get("settings", {})
            trial = Trial(trial_id, len(self.trials) + 1, settings)
            trial.run = workflows_trial.run_name(self._spec.name, trial_id)
            self.trials.append(trial)
            self._known[trial_id] = trial
        if "changes" in about:
            trial.settings, trial.changes = about["settings"], about["changes"]
        if what == "start":
            trial.status = "running"
            self._started[trial_id] = time.monotonic()
        elif what == "wait":
            self._count_seconds(trial)
            trial.status, trial.reason = "waiting", about["reason"]
            del self._started[trial_id]
        elif what == "exploit":
            self._copy_weights(trial, self._known[about["donor"]])
        elif what == "result":
            trial.note(int(about["epoch"]), float(about["value"]), self._metric)
            self._count_seconds(trial)
        elif what in ("complete", "error"):
            self._count_seconds(trial)
            self._end(trial, what, about)
        search_trials.write(self.trials, self._spec.folder / search_trials.TRIALS)
        self._published.changed()

    def _copy_weights(self, trial: Trial, donor: Trial) -> None:
        trial.copy_from(donor)
        why = f" ({trial.reason})" if trial.reason else ""
        self._say(
            f"trial {trial.number}{why} copies the weights of trial {donor.number} from epoch "
            f"{trial.changes[-1]['epoch']}  {settings_text(trial.settings)}"
        )

    def _count_seconds(self, trial: Trial) -> None:
        now = time.monotonic()
        trial.seconds += now - self._started.get(trial.id, now)
        self._started[trial.id] = now

    def _end(self, trial: Trial, what: str, about: Mapping[str, Any]) -> None:
        reached = max((epoch for epoch, _ in trial.curve), default=0)
        failure = self._spec.folder / "trials" / trial.run / workflows_trial.FAILURE
        if what == "error":
            trial.status, trial.reason = "failed", str(about.get("reason", trial.reason))
        elif failure.exists():
            trial.status, trial.reason = "failed", json.loads(failure.read_text())["reason"]
        else:
            trial.status = "finished" if reached >= self._most_epochs else "stopped"
        self._say(line(trial, self._metric, self._spec.trials))
        self._pool.submit(self._end_run, replace(trial), *self._progress())

    def _progress(self) -> tuple[int, float | None]:
        """How many trials are over, and the best metric among them."""
        done = [trial for trial in self.trials if trial.over]
        best = search_trials.best(done, self._metric)
        return len(done), best.value if best else None

    def _end_run(self, trial: Trial, done: int, best: float | None) -> None:
        """Uploads the remaining events of a trial and ends its run. The search continues whatever
        MLflow raises."""
        from pipelines.interfaces import Point
        from pipelines.tracking import mlflow_runs
        from pipelines.tracking.uploader import Uploader
        from pipelines.training import run as training_run
        from pipelines.training import run_files

        try:
            folder = self._spec.folder / "trials" / trial.run
            run = training_run.open_existing(folder, self._spec.trial_storage(trial.run))
            if run is None or not run.run_id:
                return
            tracker = services.attach_tracker(self._context, run.run_id)
            # The process of a stopped trial may still be running.
            with training_run.locked(run, patience_seconds=workflows_trial.LOCK_SECONDS):
                uploader = Uploader(
                    run.event_log,
                    tracker,
                    is_permanent=mlflow_runs.is_permanent,
                    fetch=run_files.of(run).fetch,
                ).start()
                uploader.close(60.0)
            values = {tag_names.TRIAL_STATUS: trial.status, tag_names.TRIAL_REASON: trial.reason}
            tracker.tags({name: value for name, value in values.items() if value})
            tracker.finish("FAILED" if trial.status == "failed" else "FINISHED")
            if best is not None:
                now = int(time.time() * 1000)
                self._parent.metrics([Point(done, now, {f"best/{self._metric.name}": best})])
        except Exception as error:
            self._say(f"note: the run of trial {trial.number} was not ended in MLflow: {error}")

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._published.close()


def line(trial: Trial, metric: Metric, trials: int) -> str:
    """A finished trial in one line."""
    value = "no metric" if trial.value is None else f"val {metric.name} {trial.value:.4f}"
    at = f" (epoch {trial.epoch})" if trial.value is not None else ""
    reason = f": {trial.reason}" if trial.reason else ""
    return (
        f"trial {trial.number}/{trials} {trial.status}{reason}  {value}{at}  "
        f"{settings_text(trial.settings)}"
    )


def settings_text(settings: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else json.dumps(value)

    return " ".join(f"{path}={text(value)}" for path, value in settings.items())
