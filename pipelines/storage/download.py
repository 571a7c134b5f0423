"""Reads one file from a web server whose host is allowed.

In: an http or https address, the hosts that may be asked, a limit. Out: the bytes. Must not know
what they are. No credentials are sent: an address with a user is refused, and neither cookies nor
the passwords of `.netrc` are used. A redirect is followed to the same host only, and never from
https to http.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, urlsplit

from models.core.errors import TesseraError
from pipelines.storage.web import opener

QUIET_SECONDS = 20
"""Timeout of a connection that sends nothing."""
TOTAL_SECONDS = 120
"""Timeout of a file."""
MAX_REDIRECTIONS = 5
_CHUNK = 1 << 16
_PORTS = {"http": 80, "https": 443}


def is_web_address(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def download(url: str, allowed_hosts: Iterable[str], limit: int) -> bytes:
    """The bytes at `url`, at most `limit`. `allowed_hosts` are HOST or HOST:PORT; without a port
    they stand for 80 and 443. Raises TesseraError, which names the address without its query."""
    shown = without_query(url)
    _check(url, shown, allowed_hosts)
    request = urllib.request.Request(
        quote(url, safe="%/:=&?~#+!$,;'@()*[]"),
        headers={"Accept-Encoding": "identity", "User-Agent": "tessera"},
    )
    until = time.monotonic() + TOTAL_SECONDS
    try:
        with opener(_SameHost).open(request, timeout=QUIET_SECONDS) as response:
            return _read(response, shown, limit, until)
    except urllib.error.HTTPError as error:
        error.close()
        raise TesseraError(f"{shown}: the server responds {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise TesseraError(f"{shown} can't be read: {reason}") from None


def without_query(url: str) -> str:
    """The address without what may be secret in it: user, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _read(response: Any, shown: str, limit: int, until: float) -> bytes:
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and int(length) > limit:
        raise TesseraError(f"{shown} has {int(length):,} bytes, more than {limit:,}")
    data = bytearray()
    while chunk := response.read1(_CHUNK):
        data += chunk
        if len(data) > limit:
            raise TesseraError(f"{shown} has more than {limit:,} bytes")
        if time.monotonic() > until:
            raise TesseraError(f"{shown} took more than {TOTAL_SECONDS} s")
    if length.isdigit() and len(data) != int(length):
        raise TesseraError(f"{shown} was cut: {len(data):,} of {int(length):,} bytes came")
    return bytes(data)


def _check(url: str, shown: str, allowed_hosts: Iterable[str]) -> None:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError as error:
        raise TesseraError(f"{shown} is no address: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise TesseraError(
            f"{shown}: an address with a user or a password is refused",
            hint="download the file yourself, and name that",
        )
    usual = port in (None, *_PORTS.values())
    names = {f"{host}:{port or _PORTS.get(parts.scheme)}", *([host] if usual else [])}
    if not host or not names & {allowed.strip().lower() for allowed in allowed_hosts}:
        named = host if usual else f"{host}:{port}"
        raise TesseraError(
            f"{shown}: the host {named} is not allowed", hint=f"allow it: --allow-host {named}"
        )


class _SameHost(urllib.request.HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTIONS

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        same = (old.hostname, _port(old)) == (new.hostname, _port(new))
        safer = (old.scheme, new.scheme) == ("http", "https") and _port(old) in (80, 443)
        if new.username is not None or not (
            (same and old.scheme == new.scheme)
            or (safer and old.hostname == new.hostname and _port(new) == 443)
        ):
            fp.close()
            raise ValueError(f"it redirects to another host, {new.scheme}://{new.hostname}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _port(parts: Any) -> int | None:
    port: int | None = parts.port
    return port or _PORTS.get(parts.scheme)
