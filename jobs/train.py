"""`tessera train`: trains a family or a recipe and registers the best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run as run_command
from jobs.shared import completion
from jobs.shared.settings_options import (
    SHORTCUTS,
    SettingsCommand,
    refuse_with_resume,
    settings_options,
)
from jobs.shared.storage_option import settings_with, storage_option

if TYPE_CHECKING:
    from pipelines.training.driver import Outcome
    from pipelines.workflows.train import TrainingPlan


GROUP = "training"


@click.command(
    cls=SettingsCommand, short_help="Train a family or a recipe and register the best checkpoint."
)
@click.argument(
    "what", metavar="FAMILY|RECIPE", required=False, shell_complete=completion.families_and_recipes
)
@click.option(
    "--data",
    "data",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Packed data set: a folder or an address.",
)
@click.option(
    "--variant",
    shell_complete=completion.variants,
    help="Variant of the family, such as tiny or base.",
)
@click.option(
    "--workers",
    metavar="N|MIN:MAX",
    help="Data-parallel workers; 0 trains in this process, 2:8 grows and shrinks with the cluster.",
)
@click.option(
    "--wait",
    "wait_seconds",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Set workers.wait_seconds, the time to wait for machines.",
)
@settings_options
@click.option("--model", help="Name in the registry; by default the data set's.")
@click.option(
    "--run",
    metavar="NAME",
    help="Name of the run. Repeated, the command resumes it, or prints the result if it is "
    "finished.",
)
@click.option("--experiment", default="tessera", show_default=True, help="MLflow experiment.")
@click.option("--resume", metavar="RUN", help="Resume this run, by its name or MLflow run ID.")
@storage_option
@click.option("--dry-run", is_flag=True, help="Check and print what would be trained, and stop.")
@click.option("--verbose", is_flag=True, help="Show Ray's output, and tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    what: str | None,
    data: str | None,
    variant: str | None,
    workers: str | None,
    wait_seconds: float | None,
    overrides: tuple[str, ...],
    model: str | None,
    run: str | None,
    experiment: str,
    resume: str | None,
    storage: str | None,
    dry_run: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Train FAMILY or RECIPE, and register the best checkpoint as `challenger`.

    `tessera families` lists the families. RECIPE is the name of a measured recipe (`tessera
    families --recipes`) or a YAML file.
    """
    from models.core.errors import UsageError
    from pipelines import recipe as recipes
    from pipelines.workflows import train

    changes = dict(map(recipes.parse_override, overrides))
    if wait_seconds is not None:
        changes["workers.wait_seconds"] = wait_seconds
    context = settings_with(storage)
    if resume:
        refuse_with_resume(
            "the recipe and the names of the run",
            (
                *("data", "workers", "wait_seconds", "overrides", *SHORTCUTS),
                *("experiment", "storage", "verbose", "as_json"),
            ),
        )
        outcome = train.resume(
            resume,
            data=data,
            workers=workers,
            set=changes,
            experiment=experiment,
            verbose=verbose,
            progress=not as_json,
            context=context,
        )
        return _show(outcome, as_json, data)
    if not what:
        raise UsageError("nothing to train", hint="name a family or a recipe: tessera families")
    if dry_run:
        plan = train.plan(
            what, data=data, variant=variant, workers=workers, set=changes, context=context
        )
        return _show_plan(plan, as_json)
    outcome = train.train(
        what,
        data=data,
        variant=variant,
        workers=workers,
        set=changes,
        model=model,
        run=run,
        experiment=experiment,
        verbose=verbose,
        progress=not as_json,
        context=context,
    )
    return _show(outcome, as_json, data)


def check(parameters: Mapping[str, Any]) -> None:
    """Refuses a training that can't start, before it is submitted. Takes `command`'s parameters.

    Data that only the cluster's machines can read is checked by the job itself.
    """
    from models.core.errors import TesseraError
    from pipelines import recipe as recipes
    from pipelines.data import card as cards
    from pipelines.training.setup import TrainingSetup, check_ready
    from pipelines.workflows import train, used_models
    from pipelines.workflows.context import Context

    if parameters["resume"] or not parameters["what"]:
        return
    changes: dict[str, Any] = dict(map(recipes.parse_override, parameters["overrides"]))
    if parameters["workers"] is not None:
        changes["workers.count"] = parameters["workers"]
    what, data, variant = parameters["what"], parameters["data"], parameters["variant"]
    where = train.make_recipe(what, data, variant, changes).data.path
    if "://" not in where and not Path(where).exists():
        return
    try:
        card = cards.read(where)
    except TesseraError:
        if "://" in where:  # the credentials may be the cluster's
            return
        raise
    recipe, _ = train.fit_recipe(what, data, variant, changes)
    # The job runs elsewhere: neither this machine's CPUs nor its copy of the weights count.
    setup = TrainingSetup.of(used_models.pin(Context.from_environment(), recipe), card)
    check_ready(setup, check_weights=False)


def _show_plan(plan: TrainingPlan, as_json: bool) -> int:
    import yaml

    from jobs.shared.terminal import show_facts, show_json
    from models.core.errors import hide_passwords

    size = " x ".join(map(str, plan.shape))
    epochs = plan.recipe.train.epochs
    facts = {
        "data": f"{plan.data}: {plan.samples:,} training images of {size}",
        "steps": f"{plan.steps:,} ({plan.steps_per_epoch:,} an epoch, {epochs} epochs)",
        "workers": plan.recipe.workers.count,
    }
    if plan.estimate:
        gib = plan.estimate.memory_bytes / (1 << 30)
        facts["time"] = (
            f"about {_duration(plan.estimate.seconds)}, {plan.estimate.step_seconds:.2g} s a "
            f"step, as tried on this machine ({plan.estimate.device})"
        )
        facts["memory"] = f"about {gib:.2g} GiB a worker, besides libraries and cached images"
    recipe = plan.recipe.model_dump(mode="json")
    if as_json:
        fitted = {one.path: asdict(one) for one in plan.fitted}
        show_json({"recipe": recipe, "plan": facts, "fitted": fitted})
        return 0
    click.echo(hide_passwords(yaml.safe_dump(recipe, sort_keys=False)))
    show_facts(facts)
    if plan.fitted:
        click.echo("\nfitted to the data; --set replaces any of them:")
        show_facts({one.path: f"{one.value}  ({one.reason})" for one in plan.fitted})
    return 0


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit * 1.5:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds:.2g} s"


def _show(outcome: Outcome, as_json: bool, data: str | None) -> int:
    from jobs.shared.terminal import show_facts, show_json, show_next
    from pipelines.workflows import services
    from pipelines.workflows.context import Context

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
        show_facts({**facts, "page": services.page(Context.from_environment(), outcome.link)})
        show_next("evaluate", facts["model"].removeprefix("models:/"), "--data", data or "DIR")
    return 0


if __name__ == "__main__":
    run_command(command, "tessera train")
