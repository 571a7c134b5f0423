"""What is known of a packed shard, stored beside it until its data set is finished.

In: a `ShardRecord` and its arrays. Out: the same, complete or not at all. Must not know images or
sources. The files are JSON and .npy; nothing is unpickled.
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

    plan                digest of the pack's plan and options
    stamps              digest of sizes and times of the files that the samples come from
    counts              images, objects or pixels of each class
    rejected            rows of `rejected.jsonl` on images
    dropped             rows of `rejected.jsonl` on objects of images that are packed
    rows, fingerprints  sha256 of the shard's rows of the index, and of its images' fingerprints
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    plan: str
    stamps: str
    shard: Shard
    statistics: ImageCounts
    counts: tuple[int, ...]
    rejected: tuple[dict[str, str], ...]
    dropped: tuple[dict[str, str], ...] = ()
    rows: str
    fingerprints: str


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def encode(array: Array) -> bytes:
    """The bytes of a .npy file."""
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def save(storage: Storage, record: ShardRecord, rows: bytes, fingerprints: bytes) -> None:
    """Writes a record and its arrays. The JSON comes last: a record without it doesn't exist."""
    name = _name(record.shard.path)
    storage.write(f"{name}.rows.npy", rows)
    storage.write(f"{name}.fingerprints.npy", fingerprints)
    storage.write(f"{name}.json", record.model_dump_json().encode())


def load(storage: Storage, path: str) -> ShardRecord | None:
    """The record of the shard `path`; None if there is none or it can't be read."""
    name = f"{_name(path)}.json"
    if storage.size(name) is None:
        return None
    try:
        return ShardRecord.model_validate_json(storage.read(name))
    except ValidationError:
        return None


def known(storage: Storage) -> frozenset[str]:
    """Paths of the shards that have records."""
    names = (name for name in storage.names(SHARDS) if name.endswith(".json"))
    return frozenset(
        f"{name.removeprefix(f'{SHARDS}/').removesuffix('.json')}.tar" for name in names
    )


def load_rows(storage: Storage, record: ShardRecord) -> Array:
    """The shard's rows of the index."""
    return _load(storage, f"{_name(record.shard.path)}.rows.npy", record.rows)


def load_fingerprints(storage: Storage, record: ShardRecord) -> Array:
    """uint8 (samples, `duplicates.SIZE`)."""
    return _load(storage, f"{_name(record.shard.path)}.fingerprints.npy", record.fingerprints)


def _load(storage: Storage, path: str, sha256: str) -> Array:
    data = storage.read(path)
    if digest(data) != sha256:
        raise TesseraError(
            f"{storage.where}/{path} was changed while packing",
            hint="only one pack may write to a location; the same command resumes",
        )
    array: Array = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _name(path: str) -> str:
    return f"{SHARDS}/{path.removesuffix('.tar')}"
