"""`tessera formats`: what can be packed."""

from __future__ import annotations

import json
import re

import click

from jobs.cli import run


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the formats of data sets that `tessera pack` reads, with their options."""
    from pipelines.data.packing import pack

    modules = [pack.importer(name) for name in pack.formats()]
    rows = [
        {"format": module.NAME, "about": _first_sentence(module), "options": dict(module.OPTIONS)}
        for module in modules
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        click.echo(f"{row['format']:<15} {row['about']}")
        for name, text in row["options"].items():
            click.echo(f"{'':<15} --option {name}=…  {text}")


def _first_sentence(module: object) -> str:
    """The first paragraph of the importer's own words, on one line."""
    words = (module.__doc__ or "").partition("\n\n")[0]
    return re.sub(r"\s+", " ", words).strip()


if __name__ == "__main__":
    run(command, "tessera formats")
