"""`tessera rollback`: the champion before."""

from __future__ import annotations

import click

from jobs.cli import run as run_command

GROUP = "models"


@click.command(short_help="Make an earlier champion the champion again.")
@click.argument("model", metavar="MODEL")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, verbose: bool, as_json: bool) -> int:
    """Make an earlier champion the champion again.

    MODEL alone is the champion before the current one; NAME/2 or NAME@alias is a version that was
    champion once.
    """
    from jobs.shared.terminal import show_json
    from pipelines.promotion import gate
    from pipelines.workflows import model_reference, services
    from pipelines.workflows.context import Context

    registry = services.open_registry(Context.from_environment())
    named = model_reference.parse(model)
    to = named.resolve(registry).number if named.alias else named.number
    before, now = gate.roll_back(registry, named.name, to=to)
    if as_json:
        show_json({"model": named.name, "from": before.number, "to": now.number})
    else:
        click.echo(
            f"rolled back {named.name} from version {before.number} to version {now.number}: "
            f"models:/{named.name}@champion is version {now.number}"
        )
    return 0


if __name__ == "__main__":
    run_command(command, "tessera rollback")
