"""The cost of an empty trial: with Ray Tune, with PBT generations, and with Optuna alone.

Each method runs the same numbers of empty trials, in turns in one run, on one cluster whose start
is excluded. A trial of Tune runs in its own process or, with `kept` (how trials without workers are
run), in a process that is used again for the next one; a member of a population runs in a process
on the driver's node, a trial of Optuna in the driver. With `tracked` a trial also has a run in
MLflow, as every trial of a search has. A warm-up trial of each method starts the processes. Prints
a table, writes benchmarks/results/search_overhead.json.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import arguments, machine, record, table

from models.core.spaces import LogUniform
from pipelines.cluster.tuner import Report, TunerOptions
from pipelines.workflows.context import Context

COUNTS = (4, 16, 64)
SPACE = {"optim.model.lr": LogUniform(1e-4, 1.0)}
SEARCH = "overhead"


def optuna_alone(count: int, folder: Path, at_once: int) -> None:
    """Optuna in this process, with an objective that returns a random number."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(lambda trial: trial.suggest_float("lr", 1e-4, 1.0, log=True), n_trials=count)


def tune(
    kind: str, *, tracked: bool = False, kept: bool = False
) -> Callable[[int, Path, int], None]:
    def run(count: int, folder: Path, at_once: int) -> None:
        from pipelines.cluster import tuner

        events: list[str] = []
        options = TunerOptions(
            folder=folder / "tune",
            space=SPACE,
            search=kind,
            scheduler="none",
            trials=count,
            at_once=at_once,
            direction="min",
            most_epochs=1,
            grace_epochs=1,
            reduction=3.0,
            seed=0,
            keep_processes=kept,
        )
        payload = {"home": os.environ["TESSERA_HOME"], "tracked": tracked, "turn": folder.name}
        tuner.run(
            empty_trial,
            payload,
            options,
            lambda event, trial, details: events.append(event),
            restore=False,
        )
        assert events.count("complete") == count, events

    return run


def generations(count: int, folder: Path, at_once: int) -> None:
    """The calls that make up a generation of a population."""
    from pipelines.cluster import tasks

    results = list(tasks.map_local_tasks(empty_member, {}, range(count), at_once=at_once))
    assert sorted(number for number, _ in results) == list(range(count))


def empty_member(shared: dict[str, Any], part: int) -> int:
    """A member of a population that trains nothing."""
    return part


def empty_trial(
    payload: dict[str, Any], trial: str, settings: dict[str, Any], report: Report
) -> None:
    """Reports one epoch and trains nothing."""
    if payload["tracked"]:
        os.environ["TESSERA_HOME"] = payload["home"]
        from pipelines.workflows import services

        tracker = services.open_tracker(
            Context.from_environment(), f"{payload['turn']}-{trial}", experiment=SEARCH, tags={}
        )
        tracker.params({path: str(value) for path, value in settings.items()})
        tracker.finish("FINISHED")
    report(1, 0.5)


METHODS: dict[str, Callable[[int, Path, int], None]] = {
    "optuna alone": optuna_alone,
    "tune, random": tune("random"),
    "tune, optuna": tune("optuna"),
    "tune, random, tracked": tune("random", tracked=True),
    "tune, random, kept": tune("random", kept=True),
    "tune, random, kept, tracked": tune("random", kept=True, tracked=True),
    "generations": generations,
}


def measure(
    work: Path, counts: list[int], rounds: int, at_once: int, only: list[str]
) -> list[dict[str, Any]]:
    """One entry for each method and number of trials, with the median of its rounds."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):
        for name in only:
            for count in counts if turn else [1]:  # the first turn is a warm-up
                folder = Path(tempfile.mkdtemp(prefix="turn-", dir=work))
                began = time.perf_counter()
                METHODS[name](count, folder, at_once)
                if turn:
                    seconds.setdefault((name, count), []).append(time.perf_counter() - began)
                shutil.rmtree(folder)
    return [
        {
            "method": name,
            "trials": count,
            "seconds": statistics.median(turns),
            "seconds_range": [min(turns), max(turns)],
            "seconds_per_trial": statistics.median(turns) / count,
        }
        for (name, count), turns in seconds.items()
    ]


def growth(entries: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each method: the seconds that a further trial costs, from the smallest to the largest
    number of trials, and the cost of a trial at the largest divided by that at the smallest."""
    growths = {}
    for name in dict.fromkeys(entry["method"] for entry in entries):
        measured = sorted((e for e in entries if e["method"] == name), key=lambda e: e["trials"])
        few, many = measured[0], measured[-1]
        if few is many:
            continue
        more = many["trials"] - few["trials"]
        growths[name] = {
            "seconds_per_further_trial": (many["seconds"] - few["seconds"]) / more,
            "cost_ratio": many["seconds_per_trial"] / few["seconds_per_trial"],
        }
    return growths


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--trials", type=int, nargs="+", default=list(COUNTS), help="numbers of trials"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds, after one warm-up")
    parser.add_argument(
        "--at-once", type=int, default=os.cpu_count() or 1, help="trials at the same time"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(METHODS), default=list(METHODS), help="methods"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="overhead-", dir=options.work))
    os.environ["TESSERA_HOME"] = str(scratch / "home")
    from pipelines.workflows import services

    try:
        with services.joined(Context.from_environment()):
            entries = measure(
                scratch, options.trials, options.rounds, options.at_once, options.only
            )
    finally:
        shutil.rmtree(scratch)
    rows = [
        [
            entry["method"],
            str(entry["trials"]),
            f"{entry['seconds']:.2f}",
            "{:.2f} to {:.2f}".format(*entry["seconds_range"]),
            f"{entry['seconds_per_trial']:.3f}",
        ]
        for entry in sorted(entries, key=lambda e: (list(METHODS).index(e["method"]), e["trials"]))
    ]
    print(table(["", "trials", "seconds", "range", "per trial"], rows))
    entry = {
        **machine("ray", "optuna", "mlflow"),
        "rounds": options.rounds,
        "at_once": options.at_once,
        "entries": entries,
        "growth": growth(entries),
    }
    print(record(options.results, "search_overhead", entry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
