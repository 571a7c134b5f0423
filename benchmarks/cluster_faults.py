"""Kills machines and services at random times in trainings, and counts how the trainings end.

A cluster of machines that share no folder is made of namespaces (tests/support/lab.py), as root.
Each training has one victim. Prints a table, writes `cluster_faults.json`, and ends with an error
if a training hung, failed, lost or doubled a point, ended with other weights than an undisturbed
one, or lost more than what was not yet in the store.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import cluster_lab
import common
from training_faults import SPARE_WORKERS, VICTIMS, WORKERS, Outcome, Trainings


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--trainings", type=int, default=30, help="how many have a victim")
    parser.add_argument("--epochs", type=int, default=40, help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of victims and times")
    parser.add_argument("--add", action="store_true", help="add to the results that are there")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no training after that")
    arguments = parser.parse_args()
    if reason := cluster_lab.missing():
        raise SystemExit(reason)
    began, chance = time.monotonic(), random.Random(arguments.seed)
    outcomes = earlier(arguments) if arguments.add else []
    done = len(outcomes)
    with (
        tempfile.TemporaryDirectory(prefix="tessera-lab-") as folder,
        cluster_lab.cluster(
            Path(folder, "lab"),
            workers=WORKERS + SPARE_WORKERS,
            TESSERA_STORAGE=cluster_lab.STORAGE,
        ) as cluster,
    ):
        packed = cluster.user(f"tessera pack digits --to {cluster_lab.DATA}")
        packed.check_returncode()
        trainings = Trainings(cluster, epochs=arguments.epochs, say=say)
        undisturbed = trainings.run("undisturbed")
        say(f"undisturbed: {undisturbed.seconds} s")
        for number in range(done, done + arguments.trainings):
            if time.monotonic() - began > arguments.minutes * 60:
                break
            victim = VICTIMS[number % len(VICTIMS)]
            outcome = trainings.run(f"training-{number}", victim, chance)
            outcomes.append(outcome)
            wrong = outcome.faults(arguments.epochs, undisturbed.weights)
            say(f"{outcome.name}: {victim} after epoch {outcome.epoch}: {wrong or 'good'}")
            write(arguments, undisturbed, outcomes, time.monotonic() - began)
    report(arguments, outcomes, undisturbed)


def earlier(arguments: argparse.Namespace) -> list[Outcome]:
    """The outcomes of the results that are there, which must be of the same kind."""
    entry = json.loads((arguments.results / "cluster_faults.json").read_text())
    if entry["epochs"] != arguments.epochs:
        raise SystemExit(f"the results there are of {entry['epochs']} epochs")
    rows = ({k: v for k, v in row.items() if k != "faults"} for row in entry["outcomes"])
    return [Outcome(**row) for row in rows]


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def write(
    arguments: argparse.Namespace, undisturbed: Outcome, outcomes: list[Outcome], seconds: float
) -> None:
    """Writes the results so far, so that an interrupted run has some."""
    epochs, weights = arguments.epochs, undisturbed.weights
    entry = {
        **common.machine("torch", "ray", "mlflow"),
        "epochs": epochs,
        "workers": WORKERS,
        "trainings": len(outcomes),
        "good": sum(not outcome.faults(epochs, weights) for outcome in outcomes),
        "seconds": round(seconds),
        "undisturbed": asdict(undisturbed),
        "outcomes": [
            {**asdict(outcome), "faults": outcome.faults(epochs, weights)} for outcome in outcomes
        ],
    }
    common.record(arguments.results, "cluster_faults", entry)


def report(arguments: argparse.Namespace, outcomes: list[Outcome], undisturbed: Outcome) -> None:
    """Prints the table and writes it to the docs. Ends with an error if an outcome is bad."""
    epochs, weights = arguments.epochs, undisturbed.weights
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.victim].append(outcome)
    rows = [
        [
            victim,
            str(len(group)),
            str(sum(not outcome.faults(epochs, weights) for outcome in group)),
            str(max(outcome.repeated_epochs for outcome in group)),
            str(max(len(outcome.statuses) for outcome in group)),
            f"{median(outcome.seconds for outcome in group) - undisturbed.seconds:.0f} s",
        ]
        for victim, group in groups.items()
    ]
    heads = ["killed", "trainings", "good", "most epochs repeated", "commands", "longer by"]
    print(common.table(heads, rows))
    lines = [heads, ["---"] * len(heads), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text += f'\n\nAn undisturbed training took {undisturbed.seconds:.0f} s. "Longer by" is the '
    text += "difference of the median.\n"
    common.write_measured("cluster faults", text)
    bad = [
        f"{outcome.name}: {outcome.victim} after epoch {outcome.epoch}: {fault}"
        for outcome in outcomes
        for fault in outcome.faults(epochs, weights)
    ]
    if bad:
        raise SystemExit("\n".join(bad))


if __name__ == "__main__":
    main()
