"""`tessera describe`: the variants and settings of a family, or what a measured recipe changes."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run
from jobs.shared import completion

if TYPE_CHECKING:
    from pipelines.workflows.describe import FamilyDescription, RecipeDescription

GROUP = "training"


@click.command(short_help="Show all settings of a family, or those of a recipe.")
@click.argument("what", metavar="FAMILY|RECIPE", shell_complete=completion.families_and_recipes)
@click.option(
    "--variant",
    show_default="base",
    shell_complete=completion.variants,
    help="Variant whose defaults are shown.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the description as JSON.")
def command(what: str, variant: str | None, as_json: bool) -> None:
    """Show the variants of FAMILY and every setting of its recipe.

    Each setting has the path that `--set` takes, its default, its type and what it does. Of a
    measured RECIPE the settings are shown that differ from its family's, and its results.
    """
    from dataclasses import asdict

    import models
    from jobs.shared.terminal import show_json, show_next
    from pipelines.workflows import packaged_recipes
    from pipelines.workflows.describe import describe, describe_recipe

    if what in models.names() or "." in what:
        description = describe(what, variant or "base")
        if as_json:
            show_json(asdict(description))
        else:
            _show(description)
            show_next("train", what, "--data", "DIR", "--set", "PATH=VALUE")
        return
    packaged_recipes.start(what, variant)
    recipe = describe_recipe(what)
    if as_json:
        show_json(asdict(recipe))
    else:
        _show_recipe(recipe)
        show_next("train", what, "--data", "DIR")


def _show_recipe(recipe: RecipeDescription) -> None:
    click.echo(f"{recipe.recipe}: a measured recipe of the family {recipe.family}")
    click.echo(f"data: {recipe.data}\n{recipe.result}\ntraining: {recipe.duration}")
    click.echo(f"\nSettings that differ from those of {recipe.family} {recipe.variant}:")
    for one in recipe.settings:
        click.echo(f"  {one.path} = {_text(one.value)}  (default {_text(one.default)})")


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
