"""`tessera status`: shows what `tessera up` started, and whether it is healthy."""

from __future__ import annotations

import click

from jobs.cli import run
from jobs.shared import local_services
from jobs.shared.terminal import show_json, show_table
from pipelines.workflows.context import Context

GROUP = "services"


@click.command(short_help="Show the local services and whether they are healthy.")
@click.option("--json", "as_json", is_flag=True, help="Print the services as JSON.")
@click.option("--exports", is_flag=True, help="Print only the export lines for a shell.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
def command(as_json: bool, exports: bool, verbose: bool) -> int:
    """Show the local services. The exit status is 0 if all are up and healthy, otherwise 1."""
    del verbose
    known = local_services.load(Context.from_environment().home)
    rows = []
    for service in known.services if known else ():
        alive = local_services.is_alive(service)
        reason = (
            local_services.health(service, known.environment) if alive and known else "has ended"
        )
        state = "healthy" if not reason else f"{'unhealthy' if alive else 'down'}: {reason}"
        rows.append(
            {
                "service": service.name,
                "healthy": not reason,
                "state": state,
                "pid": service.pid,
                "address": service.address,
                "log": service.log,
            }
        )
    good = len(rows) == 2 and all(row["healthy"] for row in rows)
    if as_json:
        environment = known.environment if known else {}
        show_json({"up": good, "services": rows, "environment": environment})
    elif exports and known:
        click.echo(local_services.exports(known.environment))
    elif rows:
        show_table([{k: v for k, v in row.items() if k != "healthy"} for row in rows])
    elif not exports:
        click.echo("nothing is up; `tessera up` starts Ray and MLflow on this machine")
    return 0 if good else 1


if __name__ == "__main__":
    run(command, "tessera status")
