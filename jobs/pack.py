"""`tessera pack`: from a folder of labelled images to a packed data set."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import ExitStack, redirect_stdout
from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run
from jobs.shared.terminal import show_facts, show_json
from models.core.errors import UsageError
from pipelines.workflows.context import Context

if TYPE_CHECKING:
    from pipelines.data.card import Card

SMALL_ITEMS = 20_000
"""Smaller sets are packed in this process: starting a cluster takes as long."""

BEGIN_WITH = ("cnn", "yolo")
"""Of several families for a data set, the one to begin with."""


GROUP = "data"


@click.command(short_help="Pack a folder of images into WebDataset shards.")
@click.argument("source")
@click.option(
    "--to", required=True, metavar="DIR|URL", help="New folder or address of the packed data set."
)
@click.option(
    "--format",
    "form",
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
    help="How many samples may be rejected; they are listed in rejected.jsonl.",
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
    near: bool,
    unseen: tuple[str, ...],
    workers: int | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Pack SOURCE into WebDataset shards.

    SOURCE is a folder of images in one of the known formats, or the word digits for the bundled set.
    Splits train, val and test are taken where the source has them; else they are cut from train by
    the seed. A pack that was stopped goes on when the same command is given again.
    """
    from pipelines.data.packing import pack

    started = time.monotonic()
    with _Progress() as progress, _Cluster(workers, verbose=verbose) as cluster:
        card = pack.pack(
            source,
            to,
            format=form,
            options=dict(map(_parse_option, options)),
            name=name,
            licence=licence,
            seed=seed,
            shard_samples=shard_samples,
            resize=resize,
            quality=quality,
            allow_rejected=allow_rejected,
            near=near,
            unseen=unseen,
            map_tasks=cluster.map_tasks if cluster.wanted else None,
            map_tasks_from=SMALL_ITEMS if workers is None else 0,
            progress=progress.show,
            say=progress.say,
        )
    if as_json:
        show_json(card.model_dump(mode="json"))
        return
    _show(card, to, time.monotonic() - started)


def _show(card: Card, to: str, seconds: float) -> None:
    from pipelines.data.inspection import shard_advice
    from pipelines.storage.open import open_shards

    remote = open_shards(to, card.root).remote
    samples = sum(split.samples for split in card.splits.values())
    rate = f"{samples:,} images in {seconds:.1f} s, {samples / max(seconds, 1e-9):,.0f} images/s"
    rejected = {"rejected": f"{card.rejected}, see rejected.jsonl"} if card.rejected else {}
    show_facts(
        {
            "packed": f"{to}: {rate}",
            "splits": ", ".join(f"{name} {split.samples:,}" for name, split in card.splits.items()),
            **({"classes": f"{len(card.classes)}"} if card.classes else {}),
            **rejected,
            **(dict(shard_advice.advise(card.split("train"))) if remote else {}),
            "digest": card.digest,
            "next": _next(card, to),
        }
    )


def _next(card: Card, to: str) -> str:
    import models

    if "val" not in card.splits:
        return "more images: a training needs the splits train and val"
    unseen = card.task == "classification" and not all(card.spec().counts)
    task = "verification" if unseen else card.task
    if task == "images":
        fitting = [n for n in models.names() if card.can_be_read_as(models.get(n).task.reads)]
    else:
        fitting = [n for n in models.names() if models.get(n).task.name == task]
    begin = next((name for name in BEGIN_WITH if name in fitting), fitting[0])
    return f"tessera train {begin} --data {to}"


def _parse_option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--option {text!r} is no NAME=VALUE", hint="as in --option label=class")
    return name, value


class _Cluster:
    """The cluster, joined or started when the first shard is to be made there."""

    def __init__(self, workers: int | None, *, verbose: bool) -> None:
        self._context = Context.from_environment()
        self._workers, self._verbose = workers, verbose
        self._stack = ExitStack()
        self._opened = False

    @property
    def wanted(self) -> bool:
        if self._workers is not None:
            return self._workers > 0
        return bool(self._context.ray_address) or (os.cpu_count() or 1) > 1

    def map_tasks(
        self, work: Any, shared: Any, parts: Iterable[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        from pipelines.cluster import connection, tasks

        if not self._opened:
            self._open()
        workers = self._workers or int(connection.cluster_resources().cpus)
        yield from tasks.map_tasks(work, shared, parts, workers=workers)

    def _open(self) -> None:
        from pipelines.cluster import connection
        from pipelines.workflows import services

        services.apply_settings(self._context)
        # Ray prints what happens to its workers on stdout, where a script reads the result.
        nowhere = self._stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115
        self._stack.enter_context(redirect_stdout(sys.stderr if self._verbose else nowhere))
        cpus = max(self._workers or 0, os.cpu_count() or 1)
        if connection.connect(self._context.ray_address, cpus=cpus, verbose=self._verbose):
            self._stack.callback(connection.disconnect)
        self._opened = True

    def __enter__(self) -> _Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


class _Progress:
    """One line that is written over; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._alive = sys.stderr.isatty()
        self._shown = 0.0
        self._started: tuple[float, int] | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    def say(self, line: str) -> None:
        self._clear()
        click.echo(line, err=True)

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._alive and now - self._shown > 0.2:
            # What was packed by an earlier call doesn't count as speed of this one.
            self._started = self._started or (now, done)
            since, before = self._started
            rate = f"  {(done - before) / (now - since):,.0f} images/s" if now > since else ""
            self._shown = now
            share = done * _BAR // max(total, 1)
            bar = "█" * share + "·" * (_BAR - share)
            click.echo(f"\r\x1b[K{bar} {done:,} of {total:,} images{rate}", nl=False, err=True)

    def _clear(self) -> None:
        if self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)


_BAR = 24


if __name__ == "__main__":
    run(command, "tessera pack")
