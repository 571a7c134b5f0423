"""`make measure`: trains a recipe with several seeds and records its test metrics.

In: a recipe and a packed data set. Out: an entry in `benchmarks/results/recipes.json`, from which
the comment at the top of the recipe and the tables in README and the docs are generated. No number
is typed by hand; reference values come from `benchmarks/results/references.json`.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.cli import run as run_command

RESULTS = Path("benchmarks/results/recipes.json")
REFERENCES = Path("benchmarks/results/references.json")
README = Path("README.md")
MEASURED = Path("docs/reference/measured.md")
RECIPES = Path("jobs/recipes")
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


@click.command()
@click.argument("recipe", required=False)
@click.option("--data", metavar="DIR", help="A packed data set.")
@click.option(
    "--seeds", default=3, show_default=True, help="Number of trainings, with seeds 0, 1, 2, …"
)
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe.")
@click.option("--packed", default="", metavar="COMMAND", help="Command that packed the data.")
@click.option("--readme", is_flag=True, help="Only regenerate the tables and comments.")
def command(
    recipe: str | None,
    data: str | None,
    seeds: int,
    overrides: tuple[str, ...],
    packed: str,
    readme: bool,
) -> int:
    """Measure a recipe on its test split: mean ± standard deviation over seeds."""
    from models.core.errors import UsageError
    from pipelines.storage.base import absolute_location
    from pipelines.workflows import packaged_recipes

    if not readme:
        if not recipe or not data:
            raise UsageError("a recipe and its data are needed", hint="measure RECIPE --data DIR")
        path = packaged_recipes.find(recipe).file
        entry = measure(path, absolute_location(data), seeds, overrides)
        entry["packed"] = packed
        results = read_results()
        results[recipe] = entry
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        click.echo(comment(path, entry))
    write_results()
    return 0


def measure(path: Path, data: str, seeds: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Trains and evaluates the recipe once per seed. Returns its entry of the results."""
    import models
    from pipelines import recipe as recipes
    from pipelines.data import card as cards
    from pipelines.training import hardware
    from pipelines.workflows import used_models
    from pipelines.workflows.context import Context
    from pipelines.workflows.evaluate import evaluate
    from pipelines.workflows.train import train

    context = Context.from_environment()
    changes = dict(recipes.parse_override(text) for text in overrides)
    recipe = recipes.read(path).with_overrides(
        {**changes, "data.path": data, "data.digest": cards.read(data).digest}
    )
    recipe = used_models.pin(context, recipe)
    task = models.get(recipe.family).task
    commit = _git("rev-parse", "--short", "HEAD")  # before the training: it may change meanwhile
    metrics: dict[str, list[float]] = {}
    seconds, speeds = [], []
    for seed in range(seeds):
        began = time.monotonic()
        outcome = train(
            recipe.with_overrides({"seed": seed}), experiment="measured", context=context
        )
        seconds.append(time.monotonic() - began)
        speeds.append(outcome.images_per_second)
        version = outcome.version
        evaluation = evaluate(version, data=data, report=False, intervals=False, context=context)
        for name, value in evaluation.metrics.items():
            metrics.setdefault(name, []).append(value)
        shown = ", ".join(f"{name} {metrics[name][-1]:.4f}" for name in task.headline_metrics)
        click.echo(f"seed {seed}: test {shown} in {seconds[-1]:.0f} s")
    return {
        "family": recipe.family,
        "variant": recipe.variant,
        "task": task.name,
        "data": cards.read(data).name,
        "data_digest": recipe.data.digest,
        "overrides": list(overrides),
        "judge": recipe.judge,
        "metric": f"test {task.primary.name}",
        "values": metrics[task.primary.name],
        "other_metrics": {
            name: metrics[name] for name in task.headline_metrics if name != task.primary.name
        },
        "seconds": [round(s, 1) for s in seconds],
        "images_per_second": [round(s) for s in speeds],
        "workers": recipe.workers.count,
        "hardware": hardware.describe(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "torch": _version("torch"),
        "ray": _version("ray"),
    }


def mean_and_deviation(values: list[float]) -> str:
    """Mean ± sample standard deviation, with four decimals, or with more if the mean would have
    fewer than four digits."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = statistics.mean(values)
    decimals = max(4, 3 - math.floor(math.log10(abs(mean)))) if mean else 4
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}"


def comment(path: Path, entry: dict[str, Any]) -> str:
    """The comment at the top of the recipe."""
    seconds, speeds = entry["seconds"], entry["images_per_second"]
    values = ", ".join(f"{v:.4g}" if abs(v) < 0.1 else f"{v:.4f}" for v in entry["values"])
    lines = [
        f"{train_command(path.stem, entry)}        (DIR: {entry['data']}, packed)",
        *([f"packed by: {entry['packed']}"] if entry.get("packed") else []),
        *([f"judged by: {entry['judge']}"] if entry.get("judge") else []),
        f"{entry['metric']} {mean_and_deviation(entry['values'])} "
        f"over {len(entry['values'])} seeds ({values})",
        *(
            f"{name} {mean_and_deviation(values)}"
            for name, values in entry.get("other_metrics", {}).items()
        ),
        *references(path),
        f"{statistics.mean(seconds):.0f} s a training with {entry['workers']} workers, start-up "
        f"included; {statistics.mean(speeds):,.0f} images/s in it",
        f"{entry['hardware']}; torch {entry['torch']}, ray {entry['ray']}",
        f"measured {entry['date']} at commit {entry['commit']} by: "
        f"make measure RECIPE={path.stem} DATA=DIR",
    ]
    return "".join(f"# {line}\n" for line in lines)


def train_command(recipe: str, entry: dict[str, Any]) -> str:
    changes = "".join(f" --set {text}" for text in entry.get("overrides", ()))
    return f"tessera train {recipe} --data DIR{changes}"


def references(path: Path) -> list[str]:
    """The reference values of a recipe, such as what a simple method reaches."""
    measured = json.loads(REFERENCES.read_text()) if REFERENCES.exists() else {}
    return [f"reference: {text}" for text in measured.get(path.stem, ())]


def body(path: Path) -> str:
    """The recipe without its comment."""
    lines = path.read_text().splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(lines[start:])


def read_results() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return results


def best_results(results: dict[str, Any]) -> dict[str, Any]:
    """README's rows: the best recipe of each task and data set, without the digits, which only the
    demo uses."""
    import models

    best: dict[tuple[str, str], str] = {}
    for recipe, entry in results.items():
        key = (_words(entry), entry["data"])
        primary = models.get(entry["family"]).task.primary
        mean = statistics.mean(entry["values"])
        if key not in best or primary.better(mean, statistics.mean(results[best[key]]["values"])):
            best[key] = recipe
    return {recipe: results[recipe] for (_, data), recipe in best.items() if data != "digits"}


def table(results: dict[str, Any]) -> str:
    """A Markdown table with a row for each recipe."""
    rows = [
        "| family | task | data | on test | a training | command |",
        "|---|---|---|---|---|---|",
    ]
    for recipe, entry in sorted(results.items(), key=_by_task):
        metrics = {
            entry["metric"].removeprefix("test "): entry["values"],
            **entry.get("other_metrics", {}),
        }
        shown = ", ".join(
            f"{name} {mean_and_deviation(values)}" for name, values in metrics.items()
        )
        rows.append(
            f"| `{entry['family']}` | {_words(entry)} | {entry['data']} | {shown} | "
            f"{statistics.mean(entry['seconds']):.0f} s | `{train_command(recipe, entry)}` |"
        )
    machines = sorted({entry["hardware"] for entry in results.values()})
    workers = sorted({entry["workers"] for entry in results.values()})
    counts = " or ".join(map(str, workers))
    seeds = sorted({len(entry["values"]) for entry in results.values()})
    numbers = " or ".join(map(str, seeds))
    end = f"Over {numbers} seeds, with {counts} workers on {'; '.join(machines)}."
    return "\n".join([*rows, "", end, ""])


def _by_task(item: tuple[str, dict[str, Any]]) -> tuple[str, str, str]:
    recipe, entry = item
    return _words(entry), entry["data"], recipe


def _words(entry: dict[str, Any]) -> str:
    task: str = entry.get("task", "classification")
    return task.replace("_", " ")


def write_results() -> None:
    """Writes the comments of the recipes, and the tables between their markers in README and in
    the docs."""
    for recipe, entry in read_results().items():
        if (path := RECIPES / f"{recipe}.yaml").exists():
            path.write_text(comment(path, entry) + body(path))
    results = read_results()
    for page, rows in ((README, best_results(results)), (MEASURED, results)):
        if page.exists():
            before, begin, rest = page.read_text().partition(BEGIN)
            _, end, after = rest.partition(END)
            if begin and end:
                page.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n{END}{after}")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name).split("+")[0]


if __name__ == "__main__":
    run_command(command, "measure")
