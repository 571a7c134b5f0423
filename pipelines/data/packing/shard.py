"""One shard from its items: the unit of work of a pack.

In: `PackSpec`, the same for all shards, and a `ShardPlan`; both are plain data and go to other processes.
Out: the shard at its place with a receipt beside it. The bytes depend on the items alone, not on who
packs them or in which order. Must not know how parts are cut or spread.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data import annotations as notes
from pipelines.data import duplicates
from pipelines.data.card import Shard, Split
from pipelines.data.images import encode_png, open_image, sniff
from pipelines.data.packing import shard_records
from pipelines.data.packing.shard_records import ShardRecord
from pipelines.data.packing.statistics import ImageStatistics, rejection
from pipelines.data.sample_error import SampleError
from pipelines.data.shards import Packed, write_shard
from pipelines.data.sources import Item, Source
from pipelines.storage.base import Storage
from pipelines.storage.open import open_storage

TWO_SPLITS = "image in two splits"
_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_QUALITY = 90
_REDUCING_GAP = 3.0
"""Pillow shrinks by whole factors first, down to so many times the size; no difference is seen."""


@dataclass(frozen=True)
class PackSpec:
    """What all shards of a pack have in common.

    source   without its items
    where    the folder or address to which shards and receipts go
    scratch  a local folder on the same disk, for files on their way; None for the system's own
    plan     digest of all that is to be packed, and how
    resize   most pixels that the shorter side of an image keeps
    quality  of the JPEGs that are made where images shrink; None keeps PNG what was PNG
    """

    source: Source
    where: str
    scratch: Path | None
    plan: str
    resize: int | None = None
    quality: int | None = None


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be: its items in their order. `without` are keys that are left out after all, each
    with what is said of it in `rejected.jsonl`."""

    split: Split
    path: str
    items: tuple[Item, ...]
    without: Mapping[str, str] = field(default_factory=dict)


class Sample(NamedTuple):
    """An item that has passed its checks. `image` is the one that is packed; `print` is the
    fingerprint of the one that was given; `counts` are its objects or pixels of each class."""

    packed: Packed
    image: Image.Image
    print: bytes
    counts: list[int]


def pack_shard(
    spec: PackSpec, shard_plan: ShardPlan, step: Callable[[], None] = lambda: None
) -> ShardRecord:
    """Packs a shard, or raises TesseraError or OSError where it can't be written.

    Items that fail their check are in the receipt. `step` is called after each item.
    """
    stamps = stamp_files(spec.source, shard_plan.items)
    contents = _ShardContents(len(spec.source.classes))
    place = open_storage(spec.where)
    with tempfile.TemporaryDirectory(dir=spec.scratch) as folder:
        file = Path(folder) / "shard.tar"
        shard, table = write_shard(file, shard_plan.path, contents.samples(spec, shard_plan, step))
        if shard.samples:
            place.put(file, shard_plan.path)
        else:  # it may have had some before, when nothing was known of `without`
            place.remove(shard_plan.path)
    rows = shard_records.encode(table)
    fingerprints = np.frombuffer(b"".join(contents.fingerprints), np.uint8).reshape(
        -1, duplicates.SIZE
    )
    encoded = shard_records.encode(fingerprints)
    record = ShardRecord(
        plan=spec.plan,
        stamps=stamps,
        shard=shard,
        statistics=contents.statistics.counts(),
        counts=tuple(contents.counts.tolist()),
        rejected=tuple(contents.rejected),
        rows=shard_records.digest(rows),
        fingerprints=shard_records.digest(encoded),
    )
    shard_records.save(place, record, rows, encoded)
    return record


class _ShardContents:
    """What is noted while a shard's samples go by."""

    def __init__(self, classes: int) -> None:
        self.statistics = ImageStatistics()
        self.counts = np.zeros(classes, np.int64)
        self.fingerprints: list[bytes] = []
        self.rejected: list[dict[str, str]] = []

    def samples(
        self, spec: PackSpec, shard_plan: ShardPlan, step: Callable[[], None]
    ) -> Iterator[Packed]:
        for item in shard_plan.items:
            sample = self._look(spec, shard_plan, item)
            step()
            if sample is not None:
                self.statistics.add(sample.image, counted=shard_plan.split == "train")
                self.counts += np.array(sample.counts, np.int64)
                self.fingerprints.append(sample.print)
                yield sample.packed

    def _look(self, spec: PackSpec, shard_plan: ShardPlan, item: Item) -> Sample | None:
        if item.key in shard_plan.without:
            reason, detail = TWO_SPLITS, shard_plan.without[item.key]
        else:
            try:
                return prepare(spec, item)
            except TesseraError as error:
                reason = getattr(error, "reason", "unreadable image")
                detail = error.message
        self.rejected.append(rejection(item.key, item.origin, reason, detail))
        return None


def prepare(spec: PackSpec, item: Item) -> Sample:
    """An item as it goes into a shard. Raises TesseraError, mostly with a `reason`, for one that
    can't."""
    if item.problem:
        raise SampleError(*item.problem)
    source = spec.source
    data = source.load(item)
    image = open_image(data, item.origin)
    note = _annotate(source, item, image) if source.annotate else None
    small = _shrink(image, spec.resize)
    extension = _EXTENSION.get(sniff(data) or "")
    if small is not image:
        extension, data = _encode(small, sniff(data), spec.quality)
    elif extension is None:
        extension, data = "png", encode_png(np.asarray(image))
    image_part, print = (extension, data), duplicates.fingerprint(image)
    if note is not None:
        if small is not image:
            note = notes.resize(note, (image.height, image.width), (small.height, small.width))
            _check(source, item, small, note)
        counts = notes.count(note, len(source.classes))
        return Sample(Packed(item.key, image_part, notes.encode(note)), small, print, counts)
    counts = [0] * len(source.classes)
    if source.task != "classification":
        return Sample(Packed(item.key, image_part), small, print, counts)
    label = _label(source, item)
    counts[label] = 1
    packed = Packed(item.key, image_part, ("cls", b"%d" % label), label)
    return Sample(packed, small, print, counts)


def _label(source: Source, item: Item) -> int:
    if item.label is None or not 0 <= item.label < len(source.classes):
        raise SampleError(
            "unknown class",
            f"{item.origin} has the class {item.label}, there are {len(source.classes)}",
        )
    return item.label


def _annotate(source: Source, item: Item, image: Image.Image) -> notes.Annotation:
    assert source.annotate is not None
    try:
        note = source.annotate(item)
    except TesseraError as error:
        raise SampleError(
            getattr(error, "reason", "unreadable annotation"), error.message
        ) from None
    _check(source, item, image, note)
    return note


def _check(source: Source, item: Item, image: Image.Image, note: notes.Annotation) -> None:
    notes.check(
        note,
        height=image.height,
        width=image.width,
        classes=len(source.classes),
        where=item.origin,
    )
    if source.task == "instance_segmentation":
        notes.check_masked(note, item.origin)


def _shrink(image: Image.Image, shorter: int | None) -> Image.Image:
    """The same image where its shorter side has no more than `shorter` pixels."""
    if shorter is None or min(image.size) <= shorter:
        return image
    least = min(image.size)
    width, height = ((side * shorter * 2 + least) // (2 * least) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)


def _encode(image: Image.Image, form: str | None, quality: int | None) -> tuple[str, bytes]:
    """(extension, bytes) of an image that was shrunk. What was lossy before becomes JPEG."""
    if quality is None and form not in ("JPEG", "WEBP"):
        return "png", encode_png(np.asarray(image))
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=quality or _QUALITY)
    return "jpg", out.getvalue()


def stamp_files(source: Source, items: tuple[Item, ...]) -> str:
    """Digest of sizes and times of the files that the items are made of."""
    total = hashlib.sha256()
    seen: dict[Path, bytes] = {}
    for item in items:
        for path in source.files(item):
            if path not in seen:
                seen[path] = _stamp_file(path)
                total.update(b"%s %s\n" % (str(path).encode(errors="surrogateescape"), seen[path]))
    return total.hexdigest()


def _stamp_file(path: Path) -> bytes:
    try:
        found = path.stat()
    except (OSError, ValueError):  # a NUL in a name that a table gives
        return b"-"
    return b"%d %d" % (found.st_size, found.st_mtime_ns)


def find_record(spec: PackSpec, shard_plan: ShardPlan) -> ShardRecord | None:
    """The receipt of a shard that was packed before, where packing it again would change nothing."""
    place = open_storage(spec.where)
    record = shard_records.load(place, shard_plan.path)
    if record is None or record.plan != spec.plan or record.shard.path != shard_plan.path:
        return None
    if record.stamps != stamp_files(spec.source, shard_plan.items):
        return None
    if any(row["reason"] == TWO_SPLITS for row in record.rejected):
        return None  # whether it is in two splits hangs on other shards
    if record.shard.samples and not _is_there(spec, place, record.shard):
        return None
    try:
        shard_records.load_rows(place, record)
        shard_records.load_prints(place, record)
    except (TesseraError, ValueError):
        return None
    return None if _packs_now(spec, shard_plan, record) else record


def _is_there(spec: PackSpec, place: Storage, shard: Shard) -> bool:
    if place.size(shard.path) != shard.size_bytes:
        return False
    if spec.scratch is None:  # an object store gives whole objects; reading them all costs more
        return True
    path = place.fetch(shard.path, size_bytes=shard.size_bytes, sha256=shard.sha256)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256


def _packs_now(spec: PackSpec, shard_plan: ShardPlan, record: ShardRecord) -> bool:
    """Whether a sample that was rejected is good now: a file that couldn't be read for a while
    keeps its size and time."""
    rejected: dict[str, Any] = {row["key"]: row for row in record.rejected}
    for item in shard_plan.items:
        if item.key in rejected:
            try:
                prepare(spec, item)
            except TesseraError:
                continue
            return True
    return False
