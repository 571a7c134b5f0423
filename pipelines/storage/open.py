"""Opens the storage behind a path or a URL.

In: a folder or an address. Out: a `Storage`. Connects to nothing.
"""

from __future__ import annotations

from pathlib import Path

from models.core.errors import TesseraError
from pipelines.storage.base import (
    OBJECT_STORE_SCHEMES,
    WEB_SCHEMES,
    CacheSettings,
    Storage,
    _file_path,
    current_cache,
    split_location,
)
from pipelines.storage.folder import FolderStorage


def open_storage(where: str | Path, cache: CacheSettings | None = None) -> Storage:
    """The place: a folder, which need not exist yet, or a URL. Copies of remote files go into
    `cache`, by default this process's. Raises UsageError for an address that is refused, and
    TesseraError where the library for it is missing. Connects to nothing."""
    scheme, rest = split_location(where)
    if not scheme:
        return FolderStorage(Path(where))
    if scheme == "file":
        return FolderStorage(_file_path(str(where), rest))
    url = f"{scheme}://{rest.rstrip('/')}"
    if scheme in WEB_SCHEMES:
        from pipelines.storage.http import HttpStorage

        return HttpStorage(url, cache or current_cache())
    from pipelines.storage.object_store import ObjectStorage

    return ObjectStorage(
        OBJECT_STORE_SCHEMES[scheme], rest.strip("/"), url, cache or current_cache()
    )


def open_shards(where: str | Path, root: str, cache: CacheSettings | None = None) -> Storage:
    """The place of the shards whose card lies at `where` and names the `root`, which may be empty.

    A card in a folder is the user's own and may name any place. One that comes over a network may
    name none of this machine's folders, no other kind of network and no other web server: else
    whoever wrote it would say what this machine reads and asks. Raises TesseraError.
    """
    if not root:
        return open_storage(where, cache)
    (kind, rest), (other, rest_of_root) = split_location(where), split_location(root)
    host, host_of_root = (text.partition("/")[0] for text in (rest, rest_of_root))
    afar = kind not in ("", "file")
    if afar and (kind != other or (kind in WEB_SCHEMES and host != host_of_root)):
        raise TesseraError(
            f"the card at {where} says that its shards lie in {root!r}, which is elsewhere",
            hint="if you trust it, fetch card and indices into a folder and give that",
        )
    return open_storage(root, cache)
