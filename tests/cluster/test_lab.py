"""The machines of the lab have nothing in common but the network, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from lab import Lab

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path / "lab", ["one", "two"]) as machines:
        yield machines


def test_machines_reach_each_other_by_name_and_share_no_file_and_no_process(machines: Lab) -> None:
    one, two = machines.machine("one"), machines.machine("two")
    assert one.run("hostname", check=True).stdout == "one\n"
    two.run("echo hello > /srv/file; echo hello > /tmp/file; echo hello > /dev/shm/file")
    assert one.run("cat /srv/file /tmp/file /dev/shm/file").stdout == ""
    two.start("python -m http.server 8000")
    fetch = "curl -sf -m 1 --retry 20 --retry-all-errors --retry-delay 1 http://two:8000/file"
    assert one.run(fetch).stdout == "hello\n"
    assert machines.get(f"http://{two.address}:8000/file") == "hello\n"
    assert not [line for line in one.processes() if "http.server" in line]
    assert "Read-only" in one.run(f"touch {SUPPORT}/file").stderr


def test_a_machine_can_lose_its_cable_one_of_its_neighbours_and_its_disk(machines: Lab) -> None:
    one, two = machines.machine("one"), machines.machine("two")
    ping = f"curl -s -m 2 http://{two.address}:9/; echo $?"
    refused, no_answer = "7\n", "28\n"
    assert one.run(ping).stdout == refused
    one.block(two)
    assert one.run(ping).stdout == no_answer
    one.unblock(two)
    assert one.run(ping).stdout == refused
    two.unplug()
    assert one.run(ping).stdout != refused
    two.plug()
    two.run("touch /srv/file", check=True)
    two.kill()
    assert machines.machine("two").run("ls /srv/file").returncode


def test_a_command_that_takes_too_long_is_ended(machines: Lab) -> None:
    one = machines.machine("one")
    assert one.run("sleep 60", timeout_seconds=1).returncode == 124


def test_nothing_is_left_when_the_process_that_made_the_lab_is_killed(tmp_path: Path) -> None:
    program = (
        "import time\n"
        "from pathlib import Path\n"
        "from lab import Lab\n"
        f"with Lab(Path({str(tmp_path)!r}, 'lab'), ['one']) as machines:\n"
        "    machines.machine('one').start('sleep 4321')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(SUPPORT), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 20
        started: list[psutil.Process] = []
        while not any(child.name() == "sleep" and "4321" in child.cmdline() for child in started):
            assert time.monotonic() < deadline
            started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    deadline = time.monotonic() + 20
    while any(_lives(child) for child in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [child for child in started if _lives(child)] == []


def _lives(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
