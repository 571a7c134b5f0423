"""`tessera plan`: how many shards of which size are right, before packing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.cli import run
from jobs.shared.terminal import show_json

if TYPE_CHECKING:
    from pipelines.data.inspection.shard_plan import Plan, Readers


@click.command()
@click.argument("source", metavar="SOURCE|DIR")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="On all nodes.")
@click.option("--loader-workers", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--batch", type=click.IntRange(1), default=256, show_default=True, help="Of all GPUs."
)
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--format", "form", help="The source's format; by default it is recognised.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="Of the format.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--verbose", is_flag=True, help="Show a traceback where it fails.")
def command(
    source: str,
    gpus: int,
    loader_workers: int,
    batch: int,
    nodes: int,
    form: str | None,
    options: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    """Say how many shards of which size suit a training, with the reasons.

    For a SOURCE that is not packed yet, a few of its images are read. For a packed data set, a
    folder or an address, it says how good its shards are.
    """
    del verbose
    from pipelines.data.card import FILE
    from pipelines.data.inspection import shard_plan
    from pipelines.storage.base import split_location
    from pipelines.storage.open import open_storage

    readers = shard_plan.Readers(gpus, loader_workers, batch, nodes)
    local = not split_location(source)[0]
    packed = not local or open_storage(source).size(FILE) is not None
    plan = _judge(source, readers) if packed else _recommend(source, form, options, readers)
    if as_json:
        metrics = {line.what: {"metric": line.metric, "why": line.why} for line in plan.lines}
        show_json(
            {
                "shards": plan.shards,
                "shard_samples": plan.shard_samples,
                "shard_bytes": plan.shard_bytes,
                "lines": metrics,
            }
        )
        return
    width = max(len(line.what) for line in plan.lines)
    for line in plan.lines:
        click.echo(f"{line.what:<{width}}  {line.metric}\n{'':<{width}}    {line.why}")
    if not packed:
        click.echo(f"\ntessera pack {source} --to DIR --shard-samples {plan.shard_samples}")


def _judge(source: str, readers: Readers) -> Plan:
    from pipelines.data import card
    from pipelines.data.inspection import shard_plan

    return shard_plan.judge(card.read(source).split("train"), readers)


def _recommend(source: str, form: str | None, options: tuple[str, ...], readers: Readers) -> Plan:
    from models.core.errors import UsageError
    from pipelines.data.inspection import shard_plan
    from pipelines.data.packing import formats
    from pipelines.data.packing import plan as packing_plan

    pairs = {name: value for name, _, value in (option.partition("=") for option in options)}
    if not all("=" in option for option in options):
        raise UsageError("an --option is no NAME=VALUE", hint="as in --option task=detection")
    _, importer, given, _ = formats.choose(source, form, pairs)
    if not hasattr(importer, "read"):
        raise UsageError(
            f"{source} is in shards already, which stay as they are", hint="pack it, then plan DIR"
        )
    found = importer.read(source, given)
    train = packing_plan.split_items(found.items, seed=0)["train"]
    return shard_plan.recommend(shard_plan.survey(found, train), readers)


if __name__ == "__main__":
    run(command, "tessera plan")
