"""A TCP proxy on loopback that injects faults, and a plain web server.

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
    """A proxy with its own port in front of a server; it injects faults.

    Each new connection has the first of `faults` or, if there are none, `always`:
    ""         none
    "503", "404", "403"   responds with this status; the server gets no request
    "refuse"   closes at once
    "stall"    accepts the request and never responds
    "cut:N"    closes after N bytes of the response
    "drip:N"   sends N bytes of the response per second
    "trickle:N"   takes N bytes of the request per second
    "flip:N"   flips a bit of byte N of the response
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.faults: list[str] = []
        self.always = ""
        self.connections = 0
        self.requests = 0
        self.passed = 0
        """Bytes of responses."""
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

        async def close() -> None:
            self._server.close()

        self._run(close())
        self.cut()

    def up(self) -> None:
        """Listens on the same port again."""
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", self.port))

    def cut(self) -> None:
        """Ends all connections, because faults apply to new ones only and clients keep theirs."""

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
            await self._respond(fault, reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _respond(
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
            slow = int(number) if kind == "trickle" else 0
            requests = asyncio.create_task(self._pass(reader, ours, bytes_a_second=slow))
            try:
                await self._pass(theirs, writer, kind or "none", int(number or 0))
            finally:
                requests.cancel()
        finally:
            ours.transport.abort()

    async def _pass(
        self,
        source: asyncio.StreamReader,
        to: asyncio.StreamWriter,
        kind: str = "",
        number: int = 0,
        bytes_a_second: int = 0,
    ) -> None:
        """Copies bytes. Without `kind` they are requests, which are counted by their method."""
        passed = 0
        chunk = max(bytes_a_second // 10, 1) if bytes_a_second else _CHUNK
        while data := await source.read(number if kind == "drip" else chunk):
            if bytes_a_second:
                await asyncio.sleep(len(data) / bytes_a_second)
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
    """Serves the files of a folder. It ignores ranges, and closes after each response."""
    handler = partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="web-server")
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
