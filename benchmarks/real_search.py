"""A real search: a recipe's settings, two trials at once, its driver killed in the midst and resumed,
the winner trained in full and evaluated on `test` beside what the recipe itself was measured to.

Prints what MLflow has of it and what came out; writes benchmarks/results/real_search.json and
the sentence in docs/reference/measured.md.

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

FIGURE = "accuracy"


def search(words: list[str]) -> subprocess.Popen[str]:
    """`tessera tune` in a process of its own, with a cluster of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.tune", *words, "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def standing(home: Path) -> tuple[str, dict[str, Any]]:
    """The search's name, and its trials by id; empty before it has any."""
    for file in home.glob("searches/*/trials.json"):
        return file.parent.name, {one["id"]: one for one in json.loads(file.read_text())}
    return "", {}


def over(trials: dict[str, Any]) -> dict[str, Any]:
    return {i: one for i, one in trials.items() if one["status"] in ("finished", "stopped")}


def kill_in_the_midst(home: Path, words: list[str], trials: int) -> tuple[str, dict[str, Any]]:
    """Kills the driver when a third of the trials are over; gives these."""
    process = search(words)
    while len(over(standing(home)[1])) < max(trials // 3, 1):
        if process.poll() is not None:
            raise SystemExit("the search ended before it could be killed")
        time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    name, found = standing(home)
    return name, over(found)


def in_mlflow(name: str) -> dict[str, Any]:
    """How many runs there are of the search, and how they ended."""
    from pipelines.workflows import search_board, services

    parent = services.attach_tracker(
        Context.from_environment(), search_board.find(Context.from_environment(), name).parent
    )
    client = parent._client
    below = client.search_runs(
        [parent.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    )
    trials = [child.data.tags["tessera.trial"] for child in below]
    return {
        "parent": client.get_run(parent.run_id).info.status,
        "children": len(below),
        "trials": len(set(trials)),
        "ended": sorted({child.info.status for child in below}),
    }


def markdown(entry: dict[str, Any]) -> str:
    """The sentence in docs/reference/measured.md."""
    own = entry["recipe_test"]
    words = " ".join(["PACKED", *(f"--set {change}" for change in entry["changes"])])
    text = (
        f"A search of {entry['trials']} trials around the recipe "
        f"`{entry['recipe'].removesuffix('.yaml')}` was killed with SIGKILL after "
        f"{entry['over_before_the_kill']} of them and resumed. With `--refit` it reached a test "
        f"accuracy of {entry['refit_test'][FIGURE]:.4f}; the recipe itself reaches "
        f"{statistics.mean(own):.4f}, the mean of {len(own)} seeds (`python "
        f"benchmarks/real_search.py {words}`, PACKED is the packed data; {entry['hardware']}, at "
        f"commit {entry['commit']}, {entry['seconds'] / 60:.0f} minutes)."
    )
    return "\n".join(
        [*textwrap.wrap(text, 100, break_on_hyphens=False, break_long_words=False), ""]
    )


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("packed", type=Path)
    parser.add_argument("--recipe", type=Path, default=ROOT / "jobs/recipes/mnist.yaml")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--space", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / ".tessera"
        os.environ["TESSERA_HOME"] = str(home)
        words = [str(asked.recipe), "--data", str(asked.packed.resolve())]
        words += ["--trials", str(asked.trials), "--workers-per-trial", "1"]
        words += ["--space", str(asked.space.resolve())]
        words += [word for change in asked.set for word in ("--set", change)]
        began = time.monotonic()
        name, before = kill_in_the_midst(home, words, asked.trials)
        killed_after = time.monotonic() - began
        resumed = search(["--resume", name, "--refit"])
        answer = json.loads(resumed.communicate()[0])
        seconds = time.monotonic() - began
        _, trials = standing(home)
        kept = all(trials[i]["curve"] == one["curve"] for i, one in before.items())
        runs = in_mlflow(name)
        from pipelines.workflows.evaluate import evaluate

        evaluation = evaluate(
            answer["model"], data=asked.packed.resolve(), report=False, intervals=False
        )
    measured = json.loads((asked.results / "recipes.json").read_text())
    own = measured.get(asked.recipe.resolve().relative_to(ROOT).as_posix(), {}).get("values", [])
    reached = evaluation.metrics[FIGURE]
    result = {
        **machine("torch", "ray", "mlflow"),
        "recipe": asked.recipe.name,
        "changes": asked.set,
        "space": asked.space.read_text().splitlines()[1:],
        "trials": len(trials),
        "over_before_the_kill": len(before),
        "killed_after_seconds": round(killed_after, 1),
        "these_are_the_same_after": kept,
        "ends": {
            status: sum(one["status"] == status for one in trials.values())
            for status in sorted({one["status"] for one in trials.values()})
        },
        "mlflow": runs,
        "winner": answer["winner"]["settings"],
        "refit_test": evaluation.metrics,
        "recipe_test": own,
        "at_least_as_good": reached >= statistics.mean(own) if own else None,
        "seconds": round(seconds, 1),
    }
    record(asked.results, "real_search", result)
    print(json.dumps(result, indent=1))
    if asked.results == RESULTS and result["at_least_as_good"]:
        write_measured("real search", markdown(result))


if __name__ == "__main__":
    main()
