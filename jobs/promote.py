"""`tessera promote`: makes a version the champion if the policy allows it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from jobs.cli import run as run_command
from jobs.shared import completion

if TYPE_CHECKING:
    from pipelines.workflows.promote import Promotion


GROUP = "models"


@click.command(short_help="Make a model the champion if the policy allows it.")
@click.argument("model", metavar="MODEL", shell_complete=completion.registered_models)
@click.option("--policy", metavar="FILE", help="Policy as a YAML file; by default the task's.")
@click.option("--margin", type=float, help="Override the policy's margin.")
@click.option(
    "--data",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Data set to compare on; by default the one of the evaluation.",
)
@click.option(
    "--workers",
    type=int,
    default=0,
    show_default=True,
    help="Data-parallel workers; 0 evaluates in this process.",
)
@click.option(
    "--to-name", metavar="NAME", help="Copy the champion to another model and promote it there."
)
@click.option(
    "--to-registry", metavar="URI", help="Copy the champion to another MLflow and promote it there."
)
@click.option("--dry-run", is_flag=True, help="Decide, but change nothing.")
@click.option("--verbose", is_flag=True, help="Show Ray's output, and tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def command(
    model: str,
    policy: str | None,
    margin: float | None,
    data: str | None,
    workers: int,
    to_name: str | None,
    to_registry: str | None,
    dry_run: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Make MODEL (NAME, NAME/2 or NAME@alias) the champion of its name, if the policy allows it.

    NAME alone is the newest version. Candidate and champion are evaluated on the same test images
    in one job. The decision is a run in MLflow, with policy, report and verdict. The exit status is
    1 if the candidate is refused.
    """
    from jobs.shared.terminal import show_json
    from pipelines.workflows.promote import promote

    promotion = promote(
        model,
        policy=policy,
        margin=margin,
        data=data,
        workers=workers,
        to_name=to_name,
        to_registry=to_registry,
        dry_run=dry_run,
        verbose=verbose,
    )
    if as_json:
        show_json(asdict(promotion.verdict))
    else:
        show(promotion)
    return 0 if promotion.passed else 1


def show(promotion: Promotion) -> None:
    """Prints a line for each rule, and whether the candidate was promoted."""
    from jobs.shared.terminal import show_next

    model, verdict = promotion.model, promotion.verdict
    for rule in verdict.rules:
        click.echo(
            f"{'pass' if rule.passed else 'FAIL'}  {rule.name}: {rule.candidate}; {rule.other}"
        )
    word = "promoted" if verdict.passed else "refused"
    if promotion.dry_run:
        word = f"would be {word}"
    click.echo(f"version {verdict.candidate} of {model} {word}: {promotion.why}")
    if verdict.passed and not promotion.dry_run:
        click.echo(f"models:/{model}@champion is version {verdict.candidate}")
        show_next("predict", f"{model}@champion", "IMAGES")


if __name__ == "__main__":
    run_command(command, "tessera promote")
