"""Images that lie in two splits of a data set that is being packed.

In: fingerprints beside the packed shards. Out: keys to leave out, and rows of `leakage.jsonl`. Must
not know how images are compared, nor where they came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pipelines.data import duplicates
from pipelines.data.card import SPLITS, Leakage
from pipelines.data.duplicates import Pair
from pipelines.data.packing import shard_records
from pipelines.data.packing.shard import ShardPlan
from pipelines.data.packing.shard_records import ShardRecord
from pipelines.storage.base import Storage

FILE = "leakage.jsonl"
"""One JSON object a line: left and right, each with split, key and origin; distance in bits."""
Side = tuple[str, int]
_ORDER: dict[str, int] = {split: place for place, split in enumerate(SPLITS)}


class Fingerprints:
    """The fingerprints of a packed set, and whose they are."""

    def __init__(
        self, place: Storage, parts: Sequence[ShardPlan], done: Sequence[ShardRecord]
    ) -> None:
        self._place, self._parts, self._done = place, parts, done
        self._places: dict[str, list[int]] = {split: [] for split in SPLITS}
        for number, shard_plan in enumerate(parts):
            self._places[shard_plan.split].append(number)

    def exact_duplicates(self) -> dict[int, dict[str, str]]:
        """Images that are the same, pixel by pixel, as one of a later split, where train < val <
        test: part number -> key -> which other image it is the same as."""
        others: dict[Side, Side] = {}
        for pair in duplicates.find(self._load(), ("same",)):
            known = others.get(pair.left)
            if known is None or _later(pair.right) > _later(known):
                others[pair.left] = pair.right
        names = self._names([*others, *others.values()])
        found: dict[int, dict[str, str]] = {}
        for side, other in others.items():
            number, key, origin = names[side]
            found.setdefault(number, {})[key] = (
                f"{origin} of {side[0]} is the same image as {names[other][2]} of {other[0]}"
            )
        return found

    def near(self) -> tuple[list[dict[str, Any]], Leakage]:
        """Images that look like one of another split: rows of `leakage.jsonl`, and their count."""
        pairs = duplicates.find(self._load(), ("near",))
        sides = {side for pair in pairs for side in (pair.left, pair.right)}
        names = self._names(sides)
        return [_row(pair, names) for pair in pairs], Leakage(near=len(pairs), images=len(sides))

    def _load(self) -> dict[str, shard_records.Array]:
        empty = np.zeros((0, duplicates.SIZE), np.uint8)
        return {
            split: np.concatenate(
                [empty, *(shard_records.load_prints(self._place, self._done[n]) for n in numbers)]
            )
            for split, numbers in self._places.items()
        }

    def _names(self, sides: Iterable[Side]) -> dict[Side, tuple[int, str, str]]:
        """(part number, key, origin) of images by their number in the split."""
        found: dict[Side, tuple[int, str, str]] = {}
        for split, numbers in self._places.items():
            asked = sorted({number for name, number in sides if name == split})
            ends = np.cumsum([self._done[n].shard.samples for n in numbers])
            where = np.searchsorted(ends, asked, side="right") if asked else ()
            for place in sorted(set(where)):
                shard_plan = numbers[place]
                start = int(ends[place]) - self._done[shard_plan].shard.samples
                keys = shard_records.load_rows(self._place, self._done[shard_plan])["key"]
                origins = {item.key: item.origin for item in self._parts[shard_plan].items}
                for number in (n for n, at in zip(asked, where) if at == place):
                    key = keys[number - start].decode()
                    found[split, number] = (shard_plan, key, origins[key])
        return found


def _later(side: Side) -> tuple[int, int]:
    """Orders images by what is kept: those of the last split, and of them the first."""
    return _ORDER[side[0]], -side[1]


def _row(pair: Pair, names: dict[Side, tuple[int, str, str]]) -> dict[str, Any]:
    left, right = (
        {"split": side[0], "key": names[side][1], "origin": names[side][2]}
        for side in (pair.left, pair.right)
    )
    return {"left": left, "right": right, "distance": pair.distance}
