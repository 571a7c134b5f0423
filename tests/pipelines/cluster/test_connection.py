"""An embedded cluster that doesn't start at once, or doesn't answer any more."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
STOPPED = """
import os, signal, sys, time
import psutil
from pipelines import cluster

os.environ.update(cluster.settings())
cluster.connect(cpus=1)
for process in psutil.Process().children(recursive=True):
    if process.name() == "gcs_server":
        print(process.pid, flush=True)
        if {stop}:
            process.send_signal(signal.SIGSTOP)
cluster.SHUTDOWN_SECONDS = 5.0
began = time.monotonic()
cluster.disconnect()
print(time.monotonic() - began, flush=True)
os._exit(0)
"""
TAKEN = """
import os, socket
from pipelines import cluster
from models.core.errors import TesseraError

os.environ.update(cluster.settings())
taken, free = socket.create_server(("127.0.0.1", 0)), cluster._free_port
ports = [taken.getsockname()[1]] * cluster.START_ATTEMPTS
cluster._free_port = lambda: ports[0]
try:
    cluster.connect(cpus=1)
except TesseraError as error:
    print(error.message.splitlines()[0])
cluster._free_port = lambda: ports.pop() if len(ports) == cluster.START_ATTEMPTS else free()
print(cluster.connect(cpus=1), len(ports))
cluster.disconnect()
"""


def test_a_port_that_another_takes_is_given_up_for_another_one() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TAKEN], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    refused, started = done.stdout.splitlines()
    assert refused.startswith("Ray didn't start here, 3 times: ")
    assert started == "True 2"


@pytest.mark.parametrize("stop", [True, False])
def test_a_head_that_does_not_answer_is_left(stop: bool) -> None:
    """Stopped, as one that hangs: found in a run of all tests, where Ray waited for ever."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED.format(stop=stop)],
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
