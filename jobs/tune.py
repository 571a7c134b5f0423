"""`tessera tune`: searches the settings of a family or a recipe, with a training per trial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run as run_command
from jobs.shared import completion
from jobs.shared.settings_options import (
    SettingsCommand,
    refuse_with_resume,
    settings_options,
)
from jobs.shared.storage_option import settings_with, storage_option

if TYPE_CHECKING:
    from pipelines.workflows.tune import SearchResult

SEARCHES = ("random", "optuna", "grid")
SCHEDULERS = ("asha", "pbt", "none")


GROUP = "training"


@click.command(cls=SettingsCommand, short_help="Search the settings of a family or a recipe.")
@click.argument(
    "what", metavar="FAMILY|RECIPE", required=False, shell_complete=completion.families_and_recipes
)
@click.option(
    "--data",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Packed data set: a folder or an address.",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    help="Number of trials, by default 20; a grid has one for each combination.",
)
@click.option(
    "--workers-per-trial",
    "workers",
    type=click.IntRange(min=0),
    default=1,
    help="Data-parallel workers of a trial; 0 trains in its own process.",
)
@click.option(
    "--search",
    "kind",
    type=click.Choice(SEARCHES),
    default="random",
    show_default=True,
    help="How settings are chosen.",
)
@click.option(
    "--scheduler",
    type=click.Choice(SCHEDULERS),
    help="How weak trials are stopped early; by default asha.",
)
@click.option(
    "--space", metavar="FILE", help="Search space as a YAML file; by default the family's."
)
@click.option("--budget", metavar="TIME", help="Stop after this long, such as 30m or 2h.")
@click.option("--grace", type=click.IntRange(min=1), help="Epochs before a trial may be stopped.")
@click.option(
    "--reduction",
    type=click.FloatRange(min=1, min_open=True),
    help="ASHA keeps one of this many trials at each rung; by default 3.",
)
@click.option("--interval", type=click.IntRange(min=1), help="Epochs of a generation of PBT.")
@settings_options
@click.option(
    "--variant",
    shell_complete=completion.variants,
    help="Variant of the family, such as tiny or base.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of the search.")
@click.option(
    "--refit", is_flag=True, help="Train the best settings in full and register the model."
)
@click.option("--model", help="Name in the registry; by default the data set's.")
@click.option(
    "--run",
    metavar="NAME",
    help="Name of the search. Repeated, the command resumes it, or prints the result if it is "
    "finished.",
)
@click.option("--experiment", default="tessera", show_default=True, help="MLflow experiment.")
@click.option("--resume", metavar="SEARCH", help="Resume this search.")
@storage_option
@click.option("--verbose", is_flag=True, help="Show Ray's output, and tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    what: str | None,
    data: str | None,
    trials: int | None,
    workers: int,
    kind: str,
    scheduler: str | None,
    space: str | None,
    budget: str | None,
    grace: int | None,
    reduction: float | None,
    interval: int | None,
    overrides: tuple[str, ...],
    variant: str | None,
    seed: int,
    refit: bool,
    model: str | None,
    run: str | None,
    experiment: str,
    resume: str | None,
    storage: str | None,
    verbose: bool,
    as_json: bool,
) -> int:
    """Search the settings of a family or a recipe for the best metric on the val split.

    Each trial is a training, with a run in MLflow below the run of the search.
    """
    from models.core.errors import UsageError
    from pipelines import recipe as recipes
    from pipelines.workflows import tune

    context = settings_with(storage)
    if resume:
        refuse_with_resume(
            "the recipe, the space and the settings of the search",
            ("refit", "model", "storage", "verbose", "as_json"),
        )
        result = tune.resume(
            resume,
            refit=refit,
            model=model,
            verbose=verbose,
            progress=not as_json,
            context=context,
        )
        return _show(result, as_json)
    if not what:
        raise UsageError(
            "nothing to search for", hint="name a family or a recipe: tessera families"
        )
    result = tune.tune(
        what,
        data=data,
        variant=variant,
        set=dict(map(recipes.parse_override, overrides)),
        trials=trials,
        workers_per_trial=workers,
        search=kind,
        scheduler=scheduler,
        space=space,
        budget=budget,
        grace=grace,
        reduction=reduction,
        interval=interval,
        seed=seed,
        refit=refit,
        model=model,
        run=run,
        experiment=experiment,
        verbose=verbose,
        progress=not as_json,
        context=context,
    )
    return _show(result, as_json)


def _show(result: SearchResult, as_json: bool) -> int:
    from jobs.shared.terminal import show_facts, show_json, show_next
    from pipelines.workflows import services
    from pipelines.workflows.context import Context
    from pipelines.workflows.search_board import settings_text

    best, outcome = result.winner, result.outcome
    registered = f"models:/{outcome.version.name}/{outcome.version.number}" if outcome else ""
    if as_json:
        facts: dict[str, Any] = {
            "search": result.name,
            "winner": vars(best),
            "trials": [vars(trial) for trial in result.trials],
            "page": result.page,
        }
        if outcome:
            facts |= {"model": registered, "refit": dict(outcome.metrics)}
        show_json(facts)
        return 0
    click.echo(f"\ntrial  status    epochs  val {result.metric:<12}  settings")
    for trial in result.trials:
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        click.echo(
            f"{trial.number:>5}  {trial.status:<8}  {len(trial.curve):>6}  {value:<16}  "
            f"{settings_text(trial.settings)}"
        )
    click.echo()
    shown = {
        "search": result.name,
        "winner": f"trial {best.number}: val {result.metric} {best.value:.4f}",
        "settings": settings_text(best.settings),
        "recipe": str(result.recipe),
        "page": services.page(Context.from_environment(), result.page),
    }
    if outcome:
        shown["refit"] = f"val {result.metric} {outcome.metrics[result.metric]:.4f}"
        shown["model"] = registered
    show_facts(shown)
    if outcome:
        show_next("evaluate", registered.removeprefix("models:/"), "--data", "DIR")
    else:
        show_next("train", result.recipe, "--data", "DIR")
    return 0


if __name__ == "__main__":
    run_command(command, "tessera tune")
