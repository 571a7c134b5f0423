"""`tessera families`: lists what can be trained."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from jobs.cli import run

GROUP = "training"


@click.command(short_help="List the model families and the measured recipes.")
@click.option("--recipes", is_flag=True, help="List the measured recipes instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def command(recipes: bool, as_json: bool) -> None:
    """List the model families with their tasks and variants, or the measured recipes.

    A recipe is trained by its name: tessera train digits --data DIR. Its settings are those that
    gave the listed results on the test split of its data set.
    """
    import models
    from jobs.shared.terminal import show_next

    if recipes:
        _show_recipes(as_json)
        return

    rows: list[dict[str, Any]] = [
        {
            "family": name,
            "task": family.task.name,
            "reads": family.task.reads,
            "variants": list(family.variants),
            "about": (sys.modules[type(family).__module__].__doc__ or "").strip().splitlines()[0],
        }
        for name in models.names()
        for family in [models.get(name)]
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    width = max(len(row["family"]) for row in rows)
    tasks = dict.fromkeys(row["task"] for row in rows)
    for task in tasks:
        fitting = [row for row in rows if row["task"] == task]
        reads = fitting[0]["reads"].replace("_", " ")
        data = "any images" if reads == "images" else f"data of {reads}"
        click.echo(f"{task.replace('_', ' ')}: {data}")
        for row in fitting:
            click.echo(f"  {row['family']:<{width}}  {row['about']}")
            click.echo(f"  {'':<{width}}  variants: {', '.join(row['variants'])}")
    show_next("describe", "FAMILY")


def _show_recipes(as_json: bool) -> None:
    from jobs.shared.terminal import show_json, show_next, show_table
    from pipelines.workflows import packaged_recipes

    rows = [
        {
            "recipe": recipe.name,
            "family": recipe.family,
            "data": recipe.data,
            "result": recipe.result,
            "training": recipe.duration,
        }
        for recipe in map(packaged_recipes.find, packaged_recipes.names())
    ]
    if as_json:
        show_json(rows)
    else:
        show_table(rows)
        show_next("train", "RECIPE", "--data", "DIR")


if __name__ == "__main__":
    run(command, "tessera families")
