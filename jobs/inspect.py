"""`tessera inspect`: shows a packed data set, in the terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from jobs.cli import run
from jobs.shared.terminal import show_facts, show_json, show_table

SHOWN_CLASSES = 40


GROUP = "data"


@click.command(short_help="Show what is in a packed data set.")
@click.argument("where", metavar="DIR")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write an HTML page with images to this file.",
)
@click.option(
    "--samples",
    type=click.IntRange(1, 400),
    default=24,
    show_default=True,
    help="Images of each split on the page.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
def command(where: str, html: Path | None, samples: int, as_json: bool, verbose: bool) -> None:
    """Show a packed data set, and check that its shards are all there.

    This checks sizes and indices, not every byte, as tessera verify does. The HTML page is one file
    that opens offline: samples with their boxes and masks, classes, sizes, near duplicates and
    rejected samples.
    """
    from pipelines.data import card as cards
    from pipelines.data.inspection import survey

    card = cards.read(where)
    survey.check(where, card)
    if html is not None:
        _write_page(html, where, card, samples)
    if as_json:
        show_json(card.model_dump(mode="json"))
    else:
        _show(where, card)
        if html is not None:
            click.echo(f"\npage  {html}")


def _write_page(file: Path, where: str, card: Any, samples: int) -> None:
    from models.core.errors import TesseraError
    from pipelines.data.inspection import report, survey
    from pipelines.storage.atomic import write_atomic

    page = report.render(survey.take(where, card, samples=samples))
    try:
        with write_atomic(file) as out:
            out.write(page)
    except OSError as error:
        raise TesseraError(
            f"{file} can't be written: {error.strerror}", hint="give another --html"
        ) from None


def _show(where: str, card: Any) -> None:
    from pipelines.data.inspection import report, shard_advice, survey
    from pipelines.storage.open import open_shards
    from pipelines.visuals.draw import one_line

    facts = {"name": card.name, **dict(report.facts(card))}
    reasons = survey.count_reasons(survey.read_rejected(where)) if card.rejected else []
    counted = "".join(f": {count:,} {reason}" for reason, count in reasons[:1])
    counted += "".join(f", {count:,} {reason}" for reason, count in reasons[1:])
    facts["rejected"] = f"{card.rejected:,}{counted}; see rejected.jsonl" if card.rejected else ""
    near = card.leakage
    facts["leakage"] = (
        f"{near.near:,} near-duplicate pair{'s' * (near.near != 1)} of {near.images:,} images "
        "across splits; see near_duplicates.jsonl"
        if near.near
        else ""
    )
    if open_shards(where, card.root).remote:
        facts.update(shard_advice.advise(card.split("train")))
    show_facts({name: one_line(value) for name, value in facts.items() if value})
    click.echo()
    splits = survey.ordered(card)
    show_table([_split_row(name, card.splits[name]) for name in splits])
    table = report.class_table(card, splits)
    if not table.total:
        return
    click.echo()
    rows = table.rows if table.total <= SHOWN_CLASSES else table.ends
    show_table([{f"{table.unit} of": row.name, **_cells(table, row)} for row in rows])
    if len(rows) < table.total:
        between = f"{table.total - len(rows):,} classes between; all are on the page of --html"
        click.echo(f"the largest and the smallest {len(rows) // 2}, {between}")


def _split_row(name: str, split: Any) -> dict[str, Any]:
    sizes = [shard.size_bytes for shard in split.shards]
    return {
        "split": name,
        "images": f"{split.samples:,}",
        "shards": f"{len(sizes):,}",
        "MB": f"{sum(sizes) / 1e6:.1f}",
        "MB a shard": _span(min(sizes) / 1e6, max(sizes) / 1e6),
    }


def _cells(table: Any, row: Any) -> dict[str, str]:
    return {split: text for split, (text, _) in zip(table.splits, row.cells)}


def _span(low: float, high: float) -> str:
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"


if __name__ == "__main__":
    run(command, "tessera inspect")
