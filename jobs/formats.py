"""`tessera formats`: lists what can be packed."""

from __future__ import annotations

import json
import re

import click

from jobs.cli import run
from jobs.shared.terminal import show_next

GROUP = "data"


@click.command(short_help="List the data set formats that pack reads.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def command(as_json: bool) -> None:
    """List the formats of data sets that `tessera pack` reads, with their options."""
    from pipelines.data import importers

    known = [importers.get(name) for name in importers.names()]
    if as_json:
        rows = [
            {"format": each.NAME, "about": _about(each), "options": dict(each.OPTIONS)}
            for each in known
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    for each in known:
        click.echo(f"{each.NAME:<15} {_about(each)}")
        for name, text in each.OPTIONS.items():
            click.echo(f"{'':<15} --option {name}=…  {text}")
    show_next("pack", "SOURCE", "--to", "DIR")


def _about(importer: object) -> str:
    """The first paragraph of the importer's docstring, on one line."""
    words = (importer.__doc__ or "").partition("\n\n")[0]
    return re.sub(r"\s+", " ", words).strip()


if __name__ == "__main__":
    run(command, "tessera formats")
