"""What a trial costs that does nothing: Ray Tune as a search uses it, its generations, Optuna alone.

Each way runs the same numbers of empty trials, in turns in one run, on one cluster whose start is
outside. A trial of Tune is a call in a process of its own, or with `kept`, as trials without workers
are run, in one that goes on with the next; a member of a population is a call in a process beside the
driver, a trial of Optuna alone a call in it. With `tracked` a trial also has a run in MLflow, as every
trial of a search has. Each way runs one trial before, so that processes are there. Prints a table,
writes benchmarks/results/search_overhead.json.
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


def alone(count: int, folder: Path, at_once: int) -> None:
    """Optuna in this process, with an objective that gives a number."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(lambda trial: trial.suggest_float("lr", 1e-4, 1.0, log=True), n_trials=count)


def tune(
    kind: str, *, tracked: bool = False, kept: bool = False
) -> Callable[[int, Path, int], None]:
    def run(count: int, folder: Path, at_once: int) -> None:
        from pipelines.cluster import tuner

        heard: list[str] = []
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
        told = {"home": os.environ["TESSERA_HOME"], "tracked": tracked, "turn": folder.name}
        tuner.run(
            empty, told, options, lambda what, trial, about: heard.append(what), restore=False
        )
        assert heard.count("complete") == count, heard

    return run


def generations(count: int, folder: Path, at_once: int) -> None:
    """The calls of which a population's generation is made."""
    from pipelines.cluster import tasks

    found = list(tasks.map_local_tasks(nothing, {}, range(count), at_once=at_once))
    assert sorted(number for number, _ in found) == list(range(count))


def nothing(shared: dict[str, Any], part: int) -> int:
    return part


def empty(told: dict[str, Any], trial: str, settings: dict[str, Any], report: Report) -> None:
    if told["tracked"]:
        os.environ["TESSERA_HOME"] = told["home"]
        from pipelines.workflows import services

        tracker = services.open_tracker(
            Context.from_environment(), f"{told['turn']}-{trial}", experiment=SEARCH, tags={}
        )
        tracker.params({path: str(value) for path, value in settings.items()})
        tracker.finish("FINISHED")
    report(1, 0.5)


WAYS: dict[str, Callable[[int, Path, int], None]] = {
    "optuna alone": alone,
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
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):
        for name in only:
            for count in counts if turn else [1]:  # the first turn is a warm-up
                folder = Path(tempfile.mkdtemp(prefix="turn-", dir=work))
                began = time.perf_counter()
                WAYS[name](count, folder, at_once)
                if turn:
                    seconds.setdefault((name, count), []).append(time.perf_counter() - began)
                shutil.rmtree(folder)
    return [
        {
            "way": name,
            "trials": count,
            "seconds": statistics.median(found),
            "seconds_range": [min(found), max(found)],
            "seconds_per_trial": statistics.median(found) / count,
        }
        for (name, count), found in seconds.items()
    ]


def growth(entries: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each way: seconds that one more trial costs, between the fewest and the most, and a trial's
    price at the most as a share of that at the fewest."""
    found = {}
    for name in dict.fromkeys(entry["way"] for entry in entries):
        own = sorted((e for e in entries if e["way"] == name), key=lambda e: e["trials"])
        few, many = own[0], own[-1]
        if few is many:
            continue
        more = many["trials"] - few["trials"]
        found[name] = {
            "seconds_per_further_trial": (many["seconds"] - few["seconds"]) / more,
            "price_ratio": many["seconds_per_trial"] / few["seconds_per_trial"],
        }
    return found


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--trials", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
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
            entry["way"],
            str(entry["trials"]),
            f"{entry['seconds']:.2f}",
            "{:.2f} to {:.2f}".format(*entry["seconds_range"]),
            f"{entry['seconds_per_trial']:.3f}",
        ]
        for entry in sorted(entries, key=lambda e: (list(WAYS).index(e["way"]), e["trials"]))
    ]
    print(table(["", "trials", "seconds", "range", "each"], rows))
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
