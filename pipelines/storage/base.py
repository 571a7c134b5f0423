"""Where files lie: in a folder, or at an address of an object store.

In: a path or a URL. Out: a `Storage` to read and write files in, whole or not at all. Must not know
what the files are, nor the environment: a job says with `use_cache` where copies may lie.

Addresses of these schemes are taken and no others: s3, gs (gcs), az (abfs), memory (this process
only), http and https (to read), file (a folder). Chains (`a::b`), pipes, variables, wildcards,
queries and passwords in an address are refused before any library sees them.
"""

from __future__ import annotations

import os
import re
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
"""Schemes of object stores, and the name that each has in the library."""
WEB_SCHEMES = ("http", "https")
MAX_READ_BYTES = 256 << 20
"""The most that `Storage.read` takes into memory."""
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
    """A file of known content; the shards of a card are such."""

    @property
    def path(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class Storage(Protocol):
    """A folder or an address. Paths are relative to it, with `/`; one that leads out of it is a
    TesseraError, as is everything that can't be read or written."""

    where: str
    """As the user knows it: the folder, or the URL without its last slash."""
    remote: bool
    """Whether each look at a file is a request."""

    def read(self, path: str) -> bytes:
        """A small file, whole."""

    def size(self, path: str) -> int | None:
        """In bytes; None where there is no such file, or what is there is none."""

    def sizes(self, paths: Sequence[str]) -> dict[str, int]:
        """In bytes, of those that are there, with as few requests as the place allows."""

    def fetch(self, path: str, *, size_bytes: int, sha256: str) -> Path:
        """A local file with this content: the file itself, or a checked copy in the cache, which
        may drop it later; see `open`."""

    def open(self, path: str, *, size_bytes: int, sha256: str) -> int:
        """A file descriptor to read this content from, whatever the cache does meanwhile."""

    def prefetch(self, files: Sequence[FileInfo]) -> None:
        """Begins to fetch these in the background, in this order, and forgets what it was asked
        before and has not begun. Errors come up when the file is fetched. Local: nothing."""

    def download(self, path: str, to: Path) -> None:
        """Copies a file as it is, unchecked, into a local file that is made or emptied."""

    def put(self, file: Path, path: str) -> None:
        """Takes over a local file; it appears whole or not at all, and `file` is gone after."""

    def write(self, path: str, data: bytes) -> None:
        """Writes a small file; it appears whole or not at all, and is on the disk after."""

    def remove(self, path: str) -> None:
        """Removes a file, if it is there."""

    def names(self, folder: str = "") -> list[str]:
        """Paths of all files below `folder`, sorted; none where there is no such folder."""


@dataclass(frozen=True)
class CacheSettings:
    """Where copies of remote files lie, and how many bytes they may take together."""

    folder: Path
    limit_bytes: int = 50 << 30

    @classmethod
    def default(cls) -> CacheSettings:
        """50 GiB in `.cache/tessera/shards` of the user's home."""
        return cls(Path.home() / ".cache" / "tessera" / "shards")


_cache: CacheSettings | None = None


def use_cache(settings: CacheSettings | None) -> None:
    """Sets this process's cache for remote files; None for the default. Processes that are forked
    from this one have it too; others are told by their payload."""
    global _cache
    _cache = settings


def current_cache() -> CacheSettings:
    """The cache in use: by default 50 GiB in `.cache/tessera/shards` of the user's home."""
    return _cache or CacheSettings.default()


def cache_payload() -> dict[str, Any]:
    """The cache in use as plain JSON, for `use_cache_of` in another process; empty for the default,
    which is of whose home it is."""
    cache = current_cache()
    if cache == CacheSettings.default():
        return {}
    return {"folder": str(cache.folder), "limit_bytes": cache.limit_bytes}


def use_cache_of(payload: Mapping[str, Any]) -> None:
    """Sets the cache that `cache_payload` gave as this process's."""
    if payload:
        use_cache(CacheSettings(Path(payload["folder"]), payload["limit_bytes"]))


def split_location(where: str | Path) -> tuple[str, str]:
    """(scheme, what follows `://`) of an address; ("", path) of a folder. Raises UsageError."""
    text = os.fspath(where)
    if "\0" in text or "\n" in text or "${" in text or "::" in text:
        raise UsageError(f"{text!r} is no place", hint=f"give {_ALLOWED}; chains are not read")
    match = _SCHEME.match(text)
    if not match:
        return "", text
    scheme, rest = match[1].lower(), text[match.end() :]
    known = scheme in OBJECT_STORE_SCHEMES or scheme in WEB_SCHEMES or scheme == "file"
    if not known or not rest.startswith("//"):
        hint = f"give {_ALLOWED}; a folder with a colon in its name as ./{text}"
        raise UsageError(f"{text!r} is an address that is not read here", hint=hint)
    rest = rest[2:]
    for sign, what in _REFUSED.items():
        if sign in rest and scheme != "file":
            raise UsageError(
                f"{_hidden(text)} has {what} in it", hint=f"give a plain address: {_ALLOWED}"
            )
    parts = rest.removesuffix("/").split("/")
    if scheme != "file" and (not parts[0] or any(part in ("", ".", "..") for part in parts)):
        raise UsageError(f"{text!r} is no whole address", hint=f"as in {scheme}://BUCKET/FOLDER")
    return scheme, rest


def absolute_location(where: str) -> str:
    """The same place for a process in another folder: a URL as it is, a path made absolute."""
    scheme, _ = split_location(where)
    return where if scheme else str(Path(where).expanduser().absolute())


def _hidden(text: str) -> str:
    """An address without the login in it, for messages."""
    return repr(re.sub(r"//[^/]*@", "//…@", text))


def _file_path(url: str, rest: str) -> Path:
    parts = urlsplit(f"file://{rest}")
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query:
        raise UsageError(f"{url!r} is no local folder", hint="as in file:///FOLDER")
    return Path(unquote(parts.path))


def check_path(path: str, where: str) -> tuple[str, ...]:
    """The parts of a relative path; refused where it would lead elsewhere."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or ":" in path or "\0" in path:
        raise TesseraError(
            f"the card of {where} names the file {path!r}, which is not allowed",
            hint="files of a data set lie in its folder",
        )
    return parts
