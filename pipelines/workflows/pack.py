"""Packs a source of images into a data set of shards, here or on the Ray cluster.

In: a folder of images, or the name of a bundled set. Out: a `PackedData`, which the other workflows
accept as their data set. Must not print, nor read the environment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.data.card import Card
    from pipelines.interfaces import Listener
    from pipelines.workflows.context import Context

SMALL_ITEMS = 20_000
"""Smaller sets are packed in this process by default: starting a cluster would take as long."""

BEGIN_WITH = ("cnn", "yolo")
"""The families to suggest first, if they can train on a data set."""


@dataclass(frozen=True)
class PackedData(os.PathLike[str]):
    """A packed data set. Workflows accept it instead of a path.

    Args:
        location: Its folder, absolute, or its address.
        card: Its card: splits, classes, shards, digest.
        seconds: Time that packing took.
    """

    location: str
    card: Card
    seconds: float

    def __fspath__(self) -> str:
        return self.location

    @property
    def samples(self) -> int:
        """Images in all splits."""
        return sum(split.samples for split in self.card.splits.values())


def pack(
    source: str | os.PathLike[str],
    *,
    to: str | os.PathLike[str],
    format: str | None = None,
    options: Mapping[str, str] | None = None,
    name: str | None = None,
    licence: str = "",
    seed: int = 0,
    shard_samples: int | None = None,
    resize: int | None = None,
    quality: int | None = None,
    allow_rejected: str = "0",
    allow_unused: Sequence[str] = (),
    drop: Sequence[str] = (),
    near_duplicates: bool = True,
    unseen: Sequence[str] = (),
    workers: int | None = None,
    verbose: bool = False,
    progress: bool | Listener = True,
    context: Context | None = None,
) -> PackedData:
    """Packs a source into shards. Called again after an interruption, it resumes.

    Args:
        source: A folder of images in a known format, or the name of a bundled set (`digits`).
        to: The new folder, or an address.
        format: The source's format, or FORMAT:NAME; recognised by default.
        options: Options of the format.
        name: Name of the data set; the source folder's by default.
        licence: A text for the card.
        seed: Random seed of the splits that the source doesn't have.
        shard_samples: Maximum number of samples in a shard; by default what fits in 64 MiB.
        resize: Shorter side in pixels; images with a longer one are shrunk to it.
        quality: JPEG quality of resized images, 1 to 100.
        allow_unused: Patterns of files that no sample has to use, as in "extra/*".
        allow_rejected: Images, and objects, that may be rejected: a number, or a share as in
            "0.5%".
        drop: `boxes` to drop a damaged object rather than reject its image.
        near_duplicates: Whether to search for near duplicates across splits.
        unseen: Classes to keep for the test split only.
        workers: Parallel tasks on the Ray cluster; 0 packs in this process. By default all CPUs of
            the cluster for `SMALL_ITEMS` images or more, else 0.
        verbose: Whether to show Ray's own output.
        progress: True for a display on stderr, False for none, or a `Listener`.
        context: Where Ray is; from the environment by default.

    Raises TesseraError if the source can't be read, if too many samples are rejected, or if `to`
    is not empty.
    """
    from pipelines.data.packing import pack as packing
    from pipelines.storage.base import absolute_location
    from pipelines.visuals.progress import show_progress
    from pipelines.workflows import services
    from pipelines.workflows.context import Context

    started = time.monotonic()
    context = context or Context.from_environment()
    services.apply_settings(context)
    with ExitStack() as stack, show_progress(progress) as listener:
        cluster = _Cluster(context, workers, stack, verbose=verbose)

        def advance(done: int, total: int) -> None:
            listener({"kind": "advance", "done": done, "total": total, "unit": "images"})

        card = packing.pack(
            os.fspath(source),
            os.fspath(to),
            format=format,
            options=options,
            name=name,
            licence=licence,
            seed=seed,
            shard_samples=shard_samples,
            resize=resize,
            quality=quality,
            allow_rejected=allow_rejected,
            allow_unused=allow_unused,
            drop=drop,
            near_duplicates=near_duplicates,
            unseen=unseen,
            map_tasks=cluster.map_tasks if cluster.is_wanted else None,
            map_tasks_from=SMALL_ITEMS if workers is None else 0,
            progress=advance,
            notify=lambda text: listener({"kind": "message", "text": text}),
        )
    return PackedData(absolute_location(os.fspath(to)), card, time.monotonic() - started)


def suggest_family(card: Card) -> str | None:
    """A family to start with on this data set; None if no family can train on it."""
    import models

    if "val" not in card.splits:
        return None
    unseen = card.task == "classification" and not all(card.spec().counts)
    task = "verification" if unseen else card.task
    if task == "images":
        fitting = [n for n in models.names() if card.can_be_read_as(models.get(n).task.reads)]
    else:
        fitting = [n for n in models.names() if models.get(n).task.name == task]
    return next((name for name in BEGIN_WITH if name in fitting), fitting[0])


class _Cluster:
    """Makes shards on the Ray cluster. It is joined, or started, for the first shard, and left when
    `stack` is closed."""

    def __init__(
        self, context: Context, workers: int | None, stack: ExitStack, *, verbose: bool
    ) -> None:
        self._context, self._workers, self._verbose = context, workers, verbose
        self._stack = stack
        self._joined = False

    @property
    def is_wanted(self) -> bool:
        if self._workers is not None:
            return self._workers > 0
        return bool(self._context.ray_address) or (os.cpu_count() or 1) > 1

    def map_tasks(
        self, work: Any, shared: Any, parts: Iterable[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        from pipelines.cluster import connection, tasks
        from pipelines.workflows import services

        if not self._joined:
            cpus = max(self._workers or 0, os.cpu_count() or 1)
            self._stack.enter_context(
                services.joined(self._context, cpus=cpus, verbose=self._verbose)
            )
            self._joined = True
        workers = self._workers or int(connection.cluster_resources().cpus)
        yield from tasks.map_tasks(work, shared, parts, workers=workers)
