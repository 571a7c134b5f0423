"""Assigns samples to splits and shards, before anything is packed.

In: a source's items. Out: a `PackPlan`, the same for the same input. Must not know where it is
packed.

Existing splits are kept; a missing `val` or `test` split is taken from `train`: a tenth of each
class, chosen by a hash of seed and key. Images that belong together, such as near duplicates, are
cut as one. Within a split the samples are in the order of a hash, so
that each shard is a mixture of classes. Classes can be kept for `test` only. The shards of a split
differ in size by at most one sample.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from models.core.errors import TesseraError
from pipelines.data.card import SPLITS, Split
from pipelines.data.packing.class_checks import find_alike
from pipelines.data.packing.shard import PackSpec, ShardPlan, prepare
from pipelines.data.packing.statistics import rejection
from pipelines.data.shards import SHARD_BYTES, SHARD_SAMPLES
from pipelines.data.sources import Item, Source

SHARE = 0.1
"""Share of each train class that a missing `val` or `test` gets: of three images or more, at least
one."""
CUT: tuple[Split, ...] = ("val", "test")
"""The splits that are taken from train if the source lacks them."""
Groups = Mapping[str, str]
"""Key -> name of the group that the item belongs to; other items are on their own. The name is the
key of one of the group."""
SAMPLED = 32
"""Images that are loaded to estimate how many samples fill a shard of `SHARD_BYTES`."""
_FORM = 1
"""Version of the plan: no pack resumes the work of another version."""


@dataclass(frozen=True)
class PackPlan:
    """The shards to pack, and what is rejected already.

    rejected  rows of `rejected.jsonl`
    unseen    labels of the classes that only `test` has
    left_out  number of images that are not packed because of `unseen`
    """

    shards: tuple[ShardPlan, ...]
    rejected: tuple[dict[str, str], ...]
    unseen: frozenset[int] = frozenset()
    left_out: int = 0

    @property
    def samples(self) -> int:
        """How many samples are to be packed or checked."""
        return sum(len(shard_plan.items) for shard_plan in self.shards)

    @property
    def total(self) -> int:
        """How many samples the source has."""
        return self.samples + len(self.rejected)


def make_plan(
    source: Source,
    spec: PackSpec,
    *,
    seed: int,
    shard_samples: int | None,
    unseen: frozenset[int] = frozenset(),
    groups: Groups = MappingProxyType({}),
) -> PackPlan:
    """Assigns the items of a source to splits, and the items of each split to shards.

    Train and val get no image of the `unseen` classes, test gets no other. Items of one of `groups`
    aren't cut apart. Raises TesseraError for
    a source without train images, and for a class of val or test that train doesn't have.
    """
    _check_names(source)
    rejected: list[dict[str, str]] = []
    splits = split_items(_without_duplicates(source.items, rejected), seed, groups)
    found = sum(map(len, splits.values()))
    if unseen:
        splits = _keep_unseen_for_test(splits, source.classes, unseen)
    if source.task == "classification":
        _check_classes(splits, source.classes, source.name, unseen)
    most = shard_samples or _samples_in_a_shard(spec, splits["train"])
    shards = (
        shard_plan
        for split, items in splits.items()
        for shard_plan in _cut_shards(split, items, most)
    )
    left_out = found - sum(map(len, splits.values()))
    return PackPlan(tuple(shards), tuple(rejected), unseen, left_out)


def digest(plan: PackPlan, source: Source, how: Mapping[str, Any]) -> str:
    """64 hex digits over the plan, and over `how`, the options of the pack."""
    total = hashlib.sha256()
    head = [_FORM, source.name, source.task, source.classes, how, plan.rejected]
    total.update(json.dumps(head, sort_keys=True).encode())
    for shard_plan in plan.shards:
        total.update(f"\n{shard_plan.path}\n".encode())
        for item in shard_plan.items:
            values = (item.key, item.origin, item.label, item.row, item.problem)
            frame = () if item.frame is None else (item.frame,)
            total.update(json.dumps([*values, *frame]).encode())
    return total.hexdigest()


def missing_splits(source: Source) -> list[Split]:
    """The splits that the source lacks, and that are cut from train."""
    existing = {item.split or "train" for item in source.items}
    return [split for split in CUT if split not in existing]


def split_items(
    items: Iterable[Item], seed: int, groups: Groups = MappingProxyType({})
) -> dict[Split, list[Item]]:
    """Items by split, in the order in which they are packed. Where a split is cut from train, items
    of one of `groups` stay together."""
    splits: dict[Split, list[Item]] = {split: [] for split in SPLITS}
    for item in items:
        splits[item.split or "train"].append(item)
    if not splits["train"]:
        raise TesseraError(
            "the source has no train images", hint="name the folder of the train images `train`"
        )
    missing = [split for split in CUT if not splits[split]]
    if missing:
        splits.update(_cut_splits(splits["train"], missing, seed, groups))
    return {
        split: sorted(members, key=lambda item: _rank(f"order {seed}", item.key))
        for split, members in splits.items()
        if members
    }


def _keep_unseen_for_test(
    splits: Mapping[Split, list[Item]], classes: Sequence[str], unseen: frozenset[int]
) -> dict[Split, list[Item]]:
    """The splits without the unseen classes in train and val, and without the others in test."""
    kept = {  # items without a label stay, to be rejected
        split: [i for i in items if i.label is None or (i.label in unseen) == (split == "test")]
        for split, items in splits.items()
    }
    if not kept["train"]:
        raise TesseraError(
            "no train image is left: all classes are unseen", hint="give fewer to --unseen"
        )
    tested = {item.label for item in kept.get("test", ())}
    for label in sorted(unseen - tested):
        raise TesseraError(
            f"test has no image of the unseen class {classes[label]!r}",
            hint="an unseen class needs test images, or at least 3 images to take one from",
        )
    return {split: items for split, items in kept.items() if items}


def _cut_splits(
    items: list[Item], missing: list[Split], seed: int, groups: Groups
) -> dict[Split, list[Item]]:
    """The items of a source without the splits `missing`: what is left for train, and those."""
    splits: dict[Split, list[Item]] = {"train": [], **{split: [] for split in missing}}
    units: dict[str, list[Item]] = {}
    for item in items:
        units.setdefault(groups.get(item.key, item.key), []).append(item)
    by_class: dict[int | None, list[tuple[bytes, list[Item]]]] = {}
    for name, members in units.items():
        ranked = (_rank(f"split {seed}", name), members)
        label = min(members, key=lambda item: item.key).label
        by_class.setdefault(label, []).append(ranked)
    for found in by_class.values():
        left = [members for _, members in sorted(found, key=lambda one: one[0])]
        total = sum(map(len, left))
        count = max(int(total * SHARE + 0.5), 1) if total >= 3 else 0
        for split in missing:
            chosen = _choose(left, count)
            left = [members for at, members in enumerate(left) if at not in chosen]
            splits[split] += [item for members in chosen.values() for item in members]
        splits["train"] += [item for members in left for item in members]
    return splits


def _choose(units: Sequence[list[Item]], count: int) -> dict[int, list[Item]]:
    """Units with `count` items together, by their position: the first ones that fit. If all are
    larger, the smallest one, as long as another one is left for train."""
    chosen: dict[int, list[Item]] = {}
    for at, members in enumerate(units):
        if len(members) <= count:
            chosen[at] = members
            count -= len(members)
    if count and not chosen and len(units) > 1:
        smallest = min(range(len(units)), key=lambda at: len(units[at]))
        chosen[smallest] = units[smallest]
    return chosen


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
    """Refuses empty and equal class names. Accented letters have two forms in Unicode; names that
    differ only in that are equal."""
    known: set[str] = set()
    for name in source.classes:
        if not name:
            raise TesseraError(f"{source.name} has a class without a name", hint="give it a name")
        if (plain := unicodedata.normalize("NFC", name)) in known:
            raise TesseraError(
                f"{source.name} has two classes named {name!r}",
                hint="rename one of them, or merge them",
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
        unknown = [label for label in range(len(classes)) if label in labels]
        if unknown:
            name = classes[unknown[0]]
            hint = "each class needs train images; check the names of the class folders"
            pairs = find_alike(classes)
            twin = pairs.get(name) or next((one for one in pairs if pairs[one] == name), "")
            if twin:
                hint = f"if it is the class {twin!r}, give both the same name"
            message = f"{source}: {split} has the class {name!r}, train doesn't"
            raise TesseraError(message, hint=hint)


def _samples_in_a_shard(spec: PackSpec, items: Sequence[Item]) -> int:
    """How many samples fill a shard, from the mean size of the first ones."""
    sizes = []
    for item in items[:SAMPLED]:
        try:
            sizes.append(prepare(spec, item).packed.size_bytes)
        except TesseraError:  # is rejected when it is packed
            continue
    mean = sum(sizes) // len(sizes) if sizes else 1
    return min(max(SHARD_BYTES // mean, 1), SHARD_SAMPLES)


def _cut_shards(split: Split, items: list[Item], most: int) -> Iterator[ShardPlan]:
    count = -(-len(items) // most)
    for number in range(count):
        start, stop = number * len(items) // count, (number + 1) * len(items) // count
        yield ShardPlan(split, f"{split}/{number:06d}.tar", tuple(items[start:stop]))
