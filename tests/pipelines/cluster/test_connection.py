"""An embedded cluster whose port is taken, or whose head no longer responds."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
HANGING_HEAD = """
import os, signal, sys, time
import psutil
from pipelines.cluster import connection

os.environ.update(connection.settings())
connection.connect(cpus=1)
for process in psutil.Process().children(recursive=True):
    if process.name() == "gcs_server":
        print(process.pid, flush=True)
        if {stop}:
            process.send_signal(signal.SIGSTOP)
connection.SHUTDOWN_SECONDS = 5.0
began = time.monotonic()
connection.disconnect()
print(time.monotonic() - began, flush=True)
os._exit(0)
"""
TAKEN_PORT = """
import os, socket
from models.core.errors import TesseraError
from pipelines.cluster import connection

os.environ.update(connection.settings())
taken, free_port = socket.create_server(("127.0.0.1", 0)), connection._free_port
ports = [taken.getsockname()[1]] * connection.START_ATTEMPTS
connection._free_port = lambda: ports[0]
try:
    connection.connect(cpus=1)
except TesseraError as error:
    print(error.message.splitlines()[0])
connection._free_port = (
    lambda: ports.pop() if len(ports) == connection.START_ATTEMPTS else free_port()
)
print(connection.connect(cpus=1), len(ports))
connection.disconnect()
"""


@pytest.mark.slow
def test_a_start_on_a_taken_port_is_retried_on_another() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TAKEN_PORT], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    refused, started = done.stdout.splitlines()
    assert refused.startswith("Ray could not be started here in 3 attempts: ")
    assert started == "True 2"


@pytest.mark.slow
@pytest.mark.parametrize("stop", [True, False])
def test_disconnect_does_not_wait_for_a_head_that_hangs(stop: bool) -> None:
    """The head is stopped with SIGSTOP. Ray's own shutdown would wait for it forever."""
    done = subprocess.run(
        [sys.executable, "-c", HANGING_HEAD.format(stop=stop)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    pid, seconds = done.stdout.split()
    assert (float(seconds) >= 5.0) is stop
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(int(pid)), "the head outlived its driver"
