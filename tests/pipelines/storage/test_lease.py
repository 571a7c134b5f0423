"""A lease has one holder at a time: in processes that race, are killed, or stop for a while."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import wire_to
from s3_server import S3Server, missing

from models.core.errors import TesseraError
from pipelines.storage import lease
from pipelines.storage.base import Storage
from pipelines.storage.folder import FolderStorage
from pipelines.storage.lease import Holder, LeaseLostError
from pipelines.storage.open import open_storage

ROOT = Path(__file__).parents[3]
HERE, THERE = Holder("here", 1), Holder("there", 2, "job-7")
needs_s3 = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a server")


class Process:
    """A process that holds leases; see `lease_holder.py`."""

    def __init__(self, address: str, ttl_seconds: float) -> None:
        script = ROOT / "tests" / "support" / "lease_holder.py"
        self._process = subprocess.Popen(
            [sys.executable, str(script), address, str(ttl_seconds)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def send(self, word: str, name: str) -> None:
        assert self._process.stdin is not None
        print(word, name, file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def ask(self, word: str, name: str) -> dict[str, Any]:
        self.send(word, name)
        return self.answer()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


Start = Callable[[str, float], Process]


@pytest.fixture
def start() -> Iterator[Start]:
    processes: list[Process] = []

    def start(address: str, ttl_seconds: float) -> Process:
        processes.append(Process(address, ttl_seconds))
        assert processes[-1].answer() == {"ready": True}
        return processes[-1]

    yield start
    for process in processes:
        process.end()


def held(storage: Storage, holder: Holder = HERE, **more: Any) -> Any:
    return lease.held(storage, "runs/a/lease", "run a", holder=holder, **more)


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    with held(storage, THERE) as first:
        assert first.attempt == 1
        first.check()
        with (
            pytest.raises(
                TesseraError,
                match=r"run a is being trained by host there, process 2, job job-7, renewed 0 s "
                r"ago; it can be replaced 30 s after the last sign of life",
            ),
            held(storage),
        ):
            pass
    with held(storage) as second:
        assert second.attempt == 2, "released, so nobody waits"
    assert len(storage.names("runs/a/lease")) == 1, "older entries are removed"


@pytest.mark.slow
def test_a_holder_that_shows_itself_is_not_waited_for(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    with held(storage, THERE, ttl_seconds=6.0):
        began = time.monotonic()
        with (
            pytest.raises(TesseraError, match="renewed 0 s ago"),
            held(storage, patience_seconds=60),
        ):
            pass
        assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_lease_is_renewed_while_it_is_held(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    with held(storage, ttl_seconds=3.0):
        time.sleep(4.0)
        with pytest.raises(TesseraError, match=r"renewed [012] s ago"), held(storage):
            pass


def test_the_older_holder_notices_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first holder's thread never gets to renew, and its process continues much later."""
    storage = FolderStorage(tmp_path)
    lost: list[LeaseLostError] = []
    with held(storage, ttl_seconds=600.0, on_lost=lost.append) as first:
        entry = storage.names("runs/a/lease")[0]
        hour_ago = time.time() - 3600
        os.utime(tmp_path / entry, (hour_ago, hour_ago))
        monkeypatch.setattr(lease, "_WATCHED_PART", 0.0)
        with held(storage, THERE) as second:
            assert second.attempt == 2
            first.check()  # its last renewal was a moment ago by its own clock
            now = lease._now()
            monkeypatch.setattr(lease, "_now", lambda: now + 3600)
            with pytest.raises(
                LeaseLostError, match=r"attempt 2, host there.* has replaced attempt 1 of run a"
            ):
                first.check()
            assert first.lost
            lease.check_attempt(storage, "runs/a/lease", "run a", 2)
            with pytest.raises(LeaseLostError):
                lease.check_attempt(storage, "runs/a/lease", "run a", 1)
            second.check()


def test_a_number_that_was_pruned_is_not_taken_again(tmp_path: Path) -> None:
    """A holder that slept creates the entry after its own, which was there and was removed."""
    storage = FolderStorage(tmp_path)
    with held(storage, ttl_seconds=600.0) as first:
        names = storage.names("runs/a/lease")
        with held(FolderStorage(tmp_path / "elsewhere"), THERE):
            content = (tmp_path / "elsewhere/runs/a/lease/000000001").read_bytes()
        storage.remove(names[0])
        storage.write("runs/a/lease/000000009", content)
        with pytest.raises(LeaseLostError, match=r"host there.* has replaced"):
            first._renew()
        assert storage.names("runs/a/lease") == ["runs/a/lease/000000009"]


def test_a_store_that_ignores_the_condition_is_refused(tmp_path: Path) -> None:
    class Careless(FolderStorage):
        def create_if_absent(self, path: str, data: bytes) -> bool:
            self.write(path, data)
            return True

    with (
        pytest.raises(TesseraError, match="ignores the condition of a conditional write"),
        held(Careless(tmp_path)),
    ):
        pass


# ── processes ─────────────────────────────────────────────────────────────────────────────────


def race(one: Process, other: Process, count: int) -> list[int]:
    """Which of two processes got the lease, of `count` leases that both asked for at once."""
    winners = []
    for number in range(count):
        for process in (one, other):
            process.send("try", f"run{number}")
        answers = [process.answer() for process in (one, other)]
        winners.append(["attempt" in answer for answer in answers].index(True))
        assert sorted(map(list, answers)) == [["attempt"], ["refused"]], answers
        (one, other)[winners[-1]].ask("release", f"run{number}")
    return winners


@pytest.mark.cluster
@pytest.mark.fault(35)
@pytest.mark.slow
@needs_s3
def test_of_two_processes_that_race_one_gets_the_lease(s3: str, start: Start) -> None:
    winners = race(start(s3, 30.0), start(s3, 30.0), 100)
    assert len(winners) == 100


@pytest.mark.control(35)
@pytest.mark.slow
@needs_s3
def test_without_the_condition_both_get_it(s3: str) -> None:
    """Control: to look whether there is a file and then to write it is not enough."""
    one, other = open_storage(s3), open_storage(s3)
    seen = [storage.size("lock") for storage in (one, other)]
    for storage, size in zip((one, other), seen, strict=True):
        assert size is None
        storage.write("lock", b"mine")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["folder", pytest.param("s3", marks=needs_s3)])
def test_a_killed_holder_is_replaced_after_the_stated_time(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, start: Start
) -> None:
    address = request.getfixturevalue("s3") if where == "s3" else str(tmp_path)
    first, second = start(address, 3.0), start(address, 3.0)
    assert first.ask("try", "run") == {"attempt": 1}
    first.signal(signal.SIGKILL)
    began = time.monotonic()
    assert "can be replaced 3 s after" in second.ask("try", "run")["refused"]
    assert second.ask("wait", "run") == {"attempt": 2}
    assert time.monotonic() - began > 1.5, "the last renewal was up to a second before the kill"
    assert time.monotonic() - began < 12


@pytest.mark.fault(35)
@pytest.mark.slow
@needs_s3
def test_a_stopped_holder_writes_nothing_after_it_was_replaced(s3: str, start: Start) -> None:
    first, second = start(s3, 3.0), start(s3, 3.0)
    assert first.ask("try", "run") == {"attempt": 1}
    assert first.ask("write", "before") == {"written": "before"}
    first.signal(signal.SIGSTOP)
    assert second.ask("wait", "run") == {"attempt": 2}
    first.send("write", "after")
    first.signal(signal.SIGCONT)
    assert "has replaced" in first.answer()["lost"]
    assert "attempt 1 stops here" in first.ask("write", "x")["lost"]
    assert second.ask("write", "second") == {"written": "second"}
    names = {name for name in open_storage(s3).names() if not name.startswith("run/")}
    assert names == {"before", "second"}


@pytest.mark.slow
@pytest.mark.parametrize("ahead", ["3600", "-3600"])
def test_a_clock_that_is_wrong_by_an_hour_changes_nothing(
    ahead: str, tmp_path: Path, start: Start
) -> None:
    first, second = start(str(tmp_path), 3.0), start(str(tmp_path), 3.0)
    second.ask("clock", ahead)
    assert first.ask("try", "run") == {"attempt": 1}
    assert "renewed" in second.ask("wait", "run")["refused"]
    first.signal(signal.SIGSTOP)
    assert second.ask("wait", "run") == {"attempt": 2}
    first.signal(signal.SIGCONT)
    assert "has replaced" in first.ask("write", "x")["lost"]
    second.ask("release", "run")
    assert "attempt" in first.ask("try", "run")


@pytest.mark.cluster
@pytest.mark.fault(43)
@pytest.mark.slow
@needs_s3
def test_an_outage_of_the_store_ends_no_lease(
    s3: str, s3_server: S3Server, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is away for longer than the lease lives. Its holder shows itself afterwards, before
    anybody replaces it, although the entry had expired."""
    with wire_to(s3_server.port) as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", wire.address)
        first = start(s3, 6.0)
        assert first.ask("try", "run") == {"attempt": 1}
        wire.down()
        time.sleep(8)
        first.send("write", "during")
        time.sleep(1)
        wire.up()
        second = start(s3, 6.0)
        assert "renewed" in second.ask("wait", "run")["refused"]
        assert first.answer() == {"written": "during"}
