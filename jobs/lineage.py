"""`tessera lineage`: from a registered version back to the bytes it was trained on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run as run_command
from jobs.shared import completion
from pipelines import tag_names
from pipelines.workflows.context import Context

if TYPE_CHECKING:
    from pipelines.interfaces import Version


GROUP = "models"


@click.command(short_help="Show the run, recipe, data and code behind a model.")
@click.argument("model", metavar="MODEL", shell_complete=completion.registered_models)
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the lineage as JSON.")
def command(model: str, verbose: bool, as_json: bool) -> int:
    """Show where MODEL (NAME, NAME/2 or NAME@alias) comes from.

    The lineage has the verdict, the run, the search, the recipe, the data, the code, the libraries
    and the hardware.
    """
    from jobs.shared.terminal import show_facts, show_json, show_next
    from pipelines.workflows import model_reference, services

    context = Context.from_environment()
    version = model_reference.resolve(services.open_registry(context), model)
    found = chain(context, version)
    if as_json:
        show_json(found)
        return 0
    recipe = found.pop("recipe")
    shown = {name: value for name, value in found.items() if value}
    shown["libraries"] = ", ".join(f"{n} {v}" for n, v in found["libraries"].items())
    shown["settings"] = ", ".join(f"{path}={value}" for path, value in sorted(recipe.items()))
    shown["page"] = services.page(found["page"])
    show_facts(shown)
    show_next(f"tessera reproduce {model}")
    return 0


def chain(context: Context, version: Version) -> dict[str, Any]:
    """Every link that is known. Raises TesseraError where the version isn't Tessera's, or its run
    was deleted."""
    from pipelines import recipe as recipes
    from pipelines.promotion import gate
    from pipelines.workflows import services

    digest = services.registered_digest(version)
    tracker = services.attach_tracker(context, version.run_id)
    tags, _ = tracker.tags_and_params()
    verdict = json.loads(version.tags.get(tag_names.VERDICT, "null"))
    evaluation = gate.evaluation_of(version)
    tree = json.loads(version.tags[tag_names.RECIPE])
    recipe = dict(recipes.leaves(tree))
    said = ""
    if verdict:
        word = "promoted" if verdict["passed"] else "refused"
        said = f"{word}: {'; '.join(verdict['reasons'])}"
    return {
        "version": f"models:/{version.name}/{version.number}",
        "aliases": ", ".join(version.aliases),
        "files": f"sha256 {digest}",
        "verdict": said,
        "evaluated": (
            f"{evaluation.samples:,} {evaluation.split} images of data {evaluation.data_digest}"
            if evaluation
            else ""
        ),
        "run": version.tags.get(tag_names.RUN, ""),
        "checkpoint": version.tags.get(tag_names.CHECKPOINT, ""),
        "page": tracker.link(),
        "search": version.tags.get(tag_names.SEARCH, ""),
        "trial": version.tags.get(tag_names.TRIAL, ""),
        "family": f"{tree['family']}, {tree['variant']}",
        "data": f"{version.tags.get(tag_names.DATA_NAME, '')} in {tree['data']['path']}",
        "data digest": version.tags.get(tag_names.DATA_DIGEST, ""),
        "judge": f"{tree['judge']}, sha256 {tree['judge_digest']}" if tree.get("judge") else "",
        "code": tags.get("mlflow.source.git.commit", ""),
        "command": tags.get("mlflow.source.name", ""),
        "by": tags.get("mlflow.user", ""),
        "ray job": tags.get(tag_names.RAY_SUBMISSION) or tags.get(tag_names.RAY_JOB, ""),
        "workers": str(tree["workers"]["count"]),
        "hardware": tags.get(tag_names.HARDWARE, ""),
        "python": tags.get(tag_names.PYTHON, ""),
        "libraries": {
            name.removeprefix(tag_names.LIBRARY_PREFIX): value
            for name, value in sorted(tags.items())
            if name.startswith(tag_names.LIBRARY_PREFIX)
        },
        "recipe": recipe,
    }


if __name__ == "__main__":
    run_command(command, "tessera lineage")
