"""`make measure`: trains a recipe with several seeds and writes down what it reached.

In: a recipe and a packed data set. Out: the comment on top of the recipe and an entry in
`benchmarks/results/recipes.json`, from which README's table is made. No figure is typed by hand.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import click

from jobs.cli import run as run_command

RESULTS = Path("benchmarks/results/recipes.json")
README = Path("README.md")
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


@click.command()
@click.argument("recipe", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--data", metavar="DIR", help="A packed data set.")
@click.option("--seeds", default=3, show_default=True, help="Trainings, with seeds 0, 1, 2, …")
@click.option("--readme", is_flag=True, help="Only make README's table again.")
def command(recipe: str | None, data: str | None, seeds: int, readme: bool) -> int:
    """Measure a recipe on its test split, mean ± std over seeds, and write it down."""
    from models.core.errors import UsageError
    from pipelines.data.places import storage

    if not readme:
        if not recipe or not data:
            raise UsageError("a recipe and its data are needed", mend="measure RECIPE --data DIR")
        path = Path(recipe)
        entry = measure(path, storage.absolute(data), seeds)
        results = read_results()
        results[path.as_posix()] = entry
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        path.write_text(comment(path, entry) + body(path))
        click.echo(comment(path, entry))
    write_readme()
    return 0


def measure(path: Path, data: str, seeds: int) -> dict[str, Any]:
    """Trains and evaluates once a seed; every figure that is written down comes from here."""
    import models
    from jobs.evaluate import evaluate
    from jobs.train import start
    from pipelines import recipe as recipes
    from pipelines.data import card as cards

    recipe = recipes.read(path).with_overrides(
        {"data.path": data, "data.digest": cards.read(data).digest}
    )
    primary = models.get(recipe.family).task.primary.name
    commit = _git("rev-parse", "--short", "HEAD")  # now: it may move while this trains
    values, seconds, speeds = [], [], []
    for seed in range(seeds):
        began = time.monotonic()
        outcome = start(recipe.with_overrides({"seed": seed}), experiment="measured")
        seconds.append(time.monotonic() - began)
        speeds.append(outcome.images_per_second)
        version = outcome.version
        _, evaluation = evaluate(f"{version.name}/{version.number}", data)
        values.append(evaluation.figures[primary])
        click.echo(f"seed {seed}: test {primary} {values[-1]:.4f} in {seconds[-1]:.0f} s")
    return {
        "family": recipe.family,
        "variant": recipe.variant,
        "data": cards.read(data).name,
        "data_digest": recipe.data.digest,
        "figure": f"test {primary}",
        "values": values,
        "seconds": [round(s, 1) for s in seconds],
        "images_per_second": [round(s) for s in speeds],
        "workers": recipe.workers.count,
        "hardware": hardware(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "torch": _version("torch"),
        "ray": _version("ray"),
    }


def hardware() -> str:
    """This machine in words."""
    import torch

    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores of {model}, {', '.join(gpus) if gpus else 'no GPU'}"


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def comment(path: Path, entry: dict[str, Any]) -> str:
    """The lines on top of the recipe."""
    seconds, speeds = entry["seconds"], entry["images_per_second"]
    values = ", ".join(f"{v:.4f}" for v in entry["values"])
    lines = [
        f"tessera train {path.as_posix()} --data DIR        (DIR: {entry['data']}, packed)",
        f"{entry['figure']} {spread(entry['values'])} over {len(entry['values'])} seeds ({values})",
        f"{statistics.mean(seconds):.0f} s a training with {entry['workers']} workers, start-up "
        f"included; {statistics.mean(speeds):,.0f} images/s in it",
        f"{entry['hardware']}; torch {entry['torch']}, ray {entry['ray']}",
        f"measured {entry['date']} at commit {entry['commit']} by: "
        f"make measure RECIPE={path.as_posix()} DATA=DIR",
    ]
    return "".join(f"# {line}\n" for line in lines)


def body(path: Path) -> str:
    """The recipe without its comment."""
    lines = path.read_text().splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(lines[start:])


def read_results() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return results


def table(results: dict[str, Any]) -> str:
    """README's table."""
    rows = ["| family | data | test accuracy | a training | command |", "|---|---|---|---|---|"]
    for path, entry in results.items():
        rows.append(
            f"| `{entry['family']}` | {entry['data']} | {spread(entry['values'])} "
            f"({len(entry['values'])} seeds) | {statistics.mean(entry['seconds']):.0f} s | "
            f"`tessera train {path} --data DIR` |"
        )
    where = sorted({entry["hardware"] for entry in results.values()})
    workers = sorted({entry["workers"] for entry in results.values()})
    counts = " or ".join(map(str, workers))
    return "\n".join([*rows, "", f"Measured with {counts} workers on {'; '.join(where)}.", ""])


def write_readme() -> None:
    """Puts the table between its marks."""
    if not README.exists():
        return
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        README.write_text(f"{before}{BEGIN}\n\n{table(read_results())}\n{END}{after}")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name).split("+")[0]


if __name__ == "__main__":
    run_command(command, "tessera measure")
