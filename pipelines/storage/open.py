"""Opens the storage behind a path or a URL.

In: a folder or an address. Out: a `Storage`. Must not know what the files are. Makes no connection.
"""

from __future__ import annotations

from pathlib import Path

from models.core.errors import TesseraError
from pipelines.storage.base import (
    OBJECT_STORE_SCHEMES,
    WEB_SCHEMES,
    CacheSettings,
    Storage,
    current_cache,
    file_path,
    split_location,
)
from pipelines.storage.folder import FolderStorage
from pipelines.storage.retry import RetryPolicy


def open_storage(
    where: str | Path,
    cache: CacheSettings | None = None,
    *,
    policy: RetryPolicy | None = None,
    has_responded: bool = False,
) -> Storage:
    """Opens a folder, which need not exist yet, or a URL.

    Copies of remote files go into `cache`, by default the cache of this process. `policy` says how
    requests to an object store are retried. With `has_responded` the address is known to be right,
    and the first request is retried as any other. Makes no connection. Raises UsageError for an
    address that is not accepted, and TesseraError if the library for its scheme is not installed.
    """
    scheme, rest = split_location(where)
    if not scheme:
        return FolderStorage(Path(where))
    if scheme == "file":
        return FolderStorage(file_path(str(where), rest))
    url = f"{scheme}://{rest.rstrip('/')}"
    if scheme in WEB_SCHEMES:
        from pipelines.storage.http import HttpStorage

        return HttpStorage(url, cache or current_cache())
    from pipelines.storage.object_store import ObjectStorage

    return ObjectStorage(
        OBJECT_STORE_SCHEMES[scheme],
        rest.strip("/"),
        url,
        cache or current_cache(),
        policy or RetryPolicy(),
        has_responded=has_responded,
    )


def open_shards(where: str | Path, root: str, cache: CacheSettings | None = None) -> Storage:
    """Opens the storage of a data set's shards. `where` is the location of the card, and `root` is
    what the card names as the location of the shards, empty for the card's own.

    A card in a local folder belongs to the user and may name any location. A card that comes over a
    network may name neither a local folder, nor another scheme, nor another web server: otherwise
    its author could decide what this machine reads and which servers it calls. Raises TesseraError.
    """
    if not root:
        return open_storage(where, cache)
    (kind, rest), (other, rest_of_root) = split_location(where), split_location(root)
    host, host_of_root = (text.partition("/")[0] for text in (rest, rest_of_root))
    is_remote = kind not in ("", "file")
    if is_remote and (kind != other or (kind in WEB_SCHEMES and host != host_of_root)):
        raise TesseraError(
            f"the card at {where} says that its shards are in {root!r}, which is elsewhere",
            hint="if you trust the card, download it and its indices to a folder and use that",
        )
    return open_storage(root, cache)
