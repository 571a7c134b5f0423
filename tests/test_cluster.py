"""An embedded cluster that doesn't answer any more."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
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
