"""`tessera pack`: from a folder of labelled images to a packed data set."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from jobs.cli import run
from jobs.terminal import show_facts, show_json


@click.command()
@click.argument("source")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="The new folder.")
@click.option("--format", "form", help="The source's format; by default it is recognised.")
@click.option("--name", help="Name of the data set; by default the source folder's.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--shard-samples", type=click.IntRange(1), help="Most samples in a shard.")
@click.option(
    "--allow-rejected",
    metavar="N|P%",
    default="0",
    show_default=True,
    help="So many samples may fail their check; they are listed in rejected.jsonl.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
@click.option("--verbose", is_flag=True, help="Show a traceback where it fails.")
def command(
    source: str,
    to: Path,
    form: str | None,
    name: str | None,
    seed: int,
    shard_samples: int | None,
    allow_rejected: str,
    as_json: bool,
    verbose: bool,
) -> None:
    """Pack SOURCE into WebDataset shards.

    SOURCE is a folder (a folder of images for each class, or MNIST's idx files), or the word
    digits for the bundled set. Splits train, val and test are taken where the source has them; else
    they are cut from train by the seed.
    """
    from pipelines.data import importing
    from pipelines.data.shards import SHARD_SAMPLES

    started = time.monotonic()
    with _Progress() as progress:
        card = importing.pack(
            source,
            to,
            format=form,
            name=name,
            seed=seed,
            shard_samples=shard_samples or SHARD_SAMPLES,
            allow_rejected=allow_rejected,
            progress=progress.show,
            say=lambda line: click.echo(line, err=True),
        )
    if as_json:
        show_json(card.model_dump(mode="json"))
        return
    seconds = time.monotonic() - started
    samples = sum(split.samples for split in card.splits.values())
    rejected = {"rejected": f"{card.rejected}, see rejected.jsonl"} if card.rejected else {}
    show_facts(
        {
            "packed": f"{to}: {samples:,} images in {seconds:.1f} s",
            "splits": ", ".join(f"{name} {split.samples:,}" for name, split in card.splits.items()),
            "classes": f"{len(card.classes)}",
            **rejected,
            "digest": card.digest,
            "next": f"tessera train cnn --data {to}",
        }
    )


class _Progress:
    """One line that is written over; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._alive = sys.stderr.isatty()
        self._shown = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._alive and now - self._shown > 0.2:
            self._shown = now
            rate = done / max(now - self._started, 1e-9)
            click.echo(
                f"\r\x1b[K{done:,} of {total:,} images  {rate:,.0f} images/s", nl=False, err=True
            )


if __name__ == "__main__":
    run(command, "tessera pack")
