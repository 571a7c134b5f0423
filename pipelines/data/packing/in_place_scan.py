"""Scans existing WebDataset shards to index them in place.

In: a folder or an address with tars, and the meaning of their members. Out: an index and a card.
Nothing of a shard is copied or changed, and `ShardReader` reads the shards like packed ones. Must
not know how options are written.

A sample consists of consecutive members with the same name up to the first dot of the last part, as
in WebDataset, or up to the last dot on request. What macOS adds to tars (._x.jpg, __MACOSX) is
skipped and counted. Only the image and the label are read: the image is decoded once to check it.
No other member is read, and none is unpickled, whatever its name.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data.card import SPLITS, Card, Shard, Split, SplitCard
from pipelines.data.images import make_key, open_image
from pipelines.data.index import Rows, rows_of
from pipelines.data.packing.in_place_labels import Label, parse_label, settle_classes
from pipelines.data.packing.in_place_tars import Entry, entries
from pipelines.data.packing.statistics import ImageCounts, ImageStatistics
from pipelines.data.sample_error import SampleError
from pipelines.data.shards import finish_split
from pipelines.data.sources import MAX_FILE_BYTES
from pipelines.storage.base import Storage

UNKNOWN, DOTTED = "unknown member", "name with dots"
Progress = Callable[[int, int], None]
"""Called with the number of samples done, and an estimate of the total."""


@dataclass(frozen=True)
class SampleLayout:
    """Which members of a sample are its image and its label.

    image     extensions of the image, lower case, without the first dot
    label     member with the class; None for data without labels
    classes   names of the classes; empty for those that occur
    skip      whether to skip members with other extensions; otherwise their samples are rejected
    by_shard  whether to prefix keys with the shard's name, for data sets that repeat keys
    last_dot  whether a key ends at the last dot of a name, rather than at the first
    """

    image: frozenset[str]
    label: Label | None
    classes: tuple[str, ...]
    skip: bool
    by_shard: bool
    last_dot: bool = False

    def split(self, name: str) -> tuple[str, str]:
        """(key, extension) of a member; a leading `./` is removed."""
        folder, slash, last = name.removeprefix("./").rpartition("/")
        stem, _, extension = last.rpartition(".") if self.last_dot else last.partition(".")
        return folder + slash + stem, extension.lower()


@dataclass
class ScannedShard:
    """The samples of a shard. `rows` have no labels yet; `labels` are as written in the shard.
    `rejected` has (key, origin, reason, detail); `skipped` counts members by extension,
    `hidden` those of macOS."""

    shard: Shard
    rows: Rows
    labels: list[int | str]
    statistics: ImageCounts
    rejected: list[tuple[str, str, str, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    hidden: int = 0


def scan_all(
    storage: Storage,
    splits: dict[str, Split],
    layout: SampleLayout,
    progress: Progress | None = None,
) -> dict[str, ScannedShard]:
    """Scans the shards, several at a time, and returns their samples by path. `splits` has the
    split of each shard. Raises TesseraError for a tar that is damaged or has refused members, and
    for a duplicate key."""
    paths = list(splits)
    sizes = storage.sizes(paths)
    scanned: dict[str, ScannedShard] = {}
    samples = done = 0
    with (
        tempfile.TemporaryDirectory(prefix="tessera-index-") as folder,
        ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="tessera-index") as pool,
    ):
        work = partial(_scan, storage, Path(folder), layout)
        try:
            for path, shard in zip(
                paths, pool.map(work, paths, [splits[path] == "train" for path in paths])
            ):
                scanned[path] = shard
                samples += len(shard.rows) + len(shard.rejected)
                done += shard.shard.size_bytes
                if progress:
                    progress(samples, max(samples * sum(sizes.values()) // max(done, 1), samples))
        finally:
            pool.shutdown(cancel_futures=True)
    _check_keys(scanned)
    return scanned


def make_card(
    scanned: dict[str, ScannedShard], splits: dict[str, Split], layout: SampleLayout, folder: Path
) -> Card:
    """Writes the indices below `folder` and returns the card, without the fields that the caller
    fills in.

    Raises TesseraError if train has no samples, or a class has no train image.
    """
    classes, numbers = settle_classes(
        {path: shard.labels for path, shard in scanned.items()}, layout.classes
    )
    statistics = ImageStatistics()
    for shard in scanned.values():
        statistics.merge(shard.statistics)
        shard.rows["label"] = [numbers[label] for label in shard.labels] if classes else -1
    cards: dict[Split, SplitCard] = {}
    for split in SPLITS:
        shards = [
            scanned[path] for path, of in splits.items() if of == split and len(scanned[path].rows)
        ]
        if shards:
            cards[split] = _finish(folder, split, shards, classes)
    if "train" not in cards:
        raise TesseraError(
            "no train sample is in these shards", hint="see what was rejected, or name the splits"
        )
    for split, card in cards.items():
        for name, count in card.class_counts.items():
            if count and not cards["train"].class_counts[name]:
                raise TesseraError(
                    f"{split} has the class {name!r}, train doesn't",
                    hint="each class needs train images; see which shards are train",
                )
    return Card(
        name="",
        task="classification" if classes else "images",
        classes=classes,
        image=statistics.card(),
        splits=cards,
    )


def _finish(
    folder: Path, split: Split, shards: Sequence[ScannedShard], classes: tuple[str, ...]
) -> SplitCard:
    (folder / split).mkdir(exist_ok=True)
    card = finish_split(folder, split, [(shard.shard, shard.rows) for shard in shards])
    if not classes:
        return card
    labels = np.concatenate([shard.rows["label"] for shard in shards])
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    return card.model_copy(update={"class_counts": dict(zip(classes, counts))})


def _scan(
    storage: Storage, folder: Path, layout: SampleLayout, path: str, counted: bool
) -> ScannedShard:
    where = f"shard {path} of {storage.where}"
    if not storage.remote:
        if not Path(storage.where, path).is_file():  # reading a pipe would block
            raise TesseraError(f"{where} is not a regular file")
        with Path(storage.where, path).open("rb") as file:
            return _read(file, path, where, layout, counted)
    with tempfile.NamedTemporaryFile(dir=folder) as copy:
        storage.download(path, Path(copy.name))
        return _read(copy, path, where, layout, counted)


def _read(stream: Any, path: str, where: str, layout: SampleLayout, counted: bool) -> ScannedShard:
    file = stream.fileno()
    keys: list[str] = []
    rows: list[tuple[int, ...]] = []
    labels: list[int | str] = []
    rejected, skipped, statistics = [], Counter[str](), ImageStatistics()
    seen: dict[str, int] = {}
    hidden = Counter[bool]()
    visible = _visible(entries(file, where), hidden)
    for stem, group in groupby(visible, lambda entry: layout.split(entry.name)[0]):
        members = list(group)
        _check_apart(stem, members, seen, where)
        key = make_key(f"{Path(path).stem}/{stem}" if layout.by_shard else stem)
        try:
            image, label = _choose(members, layout, skipped)
            if image is None:
                continue
            data = os.pread(file, image.size, image.start)
            value = _label(file, label, layout)
            statistics.add(_open(data, f"{path}: {image.name}"), counted=counted)
        except SampleError as error:
            rejected.append((key, f"{path}: {stem}", error.reason, error.message))
            continue
        keys.append(key)
        rows.append((image.start, image.size, 0, image.size, 0, 0, zlib.crc32(data), -1))
        labels.append(value)
    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    size = os.fstat(file).st_size
    shard = Shard(path=path, samples=len(keys), size_bytes=size, sha256=sha256, rows_sha256="")
    table, counts = rows_of(keys, rows), statistics.counts()
    return ScannedShard(shard, table, labels, counts, rejected, skipped, hidden[True])


def _visible(members: Iterable[Entry], hidden: Counter[bool]) -> Iterator[Entry]:
    """The members without those of macOS, which are counted."""
    for member in members:
        hidden[_is_hidden(member.name)] += 1
        if not _is_hidden(member.name):
            yield member


def _is_hidden(name: str) -> bool:
    """Whether a member is what macOS adds to a tar beside each file."""
    *folders, last = name.split("/")
    return last.startswith("._") or last == ".DS_Store" or "__MACOSX" in folders


def _check_apart(stem: str, members: Sequence[Entry], seen: dict[str, int], where: str) -> None:
    start = members[0].start
    if stem in seen:
        raise TesseraError(
            f"{where} has the key {stem!r} twice, at bytes {seen[stem]:,} and {start:,}",
            hint="the members of a sample must follow each other, and no two samples share a key",
        )
    seen[stem] = start
    twice = [name for name, count in Counter(m.name for m in members).items() if count > 1]
    if twice:
        starts = [f"{member.start:,}" for member in members if member.name == twice[0]]
        raise TesseraError(
            f"{where} has the member {twice[0]!r} twice, at bytes {' and '.join(starts)}",
            hint="two samples of one key follow each other; give them different keys",
        )


def _choose(
    members: Sequence[Entry], layout: SampleLayout, skipped: Counter[str]
) -> tuple[Entry | None, Entry | None]:
    """The image and the label of a sample; None for both if all its members are skipped."""
    kinds = [(layout.split(member.name)[1], member) for member in members]
    images = [member for extension, member in kinds if extension in layout.image]
    label = layout.label.extension if layout.label else None
    labels = [member for extension, member in kinds if extension == label]
    others = [(e, m) for e, m in kinds if m not in images and m not in labels]
    for extension, member in [] if images else others:
        if extension.rpartition(".")[2] in {*layout.image, label}:
            raise SampleError(
                DOTTED,
                f"{member.name}: a key ends at the first dot of a name, so the key is "
                f"{layout.split(member.name)[0]!r}, and .{extension} is neither image nor label",
            )
    if others and not layout.skip:
        raise SampleError(UNKNOWN, f"{others[0][1].name} is neither the image nor the label")
    skipped.update(extension for extension, _ in others)
    if not images and not labels:
        return None, None
    if len(images) != 1:
        what = f"{len(images)} images" if images else "no image"
        raise SampleError(what if not images else "several images", f"{members[0].name} has {what}")
    if layout.label and not labels:
        raise SampleError("no label", f"{images[0].name} has no .{label} member")
    if images[0].size > MAX_FILE_BYTES:
        raise SampleError("unreadable image", f"{images[0].name} has {images[0].size:,} bytes")
    return images[0], labels[0] if labels else None


def _label(file: int, member: Entry | None, layout: SampleLayout) -> int | str:
    if member is None or layout.label is None:
        return ""
    limit = layout.label.limit
    if member.size > limit:
        raise SampleError(
            "unknown class", f"{member.name} has {member.size:,} bytes, too many for a label"
        )
    data = os.pread(file, member.size, member.start)
    return parse_label(data, member.name, layout.label, layout.classes)


def _open(data: bytes, where: str) -> Image.Image:
    try:
        return open_image(data, where)
    except TesseraError as error:
        raise SampleError("unreadable image", error.message) from None


def _check_keys(scanned: dict[str, ScannedShard]) -> None:
    """Raises TesseraError for a key in two shards. Within a shard `_check_apart` checks it."""
    for key, first, second in _duplicate_keys(scanned):
        raise TesseraError(
            f"the key {key!r} is in shard {first} and in shard {second}",
            hint="if shards repeat keys, put the shard's name before them: --option keys=shard",
        )


def _duplicate_keys(scanned: dict[str, ScannedShard]) -> Iterator[tuple[str, str, str]]:
    tables = [(path, shard.rows["key"]) for path, shard in scanned.items() if len(shard.rows)]
    if not tables:
        return
    keys = np.concatenate([table for _, table in tables])
    owners = np.repeat(np.arange(len(tables)), [len(table) for _, table in tables])
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    for index in same.tolist():
        first, second = owners[order[index]], owners[order[index + 1]]
        yield keys[order[index]].decode(), tables[first][0], tables[second][0]
