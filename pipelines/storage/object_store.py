"""Files in an object store. The only module that uses fsspec.

In: fsspec's name of the protocol, and a bucket with a prefix. Out: a `Storage`. Must not know
shards or cards. The store's own library finds endpoint and credentials; for S3 in AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and ~/.aws.

fsspec would expand chains (`a::b`) and patterns in a path. Here it gets only plain paths that
`split_location` and `check_path` have accepted. Its own retries are off, because they have no
deadline; those of `retry.py` are used.
"""

from __future__ import annotations

import asyncio
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from models.core.errors import TesseraError
from pipelines.storage.base import CacheSettings, check_path
from pipelines.storage.remote import RemoteStorage
from pipelines.storage.retry import RetryPolicy, TransientError

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}
_CONNECT_SECONDS = 10
_READ_SECONDS = 30
_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "urllib3", "google", "gcsfs", "azure")
"""Their network errors are not OSErrors."""


class ObjectStorage(RemoteStorage):
    """Files below `root` ("BUCKET/PREFIX") of a store. `protocol` is fsspec's name for it. Raises
    TesseraError if the library for the protocol is not installed."""

    def __init__(
        self,
        protocol: str,
        root: str,
        where: str,
        cache: CacheSettings,
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        *,
        has_responded: bool = False,
    ) -> None:
        super().__init__(where, cache, policy, has_responded=has_responded)
        self._protocol, self._root = protocol, root
        self._held: tuple[int, Any] | None = None
        self._class()

    def _read(self, path: str, start: int, stop: int, seconds: float) -> bytes:
        data: bytes = self._call("cat_file", path, seconds, start=start, end=stop)
        return data

    def _size(self, path: str, seconds: float) -> int:
        info = self._call("info", path, seconds)
        if info["type"] != "file":
            raise FileNotFoundError
        return int(info["size"])

    def _sizes(self, folder: str, seconds: float) -> dict[str, int]:
        del seconds  # a listing may be of any length
        files = self._call("find", folder, None, detail=True)
        start = len(self._root) + 1
        return {name.lstrip("/")[start:]: int(info["size"]) for name, info in files.items()}

    def _times(self, folder: str, seconds: float) -> dict[str, float]:
        del seconds
        files = self._call("find", folder, None, detail=True)
        start = len(self._root) + 1
        return {name.lstrip("/")[start:]: _time(info) for name, info in files.items()}

    def _create(self, path: str, data: bytes, seconds: float) -> None:
        try:
            self._call("pipe_file", path, seconds, data, mode="create")
        except TypeError:
            raise self._unconditional() from None

    def _unconditional(self) -> TesseraError:
        return TesseraError(
            f"{self.where} can't be written conditionally: the store or its library doesn't "
            "support that",
            hint="use a store that supports If-None-Match, or a folder that all machines share",
        )

    def _folders(self, folder: str, seconds: float) -> list[str]:
        del seconds  # a listing may be of any length
        try:
            entries = self._call("ls", folder, None, detail=True)
        except FileNotFoundError:
            return []
        return [
            entry["name"].rstrip("/").rpartition("/")[2]
            for entry in entries
            if entry["type"] == "directory"
        ]

    def _upload(self, file: Path, path: str, seconds: float) -> None:
        if self._protocol == "memory":
            self._call("pipe_file", path, None, file.read_bytes())
        else:
            self._call("put_file", path, seconds, lead=(str(file),))

    def _delete(self, path: str, seconds: float) -> None:
        self._call("rm_file", path, seconds)

    def _call(
        self, name: str, path: str, seconds: float | None, *more: Any, lead: Any = (), **named: Any
    ) -> Any:
        full = "/".join((self._root, *check_path(path, self.where))) if path else self._root
        system = self._system()
        if seconds and system.async_impl:
            named["timeout"] = seconds
        try:
            return getattr(system, name)(*lead, full, *more, **named)
        except (FileNotFoundError, PermissionError) as error:
            raise type(error)(_code(error)) from None
        except Exception as error:
            raise self._translate(error) from None

    def _translate(self, error: Exception) -> Exception:
        """The exception to raise for an error of one of the libraries."""
        kind, code = type(error).__name__, _status(error)
        if kind == "FileExistsError" or code == 412:
            return FileExistsError()
        if code == 501:
            return self._unconditional()
        message = (str(error) or kind).splitlines()[0]
        if kind in ("NoCredentialsError", "PartialCredentialsError"):
            return TesseraError(
                f"{self.where} can't be reached: its credentials are missing or incomplete",
                hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write ~/.aws/credentials",
            )
        network = isinstance(error, OSError | asyncio.TimeoutError)
        of_library = type(error).__module__.partition(".")[0] in _LIBRARIES
        if network or (of_library and kind != "ParamValidationError"):
            return TransientError(message)
        if isinstance(error, ValueError) or of_library:
            return TesseraError(f"{self.where} was rejected by the store's library: {message}")
        return error

    def _system(self) -> Any:
        """fsspec's file system, one for each process: its threads don't survive a fork."""
        if self._held is None or self._held[0] != os.getpid():
            self._held = (os.getpid(), self._make())
        return self._held[1]

    def _make(self) -> Any:
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self._protocol == "s3":
            options["session"] = _session()
            options["config_kwargs"] = {
                "retries": {"total_max_attempts": 1},
                "connect_timeout": _CONNECT_SECONDS,
                "read_timeout": _READ_SECONDS,
            }
        system = self._class()(**options)
        if self._protocol == "s3":
            system.retries = 1
        return system

    def _class(self) -> Any:
        import fsspec

        try:
            return fsspec.get_filesystem_class(self._protocol)
        except ImportError:
            package = _PACKAGES[self._protocol]
            raise TesseraError(
                f"{self.where} can't be read: the package {package} is not installed",
                hint=f"pip install {package}",
            ) from None


def _session() -> Any:
    """A session of S3's library. Sessions of a process share what the library reads from its own
    files, which takes 60 ms for each one otherwise."""
    from aiobotocore.session import AioSession

    session = AioSession()
    session.register_component("data_loader", _descriptions(session))
    return session


_descriptions_of: dict[str | None, Any] = {}


def _descriptions(session: Any) -> Any:
    """The reader of the library's files, for the folder that the user may have added."""
    from botocore.loaders import create_loader

    folder = session.get_config_variable("data_path")
    return _descriptions_of.setdefault(folder, create_loader(folder))


def _code(error: OSError) -> str:
    """The error code of the server, empty if it only says that the file is missing or forbidden."""
    response = getattr(error.__cause__, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    known = {"NoSuchBucket": "there is no such bucket", "404": "", "NoSuchKey": "", "403": ""}
    return known.get(code, code)


def _status(error: Exception) -> int:
    """The HTTP status that the error reports; 0 if there is none."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status)


_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
"""Names of the time of the last write in fsspec's listings of the stores."""


def _time(info: dict[str, Any]) -> float:
    value = next(info[name] for name in _TIMES if info.get(name) is not None)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)
