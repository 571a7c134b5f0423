"""`tessera evaluate`: registered versions on one split, every sample once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run as run_command
from pipelines.workflows.context import Context
from pipelines.workflows.evaluate import evaluate_all

if TYPE_CHECKING:
    from pipelines.evaluation.results import Comparison, EvaluationResult


GROUP = "models"


@click.command(short_help="Evaluate registered models on one split, with a report.")
@click.argument("models", metavar="MODEL…", nargs=-1, required=True)
@click.option("--data", required=True, metavar="DIR", help="A packed data set.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test")
@click.option("--workers", type=int, default=0, show_default=True, help="0: in this process.")
@click.option(
    "--report", "folder", metavar="DIR", help="Where the report goes; it is in MLflow anyway."
)
@click.option("--no-report", is_flag=True, help="Only the figures.")
@click.option(
    "--robustness",
    type=click.IntRange(min=0),
    metavar="N",
    help="Images that are spoiled for the report, 0 for none.  [default: 500]",
)
@click.option("--fields", metavar="FILE", help="CSV with a column `key`: slices by its others.")
@click.option("--verbose", is_flag=True, help="Show Ray's own output, and tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
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
    """Evaluate MODEL (NAME, NAME@alias, NAME/3 or models:/…), and note the figures on its version.

    NAME alone is its newest version. Of several models the first is compared with the others, on
    the same images. The figures don't depend on the number of workers.
    """
    from jobs.shared.terminal import show_json, show_table
    from models.core.errors import UsageError
    from pipelines.evaluation import results, slices
    from pipelines.workflows.evaluate import ROBUSTNESS, Wanted

    if no_report and (folder or fields or robustness):
        raise UsageError("--no-report goes with no other option of the report", hint="leave it out")
    context = Context.from_environment()
    wanted = Wanted()
    if not no_report:
        to = _folder(context, folder, models, split)
        most = ROBUSTNESS if robustness is None else robustness
        known = slices.read_fields(Path(fields)) if fields else {}
        wanted = Wanted(robustness=most, costs=True, fields=known, report=to)
    found, compared = evaluate_all(
        context, models, data, wanted, split=split, workers=workers, verbose=verbose
    )
    if as_json:
        one = {"models": [results.to_plain(one) for _, one, _ in found]}
        show_json(one | {"comparisons": [results.to_plain(one) for one in compared]})
        return 0
    show_table(_rows([one for _, one, _ in found], compared))
    click.echo(f"on {data} ({split}, {found[0][1].samples:,} images)")
    if wanted.report:
        click.echo(f"report {wanted.report / 'report.html'}")
    return 0


def _folder(context: Context, given: str | None, models: tuple[str, ...], split: str) -> Path:
    """Where the report goes: a folder that isn't there yet, or is empty."""
    import re
    import time

    from models.core.errors import UsageError

    if given:
        folder = Path(given).absolute()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is there already", hint="name a new folder")
        return folder
    name = re.sub(r"[^\w.-]+", "-", "-".join(models))[:80].strip("-.")
    return context.reports_dir / f"{name}-{split}-{time.strftime('%Y%m%d-%H%M%S')}"


def _rows(found: list[EvaluationResult], compared: list[Comparison]) -> list[dict[str, Any]]:
    """A line for each figure of the whole, a column for each model and each comparison."""
    rows = []
    for name in (name for name in found[0].metrics if "/" not in name):
        row: dict[str, Any] = {"metric": name}
        for one in found:
            estimate = one.metrics.get(name)
            row[one.model] = (
                f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"
                if estimate
                else ""
            )
        for other in compared:
            lead = other.metrics.get(name)
            text = f"{lead.value:+.4f} ({lead.low:+.4f} to {lead.high:+.4f})" if lead else ""
            row[f"lead over {other.second}"] = text
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_command(command, "tessera evaluate")
