"""`tessera reproduce`: trains a registered version again, and compares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.cli import run as run_command
from jobs.shared import completion
from pipelines.workflows.reproduce import TOLERANCE, reproduce

if TYPE_CHECKING:
    pass


GROUP = "models"


@click.command(short_help="Train a model again from its lineage and compare the two.")
@click.argument("model", metavar="MODEL", shell_complete=completion.registered_models)
@click.option(
    "--data",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Where the data set is now, if it was moved.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=TOLERANCE,
    show_default=True,
    help="Relative tolerance of the metrics if hardware or libraries differ.",
)
@click.option("--verbose", is_flag=True, help="Show Ray's output, and tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def command(model: str, data: str | None, tolerance: float, verbose: bool, as_json: bool) -> int:
    """Train MODEL (NAME, NAME/2 or NAME@alias) again from its own recipe and data, and compare.

    Weights are compared bit for bit if hardware and libraries are the same, metrics otherwise.
    Nothing is registered. The exit status is 1 if the model isn't reproduced.
    """
    from jobs.shared.terminal import show_facts, show_json, show_next
    from pipelines.workflows import model_reference, services
    from pipelines.workflows.context import Context

    context = Context.from_environment()
    version = model_reference.resolve(services.open_registry(context), model)
    found = reproduce(
        context, version, data=data, tolerance=tolerance, verbose=verbose, progress=not as_json
    )
    if as_json:
        show_json(found)
    else:
        shown = {**found, "differences": "; ".join(found["differences"]) or "none known"}
        shown["metrics"] = ", ".join(
            f"val {name} {now:.4f} (was {was:.4f})" for name, (was, now) in found["metrics"].items()
        )
        show_facts(shown)
        show_next(f"tessera lineage {model}")
    return 0 if found["reproduced"] else 1


if __name__ == "__main__":
    run_command(command, "tessera reproduce")
