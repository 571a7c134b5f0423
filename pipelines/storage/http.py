"""Files on a web server, to read.

In: an http or https address. Out: a `storage.Place` that can't be written. Must not know shards or
cards. Only http and https are followed when the server sends elsewhere.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from models.core.errors import TesseraError
from pipelines.storage.base import CacheSettings, check_path
from pipelines.storage.remote import RemoteStorage
from pipelines.storage.retry import RetryPolicy, TransientError

_QUIET_SECONDS = 30
"""The longest that a connection may say nothing."""
_CHUNK = 1 << 16
_LOOKING_THREADS = 8


class HttpStorage(RemoteStorage):
    """Files below an address. Servers that know no ranges work too, at the price of reading from
    the start again for each block."""

    def __init__(
        self,
        where: str,
        cache: CacheSettings,
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(where, cache, policy)

    def sizes(self, paths: Sequence[str]) -> dict[str, int]:
        """One request a file, as a web server lists nothing."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(_LOOKING_THREADS) as pool:
            found = zip(paths, pool.map(self.size, paths))
            return {path: size for path, size in found if size is not None}

    def _read(self, path: str, start: int, stop: int, seconds: float) -> bytes:
        if start == stop:
            return b""
        until = time.monotonic() + seconds
        with self._open("GET", path, seconds, f"bytes={start}-{stop - 1}") as answer:
            skip = 0 if answer.status == 206 else start
            data = bytearray()
            while len(data) < skip + stop - start:
                if time.monotonic() > until:
                    raise TransientError(
                        f"{len(data):,} bytes came in {seconds:.0f} s, which is too slow"
                    )
                # read1: a drip of bytes must not hold the clock up.
                chunk = answer.read1(min(_CHUNK, skip + stop - start - len(data)))
                if not chunk:
                    break
                data += chunk
        return bytes(data[skip:])

    def _size(self, path: str, seconds: float) -> int:
        with self._open("HEAD", path, seconds) as answer:
            length = answer.headers.get("Content-Length", "")
        if not length.isdigit():  # or the headers were cut short
            raise TransientError("the server doesn't say how long the file is")
        return int(length)

    def _sizes(self, folder: str, seconds: float) -> dict[str, int]:
        raise TesseraError(
            f"{self.where} can't be listed: it is a web server",
            hint="give an s3:// address or a folder",
        )

    def _upload(self, file: Path, path: str, seconds: float) -> None:
        raise self._closed()

    def _delete(self, path: str, seconds: float) -> None:
        raise self._closed()

    def _closed(self) -> TesseraError:
        return TesseraError(
            f"{self.where} can't be written: it is a web server",
            hint="give an s3:// address or a folder",
        )

    @contextmanager
    def _open(self, method: str, path: str, seconds: float, span: str = "") -> Iterator[Any]:
        url = f"{self.where}/{quote('/'.join(check_path(path, self.where)))}"
        headers = {"Accept-Encoding": "identity", "User-Agent": "tessera"}
        if span:
            headers["Range"] = span
        request = urllib.request.Request(url, headers=headers, method=method)
        try:
            with _opener().open(request, timeout=min(seconds, _QUIET_SECONDS)) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            error.close()
            raise _judge(error.code, error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(
                str(getattr(error, "reason", error)) or type(error).__name__
            ) from None


def _judge(code: int, reason: str) -> Exception:
    if code in (404, 410):
        return FileNotFoundError()
    if code in (401, 403):
        return PermissionError(f"{code} {reason}")
    if code >= 500 or code in (408, 425, 429):
        return TransientError(f"the server says {code} {reason}")
    return TesseraError(f"the server says {code} {reason}")


def _opener() -> urllib.request.OpenerDirector:
    """Without the handlers for ftp, file and data, which a server could send to."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener
