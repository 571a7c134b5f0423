"""A real search over a recipe's settings whose driver is killed and resumed.

The best settings are then trained in full and evaluated on `test`, and compared with the measured
result of the recipe itself. Prints the results, with the runs in MLflow; writes
benchmarks/results/real_search.json and the sentence in docs/reference/measured.md.

    python benchmarks/real_search.py PACKED [--recipe jobs/recipes/mnist.yaml] [--trials 16]
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, ROOT, arguments, machine, record, write_measured

from pipelines.workflows.context import Context

METRIC = "accuracy"


def start_search(arguments: list[str]) -> subprocess.Popen[str]:
    """Starts `tessera tune` as a process with its own cluster."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.tune", *arguments, "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def read_trials(home: Path) -> tuple[str, dict[str, Any]]:
    """The name of the search and its trials by id; empty before the first trial."""
    for file in home.glob("searches/*/trials.json"):
        return file.parent.name, {one["id"]: one for one in json.loads(file.read_text())}
    return "", {}


def finished(trials: dict[str, Any]) -> dict[str, Any]:
    """The trials that have ended."""
    return {i: one for i, one in trials.items() if one["status"] in ("finished", "stopped")}


def run_and_kill(home: Path, arguments: list[str], trials: int) -> tuple[str, dict[str, Any]]:
    """Starts a search and kills its driver when a third of the trials have ended. Returns the name
    of the search and these trials."""
    process = start_search(arguments)
    while len(finished(read_trials(home)[1])) < max(trials // 3, 1):
        if process.poll() is not None:
            raise SystemExit("the search ended before it could be killed")
        time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    name, trials_so_far = read_trials(home)
    return name, finished(trials_so_far)


def mlflow_runs(name: str) -> dict[str, Any]:
    """The number of runs of the search in MLflow, and their statuses."""
    from pipelines.workflows import search_board, services

    parent = services.attach_tracker(
        Context.from_environment(), search_board.find(Context.from_environment(), name).parent
    )
    client = parent._client
    children = client.search_runs(
        [parent.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    )
    trials = [child.data.tags["tessera.trial"] for child in children]
    return {
        "parent": client.get_run(parent.run_id).info.status,
        "children": len(children),
        "trials": len(set(trials)),
        "ended": sorted({child.info.status for child in children}),
    }


def markdown(entry: dict[str, Any]) -> str:
    """The sentence in docs/reference/measured.md."""
    recipe_values = entry["recipe_test"]
    arguments = " ".join(["PACKED", *(f"--set {change}" for change in entry["changes"])])
    text = (
        f"A search of {entry['trials']} trials around the recipe "
        f"`{entry['recipe'].removesuffix('.yaml')}` was killed with SIGKILL after "
        f"{entry['ended_before_the_kill']} of them and resumed. With `--refit` it reached a test "
        f"accuracy of {entry['refit_test'][METRIC]:.4f}; the recipe itself reaches "
        f"{statistics.mean(recipe_values):.4f}, the mean of {len(recipe_values)} seeds (`python "
        f"benchmarks/real_search.py {arguments}`, PACKED is the packed data; "
        f"{entry['hardware']}, at commit {entry['commit']}, {entry['seconds'] / 60:.0f} minutes)."
    )
    return "\n".join(
        [*textwrap.wrap(text, 100, break_on_hyphens=False, break_long_words=False), ""]
    )


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("packed", type=Path, help="the packed data set")
    parser.add_argument(
        "--recipe", type=Path, default=ROOT / "jobs/recipes/mnist.yaml", help="recipe"
    )
    parser.add_argument("--trials", type=int, default=16, help="number of trials")
    parser.add_argument(
        "--space", type=Path, default=Path(__file__).with_suffix(".yaml"), help="search space"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="change the recipe"
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / ".tessera"
        os.environ["TESSERA_HOME"] = str(home)
        search_arguments = [str(options.recipe), "--data", str(options.packed.resolve())]
        search_arguments += ["--trials", str(options.trials), "--workers-per-trial", "1"]
        search_arguments += ["--space", str(options.space.resolve())]
        search_arguments += [word for change in options.set for word in ("--set", change)]
        began = time.monotonic()
        name, before = run_and_kill(home, search_arguments, options.trials)
        killed_after = time.monotonic() - began
        resumed = start_search(["--resume", name, "--refit"])
        result = json.loads(resumed.communicate()[0])
        seconds = time.monotonic() - began
        _, trials = read_trials(home)
        kept = all(trials[i]["curve"] == one["curve"] for i, one in before.items())
        runs = mlflow_runs(name)
        from pipelines.workflows.evaluate import evaluate

        evaluation = evaluate(
            result["model"], data=options.packed.resolve(), report=False, intervals=False
        )
    measured = json.loads((options.results / "recipes.json").read_text())
    recipe_values = measured.get(options.recipe.stem, {}).get("values", [])
    reached = evaluation.metrics[METRIC]
    entry = {
        **machine("torch", "ray", "mlflow"),
        "recipe": options.recipe.name,
        "changes": options.set,
        "space": options.space.read_text().splitlines()[1:],
        "trials": len(trials),
        "ended_before_the_kill": len(before),
        "killed_after_seconds": round(killed_after, 1),
        "unchanged_by_the_resume": kept,
        "ends": {
            status: sum(one["status"] == status for one in trials.values())
            for status in sorted({one["status"] for one in trials.values()})
        },
        "mlflow": runs,
        "winner": result["winner"]["settings"],
        "refit_test": evaluation.metrics,
        "recipe_test": recipe_values,
        "at_least_as_good": reached >= statistics.mean(recipe_values) if recipe_values else None,
        "seconds": round(seconds, 1),
    }
    record(options.results, "real_search", entry)
    print(json.dumps(entry, indent=1))
    if options.results == RESULTS and entry["at_least_as_good"]:
        write_measured("real search", markdown(entry))


if __name__ == "__main__":
    main()
