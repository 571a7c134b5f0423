"""`tessera predict`: a registered model's answers for images."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import click

from jobs.cli import run as run_command
from jobs.terminal import json_line


@click.command()
@click.argument("model", metavar="models:/NAME@ALIAS")
@click.argument("paths", metavar="PATHS…", nargs=-1, required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write lines here.")
@click.option(
    "--pictures",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write each image with its answer drawn in.",
)
@click.option("--strict", is_flag=True, help="Exit status 1 if an input couldn't be read.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
def command(
    model: str,
    paths: tuple[str, ...],
    out: Path | None,
    pictures: Path | None,
    strict: bool,
    verbose: bool,
) -> int:
    """Answer for files, folders and globs: one JSON line for each input, in order."""
    import tempfile

    from jobs import driver
    from pipelines import checkpoints, prediction

    registry = driver.open_registry()
    version = driver.resolve(registry, model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = registry.download(version, Path(scratch))
        found = checkpoints.read_model(folder, driver.registered_digest(version))
    recipe = found.recipe
    data = found.card.spec(recipe.data.height, recipe.data.width)
    predictor = prediction.Predictor(recipe, data, found.weights)
    failed = total = 0
    names: set[str] = set()
    with _open(out) as lines:
        for answer in predictor.predict(prediction.expand(paths)):
            total += 1
            failed += "error" in answer
            answer["model"], answer["version"] = version.name, version.number
            lines.write(json_line(answer) + "\n")
            if pictures and "error" not in answer:
                _draw(Path(answer["path"]), answer, pictures, names)
    if out is not None:
        print(f"{total:,} answers in {out}", file=sys.stderr)
    if failed:
        print(f"{failed} of {total} inputs couldn't be read: see their lines", file=sys.stderr)
    return int(strict and failed > 0)


def _draw(path: Path, answer: dict[str, object], folder: Path, names: set[str]) -> None:
    from pipelines import prediction

    folder.mkdir(parents=True, exist_ok=True)
    name = prediction.picture_name(path, names)
    prediction.draw(path, answer).save(folder / name)


@contextmanager
def _open(out: Path | None) -> Iterator[IO[str]]:
    """Where the lines go. A file is there whole or not at all."""
    if out is None:
        yield sys.stdout
        return
    scratch = out.with_name(f".{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with scratch.open("w", encoding="utf-8") as file:
            yield file
        scratch.replace(out)
    finally:
        scratch.unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(command, "tessera predict")
