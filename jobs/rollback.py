"""`tessera rollback`: the champion before."""

from __future__ import annotations

import click

from jobs.cli import run as run_command

GROUP = "models"


@click.command(short_help="Make an earlier champion the champion again.")
@click.argument("model", metavar="MODEL")
@click.option("--to", type=int, metavar="N", help="A version that was champion before.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, to: int | None, verbose: bool, as_json: bool) -> int:
    """Make the champion before the current one, or version N, the `champion` of MODEL again."""
    from jobs.shared.terminal import show_json
    from pipelines.promotion import gate
    from pipelines.workflows import services
    from pipelines.workflows.context import Context

    registry = services.open_registry(Context.from_environment())
    before, now = gate.roll_back(registry, model, to=to)
    if as_json:
        show_json({"model": model, "from": before.number, "to": now.number})
    else:
        click.echo(
            f"rolled back {model} from version {before.number} to version {now.number}: "
            f"models:/{model}@champion is version {now.number}"
        )
    return 0


if __name__ == "__main__":
    run_command(command, "tessera rollback")
