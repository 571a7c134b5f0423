"""`tessera lineage`: shows the run, recipe, data and code behind a registered version."""

from __future__ import annotations

import dataclasses

import click

from jobs.cli import run as run_command
from jobs.shared import completion

GROUP = "models"


@click.command(short_help="Show the run, recipe, data and code behind a model.")
@click.argument("model", metavar="MODEL", shell_complete=completion.registered_models)
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the lineage as JSON.")
def command(model: str, verbose: bool, as_json: bool) -> int:
    """Show where MODEL (NAME, NAME/2 or NAME@alias) comes from.

    The lineage has the verdict, the run, the search, the recipe, the data, the code, the libraries
    and the hardware.
    """
    from jobs.shared.terminal import show_facts, show_json, show_next
    from pipelines.workflows import lineage, services
    from pipelines.workflows.context import Context

    facts = dataclasses.asdict(lineage.trace(model))
    if as_json:
        show_json(facts)
        return 0
    facts["aliases"] = ", ".join(facts["aliases"])
    facts["libraries"] = ", ".join(f"{n} {v}" for n, v in facts["libraries"].items())
    facts["settings"] = ", ".join(f"{path}={v}" for path, v in sorted(facts["settings"].items()))
    facts["page"] = services.page(Context.from_environment(), facts["page"])
    shown = {n.replace("_", " "): v for n, v in facts.items() if v}
    show_facts(shown)
    show_next("reproduce", model)
    return 0


if __name__ == "__main__":
    run_command(command, "tessera lineage")
