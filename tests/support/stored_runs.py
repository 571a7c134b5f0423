"""Shared by the tests of runs and searches whose files are in an object store."""

from __future__ import annotations

from pipelines.storage import lease
from pipelines.storage.base import Storage


def expire_lease(storage: Storage, folder: str) -> None:
    """Frees the lease of a run or a search whose driver was killed. By itself it would expire after
    half a minute."""
    for name in storage.names(f"{folder}/{lease.FOLDER}"):
        storage.remove(name)
