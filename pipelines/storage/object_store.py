"""The fsspec room: files in an object store.

In: the protocol's name, a bucket with a prefix. Out: a `storage.Place`. Must not know shards or
cards. Endpoint and credentials are found by the store's own library, for S3 in AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and ~/.aws.

fsspec would follow chains (`a::b`) and patterns in what it is given: here it gets plain paths that
`storage.split` has let through, and its own retries are off, for ours say how long they take.
"""

from __future__ import annotations

import asyncio
import os
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
"""Their errors of the network are no OSError."""


class ObjectStorage(RemoteStorage):
    """Files below `root` ("BUCKET/PREFIX") of the store that fsspec calls `protocol`."""

    def __init__(
        self,
        protocol: str,
        root: str,
        where: str,
        cache: CacheSettings,
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(where, cache, policy)
        self._protocol, self._root = protocol, root
        self._held: tuple[int, Any] | None = None
        self._class()

    def _read(self, path: str, start: int, stop: int, seconds: float) -> bytes:
        data: bytes = self._call("cat_file", path, seconds, start=start, end=stop)
        return data

    def _size(self, path: str, seconds: float) -> int:
        about = self._call("info", path, seconds)
        if about["type"] != "file":
            raise FileNotFoundError
        return int(about["size"])

    def _sizes(self, folder: str, seconds: float) -> dict[str, int]:
        del seconds  # a listing of any length
        found = self._call("find", folder, None, detail=True)
        start = len(self._root) + 1
        return {name.lstrip("/")[start:]: int(about["size"]) for name, about in found.items()}

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
            raise self._judge(error) from None

    def _judge(self, error: Exception) -> Exception:
        """What an error of the libraries means here."""
        kind, said = type(error).__name__, (str(error) or type(error).__name__).splitlines()[0]
        if kind in ("NoCredentialsError", "PartialCredentialsError"):
            return TesseraError(
                f"{self.where} can't be reached: there are no whole credentials for it",
                hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or make ~/.aws/credentials",
            )
        network = isinstance(error, OSError | asyncio.TimeoutError)
        of_library = type(error).__module__.partition(".")[0] in _LIBRARIES
        if network or (of_library and kind != "ParamValidationError"):
            return TransientError(said)
        if isinstance(error, ValueError) or of_library:
            return TesseraError(f"{self.where} is refused by the store's library: {said}")
        return error

    def _system(self) -> Any:
        """One a process: its threads don't live on in a fork."""
        if self._held is None or self._held[0] != os.getpid():
            self._held = (os.getpid(), self._make())
        return self._held[1]

    def _make(self) -> Any:
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self._protocol == "s3":
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


def _code(error: OSError) -> str:
    """What the server said, where it said more than that the file isn't there."""
    answer = getattr(error.__cause__, "response", None) or {}
    code = str(answer.get("Error", {}).get("Code", ""))
    known = {"NoSuchBucket": "there is no such bucket", "404": "", "NoSuchKey": "", "403": ""}
    return known.get(code, code)
