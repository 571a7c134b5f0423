"""`tessera describe FAMILY`: its variants, and every setting with type, default and meaning."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run
from jobs.shared import completion

if TYPE_CHECKING:
    from pipelines.workflows.describe import FamilyDescription

GROUP = "training"


@click.command(short_help="Show the variants and all settings of a family.")
@click.argument("family", metavar="FAMILY", shell_complete=completion.families)
@click.option(
    "--variant",
    default="base",
    show_default=True,
    shell_complete=completion.variants,
    help="Variant whose defaults are shown.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the description as JSON.")
def command(family: str, variant: str, as_json: bool) -> None:
    """Show the variants of FAMILY and every setting of its recipe.

    Each setting has the path that `--set` takes, its default, its type and what it does.
    """
    from dataclasses import asdict

    from jobs.shared.terminal import show_json, show_next
    from pipelines.workflows.describe import describe

    description = describe(family, variant)
    if as_json:
        show_json(asdict(description))
    else:
        _show(description)
        show_next(f"tessera train {family} --data DIR --set PATH=VALUE")


def _show(description: FamilyDescription) -> None:
    from pipelines.workflows.describe import SECTIONS

    click.echo(f"{description.family}: {description.about}")
    click.echo(
        f"task: {description.task.replace('_', ' ')}, reads {description.reads.replace('_', ' ')}\n"
    )
    click.echo("Variants:")
    for variant in description.variants:
        changes = ", ".join(f"{path}={_text(value)}" for path, value in variant.changes.items())
        mark = " (shown below)" if variant.name == description.variant else ""
        click.echo(_wrapped(f"{variant.name}{mark}: {changes or 'the defaults'}", "  "))
    for section, heading in SECTIONS.items():
        settings = [one for one in description.settings if one.section == section]
        if settings:
            click.echo(f"\n{heading}:")
        for one in settings:
            click.echo(f"  {one.path} = {_text(one.default)}  [{one.type}]")
            if one.help:
                click.echo(_wrapped(one.help, "      "))


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _wrapped(text: str, indent: str) -> str:
    lines = textwrap.fill(text, 80 - len(indent), break_long_words=False)
    return textwrap.indent(lines, indent)


if __name__ == "__main__":
    run(command, "tessera describe")
