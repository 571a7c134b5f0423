"""`tessera families`: what can be trained."""

from __future__ import annotations

import json
import sys

import click

from jobs.cli import run


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the model families with their tasks and variants."""
    import models

    rows = [
        {
            "family": name,
            "task": family.task.name,
            "variants": list(family.variants),
            "about": (sys.modules[type(family).__module__].__doc__ or "").strip().splitlines()[0],
        }
        for name in models.names()
        for family in [models.get(name)]
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        click.echo(f"{row['family']:<12} {row['task']:<16} {row['about']}")
        click.echo(f"{'':<12} variants: {', '.join(row['variants'])}")


if __name__ == "__main__":
    run(command, "tessera families")
