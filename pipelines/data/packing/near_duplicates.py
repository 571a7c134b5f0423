"""Images that are twice in a data set that is being packed, in two splits or in one.

In: the fingerprints beside the packed shards. Out: samples to leave out, and the rows of
`near_duplicates.jsonl` and `copies.jsonl`. Must not know how images are compared, nor where they
come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.data import duplicates
from pipelines.data.card import SPLITS, NearDuplicates, Split
from pipelines.data.duplicates import Pair, Position
from pipelines.data.packing import shard_records
from pipelines.data.packing.shard import ShardPlan
from pipelines.data.packing.shard_records import ShardRecord
from pipelines.storage.base import Storage

FILE = "near_duplicates.jsonl"
"""One JSON object a line: left and right, each with split, key and origin; distance in bits."""
COPIES = "copies.jsonl"
"""One JSON object a line: the split, and images with the same pixels: key, origin, class."""
_SHOWN = 5
_ORDER: dict[str, int] = {split: index for index, split in enumerate(SPLITS)}


class _Name(NamedTuple):
    """The shard that a sample is in, by its number in the plan, and what names the sample."""

    shard: int
    key: str
    origin: str
    label: int
    source_split: Split | None


class Copy(NamedTuple):
    """An image that is in a later split too: details for `rejected.jsonl`, and whether only the cut
    of the splits that the source lacks has put the two apart. Copies of two classes count as two
    splits of the source."""

    detail: str
    cut_apart: bool


class Fingerprints:
    """The fingerprints of all packed shards, and the samples that they belong to."""

    def __init__(
        self, storage: Storage, shards: Sequence[ShardPlan], records: Sequence[ShardRecord]
    ) -> None:
        self._storage, self._shards, self._records = storage, shards, records
        self._by_split: dict[str, list[int]] = {split: [] for split in SPLITS}
        for number, shard_plan in enumerate(shards):
            self._by_split[shard_plan.split].append(number)

    def exact_duplicates(self) -> dict[int, dict[str, Copy]]:
        """Images with the same pixels as an image of a later split, where train < val < test:
        number of the shard -> key -> the copy."""
        others: dict[Position, Position] = {}
        for pair in duplicates.find_pairs(self._load(), ("exact",)):
            known = others.get(pair.left)
            if known is None or _priority(pair.right) > _priority(known):
                others[pair.left] = pair.right
        names = self._names([*others, *others.values()])
        result: dict[int, dict[str, Copy]] = {}
        for position, other in others.items():
            name, kept = names[position], names[other]
            detail = (
                f"{name.origin} of {position[0]} is the same image as {kept.origin} of {other[0]}"
            )
            cut = (kept.source_split or "train") != other[0] and name.label == kept.label
            result.setdefault(name.shard, {})[name.key] = Copy(detail, cut)
        return result

    def near_duplicates(self) -> tuple[list[dict[str, Any]], NearDuplicates]:
        """Images that look like an image of another split: rows of `FILE`, and their counts."""
        pairs = duplicates.find_pairs(self._load(), ("near",))
        positions = {position for pair in pairs for position in (pair.left, pair.right)}
        names = self._names(positions)
        rows = [_row(pair, names) for pair in pairs]
        return rows, NearDuplicates(near=len(pairs), images=len(positions))

    def share_cut_apart(self, splits: Sequence[Split], *, near: bool) -> float:
        """The share of a split's images that have a copy or a near duplicate in another of these
        splits: the largest of val and test."""
        prints = {split: prints for split, prints in self._load().items() if split in splits}
        pairs = duplicates.find_pairs(prints, ("exact", "near") if near else ("exact",))
        alike = {position for pair in pairs for position in (pair.left, pair.right)}
        count = Counter(split for split, _ in alike)
        others = [split for split in prints if split != "train" and len(prints[split])]
        return max((count[split] / len(prints[split]) for split in others), default=0.0)

    def groups(self, splits: Sequence[Split], *, near: bool) -> dict[str, str]:
        """Key -> name of its group, of the images of these splits that belong together: those with
        the same pixels, and near duplicates. The name is the first key of the group."""
        prints = self._load()
        positions = [(split, at) for split in splits for at in range(len(prints[split]))]
        stacked = np.concatenate([prints[split] for split in splits])
        found = duplicates.find_groups(stacked, near=near)
        names = self._names([positions[number] for group in found for number in group])
        result = {}
        for group in found:
            keys = sorted(names[positions[number]].key for number in group)
            result.update(dict.fromkeys(keys, keys[0]))
        return result

    def copies(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Images of one split with the same pixels: rows of `COPIES`."""
        groups = [
            [(split, number) for number in numbers]
            for split, fingerprints in self._load().items()
            for numbers in duplicates.find_copies(fingerprints)
        ]
        names = self._names([position for group in groups for position in group])
        return [
            {
                "split": group[0][0],
                "images": [
                    {
                        "key": names[position].key,
                        "origin": names[position].origin,
                        **_class(names[position].label, classes),
                    }
                    for position in group
                ],
            }
            for group in groups
        ]

    def _load(self) -> dict[str, shard_records.Array]:
        """uint8 (N, `duplicates.SIZE`) of each split."""
        empty = np.zeros((0, duplicates.SIZE), np.uint8)
        return {
            split: np.concatenate([empty, *(self._load_shard(number) for number in numbers)])
            for split, numbers in self._by_split.items()
        }

    def _load_shard(self, number: int) -> shard_records.Array:
        return shard_records.load_fingerprints(self._storage, self._records[number])

    def _names(self, positions: Iterable[Position]) -> dict[Position, _Name]:
        names: dict[Position, _Name] = {}
        for split, numbers in self._by_split.items():
            wanted = sorted({number for name, number in positions if name == split})
            ends = np.cumsum([self._records[n].shard.samples for n in numbers])
            owners = np.searchsorted(ends, wanted, side="right") if wanted else ()
            for index in sorted(set(owners)):
                shard = numbers[index]
                record = self._records[shard]
                start = int(ends[index]) - record.shard.samples
                rows = shard_records.load_rows(self._storage, record)
                items = {item.key: item for item in self._shards[shard].items}
                for number in (n for n, owner in zip(wanted, owners) if owner == index):
                    key = rows["key"][number - start].decode()
                    label = int(rows["label"][number - start])
                    item = items[key]
                    names[split, number] = _Name(shard, key, item.origin, label, item.split)
        return names


def describe_conflicts(groups: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Lines about images with the same pixels and different classes."""
    conflicts = []
    for group in groups:
        by_class = {image.get("class"): image["origin"] for image in group["images"]}
        if len(by_class) > 1:
            conflicts.append(", ".join(f"{path} is {name}" for name, path in by_class.items()))
    for text in conflicts[:_SHOWN]:
        yield f"the same pixels have different classes: {text}"
    if len(conflicts) > _SHOWN:
        yield f"… and {len(conflicts) - _SHOWN:,} more images with different classes"


def _class(label: int, classes: Sequence[str]) -> dict[str, str]:
    return {"class": classes[label]} if label >= 0 else {}


def _priority(position: Position) -> tuple[int, int]:
    """Orders images by which one is kept: those of the last split, and of them the first."""
    return _ORDER[position[0]], -position[1]


def _row(pair: Pair, names: dict[Position, _Name]) -> dict[str, Any]:
    left, right = (
        {"split": position[0], "key": names[position].key, "origin": names[position].origin}
        for position in (pair.left, pair.right)
    )
    return {"left": left, "right": right, "distance": pair.distance}
