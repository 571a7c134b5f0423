"""One shard from its items: the unit of work of a pack.

In: `PackSpec`, the same for all shards, and a `ShardPlan`; both are plain data and go to other
processes. Out: the shard and its record. The bytes depend on the items only, not on which process
packs them or in which order. Must not know how shards are planned or distributed.
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
from pipelines.data import annotations as annotation_ops
from pipelines.data import duplicates
from pipelines.data.annotations import Damage, Objects
from pipelines.data.card import Shard, Split
from pipelines.data.image_formats import list_frames, sniff
from pipelines.data.image_reading import ImageReading, reading_images
from pipelines.data.images import encode_png, open_image
from pipelines.data.packing import shard_records
from pipelines.data.packing.shard_records import ShardRecord
from pipelines.data.packing.statistics import ImageStatistics, dropped_object, rejection
from pipelines.data.sample_error import SampleError
from pipelines.data.shards import Packed, write_shard
from pipelines.data.sources import Item, Source
from pipelines.storage.base import Storage
from pipelines.storage.open import open_storage

TWO_SPLITS = "image in two splits"
IMAGE_EXTENSION_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_PNG_DEPTH = 24
"""Where a PNG has the number of bits of a channel."""
_QUALITY = 90
_REDUCING_GAP = 3.0
"""Pillow shrinks by integer factors first, to this many times the size; the result looks the
same."""


@dataclass(frozen=True)
class PackSpec:
    """What all shards of a pack have in common.

    source   the source, without its items
    where    the folder or address that shards and records are written to
    scratch  a local folder on the same disk for temporary files; None for the system's own
    plan     digest of the plan and the options of the pack
    resize   images whose shorter side has more pixels are shrunk to it
    quality  of the JPEGs that shrinking makes; None keeps PNGs as PNGs
    drop     whether a damaged object is dropped; otherwise its image is rejected
    reading  how image files are read
    """

    source: Source
    where: str
    scratch: Path | None
    plan: str
    resize: int | None = None
    quality: int | None = None
    drop: bool = False
    reading: ImageReading = field(default_factory=ImageReading)


@dataclass(frozen=True)
class ShardPlan:
    """A shard to pack: its items in order. `without` are keys to leave out, each with the details
    for `rejected.jsonl`."""

    split: Split
    path: str
    items: tuple[Item, ...]
    without: Mapping[str, str] = field(default_factory=dict)


class Sample(NamedTuple):
    """An item that passed its checks.

    image        the image as packed
    fingerprint  of the original image
    counts       1 for its class, or its objects or pixels of each class
    dropped      objects that are left out
    frames       of its file, of which it is one
    """

    packed: Packed
    image: Image.Image
    fingerprint: bytes
    counts: list[int]
    dropped: tuple[Damage, ...] = ()
    frames: int = 1


def pack_shard(
    spec: PackSpec, shard_plan: ShardPlan, step: Callable[[], None] = lambda: None
) -> ShardRecord:
    """Packs a shard. Raises TesseraError or OSError if it can't be written.

    Items that fail their check are listed in the record. `step` is called after each item.
    """
    stamps = stamp_files(spec.source, shard_plan.items)
    contents = _ShardContents(len(spec.source.classes))
    storage = open_storage(spec.where)
    with tempfile.TemporaryDirectory(dir=spec.scratch) as folder:
        file = Path(folder) / "shard.tar"
        shard, table = write_shard(file, shard_plan.path, contents.samples(spec, shard_plan, step))
        if shard.samples:
            storage.put(file, shard_plan.path)
        else:  # an earlier pack of it, without `without`, may have had some
            storage.remove(shard_plan.path)
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
        dropped=tuple(contents.dropped),
        rows=shard_records.digest(rows),
        fingerprints=shard_records.digest(encoded),
    )
    shard_records.save(storage, record, rows, encoded)
    return record


class _ShardContents:
    """What is counted while a shard's samples are written."""

    def __init__(self, classes: int) -> None:
        self.statistics = ImageStatistics()
        self.counts = np.zeros(classes, np.int64)
        self.fingerprints: list[bytes] = []
        self.rejected: list[dict[str, str]] = []
        self.dropped: list[dict[str, str]] = []

    def samples(
        self, spec: PackSpec, shard_plan: ShardPlan, step: Callable[[], None]
    ) -> Iterator[Packed]:
        for item in shard_plan.items:
            sample = self._prepare(spec, shard_plan, item)
            step()
            if sample is not None:
                self.statistics.add(sample.image, counted=shard_plan.split == "train")
                self.statistics.add_frames(sample.frames)
                self.counts += np.array(sample.counts, np.int64)
                self.fingerprints.append(sample.fingerprint)
                self._note_dropped(spec.source, item, sample.dropped)
                yield sample.packed

    def _note_dropped(self, source: Source, item: Item, dropped: tuple[Damage, ...]) -> None:
        for damage in dropped:
            name = "" if damage.label is None else source.classes[damage.label]
            row = rejection(item.key, item.origin, damage.reason, damage.message)
            self.dropped.append(dropped_object(row, name))

    def _prepare(self, spec: PackSpec, shard_plan: ShardPlan, item: Item) -> Sample | None:
        hint, of_object = "", False
        if item.key in shard_plan.without:
            reason, detail = TWO_SPLITS, shard_plan.without[item.key]
        else:
            try:
                return prepare(spec, item)
            except TesseraError as error:
                reason = getattr(error, "reason", "unreadable image")
                detail = error.message
                hint, of_object = error.hint, getattr(error, "of_object", False)
        row = rejection(item.key, item.origin, reason, detail, hint)
        self.rejected.append({**row, "drop": "boxes"} if of_object else row)
        return None


def prepare(spec: PackSpec, item: Item) -> Sample:
    """An item as it is packed. Raises TesseraError, mostly SampleError, for one that can't be."""
    with reading_images(spec.reading):
        return _prepare(spec, item)


def _prepare(spec: PackSpec, item: Item) -> Sample:
    if item.problem:
        raise SampleError(*item.problem)
    source = spec.source
    data = source.load(item)
    frames = 1 if item.frame is not None else len(list_frames(data))
    image = open_image(data, item.origin, item.frame or 0)
    annotation, dropped = _annotate(spec, item, image) if source.annotate else (None, ())
    small = _shrink(image, spec.resize)
    extension = (
        None if _is_converted(spec, item, data) else IMAGE_EXTENSION_OF.get(sniff(data) or "")
    )
    if small is not image:
        extension, data = _encode(small, sniff(data), spec.quality)
    elif extension is None:
        extension, data = "png", encode_png(np.asarray(image))
    image_member, fingerprint = (extension, data), duplicates.fingerprint(image)
    if annotation is not None:
        if small is not image:
            annotation = annotation_ops.resize(
                annotation, (image.height, image.width), (small.height, small.width)
            )
            _check(source, item, small, annotation)
        counts = annotation_ops.count(annotation, len(source.classes))
        return Sample(
            Packed(item.key, image_member, annotation_ops.encode(annotation)),
            small,
            fingerprint,
            counts,
            dropped,
            frames,
        )
    counts = [0] * len(source.classes)
    if source.task != "classification":
        return Sample(Packed(item.key, image_member), small, fingerprint, counts, (), frames)
    label = _label(source, item)
    counts[label] = 1
    packed = Packed(item.key, image_member, ("cls", b"%d" % label), label)
    return Sample(packed, small, fingerprint, counts, (), frames)


def _is_converted(spec: PackSpec, item: Item, data: bytes) -> bool:
    """Whether the file, read on its own, has other pixels than those of the sample: it has other
    frames, or the user says what its values mean."""
    wide = sniff(data) == "PNG" and data[_PNG_DEPTH] == 16
    return item.frame is not None or (spec.reading.range is not None and wide)


def _label(source: Source, item: Item) -> int:
    if item.label is None or not 0 <= item.label < len(source.classes):
        raise SampleError(
            "unknown class",
            f"{item.origin} has the class {item.label}, there are {len(source.classes)} classes",
        )
    return item.label


def _annotate(
    spec: PackSpec, item: Item, image: Image.Image
) -> tuple[annotation_ops.Annotation, tuple[Damage, ...]]:
    """The annotation, checked, and the objects that are left out of it."""
    source = spec.source
    dropped: tuple[Damage, ...] = ()
    assert source.annotate is not None
    try:
        annotation = source.annotate(item)
    except SampleError:
        raise
    except TesseraError as error:
        raise SampleError("unreadable annotation", error.message, hint=error.hint) from None
    if spec.drop and isinstance(annotation, Objects):
        annotation, dropped = annotation_ops.drop_damaged(
            annotation,
            height=image.height,
            width=image.width,
            classes=len(source.classes),
            where=item.origin,
        )
    _check(source, item, image, annotation)
    return annotation, dropped


def _check(
    source: Source, item: Item, image: Image.Image, annotation: annotation_ops.Annotation
) -> None:
    annotation_ops.check(
        annotation,
        height=image.height,
        width=image.width,
        classes=len(source.classes),
        where=item.origin,
    )
    if source.task == "instance_segmentation":
        annotation_ops.check_masked(annotation, item.origin)


def _shrink(image: Image.Image, shorter: int | None) -> Image.Image:
    """The image, shrunk if its shorter side has more than `shorter` pixels."""
    if shorter is None or min(image.size) <= shorter:
        return image
    least = min(image.size)
    width, height = ((side * shorter * 2 + least) // (2 * least) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)


def _encode(image: Image.Image, form: str | None, quality: int | None) -> tuple[str, bytes]:
    """(extension, bytes) of an image that was shrunk. Lossy formats become JPEG."""
    if quality is None and form not in ("JPEG", "WEBP"):
        return "png", encode_png(np.asarray(image))
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=quality or _QUALITY)
    return "jpg", out.getvalue()


def stamp_files(source: Source, items: tuple[Item, ...]) -> str:
    """Digest of sizes and times of the files that the items come from."""
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
    except (OSError, ValueError):  # a NUL in a name from a table
        return b"-"
    return b"%d %d" % (found.st_size, found.st_mtime_ns)


def find_record(spec: PackSpec, shard_plan: ShardPlan) -> ShardRecord | None:
    """The record of a shard that was packed before; None if packing it again could change it."""
    storage = open_storage(spec.where)
    record = shard_records.load(storage, shard_plan.path)
    if record is None or record.plan != spec.plan or record.shard.path != shard_plan.path:
        return None
    if record.stamps != stamp_files(spec.source, shard_plan.items):
        return None
    if any(row["reason"] == TWO_SPLITS for row in record.rejected):
        return None  # whether a sample is in two splits depends on other shards
    if record.shard.samples and not _is_stored(spec, storage, record.shard):
        return None
    try:
        shard_records.load_rows(storage, record)
        shard_records.load_fingerprints(storage, record)
    except (TesseraError, ValueError):
        return None
    return None if _can_pack_rejected(spec, shard_plan, record) else record


def _is_stored(spec: PackSpec, storage: Storage, shard: Shard) -> bool:
    if storage.size(shard.path) != shard.size_bytes:
        return False
    if (
        spec.scratch is None
    ):  # an object store writes whole objects; reading them all would cost more than it saves
        return True
    path = storage.fetch(shard.path, size_bytes=shard.size_bytes, sha256=shard.sha256)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256


def _can_pack_rejected(spec: PackSpec, shard_plan: ShardPlan, record: ShardRecord) -> bool:
    """Whether a rejected sample can be packed now: a file that was unreadable for a while keeps its
    size and time."""
    rejected: dict[str, Any] = {row["key"]: row for row in record.rejected}
    for item in shard_plan.items:
        if item.key in rejected:
            try:
                prepare(spec, item)
            except TesseraError:
                continue
            return True
    return False
