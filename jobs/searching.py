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
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import driver, embedded, generations, trials
from models.core.errors import TesseraError, unknown
from pipelines.search import space as search_space
from pipelines.search import trials as search_trials
from pipelines.search.trials import Trial

if TYPE_CHECKING:
    from collections.abc import Iterator

    from models.core.family import Figure
    from models.core.spaces import Space
    from pipelines.cluster.tuner import Order
    from pipelines.recipe import Recipe
    from pipelines.search.space import Room
    from pipelines.tracking.mlflow_runs import MlflowTracker
    from pipelines.training.run import Run

STATUS_TAG = "tessera.trial.status"
KEPT = ("TESSERA_HOME", "TESSERA_CACHE", "TESSERA_CACHE_SIZE", "TESSERA_UI", "MLFLOW_TRACKING_URI")
"""Of the environment: a trial's process may have been started by a cluster that has another."""


@dataclass(frozen=True)
class Asked:
    """What a search was asked for; `recipe` is its JSON, `space` as in a YAML file."""

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
    parent: str = ""
    """MLflow's run of the search."""

    @property
    def folder(self) -> Path:
        return embedded.searches_dir() / self.name

    def parsed_space(self) -> dict[str, Space]:
        return {path: search_space.parse(path, given) for path, given in self.space.items()}

    def write(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)  # what Tune keeps in it is executed when read
        scratch = self.folder / ".search.json"
        scratch.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        scratch.replace(self.folder / "search.json")


def find(name: str) -> Asked:
    known = [file.parent.name for file in sorted(embedded.searches_dir().glob("*/search.json"))]
    if name not in known:
        if not known:
            raise TesseraError(f"there is no search {name!r}: nothing was searched here yet")
        raise unknown("search", name, known)
    text = (embedded.searches_dir() / name / "search.json").read_text(encoding="utf-8")
    return Asked(**json.loads(text))


def run(
    asked: Asked, recipe: Recipe, *, restore: bool, verbose: bool, quiet: bool
) -> dict[str, Any]:
    """Runs the search to its end; gives `search`, `winner`, `trials` (the best first) and `page`."""
    import models
    from jobs.shared.terminal import say
    from pipelines.cluster import connection, workers
    from pipelines.training import run as training_run

    tell: Callable[[str], None] = (lambda text: None) if quiet else say
    group = driver.group_of(recipe)
    with ExitStack() as held:
        if restore:  # before anything is said of it anywhere
            held.enter_context(training_run.locked(asked))
        held.enter_context(driver.joined(verbose=verbose))
        room = search_space.room(
            cpus=connection.cpus(),
            gpus=connection.gpus(),
            workers=max(group.workers, 1),
            cpus_each=group.cpus,
            gpus_each=workers.gpus_each(group),
            trials=asked.trials,
        )
        parent = held.enter_context(parent_run(asked, recipe))
        asked = replace(asked, parent=parent.run_id)
        asked.write()
        if not restore:
            held.enter_context(training_run.locked(asked))
        tell(f"search {asked.name}")
        tell(f"watch {driver.page(parent.link())}")
        tell(f"{asked.trials} trials, {room.at_once} at once: {room.because}")
        figure = models.get(recipe.family).task.primary
        board = Board(asked, figure, recipe.train.epochs, parent, tell)
        board.settle_again()
        try:
            _train(asked, recipe, board, room, restore=restore)
        except KeyboardInterrupt:
            tell(f"go on with: tessera tune --resume {asked.name}")
            raise
        finally:
            board.close()
        return _conclude(asked, recipe, board, figure, parent)


def _train(asked: Asked, recipe: Recipe, board: Board, room: Room, *, restore: bool) -> None:
    import models
    from pipelines.cluster import tuner

    figure = models.get(recipe.family).task.primary
    facts = told(asked, figure)
    if asked.scheduler == "pbt":
        generations.run(asked, figure, recipe.train.epochs, facts, board, room.at_once)
        return
    order = _order(asked, recipe, room)
    again = restore and tuner.can_restore(order.folder)
    tuner.run(trials.run_trial, facts, order, board.hear, restore=again)
    for trial in board.trials:
        if again and not trial.over:  # Tune's record was older: it gave these settings anew
            board.hear(
                "error", trial.id, {"reason": "it had only begun when the search was killed"}
            )


def told(asked: Asked, figure: Figure) -> dict[str, Any]:
    """What a trial's process must know of its search."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {
        "environment": {**kept, "TESSERA_HOME": str(embedded.root())},
        "search": asked.name,
        "recipe": asked.recipe,
        "folder": str(asked.folder),
        "parent": asked.parent,
        "experiment": asked.experiment,
        "figure": figure.name,
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
        keep_processes=driver.group_of(recipe).workers == 0,
    )


def _conclude(
    asked: Asked, recipe: Recipe, board: Board, figure: Figure, parent: MlflowTracker
) -> dict[str, Any]:
    """Names the winner, and leaves it and the pictures with the search."""
    import yaml

    from pipelines.search import plots

    best = search_trials.winner(board.trials, figure)
    made = recipe.with_overrides(best.settings).model_dump(mode="json")
    (asked.folder / "winner.yaml").write_text(yaml.safe_dump(made, sort_keys=False), "utf-8")
    pictures = asked.folder / "pictures"
    for file in plots.draw(board.trials, asked.parsed_space(), figure, pictures):
        parent.artifact(file, "pictures")
    for name in (search_trials.TRIALS, "winner.yaml"):
        parent.artifact(asked.folder / name, "")
    return {
        "search": asked.name,
        "winner": best,
        "trials": search_trials.ranked(board.trials, figure),
        "page": parent.link(),
    }


class Board:
    """Who stands where: hears what becomes of the trials, keeps it in `trials.json`, says it, and
    ends the trials' runs in MLflow."""

    def __init__(
        self,
        asked: Asked,
        figure: Figure,
        most_epochs: int,
        parent: MlflowTracker,
        say: Callable[[str], None],
    ) -> None:
        self.trials = search_trials.read(asked.folder / search_trials.TRIALS)
        self._asked, self._figure, self._most_epochs = asked, figure, most_epochs
        self._parent, self._say = parent, say
        self._known = {trial.id: trial for trial in self.trials}
        self._began: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trial-end")

    def settle_again(self) -> None:
        """Of a search that was killed: the end of a trial may not have come to MLflow."""
        for trial in self.trials:
            if trial.over:
                self._pool.submit(self._settle, replace(trial), *self._reached())

    def hear(self, what: str, trial_id: str, about: dict[str, Any]) -> None:
        trial = self._known.get(trial_id)
        if trial is not None and trial.over:
            return  # a tuner that was killed may tell again what became of it
        if trial is None:
            settings = about.get("settings", {})
            trial = Trial(trial_id, len(self.trials) + 1, settings)
            trial.run = trials.run_name(self._asked.name, trial_id)
            self.trials.append(trial)
            self._known[trial_id] = trial
        if "changes" in about:
            trial.settings, trial.changes = about["settings"], about["changes"]
        if what == "start":
            trial.status = "running"
            self._began[trial_id] = time.monotonic()
        elif what == "wait":
            self._clock(trial)
            trial.status, trial.reason = "waiting", about["reason"]
            del self._began[trial_id]
        elif what == "exploit":
            self._take_over(trial, self._known[about["donor"]])
        elif what == "result":
            trial.note(int(about["epoch"]), float(about["value"]), self._figure)
            self._clock(trial)
        elif what in ("complete", "error"):
            self._clock(trial)
            self._end(trial, what, about)
        search_trials.write(self.trials, self._asked.folder / search_trials.TRIALS)

    def _take_over(self, trial: Trial, donor: Trial) -> None:
        trial.take_over(donor)
        why = f" ({trial.reason})" if trial.reason else ""
        self._say(
            f"trial {trial.number}{why} goes on with the weights of trial {donor.number} from epoch "
            f"{trial.changes[-1]['epoch']}  {settings_text(trial.settings)}"
        )

    def _clock(self, trial: Trial) -> None:
        now = time.monotonic()
        trial.seconds += now - self._began.get(trial.id, now)
        self._began[trial.id] = now

    def _end(self, trial: Trial, what: str, about: Mapping[str, Any]) -> None:
        reached = max((epoch for epoch, _ in trial.curve), default=0)
        failure = self._asked.folder / "trials" / trial.run / trials.FAILURE
        if what == "error":
            trial.status, trial.reason = "failed", str(about.get("reason", trial.reason))
        elif failure.exists():
            trial.status, trial.reason = "failed", json.loads(failure.read_text())["reason"]
        else:
            trial.status = "finished" if reached >= self._most_epochs else "stopped"
        self._say(line(trial, self._figure, self._asked.trials))
        self._pool.submit(self._settle, replace(trial), *self._reached())

    def _reached(self) -> tuple[int, float | None]:
        """How many trials are over, and the best figure among them."""
        done = [trial for trial in self.trials if trial.over]
        best = next(
            (t for t in search_trials.ranked(done, self._figure) if t.value is not None), None
        )
        return len(done), best.value if best else None

    def _settle(self, trial: Trial, done: int, best: float | None) -> None:
        """Delivers what a stopped trial left, and ends its run; whatever the service raises, the
        search goes on."""
        from pipelines.interfaces import Point
        from pipelines.tracking import mlflow_runs
        from pipelines.tracking.shipper import Shipper
        from pipelines.training import run as training_run

        try:
            folder = self._asked.folder / "trials"
            if not (folder / trial.run / "run.json").exists():
                return
            run = training_run.find(folder, trial.run)
            if not run.run_id:
                return
            tracker = driver.attach_tracker(run.run_id)
            # One that was stopped may still be on its way out.
            with training_run.locked(run, patience_seconds=trials.END_SECONDS):
                shipper = Shipper(run.spool, tracker, is_permanent=mlflow_runs.is_permanent).start()
                shipper.close(60.0)
            values = {STATUS_TAG: trial.status, "tessera.trial.reason": trial.reason}
            tracker.tags({name: value for name, value in values.items() if value})
            tracker.finish("FAILED" if trial.status == "failed" else "FINISHED")
            if best is not None:
                now = int(time.time() * 1000)
                self._parent.metrics([Point(done, now, {f"best/{self._figure.name}": best})])
        except Exception as error:
            self._say(f"note: the end of trial {trial.number} was not noted: {error}")

    def close(self) -> None:
        self._pool.shutdown(wait=True)


def line(trial: Trial, figure: Figure, trials: int) -> str:
    """What became of a trial, in one line."""
    value = "no figure" if trial.value is None else f"val {figure.name} {trial.value:.4f}"
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


@contextmanager
def parent_run(asked: Asked, recipe: Recipe) -> Iterator[MlflowTracker]:
    """The search's entry in MLflow, ended with what becomes of the search."""
    tracker = driver.open_tracker(
        asked.name,
        experiment=asked.experiment,
        tags={**driver.tags_of(recipe), "tessera.search": asked.name},
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
