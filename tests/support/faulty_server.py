"""A wire to a server that can be cut: a TCP proxy on loopback with faults, and a plain web server.

In: the port of a server, or a folder. Out: a port to reach it by. Real sockets; nothing is mocked.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_CHUNK = 1 << 16


class FaultyWire:
    """Passes bytes between a port of its own and a server's, but for its faults.

    Each new connection takes the first of `faults`, or else `always`:
    ""         none
    "503", "404", "403"   answers so, without asking the server
    "refuse"   closes at once
    "stall"    takes the request, and says nothing
    "cut:N"    closes after N bytes of the answer
    "drip:N"   sends N bytes of the answer a second
    "flip:N"   changes the byte N of the answer
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.faults: list[str] = []
        self.always = ""
        self.connections = 0
        self.requests = 0
        self.passed = 0
        """Bytes of answers."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-wire")
        self._thread.start()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def down(self) -> None:
        """Ends all connections, and refuses new ones."""
        self._server.close()
        self.cut()

    def up(self) -> None:
        """The same port answers again."""
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", self.port))

    def cut(self) -> None:
        """Ends all connections; clients keep them open, and faults come to new ones only."""

        async def cancel() -> None:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._run(cancel())

    def close(self) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        fault = self.faults.pop(0) if self.faults else self.always
        try:
            await self._answer(fault, reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(
        self, fault: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        kind, _, number = fault.partition(":")
        if kind == "refuse":
            return
        if kind == "stall":
            await asyncio.sleep(3600)
        if kind.isdigit():
            await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 {kind} Fault\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()
            return
        theirs, ours = await asyncio.open_connection("127.0.0.1", self.target)
        try:
            ask = asyncio.create_task(self._pass(reader, ours))
            try:
                await self._pass(theirs, writer, kind or "none", int(number or 0))
            finally:
                ask.cancel()
        finally:
            ours.transport.abort()

    async def _pass(
        self,
        source: asyncio.StreamReader,
        to: asyncio.StreamWriter,
        kind: str = "",
        number: int = 0,
    ) -> None:
        """Without a `kind` it is what is asked, of which a request is known by its first word."""
        passed = 0
        while data := await source.read(number if kind == "drip" else _CHUNK):
            if not kind:
                self.requests += data.startswith((b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE "))
            if kind == "cut":
                data = data[: number - passed]
            if kind == "flip" and passed <= number < passed + len(data):
                at = number - passed
                data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            passed += len(data)
            self.passed += len(data) if kind else 0
            to.write(data)
            await to.drain()
            if kind == "cut" and passed >= number:
                return
            if kind == "drip":
                await asyncio.sleep(1)


@contextmanager
def wire_to(port: int) -> Iterator[FaultyWire]:
    wire = FaultyWire(port)
    try:
        yield wire
    finally:
        wire.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return


@contextmanager
def web_server(folder: Path) -> Iterator[int]:
    """The files of a folder at a port. It knows no ranges, and closes after each answer."""
    handler = partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, name="web-server")
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
