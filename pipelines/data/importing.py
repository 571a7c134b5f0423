"""From a raw source to a packed data set.

In: a folder of images, or the word of a bundled set. Out: shards and a card, or one clear error and
nothing written. Must not know Ray or MLflow. An importer is a file in `importers/`; the folder is
the registry, and `sources.py` says what it has.

Splits: what the source has is taken (`train`, `val` or `valid` or `validation`, `test`); of `val`
and `test`, what is missing is cut from `train`, a tenth of each class, chosen by a hash of seed and
key. Within a split the samples are packed in hashed order, so that each shard is a mixture.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.core.errors import TesseraError, UsageError, unknown
from pipelines.data import importers
from pipelines.data.card import FILE, SPLITS, Card, Split
from pipelines.data.packing import Rejections, Tally, stage, write_last
from pipelines.data.samples import encode_png, open_image, sniff
from pipelines.data.shards import SHARD_SAMPLES, Packed, write
from pipelines.data.sources import IMAGE_SUFFIXES, Item, Source, find_images

SHARE = 0.1
"""Share of each train class that a missing `val` or `test` gets; at least one of three images."""
Progress = Callable[[int, int], None]
"""Called with the number of samples looked at, and of all."""
_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def formats() -> list[str]:
    """Names of all importers, without importing one."""
    return sorted(m.name for m in pkgutil.iter_modules(importers.__path__) if not m.ispkg)


def importer(name: str) -> Any:
    """The importer called `name`; raises UsageError with the nearest known name."""
    if name not in formats():
        raise unknown("format", name, formats())
    return importlib.import_module(f"{importers.__name__}.{name}")


def recognise(source: str) -> tuple[str, str]:
    """(format, what speaks for it). Raises TesseraError where none or several fit."""
    found = {name: importer(name).recognises(source) for name in formats()}
    fitting = {name: why for name, why in found.items() if why}
    if len(fitting) == 1:
        return next(iter(fitting.items()))
    if fitting:
        listed = "; ".join(f"{name} ({why})" for name, why in fitting.items())
        raise UsageError(f"{source} could be {listed}", mend="say which: --format NAME")
    folder = Path(source)
    if not folder.exists():
        words = ", ".join(name for name in formats() if importer(name).recognises(name))
        raise UsageError(
            f"there is no {source}", mend=f"give a folder, or the name of a bundled set: {words}"
        )
    if not folder.is_dir():
        raise UsageError(f"{source} is a file", mend="give the folder with the images; unpack it")
    if next(find_images(folder), None) is None:
        raise TesseraError(
            f"{source} has no images", mend=f"files named {' '.join(sorted(IMAGE_SUFFIXES))} count"
        )
    raise TesseraError(
        f"{source} is of no known format ({', '.join(formats())})",
        mend="put each class in a folder of its own: SOURCE/CLASS/IMAGE.jpg",
    )


def pack(
    source: str,
    to: Path,
    *,
    format: str | None = None,
    name: str | None = None,
    licence: str = "",
    seed: int = 0,
    shard_samples: int = SHARD_SAMPLES,
    allow_rejected: str = "0",
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Card:
    """Packs `source` into the new folder `to` and gives the card.

    `allow_rejected` is how many samples may fail their check: a number, or a share like "0.5%".
    Raises TesseraError, and leaves nothing behind, for an occupied `to`, a source without images,
    an empty class, or more rejected samples than allowed. The same input gives the same bytes.
    """
    if shard_samples < 1:
        raise UsageError(f"{shard_samples} samples a shard are too few", mend="give 1 or more")
    with stage(to) as folder:
        chosen, why = (format, "as told") if format else recognise(source)
        reader = importer(chosen)
        say(f"{source} is read as {chosen}: {why}")
        found: Source = reader.read(source, {})
        for note in found.notes:
            say(note)
        rejections = Rejections(allow_rejected, len(found.items))
        splits = split_items(_without_duplicates(found.items, rejections), seed)
        _check_classes(splits, found.classes, source)
        tally, cards = Tally(), {}
        seen = _Counter(len(found.items), progress)
        for split, items in splits.items():
            counts = dict.fromkeys(found.classes, 0)
            samples = _check(items, found, split, tally, rejections, counts, seen)
            card = write(folder, split, samples, shard_samples=shard_samples)
            cards[split] = card.model_copy(update={"class_counts": counts})
        rejections.judge(folder)
        _check_left(cards["train"].class_counts, source)
        sealed = Card(
            name=name or found.name,
            task=found.task,
            classes=found.classes,
            image=tally.card(),
            splits=cards,
            source=f"{chosen}:{found.name}",
            licence=licence,
            rejected=rejections.count,
        ).sealed()
        write_last(folder / FILE, sealed.to_json())
    return sealed


def split_items(items: Iterable[Item], seed: int) -> dict[Split, list[Item]]:
    """Items by split, each in the order in which it is packed."""
    given: dict[Split, list[Item]] = {split: [] for split in SPLITS}  # type: ignore[misc]
    for item in items:
        given[item.split or "train"].append(item)
    if not given["train"]:
        raise TesseraError(
            "the source has no train images", mend="name the folder with the train images: train"
        )
    missing: list[Split] = [split for split in ("val", "test") if not given[split]]
    if missing:
        given.update(_cut(given["train"], missing, seed))
    return {
        split: sorted(chosen, key=lambda item: _rank(f"order {seed}", item.key))
        for split, chosen in given.items()
        if chosen
    }


def _cut(items: list[Item], missing: list[Split], seed: int) -> dict[Split, list[Item]]:
    parts: dict[Split, list[Item]] = {"train": [], **{split: [] for split in missing}}
    by_class: dict[int | None, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.label, []).append(item)
    for members in by_class.values():
        members.sort(key=lambda item: _rank(f"split {seed}", item.key))
        count = max(int(len(members) * SHARE + 0.5), 1) if len(members) >= 3 else 0
        for place, split in enumerate(missing):
            parts[split] += members[place * count : (place + 1) * count]
        parts["train"] += members[len(missing) * count :]
    return parts


def _rank(salt: str, key: str) -> bytes:
    return hashlib.sha256(f"{salt} {key}".encode()).digest()


def _without_duplicates(items: Sequence[Item], rejections: Rejections) -> list[Item]:
    first: dict[str, Item] = {}
    for item in items:
        other = first.setdefault(item.key, item)
        if other is not item:
            detail = f"{item.origin} has the key of {other.origin}"
            rejections.add(item.key, item.origin, "duplicate key", detail)
    return list(first.values())


def _check(
    items: list[Item],
    source: Source,
    split: Split,
    tally: Tally,
    rejections: Rejections,
    counts: dict[str, int],
    seen: _Counter,
) -> Iterator[Packed]:
    """The items that decode, as shard samples; what doesn't goes to `rejections`."""
    for item in items:
        seen.step()
        try:
            data = source.load(item)
            image = open_image(data, item.origin)
        except TesseraError as error:
            rejections.add(item.key, item.origin, "unreadable image", error.message)
            continue
        tally.add(image, counted=split == "train")
        extension = _EXTENSION.get(sniff(data) or "")
        if extension is None:
            extension, data = "png", encode_png(np.asarray(image))
        label = item.label or 0
        counts[source.classes[label]] += 1
        yield Packed(item.key, (extension, data), ("cls", b"%d" % label), label)


def _check_classes(splits: Mapping[Split, list[Item]], classes: Sequence[str], source: str) -> None:
    trained = {item.label or 0 for item in splits["train"]}
    for split, items in splits.items():
        strange = sorted({item.label or 0 for item in items} - trained)
        if strange:
            raise TesseraError(
                f"{source}: {split} has the class {classes[strange[0]]!r}, train has not",
                mend="each class needs train images; check the names of the class folders",
            )


def _check_left(counts: Mapping[str, int], source: str) -> None:
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise TesseraError(
            f"{source}: no train image of the class {empty[0]!r} is left",
            mend="see which were rejected, or remove the class",
        )


class _Counter:
    """Tells `progress` now and then: not at each sample, which would cost more than packing it."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def step(self) -> None:
        self._done += 1
        if self._progress and (self._done % 64 == 0 or self._done == self._total):
            self._progress(self._done, self._total)
