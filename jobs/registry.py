"""`tessera registry`: what is registered, and where each version stands."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run as run_command
from pipelines import tag_names

if TYPE_CHECKING:
    from pipelines.interfaces import Version


GROUP = "models"


@click.command(short_help="List registered models, or delete a version.")
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--delete", "number", type=int, metavar="N", help="Remove a version of MODEL.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str | None, number: int | None, verbose: bool, as_json: bool) -> int:
    """Show the registered models; with MODEL its versions: aliases, figures, verdicts."""
    from jobs.shared.terminal import show_json, show_table
    from models.core.errors import TesseraError, UsageError, unknown
    from pipelines.promotion import gate
    from pipelines.workflows import services
    from pipelines.workflows.context import Context

    if number is not None and model is None:
        raise UsageError("--delete goes with a model", hint="tessera registry MODEL --delete N")
    known = services.open_registry(Context.from_environment())
    names = known.names()
    if model is not None:
        if model not in names:
            if not names:
                raise TesseraError("no model is registered yet", hint="train one: tessera train")
            raise unknown("model", model, names)
        if number is not None:
            gate.delete(known, model, number)
            click.echo(f"version {number} of {model} is deleted", err=True)
        rows = [row(version) for version in reversed(known.versions(model))]
    else:
        rows = [summary(name, known.versions(name)) for name in names]
    if as_json:
        show_json(rows)
    elif rows:
        show_table(rows)
    else:
        click.echo("no model is registered yet: tessera train")
    return 0


def summary(name: str, versions: list[Version]) -> dict[str, Any]:
    """One model in a line."""
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
    """One version in a line."""
    from pipelines.promotion import gate

    evaluation = gate.evaluation_of(version)
    primary = _primary(version)
    val = _json(version.tags.get(tag_names.METRICS, "")).get(f"val/{primary}")
    test = evaluation.metrics.get(primary) if evaluation else None
    verdict = _json(version.tags.get(tag_names.VERDICT, ""))
    said = "; ".join(verdict.get("reasons", ()))
    word = ("promoted" if verdict.get("passed") else "refused") if verdict else ""
    return {
        "version": version.number,
        "aliases": ", ".join(version.aliases),
        "family": version.tags.get(tag_names.FAMILY),
        "metric": primary,
        "val": None if val is None else f"{val:.4f}",
        "test": None if test is None else f"{test:.4f}",
        "run": version.tags.get(tag_names.RUN),
        "verdict": f"{word}: {said}" if word else None,
    }


def _primary(version: Version) -> str:
    """Name of the figure by which versions of its family are compared."""
    import models
    from models.core.errors import TesseraError

    try:
        return models.get(version.tags.get(tag_names.FAMILY, "")).task.primary.name
    except TesseraError:  # a family that isn't installed here
        return ""


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    run_command(command, "tessera registry")
