"""Files on a web server, read only.

In: an http or https address. Out: a `Storage` that can't be written. Must not know shards or cards.
Redirects are followed to http and https addresses only.
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
from urllib.parse import quote, urlsplit

from models.core.errors import TesseraError
from pipelines.storage.base import CacheSettings, check_path
from pipelines.storage.remote import RemoteStorage
from pipelines.storage.retry import RetryPolicy, TransientError
from pipelines.storage.web import opener

_QUIET_SECONDS = 30
"""Timeout of a connection that sends nothing."""
_CHUNK = 1 << 16
_SIZE_THREADS = 8


class HttpStorage(RemoteStorage):
    """Files below an address of a web server. Servers without range requests work too, but each
    block then costs a download of all bytes before it."""

    def __init__(
        self,
        where: str,
        cache: CacheSettings,
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(where, cache, policy)

    def sizes(self, paths: Sequence[str]) -> dict[str, int]:
        """Sends one request for each file, because a web server lists nothing."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(_SIZE_THREADS) as pool:
            pairs = zip(paths, pool.map(self.size, paths))
            return {path: size for path, size in pairs if size is not None}

    def _read(self, path: str, start: int, stop: int, seconds: float) -> bytes:
        if start == stop:
            return b""
        until = time.monotonic() + seconds
        with self._open("GET", path, seconds, f"bytes={start}-{stop - 1}") as response:
            skip = 0 if response.status == 206 else start
            data = bytearray()
            while len(data) < skip + stop - start:
                if time.monotonic() > until:
                    raise TransientError(f"too slow: {len(data):,} bytes in {seconds:.0f} s")
                # read1 returns what has arrived; `read` would wait on a server that sends slowly.
                chunk = response.read1(min(_CHUNK, skip + stop - start - len(data)))
                if not chunk:
                    break
                data += chunk
        return bytes(data[skip:])

    def _size(self, path: str, seconds: float) -> int:
        with self._open("HEAD", path, seconds) as response:
            length = response.headers.get("Content-Length", "")
        if not length.isdigit():  # it may be missing because the response was cut short
            raise TransientError("the server doesn't send the file's length")
        return int(length)

    def _sizes(self, folder: str, seconds: float) -> dict[str, int]:
        raise self._not_listed()

    def _folders(self, folder: str, seconds: float) -> list[str]:
        raise self._not_listed()

    def _upload(self, file: Path, path: str, seconds: float) -> None:
        raise self._read_only()

    def _create(self, path: str, data: bytes, seconds: float) -> None:
        raise self._read_only()

    def _delete(self, path: str, seconds: float) -> None:
        raise self._read_only()

    def _not_listed(self) -> TesseraError:
        return TesseraError(
            f"{self.where} can't be listed: it is a web server",
            hint="use an s3:// address or a folder",
        )

    def _read_only(self) -> TesseraError:
        return TesseraError(
            f"{self.where} can't be written: it is a web server",
            hint="use an s3:// address or a folder",
        )

    @contextmanager
    def _open(self, method: str, path: str, seconds: float, span: str = "") -> Iterator[Any]:
        url = f"{self.where}/{quote('/'.join(check_path(path, self.where)))}"
        headers = {"Accept-Encoding": "identity", "User-Agent": "tessera"}
        if span:
            headers["Range"] = span
        request = urllib.request.Request(url, headers=headers, method=method)
        try:
            with opener(_SameHost).open(request, timeout=min(seconds, _QUIET_SECONDS)) as response:
                yield response
        except urllib.error.HTTPError as error:
            error.close()
            raise _translate(error.code, error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(
                str(getattr(error, "reason", error)) or type(error).__name__
            ) from None


def _translate(code: int, reason: str) -> Exception:
    """The exception for a status code. Only server errors, timeouts and rate limits may pass."""
    if code in (404, 410):
        return FileNotFoundError()
    if code in (401, 403):
        return PermissionError(f"{code} {reason}")
    if code >= 500 or code in (408, 425, 429):
        return TransientError(f"the server responds {code} {reason}")
    return TesseraError(f"the server responds {code} {reason}")


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to the same host only: another one is not what the user named."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if after.hostname != before.hostname or (before.scheme, after.scheme) == ("https", "http"):
            raise TesseraError(
                f"{before.hostname} redirects to {after.scheme}://{after.netloc}, which is not "
                "followed",
                hint="if you trust it, use the address that it redirects to",
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)
