"""How soon a search reaches a target metric: ASHA, Optuna with ASHA, PBT, and random search with
the same number of trials and with twice as many.

All search the same space of the digits recipe by its `val` metric, with the same seeds, in turns in
one run on one cluster. The budget of a method is a number of trials; a trial that is stopped early
costs less, so the trained epochs are reported next to the time. A method that doesn't reach the
target within its trials has no time for that seed. Prints a table, writes
benchmarks/results/search_to_target.json and the table in docs/reference/measured.md.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, ROOT, arguments, machine, record, table, write_measured

from pipelines.workflows.context import Context

RECIPE = ROOT / "jobs" / "recipes" / "digits.yaml"
METRIC = "accuracy"
TARGET = 0.985
CHANGES = ["train.epochs=9"]
"""Changes to the recipe, so that all methods and seeds don't take hours."""
TRIALS = 8
SPACE = """\
optim.model.lr: {log_uniform: [1e-4, 1]}
optim.model.weight_decay: {log_uniform: [1e-5, 1e-2]}
augment.label_smoothing: {uniform: [0, 0.2]}
model.dropout: {uniform: [0, 0.5]}
"""
"""Only settings that PBT may change during a training, so that all methods search the same
space."""
METHODS: dict[str, tuple[dict[str, str], int]] = {
    "random": ({"scheduler": "none"}, 1),
    "random, double": ({"scheduler": "none"}, 2),
    "asha": ({"scheduler": "asha"}, 1),
    "optuna, asha": ({"search": "optuna", "scheduler": "asha"}, 1),
    "pbt": ({"scheduler": "pbt"}, 1),
}
"""Method -> arguments of `tune`, and the factor of the number of trials."""


def search(data: Path, method: str, seed: int, options: Any, space: Path) -> dict[str, Any]:
    """Runs one search. Returns its best value, and what it took to reach the target."""
    from pipelines import recipe as recipes
    from pipelines.workflows.tune import tune

    arguments, factor = METHODS[method]
    began = time.time()
    result = tune(
        options.recipe,
        data=data,
        space=space,
        trials=options.trials * factor,
        seed=seed,
        workers_per_trial=0,
        set={"seed": seed, **dict(map(recipes.parse_override, options.set))},
        progress=False,
        **arguments,
    )
    seconds = time.time() - began
    trials = result.folder / "trials"
    return {
        "method": method,
        "seed": seed,
        "best": result.winner.value,
        "seconds": seconds,
        **to_target(records(trials), options.target, began),
    }


def records(trials: Path) -> list[list[tuple[float, float | None]]]:
    """For each trial the time in seconds of every event, with the metric if the event has it."""
    from pipelines.tracking.events import read_events

    return [
        [
            (event["time_ms"] / 1000, event.get("values", {}).get(f"val/{METRIC}"))
            for event, _ in read_events(log)
        ]
        for log in sorted(trials.glob("*/events.jsonl"))
    ]


def to_target(
    trials: Sequence[Sequence[tuple[float, float | None]]], target: float, began: float
) -> dict[str, Any]:
    """`epochs`: number of trained epochs; `to_target`: seconds, started trials and trained epochs
    until a trial reached the target, or None."""
    epochs = sorted(
        (time_s, value) for trial in trials for time_s, value in trial if value is not None
    )
    reached = next((time_s for time_s, value in epochs if value >= target), None)
    result: dict[str, Any] = {"epochs": len(epochs), "to_target": None}
    if reached is not None:
        result["to_target"] = {
            "seconds": reached - began,
            "trials": sum(
                min(time_s for time_s, _ in trial) <= reached for trial in trials if trial
            ),
            "epochs": sum(time_s <= reached for time_s, _ in epochs),
        }
    return result


def summary(searches: list[dict[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """For each method: the number of seeds that reached the target, and the medians over those."""
    entries = []
    for method in methods:
        runs = [one for one in searches if one["method"] == method]
        reached = [one["to_target"] for one in runs if one["to_target"]]
        medians = {
            unit: statistics.median(one[unit] for one in reached) if reached else None
            for unit in ("seconds", "trials", "epochs")
        }
        entries.append(
            {
                "method": method,
                "searches": len(runs),
                "reached": len(reached),
                "to_target": medians,
                "best": statistics.median(one["best"] for one in runs),
                "seconds": statistics.median(one["seconds"] for one in runs),
                "epochs": statistics.median(one["epochs"] for one in runs),
            }
        )
    return entries


def rows(entries: list[dict[str, Any]]) -> list[list[str]]:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}"

    return [
        [
            entry["method"],
            f"{entry['reached']}/{entry['searches']}",
            *(text(entry["to_target"][unit]) for unit in ("seconds", "trials", "epochs")),
            text(entry["seconds"]),
            text(entry["epochs"]),
            f"{entry['best']:.4f}",
        ]
        for entry in entries
    ]


def markdown(entry: dict[str, Any]) -> str:
    """The table in docs/reference/measured.md."""
    heads = (
        "| | reached the target | seconds | trials started | epochs trained "
        "| whole search, seconds | best |"
    )
    lines = [heads, "|---|---|---|---|---|---|---|"]
    for method, reached, seconds, trials, epochs, whole, _, best in rows(entry["entries"]):
        lines.append(
            f"| {method} | {reached} | {seconds} | {trials} | {epochs} | {whole} | {best} |"
        )
    seeds = max(one["searches"] for one in entry["entries"])
    (metric,) = entry["target"]
    return "\n".join(
        [
            *lines,
            "",
            f"Recipe `{entry['recipe'].removesuffix('.yaml')}` with "
            f"{', '.join(entry['changes']) or 'no changes'}; target: {metric} "
            f"{entry['target'][metric]:g} within {entry['trials']} trials (double: "
            f"{2 * entry['trials']}). Medians over the searches of {seeds} seeds that reached it "
            f"(`python benchmarks/search_to_target.py`). {entry['hardware']}, at commit "
            f"{entry['commit']}.",
            "",
        ]
    )


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="recipe")
    parser.add_argument("--target", type=float, default=TARGET, help="val accuracy to reach")
    parser.add_argument("--trials", type=int, default=TRIALS, help="number of trials")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--set", action="append", help="change the recipe")
    parser.add_argument(
        "--only", nargs="+", choices=list(METHODS), default=list(METHODS), help="methods"
    )
    options = parser.parse_args()
    options.set = CHANGES if options.set is None else options.set
    options.work.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="target-", dir=options.work))
    os.environ["TESSERA_HOME"] = str(scratch / "home")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from pipelines.data.packing import pack
    from pipelines.workflows import services

    try:
        pack.pack("digits", scratch / "digits")
        space = scratch / "space.yaml"
        space.write_text(SPACE)
        searches = []
        with services.joined(Context.from_environment()):
            for seed in range(options.seeds):
                for method in options.only:
                    searches.append(search(scratch / "digits", method, seed, options, space))
    finally:
        shutil.rmtree(scratch)
    entries = summary(searches, options.only)
    heads = ["", "reached", "seconds", "trials", "epochs", "total, s", "total epochs", "best"]
    print(table(heads, rows(entries)))
    entry = {
        **machine("torch", "ray", "optuna", "mlflow"),
        "recipe": options.recipe.name,
        "changes": options.set,
        "target": {f"val/{METRIC}": options.target},
        "trials": options.trials,
        "space": SPACE.splitlines(),
        "entries": entries,
        "searches": searches,
    }
    print(record(options.results, "search_to_target", entry))
    if options.results == RESULTS and options.only == list(METHODS):
        write_measured("searches", markdown(entry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
