"""`tessera evaluate`: evaluates registered versions on one split, every sample once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run as run_command
from jobs.shared import completion

if TYPE_CHECKING:
    from pipelines.workflows.evaluate import EvaluationReport


GROUP = "models"


@click.command(short_help="Evaluate registered models on one split, with a report.")
@click.argument(
    "models", metavar="MODEL…", shell_complete=completion.registered_models, nargs=-1, required=True
)
@click.option(
    "--data",
    type=click.Path(file_okay=False),
    required=True,
    metavar="DIR",
    help="Packed data set: a folder or an address.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    default="test",
    show_default=True,
    help="Split to evaluate on.",
)
@click.option(
    "--workers",
    type=int,
    default=0,
    show_default=True,
    help="Data-parallel workers; 0 evaluates in this process.",
)
@click.option(
    "--report",
    "folder",
    metavar="DIR",
    help="New folder for the report, which is also stored in MLflow.",
)
@click.option("--no-report", is_flag=True, help="Compute the metrics only.")
@click.option(
    "--robustness",
    type=click.IntRange(min=0),
    metavar="N",
    help="Images to corrupt for the report; 0 for none, by default 500.",
)
@click.option(
    "--fields",
    metavar="FILE",
    help="CSV file with a column `key`; the other columns define slices.",
)
@click.option("--verbose", is_flag=True, help="Show Ray's output, and tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print metrics and comparisons as JSON.")
def command(
    models: tuple[str, ...],
    data: str,
    split: str,
    workers: int,
    folder: str | None,
    no_report: bool,
    robustness: int | None,
    fields: str | None,
    verbose: bool,
    as_json: bool,
) -> int:
    """Evaluate MODEL (NAME, NAME/2 or NAME@alias) and store the metrics with its version.

    NAME alone is the newest version. If several models are named, the first one is compared with
    the others on the same images. The metrics don't depend on the number of workers.
    """
    from jobs.shared.terminal import show_json, show_next, show_table
    from models.core.errors import UsageError
    from pipelines.evaluation import results
    from pipelines.workflows.evaluate import ROBUSTNESS, evaluate

    if no_report and (folder or fields or robustness):
        raise UsageError(
            "--no-report can't be combined with other options of the report", hint="leave it out"
        )
    report = evaluate(
        models,
        data=data,
        split=split,
        workers=workers,
        report=not no_report if folder is None else folder,
        robustness=ROBUSTNESS if robustness is None else robustness,
        fields=fields,
        verbose=verbose,
    )
    if as_json:
        show_json(
            {
                "models": [results.to_plain(one) for one in report.models],
                "comparisons": [results.to_plain(one) for one in report.comparisons],
            }
        )
        return 0
    show_table(_rows(report))
    click.echo(f"on {data} ({split}, {report.samples:,} images)")
    if report.page:
        click.echo(f"report {report.page}")
    if split == "test":
        show_next("promote", report.models[0].model.removeprefix("models:/"))
    return 0


def _rows(report: EvaluationReport) -> list[dict[str, Any]]:
    """A line for each metric of all images, a column for each model and each comparison."""
    rows = []
    for name in (name for name in report.models[0].metrics if "/" not in name):
        row: dict[str, Any] = {"metric": name}
        for model in report.models:
            estimate = model.metrics.get(name)
            row[model.model] = (
                f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"
                if estimate
                else ""
            )
        for other in report.comparisons:
            gain = other.metrics.get(name)
            text = f"{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})" if gain else ""
            row[f"gain over {other.second}"] = text
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_command(command, "tessera evaluate")
