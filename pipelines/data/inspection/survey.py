"""A survey of a packed data set: samples, sizes, near duplicates, rejected samples.

In: a folder or an address with a card. Out: `Survey`, plain data and decoded images. Must not know
how it is shown. The work is limited for data sets of any size: of each split at most `MAX_READ`
samples are read, evenly spread; of a remote set only those of a few shards, because each shard is
downloaded as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data.annotations import Annotation, Mask, Objects, decode_mask, decode_objects
from pipelines.data.card import ANNOTATION_EXTENSIONS, SPLITS, Card
from pipelines.data.image_reading import reading_images
from pipelines.data.images import open_image
from pipelines.data.importers.support.reading import image_size
from pipelines.data.index import Index
from pipelines.data.inspection.lists import (
    CopyGroup,
    PairRow,
    RejectedRow,
    Side,
    count_reasons,
    read_account,
    read_copies,
    read_pairs,
    read_rejected,
)
from pipelines.data.inspection.suspects import Suspect
from pipelines.data.packing.account import Account
from pipelines.data.shards import ShardReader, Stored, check_sizes
from pipelines.storage.open import open_shards, open_storage

MAX_READ = 1000
"""Maximum number of samples of each split whose sizes and annotations are read."""
REMOTE_SHARDS = 3
"""Maximum number of shards of each split of a remote set that are downloaded."""
SHOWN_PAIRS = 24
SHOWN_SUSPECTS = 200
SHOWN_GROUPS, SHOWN_COPIES = 24, 4
_EMPTY = -1
"""The class of images without objects."""


@dataclass(frozen=True)
class Sample:
    """An image with its annotation. `label` is the class of the whole image, or -1."""

    split: str
    key: str
    image: Image.Image
    annotation: Annotation | None
    label: int


@dataclass
class SplitSurvey:
    """The samples of a split that were read. `sizes` are (height, width) in pixels, `objects`
    numbers of objects, `box_sides` the square roots of box areas in pixels; `shown` are for the
    page."""

    name: str
    samples: int
    read: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    box_sides: list[float] = field(default_factory=list)
    shown: list[Sample] = field(default_factory=list)


@dataclass(frozen=True)
class Survey:
    """`pairs` has both samples of each pair, or None for a sample that was not read; `suspects` the
    first suspects with their samples; `copies` all groups, and the samples of the first ones that
    were read; `account` what became of the files of the source, None if that isn't known."""

    where: str
    card: Card
    splits: list[SplitSurvey]
    pairs: list[tuple[PairRow, Sample | None, Sample | None]]
    rejected: list[RejectedRow]
    suspects: list[tuple[Suspect, Sample]] = field(default_factory=list)
    copies: list[tuple[CopyGroup, list[Sample]]] = field(default_factory=list)
    account: Account | None = None

    @property
    def reasons(self) -> list[tuple[str, int]]:
        return count_reasons(self.rejected)


def ordered(card: Card) -> list[str]:
    """The splits that have samples, in the order train, val, test."""
    return [name for name in SPLITS if name in card.splits and card.splits[name].samples]


def check(where: str | Path, card: Card) -> None:
    """Checks that every shard is there with its size, and that the indices are not damaged. Raises
    TesseraError otherwise."""
    storage = open_storage(where)
    shards = open_shards(where, card.root)
    for name in ordered(card):
        split = card.split(name)
        check_sizes(shards, split)
        index = Index(storage, split)
        for number in range(len(split.shards)):
            index.rows(number)
        index.close()


def take(
    where: str | Path, card: Card, *, samples: int, suspects: Sequence[Suspect] = ()
) -> Survey:
    """Surveys a data set. Of each split, `samples` are chosen to be shown: the same ones each time,
    and of as many classes as possible; of `suspects` the first ones. Raises TesseraError for
    damaged data."""
    remote = open_shards(where, card.root).remote
    readers = {name: ShardReader(where, card, name) for name in ordered(card)}
    try:
        return Survey(
            where=str(where),
            card=card,
            splits=[_look(card, name, readers[name], samples, remote) for name in readers],
            pairs=_open_pairs(card, readers, read_pairs(where), remote),
            rejected=read_rejected(where),
            suspects=_open_suspects(card, readers, suspects[:SHOWN_SUSPECTS]),
            copies=_open_copies(card, readers, read_copies(where), remote),
            account=read_account(where),
        )
    finally:
        for reader in readers.values():
            reader.close()


def _look(card: Card, name: str, reader: ShardReader, samples: int, remote: bool) -> SplitSurvey:
    seen = SplitSurvey(name, len(reader))
    spans = _spans(reader, remote)
    by_class: dict[int, list[int]] = {}
    for number in _spread(spans, MAX_READ):
        stored = reader.read(number)
        where = f"{name}, sample {stored.key}"
        height, width = image_size(stored.image, where)
        seen.read += 1
        seen.sizes.append((height, width))
        annotation = _annotation(card, stored, height, width, where)
        if isinstance(annotation, Objects):
            seen.objects.append(len(annotation.boxes))
            left, top, right, bottom = annotation.boxes.T
            seen.box_sides += np.sqrt((right - left) * (bottom - top)).tolist()
        for label in _classes_in(annotation, stored.label):
            by_class.setdefault(label, []).append(number)
    if ANNOTATION_EXTENSIONS.get(card.task) == "cls":  # the index has the labels of all samples
        by_class = _by_label(reader, spans, samples)
    for number in _choose(by_class, samples):
        seen.shown.append(_open(card, name, reader, number))
    return seen


def _spans(reader: ShardReader, remote: bool) -> list[tuple[int, int]]:
    """Ranges of samples that may be read: all, or those of a few shards of a remote set."""
    starts = reader.index.starts.tolist()
    if not remote:
        return [(0, starts[-1])]
    count = len(starts) - 1
    shards = sorted(set(np.linspace(0, count - 1, min(count, REMOTE_SHARDS)).astype(int).tolist()))
    return [(starts[shard], starts[shard + 1]) for shard in shards]


def _spread(spans: Sequence[tuple[int, int]], count: int) -> list[int]:
    """At most `count` numbers, evenly spread over the ranges."""
    every = np.concatenate([np.arange(*span) for span in spans])
    chosen = np.linspace(0, len(every) - 1, min(count, len(every))).astype(int)
    return [int(number) for number in every[np.unique(chosen)]]


def _by_label(
    reader: ShardReader, spans: Sequence[tuple[int, int]], most: int
) -> dict[int, list[int]]:
    """The first `most` samples of each class."""
    by_label: dict[int, list[int]] = {}
    starts = reader.index.starts
    for shard in range(len(starts) - 1):
        start = int(starts[shard])
        if any(low <= start < high for low, high in spans):
            labels = reader.index.rows(shard)["label"]
            for label in np.unique(labels).tolist():
                known = by_label.setdefault(label, [])
                known += (np.flatnonzero(labels == label)[: most - len(known)] + start).tolist()
    return by_label


def _choose(by_class: Mapping[int, Sequence[int]], count: int) -> list[int]:
    """`count` samples: one of each class in turn; with more classes than that, evenly spread."""
    classes = sorted(by_class)
    if len(classes) > count:
        spread = np.linspace(0, len(classes) - 1, count).astype(int)
        classes = [classes[index] for index in spread]
    queues = [iter(by_class[label]) for label in classes]
    chosen: dict[int, None] = {}
    while queues and len(chosen) < count:
        for queue in list(queues):
            number = next((n for n in queue if n not in chosen), None)
            if number is None:
                queues.remove(queue)
            elif len(chosen) < count:
                chosen[number] = None
    return list(chosen)


def _classes_in(annotation: Annotation | None, label: int) -> list[int]:
    if isinstance(annotation, Objects):
        return sorted(set(annotation.labels.tolist())) or [_EMPTY]
    if isinstance(annotation, Mask):
        return np.flatnonzero(np.bincount(annotation.pixels.ravel())[:255]).tolist() or [_EMPTY]
    return [label]


def _annotation(
    card: Card, stored: Stored, height: int, width: int, where: str
) -> Annotation | None:
    kind = ANNOTATION_EXTENSIONS.get(card.task)
    if kind == "json":
        return decode_objects(
            stored.note, height=height, width=width, classes=len(card.classes), where=where
        )
    if kind == "mask.png":
        return decode_mask(
            stored.note, height=height, width=width, classes=len(card.classes), where=where
        )
    return None


def _open(card: Card, split: str, reader: ShardReader, number: int) -> Sample:
    stored = reader.read(number)
    where = f"{split}, sample {stored.key}"
    if stored.label >= len(card.classes):
        raise TesseraError(
            f"{where} has the class {stored.label}, and there are {len(card.classes)} classes",
            hint="pack the data set again",
        )
    with reading_images(reader.reading):
        image = open_image(stored.image, where)
        annotation = _annotation(card, stored, image.height, image.width, where)
    return Sample(split, stored.key, image, annotation, stored.label)


def _open_pairs(
    card: Card, readers: Mapping[str, ShardReader], rows: list[PairRow], remote: bool
) -> list[tuple[PairRow, Sample | None, Sample | None]]:
    """The first pairs with their images. Of a remote set only the rows: each image would be a
    shard to download."""
    shown = rows[:SHOWN_PAIRS]
    if remote:
        return [(row, None, None) for row in shown]
    sides = [(side.split, side.key) for row in shown for side in (row.left, row.right)]
    samples = _open_all(card, readers, sides)

    def opened(side: Side) -> Sample | None:
        return samples.get((side.split, side.key))

    return [(row, opened(row.left), opened(row.right)) for row in shown]


def _open_suspects(
    card: Card, readers: Mapping[str, ShardReader], suspects: Sequence[Suspect]
) -> list[tuple[Suspect, Sample]]:
    samples = _open_all(card, readers, [(one.split, one.key) for one in suspects])
    return [(one, samples[one.split, one.key]) for one in suspects]


def _open_copies(
    card: Card, readers: Mapping[str, ShardReader], groups: Sequence[CopyGroup], remote: bool
) -> list[tuple[CopyGroup, list[Sample]]]:
    """The groups, the first ones of a local set with their first images."""
    shown = [] if remote else groups[:SHOWN_GROUPS]
    names = [(group.split, image.key) for group in shown for image in group.images[:SHOWN_COPIES]]
    samples = _open_all(card, readers, names)
    return [
        (group, [samples[n] for i in group.images if (n := (group.split, i.key)) in samples])
        for group in groups
    ]


def _open_all(
    card: Card, readers: Mapping[str, ShardReader], names: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], Sample]:
    """The samples with these splits and keys; those that there aren't are missing."""
    wanted: dict[str, set[str]] = {}
    for split, key in names:
        wanted.setdefault(split, set()).add(key)
    return {
        (split, key): _open(card, split, readers[split], number)
        for split, keys in wanted.items()
        if split in readers
        for key, number in _find(readers[split], keys).items()
    }


def _find(reader: ShardReader, keys: Iterable[str]) -> dict[str, int]:
    """Numbers of the samples with these keys."""
    numbers: dict[str, int] = {}
    wanted = np.array([key.encode("ascii", "replace") for key in keys])
    for shard, start in enumerate(reader.index.starts[:-1].tolist()):
        names: Any = reader.index.rows(shard)["key"]
        for row in np.flatnonzero(np.isin(names, wanted)).tolist():
            numbers[names[row].decode("ascii")] = start + row
    return numbers
