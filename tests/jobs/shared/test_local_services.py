"""Processes that were recorded, their health, and a record that is damaged or in use. Services that
run are in `tests/integration/test_local_services.py`."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from cli_runner import Call

from jobs.shared import local_services
from jobs.shared.local_services import Service


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path))
    return tmp_path


def test_an_unreadable_record_is_reported(home: Path, call: Call) -> None:
    (home / "services.json").write_text("{")
    for verb in ("status", "down", "up"):
        refused = call(verb)
        assert refused.status == 1
        assert "services.json can't be read" in refused.err


def test_a_second_concurrent_command_is_refused(home: Path, call: Call) -> None:
    with local_services.alone(home):
        refused = call("down")
    assert refused.status == 1
    assert "at work" in refused.err


def _names(service: Service) -> list[str]:
    """The names of processes, without the short-lived subshell."""
    try:
        return sorted(p.name() for p in local_services.processes(service))
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
def test_only_recorded_processes_are_ended() -> None:
    """The leader, its child and an orphan of its session end; a process that reuses the number
    doesn't."""
    leader = subprocess.Popen(
        ["sh", "-c", "sleep 300 & (sleep 300 &) ; wait"], start_new_session=True
    )
    try:
        began = local_services.start_time(psutil.Process(leader.pid))
        service = Service("x", leader.pid, began, "", "")
        stranger = Service("x", leader.pid, began - 60, "", "")
        _until(lambda: _names(service) == ["sh", "sleep", "sleep"])
        family = local_services.processes(service)
        assert not local_services.is_alive(stranger)
        assert local_services.end(stranger) == 0
        assert all(p.is_running() for p in family)
        assert local_services.is_alive(service)
        assert local_services.end(service) == 0
        assert not any(p.is_running() for p in family)
    finally:
        leader.kill()
        leader.wait()


@pytest.mark.slow
def test_orphans_are_ended_after_the_leader_ended() -> None:
    leader = subprocess.Popen(["sh", "-c", "sleep 300 & wait"], start_new_session=True)
    service = Service(
        "x", leader.pid, local_services.start_time(psutil.Process(leader.pid)), "", ""
    )
    _until(lambda: len(local_services.processes(service)) == 2)
    leader.kill()
    leader.wait()
    assert not local_services.is_alive(service)
    (orphan,) = local_services.processes(service)
    local_services.end(service)
    assert not orphan.is_running()


@pytest.mark.slow
def test_processes_that_ignore_sigterm_are_killed() -> None:
    leader = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; sleep 300"], start_new_session=True)
    try:
        service = Service(
            "x", leader.pid, local_services.start_time(psutil.Process(leader.pid)), "", ""
        )
        _until(lambda: len(local_services.processes(service)) == 2)
        assert local_services.end(service, timeout_seconds=0.2) >= 1
        assert local_services.processes(service) == []
    finally:
        leader.wait()


def _until(condition: object, seconds: float = 5) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def service_of(leader: subprocess.Popen[bytes]) -> Service:
    began = local_services.start_time(psutil.Process(leader.pid))
    return Service("x", leader.pid, began, "", "")


def test_a_clock_that_is_set_forgets_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil derives the start of a process from the clock and from the time of the last start of
    the machine, which Linux derives from the clock: after a step of it both differ."""
    service = Service(
        "x", os.getpid(), local_services.start_time(psutil.Process(os.getpid())), "", ""
    )
    by_clock = psutil.Process(os.getpid()).create_time()
    for step in (0, 3, -3, 3600):
        monkeypatch.setattr(psutil.Process, "create_time", lambda self, step=step: by_clock + step)
        assert local_services.is_alive(service)
        assert abs(psutil.Process(os.getpid()).create_time() - by_clock - step) < 1, "the control"
    assert 0 < service.began < time.clock_gettime(time.CLOCK_BOOTTIME)


def test_what_is_printed_for_a_shell_can_be_pasted_and_has_no_password(tmp_path: Path) -> None:
    file = tmp_path / "it's a 猫.txt"
    file.write_text("hunter2")
    given = {"A": "it's", local_services.PASSWORD_PATH: str(file)}
    lines = local_services.exports(given)
    assert "hunter2" not in lines
    shown = subprocess.run(
        ["bash", "-c", f'{lines}\necho "$A $MLFLOW_TRACKING_PASSWORD"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "it's hunter2\n"
    assert local_services.with_password(given)["MLFLOW_TRACKING_PASSWORD"] == "hunter2"
    file.unlink()
    assert local_services.with_password(given) == given


def test_health_is_decided_by_the_status_code() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert local_services.probe_url(address, timeout_seconds=0.2) == "no response in 0.2 s"
    assert local_services.probe_url(address) == "nothing listens there"
    with pytest.raises(urllib.error.URLError):  # the control: bare urllib raises
        urllib.request.urlopen(address, timeout=0.2)
