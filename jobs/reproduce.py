"""`tessera reproduce`: trains a registered version again and compares the two."""

from __future__ import annotations

import click

from jobs.cli import run as run_command
from jobs.shared import completion
from pipelines.workflows.reproduce import TOLERANCE, reproduce

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

    done = reproduce(model, data=data, tolerance=tolerance, verbose=verbose, progress=not as_json)
    if as_json:
        show_json(done.to_dict())
    else:
        shown = {**done.to_dict(), "differences": "; ".join(done.differences) or "none known"}
        shown["metrics"] = ", ".join(
            f"val {name} {now:.4f} (was {was:.4f})" for name, (was, now) in done.metrics.items()
        )
        show_facts(shown)
        show_next("lineage", model)
    return 0 if done.reproduced else 1


if __name__ == "__main__":
    run_command(command, "tessera reproduce")
