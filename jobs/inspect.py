"""`tessera inspect`: shows a packed data set, in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run
from jobs.shared import completion
from jobs.shared.terminal import say, show_facts, show_json, show_next, show_table
from models.core.errors import UsageError

if TYPE_CHECKING:
    from pipelines.data.inspection.suspects import Suspect
    from pipelines.workflows.suspects import LabelSuspects

SHOWN_CLASSES = 40
SHOWN_SUSPECTS = 25
SHOWN_CONFLICTS = 3


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
@click.option(
    "--suspects",
    "model",
    metavar="MODEL",
    shell_complete=completion.registered_models,
    help="List labels that are probably wrong, with this classifier.",
)
@click.option(
    "--split",
    "splits",
    type=click.Choice(["train", "val", "test"]),
    multiple=True,
    help="Split to search for suspects; repeatable. By default those that the model wasn't trained "
    "on.",
)
@click.option(
    "--corrections",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.csv",
    help="Write the suspects to this new file, for tessera fix.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the card, or the suspects, as JSON.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
def command(
    where: str,
    html: Path | None,
    samples: int,
    model: str | None,
    splits: tuple[str, ...],
    corrections: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Show a packed data set, and check that its shards are all there.

    This checks sizes and indices, not every byte, as tessera verify does. The HTML page is one file
    that opens offline: samples with their boxes and masks, classes, sizes, near duplicates, copies,
    rejected samples, and the files of the source.

    With --suspects MODEL it lists the samples whose label is probably wrong, by confident learning,
    and shows them on the page. A model says most about images that it wasn't trained on.
    """
    del verbose
    from pipelines.data import card as cards
    from pipelines.data.inspection import survey

    if model is None and (splits or corrections):
        raise UsageError(
            f"{'--split' if splits else '--corrections'} needs --suspects",
            hint="name a model: --suspects MODEL",
        )
    card = cards.read(where)
    survey.check(where, card)
    found = _find_suspects(where, model, splits, corrections) if model else None
    if html is not None:
        _write_page(html, where, card, samples, found.suspects if found else ())
    if found:
        _show_suspects(where, found, corrections, as_json)
    elif as_json:
        show_json(card.model_dump(mode="json"))
    else:
        _show(where, card)
    if html is not None and not as_json:
        click.echo(f"\npage  {html}")


def _find_suspects(
    where: str, model: str, splits: tuple[str, ...], corrections: Path | None
) -> LabelSuspects:
    from pipelines.data.inspection import suspects
    from pipelines.workflows.suspects import find_label_suspects

    if corrections is not None and corrections.exists():  # known before anything is predicted
        raise suspects.file_exists(corrections)
    found = find_label_suspects(where, model, splits=splits)
    if corrections is not None:
        suspects.write_draft(corrections, found.suspects)
    return found


def _show_suspects(
    where: str, found: LabelSuspects, corrections: Path | None, as_json: bool
) -> None:
    from dataclasses import asdict

    from pipelines.visuals.draw import one_line

    model = f"models:/{found.version.name}/{found.version.number}"
    for note in found.notes:
        say(f"note: {note}")
    if as_json:
        rows = [{"sample": one.name, **asdict(one)} for one in found.suspects]
        show_json(
            {
                "model": model,
                "splits": found.splits,
                "samples": found.samples,
                "notes": found.notes,
                "suspects": rows,
            }
        )
        return
    count = len(found.suspects)
    searched = f"{found.samples:,} images of {', '.join(found.splits)} by {model}"
    show_facts({"suspects": f"{count:,} of {searched}"})
    if not count:
        return
    click.echo()
    show_table(
        [
            {
                "sample": one_line(one.name),
                "split": one.split,
                "class": one_line(one.label),
                "suggested": one_line(one.suggested),
                "margin": f"{one.margin:.3f}",
            }
            for one in found.suspects[:SHOWN_SUSPECTS]
        ]
    )
    if count > SHOWN_SUSPECTS:
        click.echo(f"the first {SHOWN_SUSPECTS}; --corrections FILE.csv lists all")
    if corrections is not None:
        say(f"{corrections} has no actions yet: fill in the column action with a class, or drop")
        show_next("fix", where, corrections, "--to", "DIR")


def _write_page(
    file: Path, where: str, card: Any, samples: int, suspects: Sequence[Suspect]
) -> None:
    from models.core.errors import TesseraError
    from pipelines.data.inspection import report, survey
    from pipelines.storage.atomic import write_atomic

    page = report.render(survey.take(where, card, samples=samples, suspects=suspects))
    try:
        with write_atomic(file) as out:
            out.write(page)
    except OSError as error:
        raise TesseraError(
            f"{file} can't be written: {error.strerror}", hint="give another --html"
        ) from None


def _show(where: str, card: Any) -> None:
    from pipelines.data.inspection import lists, report, shard_advice, survey
    from pipelines.storage.open import open_shards
    from pipelines.visuals.draw import one_line

    facts = {"name": card.name, **dict(report.facts(card))}
    reasons = lists.count_reasons(lists.read_rejected(where)) if card.rejected else []
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
    facts.update(lists.describe_copies(lists.read_copies(where), SHOWN_CONFLICTS))
    if account := lists.read_account(where):
        facts["files"] = str(account).removeprefix("files: ")
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
