"""Checks before a training starts: are there enough samples for its workers, and are all files
there?

In: a card and the numbers of a training. Out: nothing, or a TesseraError. Must not know recipes.
"""

from __future__ import annotations

from pathlib import Path

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import Card, Shard
from pipelines.storage.open import open_shards, open_storage


def check_numbers(samples: int, *, workers: int, batch_size: int) -> None:
    """Raises UsageError if a worker would have no samples. `batch_size` is global."""
    if batch_size < workers:
        raise UsageError(
            f"a batch of {batch_size} can't be split over {workers} workers",
            hint=f"the batch size counts the samples of all workers: use {workers} or more",
        )
    if samples < workers:
        raise UsageError(
            f"{samples} train samples are not enough for {workers} workers",
            hint=f"use {max(samples, 1)} workers or fewer",
        )


def check_feedable(
    card: Card,
    *,
    workers: int,
    batch_size: int,
    split: str = "train",
    where: str | Path | None = None,
) -> None:
    """Raises TesseraError if a split has too few samples for this number of workers (0: training in
    this process) and this global batch size. With `where`, the location of the card, also if a file
    of the split is missing or has another size."""
    split_card = card.split(split)
    check_numbers(split_card.samples, workers=max(workers, 1), batch_size=batch_size)
    if where is not None:
        check_files(where, card, split)


def check_files(where: str | Path, card: Card, split: str) -> None:
    """Raises TesseraError that names each missing file, and each whose size differs from the card,
    among the index and the shards of a split. In an object store it costs one listing, however many
    shards there are."""
    split_card = card.split(split)
    storage = open_storage(where)
    root = open_shards(where, card.root)
    sizes = root.sizes([shard.path for shard in split_card.shards])
    index = storage.size(split_card.index)
    wrong = [
        name for shard in split_card.shards if (name := _difference(shard, sizes.get(shard.path)))
    ]
    if index != split_card.index_bytes:
        raise TesseraError(
            f"the index {split_card.index} of {storage.where} "
            f"{_state(index, split_card.index_bytes)}",
            hint="download or pack the data set again",
        )
    if wrong:
        raise TesseraError(
            f"{len(wrong)} of {len(split_card.shards)} shards of {root.where} differ from the "
            f"card: "
            f"{'; '.join(wrong[:3])}{'; …' if len(wrong) > 3 else ''}",
            hint="download or pack the data set again",
        )


def _difference(shard: Shard, size: int | None) -> str:
    same = size == shard.size_bytes
    return "" if same else f"shard {shard.path} {_state(size, shard.size_bytes)}"


def _state(size: int | None, expected: int) -> str:
    return "is missing" if size is None else f"has {size:,} bytes, the card says {expected:,}"
