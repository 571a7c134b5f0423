"""`tessera rollback`: makes an earlier champion the champion again."""

from __future__ import annotations

import click

from jobs.cli import run as run_command
from jobs.shared import completion

GROUP = "models"


@click.command(short_help="Make an earlier champion the champion again.")
@click.argument("model", metavar="MODEL", shell_complete=completion.registered_models)
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(model: str, verbose: bool, as_json: bool) -> int:
    """Make an earlier champion the champion again.

    MODEL alone is the champion before the current one; NAME/2 or NAME@alias is a version that was
    champion once.
    """
    from jobs.shared.terminal import show_json, show_next
    from pipelines.workflows.promote import rollback

    done = rollback(model)
    name, before, now = done.model, done.before.number, done.now.number
    if as_json:
        show_json({"model": name, "from": before, "to": now})
    else:
        click.echo(
            f"rolled back {name} from version {before} to version {now}: "
            f"models:/{name}@champion is version {now}"
        )
        show_next("registry", name)
    return 0


if __name__ == "__main__":
    run_command(command, "tessera rollback")
