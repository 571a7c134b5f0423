"""What goes into which shard, before any of it is packed.

In: a source's items. Out: a `PackPlan`, the same for the same input. Must not know where it is packed.

Splits: what the source has is taken (`train`, `val`, `test`); of `val` and `test`, what is missing is
cut from `train`, a tenth of each class, chosen by a hash of seed and key. Within a split the samples
are in hashed order, so that each shard is a mixture. Classes can be kept for `test` alone. All shards of a split have as many samples, give
or take one.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.core.errors import TesseraError
from pipelines.data.card import SPLITS, Split
from pipelines.data.packing.shard import PackSpec, ShardPlan, prepare
from pipelines.data.packing.statistics import rejection
from pipelines.data.shards import SHARD_BYTES, SHARD_SAMPLES
from pipelines.data.sources import Item, Source

SHARE = 0.1
"""Share of each train class that a missing `val` or `test` gets; at least one of three images."""
SAMPLED = 32
"""So many images are loaded to tell how many samples a shard of `SHARD_BYTES` has."""
_FORM = 1
"""Changes with what a plan means, so that no pack goes on with another's work."""


@dataclass(frozen=True)
class PackPlan:
    """The shards to be, and what is rejected already: rows of `rejected.jsonl`. `unseen` are
    classes that only `test` has, and `left_out` the images that are not packed for that."""

    parts: tuple[ShardPlan, ...]
    rejected: tuple[dict[str, str], ...]
    unseen: frozenset[int] = frozenset()
    left_out: int = 0

    @property
    def samples(self) -> int:
        """How many will be looked at."""
        return sum(len(shard_plan.items) for shard_plan in self.parts)

    @property
    def total(self) -> int:
        """How many the source has."""
        return self.samples + len(self.rejected)


def make_plan(
    source: Source,
    spec: PackSpec,
    *,
    seed: int,
    shard_samples: int | None,
    unseen: frozenset[int] = frozenset(),
) -> PackPlan:
    """Splits a source and cuts its splits into shards. Of the classes `unseen` train and val get no
    image, and test gets no other. Raises TesseraError for a source without train images, or where
    another class of another split has none."""
    _check_names(source)
    rejected: list[dict[str, str]] = []
    splits = split_items(_without_duplicates(source.items, rejected), seed)
    found = sum(map(len, splits.values()))
    if unseen:
        splits = _keep_apart(splits, source.classes, unseen)
    if source.task == "classification":
        _check_classes(splits, source.classes, source.name, unseen)
    most = shard_samples or _fitting(spec, splits["train"])
    parts = (
        shard_plan
        for split, items in splits.items()
        for shard_plan in _cut_parts(split, items, most)
    )
    left_out = found - sum(map(len, splits.values()))
    return PackPlan(tuple(parts), tuple(rejected), unseen, left_out)


def digest(plan: PackPlan, source: Source, how: Mapping[str, Any]) -> str:
    """64 hex digits over all that a plan says. `how` is how it is packed."""
    total = hashlib.sha256()
    head = [_FORM, source.name, source.task, source.classes, how, plan.rejected]
    total.update(json.dumps(head, sort_keys=True).encode())
    for shard_plan in plan.parts:
        total.update(f"\n{shard_plan.path}\n".encode())
        for item in shard_plan.items:
            values = (item.key, item.origin, item.label, item.row, item.problem)
            total.update(json.dumps(values).encode())
    return total.hexdigest()


def split_items(items: Iterable[Item], seed: int) -> dict[Split, list[Item]]:
    """Items by split, each in the order in which it is packed."""
    given: dict[Split, list[Item]] = {split: [] for split in SPLITS}
    for item in items:
        given[item.split or "train"].append(item)
    if not given["train"]:
        raise TesseraError(
            "the source has no train images", hint="name the folder with the train images: train"
        )
    missing: list[Split] = [split for split in ("val", "test") if not given[split]]
    if missing:
        given.update(_cut_splits(given["train"], missing, seed))
    return {
        split: sorted(chosen, key=lambda item: _rank(f"order {seed}", item.key))
        for split, chosen in given.items()
        if chosen
    }


def _keep_apart(
    splits: Mapping[Split, list[Item]], classes: Sequence[str], unseen: frozenset[int]
) -> dict[Split, list[Item]]:
    """The same without the unseen classes in train and val, and without the others in test."""
    kept = {  # what has no label stays, to be rejected
        split: [i for i in items if i.label is None or (i.label in unseen) == (split == "test")]
        for split, items in splits.items()
    }
    if not kept["train"]:
        raise TesseraError("no train image is left: all classes are unseen", hint="name fewer")
    tested = {item.label for item in kept.get("test", ())}
    for label in sorted(unseen - tested):
        raise TesseraError(
            f"test has no image of the unseen class {classes[label]!r}",
            hint="an unseen class needs test images, or 3 images of which some can be test's",
        )
    return {split: items for split, items in kept.items() if items}


def _cut_splits(items: list[Item], missing: list[Split], seed: int) -> dict[Split, list[Item]]:
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


def _without_duplicates(items: Sequence[Item], rejected: list[dict[str, str]]) -> list[Item]:
    first: dict[str, Item] = {}
    for item in items:
        other = first.setdefault(item.key, item)
        if other is not item:
            detail = f"{item.origin} has the key of {other.origin}"
            rejected.append(rejection(item.key, item.origin, "duplicate key", detail))
    return list(first.values())


def _check_names(source: Source) -> None:
    """Letters with marks have two forms in Unicode; names that differ in it alone are one name."""
    known: set[str] = set()
    for name in source.classes:
        if not name:
            raise TesseraError(f"{source.name} has a class without a name", hint="name it")
        if (plain := unicodedata.normalize("NFC", name)) in known:
            raise TesseraError(
                f"{source.name} has two classes that are called {name!r}",
                hint="rename one of them, or put them together",
            )
        known.add(plain)


def _check_classes(
    splits: Mapping[Split, list[Item]],
    classes: Sequence[str],
    source: str,
    unseen: frozenset[int],
) -> None:
    trained = {item.label for item in splits["train"]} | unseen
    for split, items in splits.items():
        labels = {item.label for item in items} - trained
        strange = [label for label in range(len(classes)) if label in labels]
        if strange:
            raise TesseraError(
                f"{source}: {split} has the class {classes[strange[0]]!r}, train has not",
                hint="each class needs train images; check the names of the class folders",
            )


def _fitting(spec: PackSpec, items: Sequence[Item]) -> int:
    """How many samples fill a shard, by the mean of the first ones."""
    sizes = []
    for item in items[:SAMPLED]:
        try:
            sizes.append(prepare(spec, item).packed.size_bytes)
        except TesseraError:  # comes again, and is noted, when it is packed
            continue
    mean = sum(sizes) // len(sizes) if sizes else 1
    return min(max(SHARD_BYTES // mean, 1), SHARD_SAMPLES)


def _cut_parts(split: Split, items: list[Item], most: int) -> Iterator[ShardPlan]:
    shards = -(-len(items) // most)
    for number in range(shards):
        start, stop = number * len(items) // shards, (number + 1) * len(items) // shards
        yield ShardPlan(split, f"{split}/{number:06d}.tar", tuple(items[start:stop]))
