"""`tessera inspect`: what a packed data set is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from jobs.cli import run
from jobs.terminal import show_facts, show_json, show_table


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
@click.option("--verbose", is_flag=True, help="Show a traceback where it fails.")
def command(folder: Path, as_json: bool, verbose: bool) -> None:
    """Show a packed data set, and check that its shards are all there.

    Sizes and indices are checked, not every byte.
    """
    from pipelines.data import card as cards
    from pipelines.data import shards

    card = cards.read(folder)
    shards.verify(folder, card)
    if as_json:
        show_json(card.model_dump(mode="json"))
        return
    image = card.image
    facts = {
        "name": card.name,
        "task": card.task,
        "source": card.source,
        "images": f"{_channels(image.channels)}, height {_span(image.min_height, image.max_height)}"
        f", width {_span(image.min_width, image.max_width)}",
        "mean": "  ".join(f"{value:.4f}" for value in image.mean),
        "std": "  ".join(f"{value:.4f}" for value in image.std),
        "licence": card.licence,
        "rejected": f"{card.rejected}, see rejected.jsonl" if card.rejected else "",
        "digest": card.digest,
    }
    show_facts({name: value for name, value in facts.items() if value})
    click.echo()
    show_table(
        [
            {
                "split": name,
                "images": f"{split.samples:,}",
                "shards": len(split.shards),
                "MB": f"{sum(shard.size_bytes for shard in split.shards) / 1e6:.1f}",
            }
            for name, split in _ordered(card)
        ]
    )
    click.echo()
    show_table([_class_row(name, card) for name in card.classes])


def _class_row(name: str, card: Any) -> dict[str, Any]:
    counts = {split: held.class_counts.get(name, 0) for split, held in _ordered(card)}
    return {"class": name, **counts}


def _ordered(card: Any) -> list[tuple[str, Any]]:
    """The splits as they are used, not as the JSON sorts them."""
    from pipelines.data.card import SPLITS

    return [(name, card.splits[name]) for name in SPLITS if name in card.splits]


def _channels(count: int) -> str:
    return "grey" if count == 1 else "RGB"


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


if __name__ == "__main__":
    run(command, "tessera inspect")
