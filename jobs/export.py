"""`tessera export`: exports a registered version to a file that predicts without Tessera."""

from __future__ import annotations

from pathlib import Path

import click

from jobs.cli import run as run_command
from jobs.shared import completion
from pipelines.inference.export import FORMATS

GROUP = "models"


@click.command(short_help="Export a model to ONNX or pt2 and compare its predictions.")
@click.argument("model", metavar="MODEL", shell_complete=completion.registered_models)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="File format: onnx for ONNX Runtime, pt2 for torch.export.load.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File to write; by default NAME-NUMBER.FORMAT in this folder.",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Data set to compare predictions on; by default the model's own.",
)
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: str,
    form: str | None,
    out: Path | None,
    data: str | None,
    force: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Export MODEL (NAME, NAME/2 or NAME@alias) to a file that predicts without Tessera.

    The file takes images as uint8 (batch, height, width, channels), of the size the model was
    trained on. Its predictions are compared with the model's on test images; if they differ, no
    file is left.
    """
    from jobs.shared.terminal import show_facts, show_json
    from models.core.errors import UsageError
    from pipelines.workflows.export import export

    if form is None:
        raise UsageError("--format is missing", hint="--format onnx, or --format pt2")
    done = export(model, format=form, out=out, data=data, force=force)
    if as_json:
        show_json(done.to_dict())
        return 0
    same = "the same data as in training" if done.same_data else "other data than in training"
    facts = {
        "model": done.model,
        "file": f"{done.file}, {done.size_bytes:,} bytes",
        "input": f"{done.input['dtype']} ({', '.join(map(str, done.input['shape']))})",
        "output": done.output,
        "compared": f"on {done.images:,} test images of {done.data}, {same}",
        "largest difference": f"{done.largest_difference:.2g}",
    }
    if done.other_class is not None:
        facts["other class"] = f"in {done.other_class:,} images"
    show_facts(facts)
    return 0


if __name__ == "__main__":
    run_command(command, "tessera export")
