"""Checks before a training starts: can this data set feed these workers, and are its files there?

In: a card and the numbers of a training. Out: nothing, or a TesseraError. Must not know recipes.
"""

from __future__ import annotations

from pathlib import Path

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import Card, Shard
from pipelines.storage.open import open_shards, open_storage


def check_numbers(samples: int, *, workers: int, batch_size: int) -> None:
    """Raises UsageError where a worker would be left without samples."""
    if batch_size < workers:
        raise UsageError(
            f"a batch of {batch_size} can't be split over {workers} workers",
            hint=f"the batch size is that of all workers together: give {workers} or more",
        )
    if samples < workers:
        raise UsageError(
            f"{samples} train samples can't feed {workers} workers",
            hint=f"give {max(samples, 1)} workers or fewer",
        )


def check_feedable(
    card: Card,
    *,
    workers: int,
    batch_size: int,
    split: str = "train",
    where: str | Path | None = None,
) -> None:
    """Raises TesseraError where a training with so many workers (0: in this process) and samples in
    a global batch can't be fed by a split; with `where`, also where a file of it is not there."""
    held = card.split(split)
    check_numbers(held.samples, workers=max(workers, 1), batch_size=batch_size)
    if where is not None:
        check_files(where, card, split)


def check_files(where: str | Path, card: Card, split: str) -> None:
    """Each shard and the index are there, and as long as the card says; else TesseraError names
    them. In an object store it costs a listing, however many shards there are."""
    held = card.split(split)
    storage = open_storage(where)
    root = open_shards(where, card.root)
    found = root.sizes([shard.path for shard in held.shards])
    index = storage.size(held.index)
    wrong = [name for shard in held.shards if (name := _fault(shard, found.get(shard.path)))]
    if index != held.index_bytes:
        raise TesseraError(
            f"the index {held.index} of {storage.where} {_state(index, held.index_bytes)}",
            hint="fetch or pack the data set again",
        )
    if wrong:
        raise TesseraError(
            f"{len(wrong)} of {len(held.shards)} shards of {root.where} are not as the card says: "
            f"{'; '.join(wrong[:3])}{'; …' if len(wrong) > 3 else ''}",
            hint="fetch or pack the data set again",
        )


def _fault(shard: Shard, size: int | None) -> str:
    same = size == shard.size_bytes
    return "" if same else f"shard {shard.path} {_state(size, shard.size_bytes)}"


def _state(found: int | None, said: int) -> str:
    return "is missing" if found is None else f"has {found:,} bytes, the card says {said:,}"
