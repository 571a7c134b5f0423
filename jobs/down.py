"""`tessera down`: stops what `tessera up` started, and nothing else."""

from __future__ import annotations

import click

from jobs.cli import run
from jobs.shared import local_services
from pipelines.workflows.context import Context

GROUP = "services"


@click.command(short_help="Stop the local Ray and MLflow.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
def command(verbose: bool) -> None:
    """Stop the local Ray and MLflow that `tessera up` started, with all jobs that run there."""
    del verbose
    home = Context.from_environment().home
    with local_services.alone(home):
        known = local_services.load(home)
        if known is None:
            click.echo("nothing is up")
            return
        names = [s.name for s in known.services if local_services.is_alive(s)]
        killed = local_services.end_all(known, home)
    click.echo(f"ended: {', '.join(names) or 'nothing, they had ended before'}")
    if killed:
        click.echo(f"{killed} processes did not end by themselves and were killed")


if __name__ == "__main__":
    run(command, "tessera down")
