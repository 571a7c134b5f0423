"""The interface of a storage, the addresses that are accepted, and the settings of the cache.

In: a path or a URL. Out: its parts, checked; `open.py` makes a `Storage` of them. Must not know
what the files are, nor read the environment: the settings of the cache are given to `use_cache`.

Accepted schemes: s3, gs (gcs), az (abfs), memory (this process only), http and https (read only),
and file (a local folder). Chains (`a::b`), pipes, variables, wildcards, queries and passwords in an
address are refused before a library sees the address.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from models.core.errors import TesseraError, UsageError

OBJECT_STORE_SCHEMES = {
    "s3": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "abfs",
    "abfs": "abfs",
    "memory": "memory",
}
"""Schemes of object stores, each with its name in fsspec."""
WEB_SCHEMES = ("http", "https")
MAX_READ_BYTES = 256 << 20
"""The largest file that `Storage.read` reads into memory."""
_ALLOWED = (
    "a folder, or an address that begins with s3://, gs://, az://, http://, https:// or file://"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_REFUSED = {
    "?": "a query",
    "#": "a fragment",
    "*": "a wildcard",
    "[": "a wildcard",
    "{": "a wildcard",
    "\\": "a backslash",
    "@": "a login",
}


class FileInfo(Protocol):
    """A file whose content is known, such as the shards of a card."""

    @property
    def path(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class Storage(Protocol):
    """The files below a local folder or an address.

    Paths are relative, with `/`. Every method raises TesseraError for a path that leads out of the
    storage, for a file that can't be read or written, and for a server that stays unreachable.
    """

    where: str
    """As the user knows it: the folder, or the URL without a slash at its end."""
    remote: bool
    """True if every method costs at least one request."""

    def read(self, path: str) -> bytes:
        """Returns the content of a file of at most `MAX_READ_BYTES`."""

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Returns bytes `start` to `stop` of a file. Raises TesseraError if it ends earlier."""

    def size(self, path: str) -> int | None:
        """Returns the size of a file in bytes, or None if there is no regular file."""

    def sizes(self, paths: Sequence[str]) -> dict[str, int]:
        """Returns the sizes in bytes of those files that exist. An object store needs one listing
        for each folder, a web server one request for each file."""

    def fetch(self, path: str, *, size_bytes: int, sha256: str) -> Path:
        """Returns a local file with this content. In a local folder it is the file itself,
        unchecked. Otherwise it is a copy in the cache, whose size and checksum were verified, and
        which the cache may delete when it needs the room; use `open` to keep it readable."""

    def open(self, path: str, *, size_bytes: int, sha256: str) -> int:
        """Returns a file descriptor of the file that `fetch` returns. It stays readable even when
        the cache deletes the copy. The caller closes it."""

    def discard_damaged(self, path: str, *, sha256: str) -> bool:
        """Removes the copy in the cache if its content isn't the one with this checksum, so that
        the next `open` fetches it again. Returns whether it was removed; never in a local folder,
        where a file is no copy."""

    def prefetch(self, files: Sequence[FileInfo]) -> None:
        """Starts to copy these files into the cache in the background, in this order. Replaces the
        list of an earlier call: of that, only downloads of files listed again continue. Errors are
        raised when the file is fetched. Does nothing for a local folder."""

    def download(self, path: str, to: Path) -> None:
        """Copies a file, unchecked, to a local path, which is overwritten."""

    def put(self, file: Path, path: str) -> None:
        """Moves a local file into the storage, where it appears complete or not at all."""

    def upload(self, file: Path, path: str) -> None:
        """As `put`, but the local file stays where it is."""

    def write(self, path: str, data: bytes) -> None:
        """Writes a small file, which appears complete or not at all and survives a power failure
        after the call."""

    def create_if_absent(self, path: str, data: bytes) -> bool:
        """Writes a small file unless there is one. Of several processes that create a path at the
        same time, on any machines, one gets True. Raises TesseraError if the store is known to
        have no conditional writes; see `lease.py` for stores that ignore the condition."""

    def times(self, folder: str) -> dict[str, float]:
        """Returns the time of the last write of each file below `folder`, in seconds since 1970 by
        the clock of the store, which may differ from this machine's."""

    def remove(self, path: str) -> None:
        """Removes a file; does nothing if there is none."""

    def names(self, folder: str = "") -> list[str]:
        """Returns the sorted paths of all files below `folder`, an empty list if there is no such
        folder. A web server can't be listed."""

    def folders(self, folder: str = "") -> list[str]:
        """Returns the sorted names of the folders directly below `folder`, an empty list if there
        is no such folder. A web server can't be listed."""


@dataclass(frozen=True)
class CacheSettings:
    """The folder for copies of remote files, and how many bytes they may occupy together."""

    folder: Path
    limit_bytes: int = 50 << 30

    @classmethod
    def default(cls) -> CacheSettings:
        """50 GiB in `.cache/tessera/shards` of the user's home, or, for a user without a home, in a
        folder of temporary files."""
        try:
            home = Path.home()
        except RuntimeError:  # neither HOME nor an entry in the list of users, as in a container
            home = Path(tempfile.gettempdir(), f"tessera-{os.getuid()}")
        return cls(home / ".cache" / "tessera" / "shards")


_cache: CacheSettings | None = None


def use_cache(settings: CacheSettings | None) -> None:
    """Sets the cache of this process, and of processes forked from it later; None restores the
    default. Other processes get the settings by `cache_payload` and `use_cache_of`."""
    global _cache
    _cache = settings


def current_cache() -> CacheSettings:
    """The cache of this process: what `use_cache` has set, or the default."""
    return _cache or CacheSettings.default()


def cache_payload() -> dict[str, Any]:
    """The settings of the cache as plain JSON, for `use_cache_of` in another process. Empty for the
    default, because the other process may belong to another user with another home."""
    cache = current_cache()
    if cache == CacheSettings.default():
        return {}
    return {"folder": str(cache.folder), "limit_bytes": cache.limit_bytes}


def use_cache_of(payload: Mapping[str, Any]) -> None:
    """Sets the cache of this process to what `cache_payload` returned in another one."""
    if payload:
        use_cache(CacheSettings(Path(payload["folder"]), payload["limit_bytes"]))


def split_location(where: str | Path) -> tuple[str, str]:
    """Splits an address into its scheme and what follows `://`. A local path has the scheme "".

    Raises UsageError if the address is malformed, or has a scheme or a part that is not accepted.
    """
    text = os.fspath(where)
    if "\0" in text or "\n" in text or "${" in text or "::" in text:
        raise UsageError(
            f"{text!r} is not a valid location",
            hint=f"use {_ALLOWED}; chains are not supported",
        )
    match = _SCHEME.match(text)
    if not match:
        return "", text
    scheme, rest = match[1].lower(), text[match.end() :]
    known = scheme in OBJECT_STORE_SCHEMES or scheme in WEB_SCHEMES or scheme == "file"
    if not known or not rest.startswith("//"):
        hint = f"use {_ALLOWED}; write a folder with a colon in its name as ./{text}"
        raise UsageError(f"{text!r} has a scheme that is not supported", hint=hint)
    rest = rest[2:]
    for sign, what in _REFUSED.items():
        if sign in rest and scheme != "file":
            raise UsageError(
                f"{_hidden(text)} contains {what}", hint=f"use a plain address: {_ALLOWED}"
            )
    parts = rest.removesuffix("/").split("/")
    if scheme != "file" and (not parts[0] or any(part in ("", ".", "..") for part in parts)):
        raise UsageError(
            f"{text!r} is not a complete address", hint=f"use {scheme}://BUCKET/FOLDER"
        )
    return scheme, rest


def absolute_location(where: str) -> str:
    """The same location for a process in another folder: a path made absolute, a URL unchanged."""
    scheme, _ = split_location(where)
    return where if scheme else str(Path(where).expanduser().absolute())


def _hidden(text: str) -> str:
    """The address without a login, for messages."""
    return repr(re.sub(r"//[^/]*@", "//…@", text))


def file_path(url: str, rest: str) -> Path:
    """The local path of a `file://` URL, of which `rest` follows the `://`. Raises UsageError."""
    parts = urlsplit(f"file://{rest}")
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query:
        raise UsageError(f"{url!r} is not a local folder", hint="use file:///FOLDER")
    return Path(unquote(parts.path))


def check_path(path: str, where: str) -> tuple[str, ...]:
    """Returns the parts of a relative path. Raises TesseraError if it leads out of `where`."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or ":" in path or "\0" in path:
        raise TesseraError(
            f"the card of {where} names the file {path!r}, which is not allowed",
            hint="the files of a data set must be inside its folder",
        )
    return parts
