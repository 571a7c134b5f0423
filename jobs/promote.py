"""`tessera promote`: the gate."""

from __future__ import annotations

from dataclasses import asdict

import click

from jobs.cli import run as run_command


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--version", "number", type=int, required=True, help="The candidate.")
@click.option(
    "--margin",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Better by how much.",
)
@click.option("--dry-run", is_flag=True, help="Decide, but change nothing.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def command(
    model: str, number: int, margin: float, dry_run: bool, verbose: bool, as_json: bool
) -> int:
    """Make a version of MODEL its `champion`, if it is better than the champion on the same test
    shards. Exit status 1 where it is refused."""
    from jobs import driver
    from jobs.terminal import show_json
    from pipelines import promotion

    registry = driver.open_registry()
    policy = promotion.Policy(margin=margin)
    verdict = promotion.promote(registry, model, number, policy=policy, dry_run=dry_run)
    if as_json:
        show_json(asdict(verdict))
    else:
        word = "promoted" if verdict.passed else "refused"
        if dry_run:
            word = f"would be {word}"
        click.echo(f"version {number} of {model} {word}: {'; '.join(verdict.reasons)}")
        if verdict.passed and not dry_run:
            click.echo(f"models:/{model}@champion is version {number}")
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    run_command(command, "tessera promote")
