"""Whether the shards of a remote data set have a good size, and how much cache a node needs.

In: a split of a card. Out: lines for the user. Must not know Ray.

Samples are read by their index, so any number of shards gives each sample exactly once, whatever
the number of GPUs and loader workers. On a local disk the size of a shard doesn't matter either. A
remote shard is fetched as a whole: small ones wait for many requests, large ones delay the first
batch.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.data.card import SplitCard
from pipelines.data.loading.order import WINDOW

SMALL_BYTES, GOOD_BYTES, LARGE_BYTES = 16 << 20, 128 << 20, 256 << 20
"""Of a shard in an object store."""


def advise(split: SplitCard) -> Iterator[tuple[str, str]]:
    """(name, advice) on a split, mostly `train`, whose shards are fetched from an address; nothing
    where all of it is no larger than one good shard."""
    sizes = sorted(shard.size_bytes for shard in split.shards)
    total, median = sum(sizes), sizes[len(sizes) // 2]
    if total <= GOOD_BYTES:
        return
    fitting = max(split.samples * GOOD_BYTES // total, 1)
    better = f"--shard-samples {fitting} makes shards of about {_megabytes(GOOD_BYTES)}"
    if median < SMALL_BYTES:
        yield "shards", f"{_megabytes(median)} each, small for an object store; {better}"
    elif median > LARGE_BYTES:
        yield (
            "shards",
            f"{_megabytes(median)} each, large: the first batch waits for a whole one; {better}",
        )
    window = min(WINDOW, len(sizes)) * median
    yield (
        "cache",
        f"at least {_megabytes(min(2 * window, total))} on each node; with {_megabytes(total)} "
        "every shard is fetched only once",
    )


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes < 1e10 else f"{size_bytes / 1e9:,.1f} GB"
