"""How soon a search comes to a figure: ASHA, Optuna with ASHA, a population, and random search with
the same and with double the trials.

All search the same space of the measured recipe of the digits, by its figure on `val`, with the same
seeds, in turns in one run on one cluster. What a way is given are trials; a trial that is stopped
early costs less, so the epochs that were trained are told beside the time. A way that didn't come to
the target within its trials has no time for that seed. Prints a table, writes
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
FIGURE = "accuracy"
TARGET = 0.985
CHANGES = ["train.epochs=9"]
"""Of the recipe, so that all five ways and seeds are no matter of hours."""
TRIALS = 8
SPACE = """\
optim.model.lr: {log_uniform: [1e-4, 1]}
optim.model.weight_decay: {log_uniform: [1e-5, 1e-2]}
augment.label_smoothing: {uniform: [0, 0.2]}
model.dropout: {uniform: [0, 0.5]}
"""
"""Settings that a population may change in mid-training: all ways search the same."""
WAYS: dict[str, tuple[dict[str, str], int]] = {
    "random": ({"scheduler": "none"}, 1),
    "random, double": ({"scheduler": "none"}, 2),
    "asha": ({"scheduler": "asha"}, 1),
    "optuna, asha": ({"search": "optuna", "scheduler": "asha"}, 1),
    "pbt": ({"scheduler": "pbt"}, 1),
}
"""Of each: arguments of `tune`, and the factor on the number of trials."""


def search(data: Path, way: str, seed: int, options: Any, space: Path) -> dict[str, Any]:
    """One search; how long it took to the target, and what it came to."""
    from pipelines import recipe as recipes
    from pipelines.workflows.tune import tune

    how, times = WAYS[way]
    began = time.time()
    result = tune(
        options.recipe,
        data=data,
        space=space,
        trials=options.trials * times,
        seed=seed,
        workers_per_trial=0,
        set={"seed": seed, **dict(map(recipes.parse_override, options.set))},
        progress=False,
        **how,
    )
    seconds = time.time() - began
    trials = result.folder / "trials"
    return {
        "way": way,
        "seed": seed,
        "best": result.winner.value,
        "seconds": seconds,
        **to_target(records(trials), options.target, began),
    }


def records(trials: Path) -> list[list[tuple[float, float | None]]]:
    """Of each trial every event's time, and the figure where it has one."""
    from pipelines.tracking.events import read_events

    return [
        [
            (event["time_ms"] / 1000, event.get("values", {}).get(f"val/{FIGURE}"))
            for event, _ in read_events(spool)
        ]
        for spool in sorted(trials.glob("*/events.jsonl"))
    ]


def to_target(
    trials: Sequence[Sequence[tuple[float, float | None]]], target: float, began: float
) -> dict[str, Any]:
    """Seconds, trials begun and epochs trained until a trial had the target, and epochs in all."""
    epochs = sorted((at, value) for trial in trials for at, value in trial if value is not None)
    reached = next((at for at, value in epochs if value >= target), None)
    found: dict[str, Any] = {"epochs": len(epochs), "to_target": None}
    if reached is not None:
        found["to_target"] = {
            "seconds": reached - began,
            "trials": sum(min(at for at, _ in trial) <= reached for trial in trials if trial),
            "epochs": sum(at <= reached for at, _ in epochs),
        }
    return found


def summary(searches: list[dict[str, Any]], ways: Sequence[str]) -> list[dict[str, Any]]:
    """Of each way: how many seeds came to the target, and the medians of those that did."""
    found = []
    for way in ways:
        own = [one for one in searches if one["way"] == way]
        came = [one["to_target"] for one in own if one["to_target"]]
        medians = {
            unit: statistics.median(one[unit] for one in came) if came else None
            for unit in ("seconds", "trials", "epochs")
        }
        found.append(
            {
                "way": way,
                "searches": len(own),
                "reached": len(came),
                "to_target": medians,
                "best": statistics.median(one["best"] for one in own),
                "seconds": statistics.median(one["seconds"] for one in own),
                "epochs": statistics.median(one["epochs"] for one in own),
            }
        )
    return found


def rows(entries: list[dict[str, Any]]) -> list[list[str]]:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}"

    return [
        [
            entry["way"],
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
        "| | reached the target | seconds | trials started | epochs trained | whole search, seconds "
        "| best |"
    )
    lines = [heads, "|---|---|---|---|---|---|---|"]
    for way, reached, seconds, trials, epochs, whole, _, best in rows(entry["entries"]):
        lines.append(f"| {way} | {reached} | {seconds} | {trials} | {epochs} | {whole} | {best} |")
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
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--target", type=float, default=TARGET, help="val accuracy")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", help="change the recipe")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
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
                for way in options.only:
                    searches.append(search(scratch / "digits", way, seed, options, space))
    finally:
        shutil.rmtree(scratch)
    entries = summary(searches, options.only)
    heads = ["", "reached", "seconds", "trials", "epochs", "in all, s", "epochs", "best"]
    print(table(heads, rows(entries)))
    entry = {
        **machine("torch", "ray", "optuna", "mlflow"),
        "recipe": options.recipe.name,
        "changes": options.set,
        "target": {f"val/{FIGURE}": options.target},
        "trials": options.trials,
        "space": SPACE.splitlines(),
        "entries": entries,
        "searches": searches,
    }
    print(record(options.results, "search_to_target", entry))
    if options.results == RESULTS and options.only == list(WAYS):
        write_measured("searches", markdown(entry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
