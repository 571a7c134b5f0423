"""`tessera tune`: a search over a family's settings, a training for each trial."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run as run_command
from jobs.shared import completion
from jobs.shared.settings_options import SettingsCommand, settings_options
from pipelines.workflows.context import Context

if TYPE_CHECKING:
    from pipelines.recipe import Recipe
    from pipelines.search.trials import Trial
    from pipelines.workflows.search_board import SearchSpec

SEARCHES = ("random", "optuna", "grid")
SCHEDULERS = ("asha", "pbt", "none")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


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
    "--trials", type=click.IntRange(min=1), default=20, show_default=True, help="Number of trials."
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
    default="asha",
    show_default=True,
    help="How weak trials are stopped early.",
)
@click.option(
    "--space", metavar="FILE", help="Search space as a YAML file; by default the family's."
)
@click.option("--budget", metavar="TIME", help="Stop after this long, such as 30m or 2h.")
@click.option("--grace", type=click.IntRange(min=1), help="Epochs before a trial may be stopped.")
@click.option(
    "--reduction",
    type=click.FloatRange(min=1, min_open=True),
    default=3.0,
    show_default=True,
    help="ASHA keeps one of this many trials at each rung.",
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
@click.option("--experiment", default="tessera", show_default=True, help="MLflow experiment.")
@click.option("--resume", metavar="SEARCH", help="Resume this search.")
@click.option("--verbose", is_flag=True, help="Show Ray's output, and tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    what: str | None,
    data: str | None,
    trials: int,
    workers: int,
    kind: str,
    scheduler: str,
    space: str | None,
    budget: str | None,
    grace: int | None,
    reduction: float,
    interval: int | None,
    overrides: tuple[str, ...],
    variant: str | None,
    seed: int,
    refit: bool,
    model: str | None,
    experiment: str,
    resume: str | None,
    verbose: bool,
    as_json: bool,
) -> int:
    """Search the settings of a family or a recipe for the best metric on the val split.

    Each trial is a training, with a run in MLflow below the run of the search.
    """
    from models.core.errors import UsageError
    from pipelines import recipe as recipes
    from pipelines.search import space as search_space
    from pipelines.workflows import search_board, tune
    from pipelines.workflows.tune import _ask, _refit

    context = Context.from_environment()
    if resume:
        if what or data:
            raise UsageError("--resume takes what the search was begun with", hint="leave it out")
        spec = search_board.find(context, resume)
    else:
        search_space.check_choices(kind, scheduler)
        changes = {**dict(map(recipes.parse_override, overrides)), "workers.count": workers}
        spec = _ask(
            context,
            _choose(context, what, variant, data, changes),
            space=Path(space) if space else None,
            search=kind,
            scheduler=scheduler,
            trials=trials,
            seed=seed,
            experiment=experiment,
            grace=grace,
            reduction=reduction,
            interval=interval,
            fixed=changes,
            budget_seconds=_seconds(budget) if budget else None,
        )
    recipe = recipes.build(json.loads(spec.recipe))
    facts = tune.run(context, spec, recipe, restore=bool(resume), verbose=verbose, quiet=as_json)
    if refit:
        made = _refit(
            context, spec, recipe, facts["winner"], model=model, verbose=verbose, quiet=as_json
        )
        facts["model"] = f"models:/{made.version.name}/{made.version.number}"
        facts["refit"] = dict(made.metrics)
    _show(spec, recipe, facts, as_json)
    return 0


def _choose(
    context: Context,
    what: str | None,
    variant: str | None,
    data: str | None,
    changes: dict[str, Any],
) -> Recipe:
    from models.core.errors import UsageError
    from pipelines.workflows import train

    if not what:
        raise UsageError(
            "nothing to search for", hint="name a family or a recipe: tessera families"
        )
    return train.make_recipe(what, data, variant, changes)


def _seconds(text: str) -> float:
    from models.core.errors import UsageError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or not float(found[1]):
        raise UsageError(f"--budget {text}", hint="give a time like 90s, 30m or 2h")
    return float(found[1]) * SECONDS[found[2]]


def _show(spec: SearchSpec, recipe: Recipe, facts: Mapping[str, Any], as_json: bool) -> None:
    import models
    from jobs.shared.terminal import show_facts, show_json, show_next
    from pipelines.workflows import search_board, services

    metric = models.get(recipe.family).task.primary
    trials: list[Trial] = facts["trials"]
    best: Trial = facts["winner"]
    if as_json:
        plain = {**facts, "winner": vars(best), "trials": [vars(t) for t in trials]}
        show_json(plain)
        return
    click.echo(f"\ntrial  status    epochs  val {metric.name:<12}  settings")
    for trial in trials:
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        click.echo(
            f"{trial.number:>5}  {trial.status:<8}  {len(trial.curve):>6}  {value:<16}  "
            f"{search_board.settings_text(trial.settings)}"
        )
    click.echo()
    shown = {
        "search": spec.name,
        "winner": f"trial {best.number}: val {metric.name} {best.value:.4f}",
        "settings": search_board.settings_text(best.settings),
        "recipe": str(spec.folder / "winner.yaml"),
        "page": services.page(facts["page"]),
    }
    if "model" in facts:
        shown["refit"] = f"val {metric.name} {facts['refit'][metric.name]:.4f}"
        shown["model"] = facts["model"]
    show_facts(shown)
    if "model" in facts:
        show_next(f"tessera evaluate {facts['model'].removeprefix('models:/')} --data DIR")
    else:
        show_next(f"tessera train {shown['recipe']} --data DIR")


if __name__ == "__main__":
    run_command(command, "tessera tune")
