"""`tessera train`: a family on a packed data set, data-parallel, tracked, registered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run as run_command
from pipelines.workflows.context import Context
from pipelines.workflows.train import _ask, _resume, changes_of, check_data, choose, settle, start

if TYPE_CHECKING:
    from pipelines.recipe import Recipe
    from pipelines.training.driver import Outcome


GROUP = "training"


@click.command(short_help="Train a family or a recipe and register the best checkpoint.")
@click.argument("what", metavar="FAMILY|RECIPE.yaml", required=False)
@click.option("--data", "data", metavar="DIR", help="A packed data set.")
@click.option("--variant", help="A variant of the family.")
@click.option("--workers", type=int, help="Data-parallel workers; 0 trains in this process.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe.")
@click.option("--model", help="Name in the registry; by default the data set's name.")
@click.option("--experiment", default="tessera", show_default=True, help="MLflow experiment.")
@click.option("--resume", metavar="RUN", help="Go on with this run, by name or MLflow run id.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained, and do nothing.")
@click.option("--verbose", is_flag=True, help="Show Ray's own output, and tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def command(
    what: str | None,
    data: str | None,
    variant: str | None,
    workers: int | None,
    overrides: tuple[str, ...],
    model: str | None,
    experiment: str,
    resume: str | None,
    dry_run: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Train a family, or a recipe, and register the best checkpoint as `challenger`."""
    from models.core.errors import UsageError

    context = Context.from_environment()
    changes = changes_of(overrides, workers)
    if resume:
        if what or variant or model:
            raise UsageError("--resume takes the recipe of the run it resumes", hint="leave it out")
        return _finish(
            _resume(context, resume, changes, data, experiment, verbose, as_json), as_json
        )
    if not what:
        raise UsageError("nothing to train", hint="name a family or a recipe: tessera families")
    recipe = choose(context, what, variant, data, changes)
    if dry_run:
        _describe(recipe, as_json)
        return 0
    outcome = start(
        context, recipe, model=model, experiment=experiment, verbose=verbose, quiet=as_json
    )
    return _finish(outcome, as_json)


def check(parameters: Mapping[str, Any]) -> None:
    """Refuses, before it is submitted, a training that can't begin: parameters of `command`.

    Data that only the cluster's machines see is looked at by the job itself.
    """
    from models.core.errors import TesseraError
    from pipelines.data import card as cards

    if parameters["resume"] or not parameters["what"]:
        return
    changes = changes_of(parameters["overrides"], parameters["workers"])
    recipe = _ask(parameters["what"], parameters["variant"], parameters["data"], changes)
    where = recipe.data.path
    if "://" not in where and not Path(where).exists():
        return
    try:
        cards.read(where)
    except TesseraError:
        if "://" in where:  # the credentials may be the cluster's
            return
        raise
    check_data(settle(Context.from_environment(), recipe))


def _describe(recipe: Recipe, as_json: bool) -> None:
    import yaml

    from jobs.shared.terminal import show_facts, show_json
    from pipelines.training.inputs import seen_of

    card = check_data(recipe)
    data = seen_of(recipe, card)
    samples = card.split("train").samples
    steps = -(-samples // recipe.train.batch_size)
    plan = {
        "data": f"{card.name}: {samples:,} training images of {' x '.join(map(str, data.shape))}",
        "steps": f"{steps * recipe.train.epochs:,} ({steps:,} an epoch, {recipe.train.epochs} epochs)",
        "workers": recipe.workers.count,
    }
    if as_json:
        show_json({"recipe": recipe.model_dump(mode="json"), "plan": plan})
        return
    click.echo(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    show_facts(plan)


def _finish(outcome: Outcome, as_json: bool) -> int:
    from jobs.shared.terminal import show_facts, show_json

    facts: dict[str, Any] = {
        "run": outcome.run.name,
        "model": f"models:/{outcome.version.name}/{outcome.version.number}",
        "aliases": ", ".join(outcome.version.aliases),
        **{f"val {name}": round(value, 4) for name, value in outcome.metrics.items()},
        "images/s": round(outcome.images_per_second),
        "page": outcome.link,
    }
    if outcome.failed_events:
        facts["failed_events"] = f"{outcome.failed_events} events wait in {outcome.run.event_log}"
    if as_json:
        show_json(facts)
    else:
        show_facts(facts)
    return 0


if __name__ == "__main__":
    run_command(command, "tessera train")
