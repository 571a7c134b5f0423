"""An embedded cluster whose port is taken, or whose head no longer responds."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, signal, socket, time
import psutil
from models.core.errors import TesseraError
from pipelines.cluster import connection

os.environ.update(connection.settings())
taken, free_port = socket.create_server(("127.0.0.1", 0)), connection._free_port
ports = [taken.getsockname()[1]]
connection._free_port = lambda: ports[0]
connection.START_ATTEMPTS = 1
try:
    connection.connect(cpus=1)
except TesseraError as error:
    print(error.message.splitlines()[0], flush=True)
connection._free_port = lambda: ports.pop() if ports else free_port()
connection.START_ATTEMPTS = 2
print(connection.connect(cpus=1), len(ports), flush=True)

connection.SHUTDOWN_SECONDS = 5.0
for stop in (False, True):
    connection.connect(cpus=1)
    heads = [p for p in psutil.Process().children(recursive=True) if p.name() == "gcs_server"]
    (head,) = [p for p in heads if p.status() != psutil.STATUS_ZOMBIE]
    if stop:
        head.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    connection.disconnect()
    print(head.pid, time.monotonic() - began, flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What `PROGRAM` prints: one process of its own, with two clusters."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_start_on_a_taken_port_is_retried_on_another(printed: list[str]) -> None:
    assert printed[0].startswith("Ray could not be started here in 1 attempts: ")
    assert printed[1] == "True 0"


@pytest.mark.slow
@pytest.mark.parametrize("stop", [False, True])
def test_disconnect_does_not_wait_for_a_head_that_hangs(printed: list[str], stop: bool) -> None:
    """The head is stopped with SIGSTOP. Ray's own shutdown would wait for it forever. Control: one
    that isn't stopped ends at once."""
    pid, seconds = printed[2 + stop].split()
    assert (float(seconds) >= 5.0) is stop
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(int(pid)), "the head outlived its driver"
