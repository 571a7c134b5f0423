"""An embedded cluster whose port is taken, or whose head no longer responds."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.shared.local_services import free_port
from pipelines.cluster import connection

ROOT = Path(__file__).parents[3]
LIMIT_SECONDS = 5.0
PROGRAM = f"""
import json, os, signal, socket, time
import psutil
from models.core.errors import TesseraError
from pipelines.cluster import connection

os.environ.update(connection.settings())
connection.SHUTDOWN_SECONDS = {LIMIT_SECONDS}
result = {{}}

def head():
    children = psutil.Process().children(recursive=True)
    heads = [process for process in children if process.name() == "gcs_server"]
    return max(heads, key=psutil.Process.create_time)  # a start that failed leaves its head

def disconnect():
    began = time.monotonic()
    connection.disconnect()
    return time.monotonic() - began

attempts, connection.START_ATTEMPTS = connection.START_ATTEMPTS, 1
taken, free_port = socket.create_server(("127.0.0.1", 0)), connection._free_port
ports = [taken.getsockname()[1]] * 2
connection._free_port = lambda: ports.pop() if ports else free_port()
try:
    connection.connect(cpus=1)
except TesseraError as error:
    result["refused"] = error.message
connection.START_ATTEMPTS = attempts
result["retried"] = connection.connect(cpus=1) and not ports
result["heads"] = [head().pid]
result["seconds"] = [disconnect()]

connection.connect(cpus=1)
result["heads"].append(head().pid)
head().send_signal(signal.SIGSTOP)
result["seconds"].append(disconnect())
print(json.dumps(result), flush=True)
os._exit(0)
"""


DEAD_ADDRESSES = """
import os, sys, time
from models.core.errors import TesseraError
from pipelines.cluster import connection

for address in sys.argv[1:]:
    os.environ.update(connection.settings(address))
    began = time.monotonic()
    try:
        connection.connect(address)
    except TesseraError as error:
        print(f"{time.monotonic() - began:.1f} {error.message}")
os._exit(0)
"""


@contextmanager
def server(answer: bytes | None) -> Iterator[int]:
    """A port where something listens that answers with these bytes, or never; not Ray."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    clients.append(client)
                    if answer is not None:
                        client.recv(1024)
                        client.sendall(answer)
                        client.close()

        clients: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        for client in clients:
            client.close()


def test_a_head_is_recognised_by_its_greeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "GREETING_SECONDS", 0.3)
    settings_frame = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    for answer, problem in (
        (settings_frame, ""),  # the control: a server that speaks HTTP/2
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not the head of a Ray cluster"),
        (b"220 mail ready\r\n", "is not the head of a Ray cluster"),
        (b"", "is not the head of a Ray cluster"),
        (None, "no response in"),
    ):
        with server(answer) as port:
            assert connection._greet("127.0.0.1", port).endswith(problem) or problem in (
                connection._greet("127.0.0.1", port)
            )
    assert connection._greet("127.0.0.1", free_port()) == "nothing listens there"
    assert "not known" in connection._greet("no-such-host.invalid", 6379)


@pytest.mark.slow
def test_a_dead_address_is_one_line_within_seconds() -> None:
    closed = free_port()
    with server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as other, server(None) as silent:
        addresses = {
            f"127.0.0.1:{closed}": "nothing listens there",
            f"ray://127.0.0.1:{closed}": "nothing listens there",
            "no-such-host.invalid:6379": "",
            f"127.0.0.1:{other}": "what listens there is not the head of a Ray cluster",
            f"127.0.0.1:{silent}": "no response in 5 s",
            "nonsense": "",
            f"http://127.0.0.1:{closed}": "it is no address of a Ray cluster",
        }
        done = subprocess.run(
            [sys.executable, "-c", DEAD_ADDRESSES, *addresses],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )
    lines = done.stdout.splitlines()
    assert len(lines) == len(addresses), done
    for line, (address, problem) in zip(lines, addresses.items()):
        seconds, _, message = line.partition(" ")
        assert float(seconds) < 20, line
        assert message.startswith(f"no Ray cluster answers at {address}: "), line
        assert problem in message


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """What a process says that starts two clusters, one after the other. For the first one, the
    port is taken twice; the head of the second one is stopped with SIGSTOP."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


@pytest.mark.slow
def test_a_start_on_a_taken_port_is_retried_on_another(result: dict[str, Any]) -> None:
    assert result["refused"].startswith("Ray could not be started here in 1 attempts: ")
    assert result["retried"] is True


@pytest.mark.slow
def test_disconnect_does_not_wait_for_a_head_that_hangs(result: dict[str, Any]) -> None:
    """Ray's own shutdown would wait for it forever. The control is a head that responds."""
    responds, hangs = result["seconds"]
    assert responds < LIMIT_SECONDS <= hangs
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, result["heads"])) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, result["heads"])), "a head outlived its driver"
