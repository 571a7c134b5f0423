"""How many shards of which size are right, and whether a set can feed a training at all.

In: how much data there is, and who reads it. Out: figures with a reason each, or a refusal. Must not
know Ray. Samples are read by their index: any number of shards gives each of them exactly once, so
what is said here is about speed, and about other readers of the same shards.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import NOTE_EXTENSIONS, SplitCard
from pipelines.data.loading.order import WINDOW
from pipelines.data.loading.preflight import check_numbers
from pipelines.data.sources import Item, Source
from pipelines.data.tar import BLOCK, padded

GOOD_BYTES = 128 << 20
LEAST_BYTES, MOST_BYTES = 64 << 20, 256 << 20
"""Of a shard in an object store. Below, the wait for an answer is felt in each fetch; above, a node
waits long for its first batch and keeps more than it needs."""
SMALL_BYTES = 8 << 20
"""Smaller shards are not recommended even where other readers would want more of them."""
NOTE_BYTES = 1 << 10
"""What the note of a sample takes in a shard with header and padding, where it is short."""
SAMPLED = 64


@dataclass(frozen=True)
class Amount:
    """The train split as it is or will be in shards."""

    samples: int
    size_bytes: int


@dataclass(frozen=True)
class Readers:
    """Who reads: GPUs of all nodes together, loader workers of each GPU, the global batch. Raises
    UsageError for more nodes than GPUs."""

    gpus: int = 1
    loader_workers: int = 1
    batch: int = 128
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.nodes > self.gpus:
            raise UsageError(
                f"{self.gpus} GPUs are too few for {self.nodes} nodes",
                hint="give the GPUs of all nodes together",
            )

    @property
    def count(self) -> int:
        return self.gpus * self.loader_workers


@dataclass(frozen=True)
class Line:
    """A figure as it is shown, and the reason for it."""

    what: str
    metric: str
    why: str


@dataclass(frozen=True)
class Plan:
    """`shards` of `shard_samples`, the last of fewer; `lines` say it for a person."""

    shards: int
    shard_samples: int
    shard_bytes: int
    lines: tuple[Line, ...]


def survey(source: Source, items: Sequence[Item]) -> Amount:
    """What `items` will take in shards, by loading `SAMPLED` of them."""
    step = max(len(items) // SAMPLED, 1)
    sizes = []
    for item in items[::step][:SAMPLED]:
        try:
            data = source.load(item)
        except TesseraError:  # packing will say so
            continue
        sizes.append(
            BLOCK + padded(len(data)) + (NOTE_BYTES if NOTE_EXTENSIONS[source.task] else 0)
        )
    if not sizes:
        raise TesseraError(f"no image of {source.name} can be read", hint="check the source")
    return Amount(len(items), int(statistics.mean(sizes) * len(items)))


def recommend(amount: Amount, readers: Readers) -> Plan:
    """How to cut a train split into shards. Raises as `check_numbers` does."""
    check_numbers(amount.samples, workers=readers.gpus, batch_size=readers.batch)
    shards, why = _choose(amount, readers)
    samples = -(-amount.samples // shards)
    shards = -(-amount.samples // samples)
    size = amount.size_bytes // shards
    lines = (
        Line("shards", f"{shards:,} of {samples:,} samples, {_bytes(size)} each", why),
        _feeding(shards, readers),
        *_steps(amount.samples, readers),
        *_disk(amount.size_bytes, size, shards, readers),
    )
    return Plan(shards, samples, size, lines)


def judge(split: SplitCard, readers: Readers) -> Plan:
    """How good the shards of a packed train split are for these readers."""
    check_numbers(split.samples, workers=readers.gpus, batch_size=readers.batch)
    sizes = sorted(shard.size_bytes for shard in split.shards)
    total, middle = sum(sizes), sizes[len(sizes) // 2]
    wanted = recommend(Amount(split.samples, total), readers)
    if wanted.shards == len(sizes):
        why = "as it would be cut for these readers"
    elif middle < LEAST_BYTES and wanted.shards < len(sizes):
        why = f"small for an object store; {wanted.shards:,} would do, and no matter on a disk"
    elif middle > MOST_BYTES:
        why = f"large: a node waits for a whole one; {wanted.shards:,} would be better"
    else:
        why = f"within what is good; {wanted.shards:,} would be cut anew for these readers"
    span = f"{_bytes(sizes[0])} to {_bytes(sizes[-1])}"
    lines = (
        Line("shards", f"{len(sizes):,} of {span}", why),
        _feeding(len(sizes), readers),
        *_steps(split.samples, readers),
        *_disk(total, middle, len(sizes), readers),
    )
    most = max(shard.samples for shard in split.shards)
    return Plan(len(sizes), most, middle, lines)


def _choose(amount: Amount, readers: Readers) -> tuple[int, str]:
    most = max(min(amount.size_bytes // SMALL_BYTES, amount.samples), 1)
    plain = max(round(amount.size_bytes / GOOD_BYTES), 1)
    if plain >= readers.count:
        for shards in (round(plain / readers.count), -(-plain // readers.count)):
            count = shards * readers.count
            if LEAST_BYTES <= amount.size_bytes / count <= MOST_BYTES:
                return count, f"{_range()}, and a multiple of {readers.count} readers"
        return min(plain, amount.samples), f"{_range()}; no multiple of the readers fits that"
    if readers.count <= most:
        return readers.count, (
            f"one for each of {readers.count} readers, so that none of a stock reader's starves"
        )
    return min(plain, most), (
        f"too little data for {readers.count} readers: more shards would be under "
        f"{_bytes(SMALL_BYTES)} each"
    )


def _range() -> str:
    return f"{_bytes(LEAST_BYTES)} to {_bytes(MOST_BYTES)} suit an object store"


def _feeding(shards: int, readers: Readers) -> Line:
    who = f"{readers.gpus} GPUs x {readers.loader_workers} loader workers = {readers.count}"
    if shards < readers.count:
        why = f"only {shards} of them would get a shard in stock webdataset; here all are fed"
    elif shards % readers.count:
        why = "no whole multiple: stock readers get uneven shares; here each sample comes once"
    else:
        why = f"{shards // readers.count} shards for each, evenly"
    return Line("readers", who, why)


def _steps(samples: int, readers: Readers) -> list[Line]:
    steps, last = -(-samples // readers.batch), samples % readers.batch
    rest = f"the last has {last} samples, counted as such" if last else "all are full"
    low, more = divmod(readers.batch, readers.gpus)
    each = f"{low:,} or {low + 1:,}" if more else f"{low:,}"
    return [
        Line(
            "steps",
            f"{steps:,} an epoch, {samples:,} samples in batches of {readers.batch:,}",
            rest,
        ),
        Line("rank", f"{each} samples a step", f"a batch over {readers.gpus} GPUs"),
    ]


def _disk(total: int, shard: int, shards: int, readers: Readers) -> list[Line]:
    held = min(WINDOW, shards)
    window = held * shard
    where = "on the node" if readers.nodes == 1 else f"on each of {readers.nodes} nodes"
    return [
        Line("window", f"{_bytes(window)} {where}", f"{held} shards are read at once, mixed"),
        Line(
            "cache",
            f"{_bytes(total)} {where}, {_bytes(min(2 * window, total))} at least",
            "with all of the set in it only the first epoch is fetched; two windows are the one "
            "that is read and the one that is fetched meanwhile",
        ),
    ]


def _bytes(size: int) -> str:
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size // unit:,} {name}"
    return f"{size / 1024:.3g} KiB"
