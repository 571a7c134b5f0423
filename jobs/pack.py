"""`tessera pack`: packs a folder of labelled images into a data set of shards."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from jobs.cli import run
from jobs.shared import completion
from jobs.shared.settings_options import parse_option
from jobs.shared.terminal import show_facts, show_json
from pipelines.workflows.pack import SMALL_ITEMS

if TYPE_CHECKING:
    from pipelines.data.card import Card
    from pipelines.workflows.pack import PackedData

GROUP = "data"


@click.command(short_help="Pack a folder of images into WebDataset shards.")
@click.argument("source")
@click.option(
    "--to", required=True, metavar="DIR|URL", help="New folder or address of the packed data set."
)
@click.option(
    "--format",
    "form",
    shell_complete=completion.formats,
    metavar="NAME[:WORD]",
    help="Format of the source; recognised by default.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="Option of the format; repeatable.",
)
@click.option("--name", help="Name of the data set; by default the source folder's.")
@click.option("--licence", default="", metavar="TEXT", help="Licence to note in the card.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Random seed of the splits.",
)
@click.option(
    "--shard-samples",
    type=click.IntRange(1),
    help="Maximum number of samples in a shard; by default what fits in 64 MiB.",
)
@click.option(
    "--resize",
    type=click.IntRange(1),
    metavar="PIXELS",
    help="Shrink images whose shorter side is longer than this.",
)
@click.option(
    "--quality",
    type=click.IntRange(1, 100),
    help="JPEG quality of resized images; by default 90, and PNG stays PNG.",
)
@click.option(
    "--allow-rejected",
    metavar="N|P%",
    default="0",
    show_default=True,
    help="How many images, and how many objects, may be rejected; rejected.jsonl lists them.",
)
@click.option(
    "--drop",
    type=click.Choice(["boxes"]),
    multiple=True,
    help="Drop a damaged box or mask; by default its image is rejected.",
)
@click.option(
    "--allow-unused",
    multiple=True,
    metavar="GLOB",
    help="Leave out files that no sample uses; repeatable.",
)
@click.option(
    "--no-leakage-check",
    "near",
    flag_value=False,
    default=True,
    help="Skip the search for near duplicates across splits.",
)
@click.option(
    "--unseen",
    multiple=True,
    metavar="CLASS,…",
    help="Classes to keep for the test split only; repeatable.",
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Parallel tasks on the Ray cluster; 0 packs in this process. By default 0, or all CPUs "
    f"for {SMALL_ITEMS:,} images or more.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
def command(
    source: str,
    to: str,
    form: str | None,
    options: tuple[str, ...],
    name: str | None,
    licence: str,
    seed: int,
    shard_samples: int | None,
    resize: int | None,
    quality: int | None,
    allow_rejected: str,
    allow_unused: tuple[str, ...],
    drop: tuple[str, ...],
    near: bool,
    unseen: tuple[str, ...],
    workers: int | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Pack SOURCE into WebDataset shards.

    SOURCE is a folder of images in one of the known formats, or the word digits for the bundled
    set. Existing splits are kept; a missing val or test split is taken from train (seeded). An
    interrupted pack resumes when the same command is run again.
    """
    from pipelines.workflows.pack import pack

    data = pack(
        source,
        to=to,
        format=form,
        options=dict(map(parse_option, options)),
        name=name,
        licence=licence,
        seed=seed,
        shard_samples=shard_samples,
        resize=resize,
        quality=quality,
        allow_rejected=allow_rejected,
        allow_unused=allow_unused,
        drop=drop,
        near_duplicates=near,
        unseen=unseen,
        workers=workers,
        verbose=verbose,
    )
    if as_json:
        show_json(data.card.model_dump(mode="json"))
    else:
        _show(data, to)


def _show(data: PackedData, to: str) -> None:
    from pipelines.data.inspection import shard_advice
    from pipelines.storage.open import open_shards
    from pipelines.workflows.pack import suggest_family

    card, seconds, samples = data.card, data.seconds, data.samples
    remote = open_shards(to, card.root).remote
    family = suggest_family(card)
    if family:
        next_step = shlex.join(["tessera", "train", family, "--data", str(to)])
    else:
        next_step = "more images: a training needs the splits train and val"
    rate = f"{samples:,} images in {seconds:.1f} s, {samples / max(seconds, 1e-9):,.0f} images/s"
    rejected = {"rejected": f"{card.rejected}, see rejected.jsonl"} if card.rejected else {}
    show_facts(
        {
            "packed": f"{to}: {rate}",
            "splits": ", ".join(f"{name} {split.samples:,}" for name, split in card.splits.items()),
            **({"classes": _classes(card)} if card.classes else {}),
            **rejected,
            **(dict(shard_advice.advise(card.split("train"))) if remote else {}),
            "digest": card.digest,
            "next": next_step,
        }
    )


def _classes(card: Card) -> str:
    """The number of classes, and the images, objects or pixels of the first ones."""
    counts = [split.class_counts for split in card.splits.values() if split.class_counts]
    names = list(card.classes[:20])
    if counts:
        names = [f"{name} {sum(count.get(name, 0) for count in counts):,}" for name in names]
    more = ", …" if len(card.classes) > len(names) else ""
    return f"{len(card.classes)} ({', '.join(names)}{more})"


if __name__ == "__main__":
    run(command, "tessera pack")
