"""`tessera predict`: predicts images with a registered model."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click

from jobs.cli import run as run_command
from jobs.shared import completion
from jobs.shared.settings_options import parse_option
from jobs.shared.terminal import json_line

GROUP = "models"


@click.command(short_help="Predict images with a registered model.")
@click.argument("model", metavar="MODEL", shell_complete=completion.registered_models)
@click.argument("paths", metavar="[PATHS…]", nargs=-1)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the JSON lines to this file.",
)
@click.option(
    "--annotated",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write each image with its prediction drawn on it to this folder.",
)
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write predictions as files to this folder: COCO results, masks and images.",
)
@click.option("--samples", type=click.IntRange(1), help="Generate this many images.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of --samples.")
@click.option(
    "--decode",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Decode the codes in this file of JSON lines with an autoencoder.",
)
@click.option(
    "--gallery",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Identify images by a folder with one subfolder of images for each identity.",
)
@click.option("--compare", is_flag=True, help="Compare each image with the first one.")
@click.option(
    "--list",
    "lists",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Predict the paths and addresses in this file, one a line; repeatable.",
)
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Web server from which addresses may be read; repeatable.",
)
@click.option(
    "--option",
    "reading",
    multiple=True,
    metavar="NAME=VALUE",
    help="Option of image files, as of pack: range, max_pixels; repeatable.",
)
@click.option("--strict", is_flag=True, help="Exit with status 1 if an input can't be read.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
def command(model: str, paths: tuple[str, ...], strict: bool, **options: Any) -> int:
    """Predict images with MODEL (NAME, NAME/2 or NAME@alias).

    PATHS are files, folders, globs, tars, http and https addresses, and - for an image or a list on
    standard input. Each image gets one line of JSON on stdout, in order; what is left out of
    folders is counted on stderr. NAME alone is the newest version.
    """
    from pipelines.storage.atomic import write_atomic
    from pipelines.workflows.predict import predict

    del options["verbose"]
    out = options.pop("out")
    options["options"] = dict(map(parse_option, options.pop("reading")))
    results = predict(model, paths, notify=partial(print, file=sys.stderr), **options)
    failed = total = 0
    with nullcontext(sys.stdout) if out is None else write_atomic(out) as lines:
        for result in results:
            total += 1
            failed += result.error is not None
            lines.write(json_line(result.to_dict()) + "\n")
    if out is not None:
        print(f"{total:,} predictions in {out}", file=sys.stderr)
    if failed:
        print(f"{failed} of {total} inputs couldn't be read; each line says why", file=sys.stderr)
    return int(failed > 0 and (strict or failed == total))


if __name__ == "__main__":
    run_command(command, "tessera predict")
