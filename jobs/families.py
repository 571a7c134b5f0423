"""`tessera families`: what can be trained."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from jobs.cli import run


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the model families with their tasks and variants."""
    import models

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
    wide = max(len(row["family"]) for row in rows)
    tasks = dict.fromkeys(row["task"] for row in rows)
    for task in tasks:
        fitting = [row for row in rows if row["task"] == task]
        reads = fitting[0]["reads"].replace("_", " ")
        data = "any images" if reads == "images" else f"data of {reads}"
        click.echo(f"{task.replace('_', ' ')}: {data}")
        for row in fitting:
            click.echo(f"  {row['family']:<{wide}}  {row['about']}")
            click.echo(f"  {'':<{wide}}  variants: {', '.join(row['variants'])}")


if __name__ == "__main__":
    run(command, "tessera families")
