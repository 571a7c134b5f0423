"""Files from web servers: from allowed hosts only, and never with credentials."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from models.core.errors import TesseraError
from pipelines.storage.download import download, is_web_address

SEEN: list[tuple[str, dict[str, str]]] = []


class _Handler(BaseHTTPRequestHandler):
    to = ""

    def do_GET(self) -> None:
        SEEN.append((self.path, dict(self.headers)))
        if self.path.startswith("/to"):
            self.send_response(302)
            self.send_header("Location", self.to if self.path == "/to" else self.path[3:])
            self.send_header("Set-Cookie", "a=b")
            self.end_headers()
            return
        found = self.path.startswith("/file")
        self.send_response(200 if found else 404)
        body = b"0123456789" if found else b""
        claimed = len(body) + (5 if "cut" in self.path else 0)
        if "endless" not in self.path:
            self.send_header("Content-Length", str(claimed))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def server(to: str = "") -> Iterator[str]:
    """A server whose /to redirects to `to`, and /to/x to /x; gives its HOST:PORT."""
    handler = type("Handler", (_Handler,), {"to": to})
    with HTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    SEEN.clear()


def test_a_file_is_read_from_an_allowed_host() -> None:
    with server() as host:
        assert download(f"http://{host}/file a.jpg", [host], 100) == b"0123456789"
        assert download(f"http://{host}/to/file", [host], 100) == b"0123456789"
    assert [path for path, _ in SEEN] == ["/file%20a.jpg", "/to/file", "/file"]
    assert not any({"Authorization", "Cookie"} & headers.keys() for _, headers in SEEN)


def test_other_hosts_get_no_request() -> None:
    with server() as host, pytest.raises(TesseraError, match=r"the host .* is not allowed"):
        download(f"http://{host}/file", ["example.org", host.replace("127.0.0.1", "localhost")], 9)
    assert SEEN == []


def test_a_redirect_to_another_host_is_not_followed() -> None:
    with server() as other, server(f"http://{other}/file") as host:
        with pytest.raises(TesseraError, match="redirects to another host, http://127"):
            download(f"http://{host}/to", [host, other], 100)
        assert [path for path, _ in SEEN] == ["/to"]
        assert download(f"http://{other}/file", [other], 100)  # the control


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://u:p@{}/file"])
def test_a_redirect_to_something_else_is_not_followed(to: str) -> None:
    with server() as other, server(to.format(other)) as host:
        with pytest.raises(TesseraError):
            download(f"http://{host}/to", [host, other], 100)
        assert [path for path, _ in SEEN] == ["/to"]


def test_a_redirect_without_end_ends() -> None:
    with server("/to") as host, pytest.raises(TesseraError, match="302"):
        download(f"http://{host}/to", [host], 100)
    assert 2 <= len(SEEN) <= 10


@pytest.mark.parametrize("user", ["user:secret@", "user@", ":secret@"])
def test_an_address_with_a_user_is_refused_and_not_repeated(user: str) -> None:
    with pytest.raises(TesseraError, match="with a user or a password is refused") as caught:
        download(f"http://{user}example.org/x?key=hidden", ["example.org"], 100)
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "limit", "message"),
    [
        ("/file", 9, "has 10 bytes, more than 9"),
        ("/file-endless", 9, "has more than 9 bytes"),
        ("/file-cut", 100, "was cut: 10 of 15 bytes came"),
        ("/none", 100, "the server responds 404"),
    ],
)
def test_what_is_too_large_cut_or_missing_is_refused(path: str, limit: int, message: str) -> None:
    with server() as host, pytest.raises(TesseraError, match=message):
        download(f"http://{host}{path}", [host], limit)


@pytest.mark.parametrize(
    ("url", "allowed", "fits"),
    [
        ("http://h.example/x", "h.example", True),
        ("https://H.example/x", "h.EXAMPLE", True),
        ("http://h.example:80/x", "h.example", True),
        ("http://h.example:8080/x", "h.example", False),
        ("http://h.example:8080/x", "h.example:8080", True),
        ("http://h.example.evil.org/x", "h.example", False),
        ("http://evil.org/h.example", "h.example", False),
        ("http://[::1]:70000/x", "h.example", False),
    ],
)
def test_a_host_is_compared_as_a_whole(url: str, allowed: str, fits: bool) -> None:
    """The name of no host that ends in .example can be resolved."""
    message = "can't be read" if fits else "is not allowed|no address"
    with pytest.raises(TesseraError, match=message):
        download(url, [allowed], 100)
    assert is_web_address(url)
