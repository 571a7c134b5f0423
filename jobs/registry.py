"""`tessera registry`: lists the registered models and their versions."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run as run_command
from jobs.shared import completion
from pipelines import tag_names

if TYPE_CHECKING:
    from pipelines.interfaces import Version


GROUP = "models"


@click.command(short_help="List registered models, or delete a version.")
@click.argument(
    "model", metavar="[MODEL]", shell_complete=completion.registered_models, required=False
)
@click.option("--delete", is_flag=True, help="Delete the version that MODEL names.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def command(model: str | None, delete: bool, verbose: bool, as_json: bool) -> int:
    """List the registered models. With MODEL, list its versions: aliases, metrics, verdicts.

    MODEL is NAME for all versions, or NAME/2 or NAME@alias for one.
    """
    from jobs.shared.terminal import show_json, show_next, show_table

    rows = _rows(model, delete=delete)
    if as_json:
        show_json(rows)
    elif rows:
        show_table(rows)
        show_next("lineage", "MODEL")
    else:
        click.echo("no model is registered yet; train one: tessera train FAMILY --data DIR")
    return 0


def _rows(model: str | None, *, delete: bool) -> list[dict[str, Any]]:
    """The rows of the list; deletes the version before that with `delete`."""
    from models.core.errors import UsageError
    from pipelines.promotion import gate
    from pipelines.workflows import model_reference, services
    from pipelines.workflows.context import Context

    named = model_reference.parse(model) if model else None
    one_version = named is not None and bool(named.alias or named.number)
    if delete and not one_version:
        raise UsageError(
            "--delete needs a version",
            hint=f"tessera registry {shlex.quote((model or 'MODEL') + '/1')} --delete",
        )
    context = Context.from_environment()
    if named is None and not services.has_registry(context):
        return []
    registry = services.open_registry(context)
    if named is None:
        return [summary(name, registry.versions(name)) for name in registry.names()]
    version = named.resolve(registry)
    if delete:
        gate.delete(registry, version.name, version.number)
        click.echo(f"version {version.number} of {version.name} is deleted", err=True)
    elif one_version:
        return [row(version)]
    return [row(one) for one in reversed(registry.versions(version.name))]


def summary(name: str, versions: list[Version]) -> dict[str, Any]:
    """The row of a model."""
    held = {alias: version.number for version in versions for alias in version.aliases}
    newest = versions[-1] if versions else None
    return {
        "model": name,
        "versions": len(versions),
        "champion": held.get("champion"),
        "challenger": held.get("challenger"),
        "family": newest.tags.get(tag_names.FAMILY) if newest else None,
        "data": newest.tags.get(tag_names.DATA_NAME) if newest else None,
    }


def row(version: Version) -> dict[str, Any]:
    """The row of a version."""
    from pipelines.promotion import gate

    evaluation = gate.evaluation_of(version)
    primary = _primary(version)
    val = _json(version.tags.get(tag_names.METRICS, "")).get(f"val/{primary}")
    test = evaluation.metrics.get(primary) if evaluation else None
    verdict = _json(version.tags.get(tag_names.VERDICT, ""))
    reasons = "; ".join(verdict.get("reasons", ()))
    word = ("promoted" if verdict.get("passed") else "refused") if verdict else ""
    return {
        "version": version.number,
        "aliases": ", ".join(version.aliases),
        "family": version.tags.get(tag_names.FAMILY),
        "metric": primary,
        "val": None if val is None else f"{val:.4f}",
        "test": None if test is None else f"{test:.4f}",
        "run": version.tags.get(tag_names.RUN),
        "verdict": f"{word}: {reasons}" if word else None,
    }


def _primary(version: Version) -> str:
    """Name of the version's primary metric; empty for an unknown family."""
    import models
    from models.core.errors import TesseraError

    if chosen := _json(version.tags.get(tag_names.RECIPE, "")).get("primary_metric"):
        return str(chosen)
    try:
        return models.get(version.tags.get(tag_names.FAMILY, "")).task.primary.name
    except TesseraError:  # a family that isn't installed here
        return ""


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


if __name__ == "__main__":
    run_command(command, "tessera registry")
