"""`tessera fix`: writes a corrected version of a packed data set."""

from __future__ import annotations

from pathlib import Path

import click

from jobs.cli import run
from jobs.shared.terminal import show_facts, show_json, show_next

GROUP = "data"


@click.command(short_help="Correct labels of a packed data set.")
@click.argument("where", metavar="DIR")
@click.argument("corrections", metavar="FILE.csv", type=click.Path(path_type=Path))
@click.option(
    "--to", required=True, metavar="DIR|URL", help="New folder or address of the corrected set."
)
@click.option("--name", help="Name of the new data set; by default that of the old one.")
@click.option(
    "--allow-empty-class",
    is_flag=True,
    help="Let a class lose all its images of a split; one without any image is removed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
def command(
    where: str,
    corrections: Path,
    to: str,
    name: str | None,
    allow_empty_class: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write a new version of the packed data set DIR with the corrections in FILE.csv.

    Each row of the file names a sample and an action: its new class, or drop to remove it. DIR
    stays as it is. The card of the new version has the digest of DIR and the checksum of the file.
    For tasks other than classification a sample can only be dropped.

    \b
    sample,action
    cat/12.jpg,dog
    dog/7.jpg,drop
    """
    del verbose
    from pipelines.workflows.fix import fix

    data = fix(where, corrections, to=to, name=name, allow_empty_class=allow_empty_class)
    card = data.card
    if as_json:
        show_json(card.model_dump(mode="json"))
        return
    made = card.corrections[-1]
    show_facts(
        {
            "fixed": f"{to}: {made.relabelled:,} relabelled, {made.dropped:,} dropped",
            "splits": ", ".join(f"{name} {split.samples:,}" for name, split in card.splits.items()),
            "of": f"{where}, digest {made.data_digest}",
            "digest": card.digest,
        }
    )
    show_next("inspect", to)


if __name__ == "__main__":
    run(command, "tessera fix")
