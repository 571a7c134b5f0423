"""What is known of a packed shard, beside it, until its data set is finished.

In: `ShardRecord` and its arrays. Out: the same, whole or not at all. Must not know images or sources.
JSON and .npy; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from models.core.errors import TesseraError
from pipelines.data.card import Shard
from pipelines.data.packing.staging import SHARDS
from pipelines.data.packing.statistics import ImageCounts
from pipelines.storage.base import Storage

Array = np.ndarray[Any, Any]


class ShardRecord(BaseModel):
    """A shard that is packed.

    plan      digest of what was to be packed, and how
    stamps    digest of sizes and times of the files that its items are made of
    counts    images, objects or pixels of each class
    rejected  rows of `rejected.jsonl`
    rows, prints  sha256 of the shard's rows of the index, and of its images' fingerprints
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    plan: str
    stamps: str
    shard: Shard
    statistics: ImageCounts
    counts: tuple[int, ...]
    rejected: tuple[dict[str, str], ...]
    rows: str
    fingerprints: str


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def encode(array: Array) -> bytes:
    """The bytes of a .npy."""
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def save(place: Storage, record: ShardRecord, rows: bytes, fingerprints: bytes) -> None:
    """Writes a receipt with its arrays; the JSON, by which it is found, comes last."""
    name = _name(record.shard.path)
    place.write(f"{name}.rows.npy", rows)
    place.write(f"{name}.prints.npy", fingerprints)
    place.write(f"{name}.json", record.model_dump_json().encode())


def load(place: Storage, path: str) -> ShardRecord | None:
    """The receipt of the shard called `path`; None where there is none that can be read."""
    name = f"{_name(path)}.json"
    if place.size(name) is None:
        return None
    try:
        return ShardRecord.model_validate_json(place.read(name))
    except ValidationError:
        return None


def known(place: Storage) -> frozenset[str]:
    """Paths of the shards that have receipts."""
    names = place.names(SHARDS)
    ends = (name for name in names if name.endswith(".json"))
    return frozenset(
        f"{name.removeprefix(f'{SHARDS}/').removesuffix('.json')}.tar" for name in ends
    )


def load_rows(place: Storage, record: ShardRecord) -> Array:
    """The shard's rows of the index."""
    return _load(place, f"{_name(record.shard.path)}.rows.npy", record.rows)


def load_prints(place: Storage, record: ShardRecord) -> Array:
    """uint8 (samples, bytes of a fingerprint)."""
    return _load(place, f"{_name(record.shard.path)}.prints.npy", record.fingerprints)


def _load(place: Storage, path: str, sha256: str) -> Array:
    data = place.read(path)
    if digest(data) != sha256:
        raise TesseraError(
            f"{place.where}/{path} was changed while packing",
            hint="no two packs may write to one place; the same command goes on",
        )
    array: Array = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _name(path: str) -> str:
    return f"{SHARDS}/{path.removesuffix('.tar')}"
