"""Writes a corrected version of a packed data set: other classes, or without some samples.

In: a packed data set, and a corrections file. Out: a new data set with its own digest, whose card
has the digests of both. Must not know how the progress is shown.

Samples keep their order, their keys and the bytes of their images. A shard without corrections is
copied; of the others one at a time is in memory. If samples are dropped, the remaining images are
decoded for the statistics of the card. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from models.core.errors import TesseraError
from pipelines.data import annotations as annotation_ops
from pipelines.data import card as cards
from pipelines.data.card import (
    ANNOTATION_EXTENSIONS,
    FILE,
    SPLITS,
    AppliedCorrections,
    Card,
    NearDuplicates,
    Shard,
    Split,
    SplitCard,
)
from pipelines.data.image_formats import sniff
from pipelines.data.image_reading import reading_images
from pipelines.data.images import open_image
from pipelines.data.importers.support.reading import image_size
from pipelines.data.index import Rows
from pipelines.data.packing import account, near_duplicates, statistics
from pipelines.data.packing.corrections import (
    Change,
    Corrections,
    find_changes,
    read_corrections,
)
from pipelines.data.packing.shard import IMAGE_EXTENSION_OF
from pipelines.data.packing.staging import Stage, refuse_occupied, stage
from pipelines.data.packing.statistics import ImageStatistics, to_json_lines
from pipelines.data.shards import Packed, ShardReader, Stored, finish_split, write_shard
from pipelines.data.tar import damaged
from pipelines.storage.base import Storage
from pipelines.storage.open import open_storage

Progress = Callable[[int, int], None]
"""Called with the number of samples done, and of all samples."""
Counts = dict[Split, np.ndarray[Any, Any]]
_GONE = -2
_FORM = 1
"""Version of what is written: no other version's work is resumed."""
ALLOW_EMPTY = "--allow-empty-class"


def fix(
    where: str,
    corrections: str | os.PathLike[str],
    to: str | Path,
    *,
    name: str | None = None,
    allow_empty: bool = False,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Card:
    """Writes `where` with the corrections to `to`, a new folder or an address; returns its card.

    name         of the new data set; by default that of the old one
    allow_empty  whether a class may lose all its images of a split; a class that no split has any
                 more is removed from the list of classes

    Raises TesseraError for a data set that is indexed in place, for a correction that doesn't fit,
    and for a split or a class without samples. Then nothing is written.
    """
    card = cards.read(where)
    if card.root:
        raise TesseraError(
            f"{where} has only an index: its shards are those of {card.root}",
            hint="correct the labels there, and pack them again",
        )
    file = read_corrections(corrections)
    refuse_occupied(to)
    with ExitStack() as stack:
        readers: dict[Split, ShardReader] = {}
        for split in SPLITS:
            if split in card.splits and card.splits[split].samples:
                readers[split] = ShardReader(where, card, split)
                stack.callback(readers[split].close)
        indices = {split: reader.index for split, reader in readers.items()}
        changes = find_changes(file.rows, card, indices)
        if file.without_action:
            notify(f"rows without an action, not applied: {file.without_action:,}")
        staged = stack.enter_context(stage(to))
        staged.begin(_plan(card, file, name, allow_empty))
        rewriter = _Rewriter(where, card, readers, changes, staged, progress)
        rewriter.count(allow_empty=allow_empty, notify=notify)
        splits = rewriter.write()
        near = _copy_lists(open_storage(where), staged.storage, card, rewriter)
        fixed = card.model_copy(
            update={
                "name": name or card.name,
                "classes": rewriter.classes,
                "image": rewriter.statistics.card().read_with(card.image.reading)
                if rewriter.statistics
                else card.image,
                "splits": splits,
                "leakage": near,
                "corrections": (*card.corrections, _record(card, file, changes)),
            }
        ).sealed()
        staged.storage.write(FILE, cards.parse(fixed.to_json(), FILE).to_json().encode())
    return fixed


def _plan(card: Card, file: Corrections, name: str | None, allow_empty: bool) -> str:
    parts = ["fix", _FORM, card.digest, file.sha256, name, allow_empty]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _record(
    card: Card, file: Corrections, changes: Mapping[Split, Mapping[int, Change]]
) -> AppliedCorrections:
    every = [change for found in changes.values() for change in found.values()]
    dropped = sum(change.label is None for change in every)
    return AppliedCorrections(
        data_digest=card.digest,
        file_sha256=file.sha256,
        relabelled=len(every) - dropped,
        dropped=dropped,
    )


class _Rewriter:
    """Writes the shards and indices of the corrected data set.

    classes     the new list of classes
    statistics  of the remaining images; None if they are those of the old data set
    gone        keys of the dropped samples of each split
    """

    def __init__(
        self,
        where: str,
        card: Card,
        readers: Mapping[Split, ShardReader],
        changes: Mapping[Split, Mapping[int, Change]],
        staged: Stage,
        progress: Progress | None,
    ) -> None:
        self._card, self._readers, self._changes = card, readers, changes
        self._source, self._staged, self._progress = open_storage(where), staged, progress
        self._changed = {split: sorted(found) for split, found in changes.items()}
        self._done = 0
        self._is_labelled = ANNOTATION_EXTENSIONS[card.task] == "cls"
        self._old: Counts = {split: self._count_split(split) for split in readers}
        self._counts: Counts = {}
        self._new_labels = np.arange(len(card.classes))
        self.classes = card.classes
        self.gone: dict[str, set[str]] = {split: set() for split in readers}
        self.relabelled: dict[tuple[str, str], str] = {}
        every = [change for found in changes.values() for change in found.values()]
        dropping = any(change.label is None for change in every)
        self.statistics = ImageStatistics() if dropping else None

    def count(self, *, allow_empty: bool, notify: Callable[[str], None]) -> None:
        """Counts what each class has afterwards. Raises TesseraError for a split without samples
        and for a class that loses all its images of a split, unless `allow_empty`."""
        for split, reader in self._readers.items():
            found = self._changes[split]
            if sum(change.label is None for change in found.values()) == len(reader):
                raise TesseraError(
                    f"no {split} image is left: all {len(reader):,} are dropped",
                    hint="keep some: a split can't be removed",
                )
            counts = self._old[split].copy()
            for number, change in sorted(found.items()):
                self._count_change(split, reader.read(number), change, counts)
            self._counts[split] = counts
        if self._is_labelled:
            self._check_classes(allow_empty)
            return
        for label, name in enumerate(self._card.classes):
            if self._old["train"][label] and not self._counts["train"][label]:
                notify(f"no train image has the class {name!r} any more")

    def _count_split(self, split: Split) -> np.ndarray[Any, Any]:
        """int64 (classes,): the images, objects or pixels of each class before the corrections."""
        classes, index = self._card.classes, self._readers[split].index
        if not self._is_labelled:
            known = self._card.splits[split].class_counts
            return np.array([known.get(name, 0) for name in classes], np.int64)
        counts = np.zeros(len(classes), np.int64)
        for number in range(len(index.starts) - 1):
            counts += np.bincount(index.rows(number)["label"], minlength=len(classes))
        return counts

    def _count_change(
        self, split: Split, stored: Stored, change: Change, counts: np.ndarray[Any, Any]
    ) -> None:
        if change.label is None:
            self.gone[split].add(stored.key)
            counts -= np.array(self._count_sample(split, stored), np.int64)
        else:
            self.relabelled[split, stored.key] = self._card.classes[change.label]
            counts[stored.label] -= 1
            counts[change.label] += 1

    def _count_sample(self, split: Split, stored: Stored) -> list[int]:
        classes = len(self._card.classes)
        if self._is_labelled:
            return [int(label == stored.label) for label in range(classes)]
        if not ANNOTATION_EXTENSIONS[self._card.task]:
            return [0] * classes
        where = f"{split}, sample {stored.key}"
        height, width = image_size(stored.image, where)
        decode: Callable[..., annotation_ops.Annotation] = (
            annotation_ops.decode_mask
            if self._card.task == "semantic_segmentation"
            else annotation_ops.decode_objects
        )
        annotation = decode(stored.note, height=height, width=width, classes=classes, where=where)
        return annotation_ops.count(annotation, classes)

    def _check_classes(self, allow_empty: bool) -> None:
        total = np.sum(list(self._counts.values()), axis=0)
        for split, counts in self._counts.items():
            for label, name in enumerate(self._card.classes):
                if not self._old[split][label] or counts[label]:
                    continue
                others = [s for s in self._counts if self._counts[s][label]]
                if split == "train" and others:
                    raise TesseraError(
                        f"no train image of the class {name!r} is left, "
                        f"{' and '.join(others)} has some",
                        hint="drop or relabel those too, or keep a train image",
                    )
                if not allow_empty:
                    raise TesseraError(
                        f"no {split} image of the class {name!r} is left",
                        hint=f"keep one, or add {ALLOW_EMPTY}: a class that no split has is "
                        "removed from the list of classes",
                    )
        lost = np.sum(list(self._old.values()), axis=0).astype(bool) & (total == 0)
        kept = np.flatnonzero(~lost)
        self.classes = tuple(self._card.classes[label] for label in kept)
        self._new_labels[:] = -1
        self._new_labels[kept] = np.arange(len(kept))
        self._counts = {split: counts[kept] for split, counts in self._counts.items()}

    def write(self) -> dict[Split, SplitCard]:
        """Writes the shards and the index of each split; returns the cards."""
        scratch = self._staged.scratch()
        splits = {}
        with tempfile.TemporaryDirectory(dir=scratch) as temporary:
            for split, reader in self._readers.items():
                written = []
                for number in range(len(self._card.splits[split].shards)):
                    done = self._write_shard(split, reader, number, Path(temporary))
                    written += [done] if done[0].samples else []
                (Path(temporary) / split).mkdir()
                made = finish_split(Path(temporary), split, written)
                self._staged.storage.put(Path(temporary) / made.index, made.index)
                counts = dict(zip(self.classes, self._counts[split].tolist()))
                splits[split] = made.model_copy(update={"class_counts": counts})
        return splits

    def _write_shard(
        self, split: Split, reader: ShardReader, number: int, temporary: Path
    ) -> tuple[Shard, Rows]:
        shard = self._card.splits[split].shards[number]
        start = int(reader.index.starts[number])
        rows = reader.index.rows(number)
        labels = self._labels(split, start, rows)
        if np.array_equal(labels, rows["label"]):
            self._copy(shard)
            if self.statistics:
                for _ in self._samples(split, reader, start, labels):
                    pass
            else:
                self._advance(shard.samples)
            return shard, rows
        file = temporary / "shard.tar"
        made = write_shard(file, shard.path, self._samples(split, reader, start, labels))
        if made[0].samples:
            self._staged.storage.put(file, shard.path)
        return made

    def _labels(self, split: Split, start: int, rows: Rows) -> np.ndarray[Any, Any]:
        """int64 (N,): the new classes; -1 for tasks without, `_GONE` for a dropped sample."""
        labels = rows["label"].astype(np.int64)
        if self._is_labelled:
            labels = self._new_labels[labels]
        changed = self._changed[split]
        first, last = (bisect_left(changed, n) for n in (start, start + len(rows)))
        for number in changed[first:last]:
            label = self._changes[split][number].label
            labels[number - start] = _GONE if label is None else self._new_labels[label]
        return labels

    def _samples(
        self, split: Split, reader: ShardReader, start: int, labels: np.ndarray[Any, Any]
    ) -> Iterator[Packed]:
        note_extension = ANNOTATION_EXTENSIONS[self._card.task]
        for number, label in enumerate(labels.tolist(), start):
            self._advance(1)
            if label == _GONE:
                continue
            stored = reader.read(number)
            if self.statistics:
                with reading_images(reader.reading):
                    image = open_image(stored.image, f"{split}, sample {stored.key}")
                self.statistics.add(image, counted=split == "train")
            note = (note_extension, b"%d" % label if self._is_labelled else stored.note)
            extension = IMAGE_EXTENSION_OF[sniff(stored.image) or ""]
            packed = (extension, stored.image)
            yield Packed(stored.key, packed, note if note_extension else None, label)

    def _copy(self, shard: Shard) -> None:
        path = self._source.fetch(shard.path, size_bytes=shard.size_bytes, sha256=shard.sha256)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise damaged(f"shard {shard.path} of {self._source.where}: checksum differs")
        self._staged.storage.upload(path, shard.path)

    def _advance(self, samples: int) -> None:
        self._done += samples
        total = sum(map(len, self._readers.values()))
        if self._progress and (samples > 1 or self._done % 64 == 0 or self._done == total):
            self._progress(self._done, total)


def _copy_lists(
    source: Storage, target: Storage, card: Card, rewriter: _Rewriter
) -> NearDuplicates:
    """Copies the lists of the data set, without the dropped samples; returns the counts of near
    duplicates."""
    for file in (statistics.REJECTED, account.FILE):
        if source.size(file) is not None:
            target.write(file, source.read(file))
    copies = list(_copies(_read_lines(source, near_duplicates.COPIES), rewriter))
    if copies:
        target.write(near_duplicates.COPIES, to_json_lines(copies))
    pairs = _read_lines(source, near_duplicates.FILE)
    kept = [row for row in pairs if not any(_is_gone(row[s], rewriter) for s in ("left", "right"))]
    if kept:
        target.write(near_duplicates.FILE, to_json_lines(kept))
    if len(kept) == len(pairs):
        return card.leakage
    sides = {(row[s]["split"], row[s]["key"]) for row in kept for s in ("left", "right")}
    return NearDuplicates(near=len(kept), images=len(sides))


def _copies(groups: Sequence[Mapping[str, Any]], rewriter: _Rewriter) -> Iterator[dict[str, Any]]:
    for group in groups:
        images = [
            {**image, "class": name} if name else dict(image)
            for image in group["images"]
            if image["key"] not in rewriter.gone.get(group["split"], ())
            for name in [rewriter.relabelled.get((group["split"], image["key"]))]
        ]
        if len(images) > 1:
            yield {**group, "images": images}


def _is_gone(side: Mapping[str, Any], rewriter: _Rewriter) -> bool:
    return side["key"] in rewriter.gone.get(side["split"], ())


def _read_lines(storage: Storage, file: str) -> list[Any]:
    if storage.size(file) is None:
        return []
    try:
        return [json.loads(line) for line in storage.read(file).splitlines()]
    except ValueError:
        raise damaged(f"{storage.where}/{file} can't be read") from None
