"""A worker that is stopped, told to end, or slow. Each is a process of its own, with real beats."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster import watchdog
from pipelines.cluster.group_control import Beat, GroupRecord

ROOT = Path(__file__).parents[2]
WORKER = """
import pickle, sys, threading, time
from pipelines.cluster import group_control
from pipelines.cluster.group_control import Beat, Orders, WorkerControl
group_control.BEAT_SECONDS = 0.02
rank, own_seconds, notes = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "notes"
if notes:
    group_control.note_termination()
def send(beat):
    pickle.dump(beat, sys.stdout.buffer)
    sys.stdout.buffer.flush()
    return Orders()
control = WorkerControl(send, Beat("a", rank, 2, "node", f"host-{rank}", rank))
def train():
    control.begin(0)
    step = 0
    while True:
        control.phase("compute")
        time.sleep(own_seconds)
        control.phase("sync")
        time.sleep(0.06 - own_seconds)  # the wait for the slowest worker
        step += 1
        control.stops_after(step)
control.start()
thread = threading.Thread(target=train, daemon=True)
thread.start()
while thread.is_alive():
    time.sleep(0.05)
"""


class Workers:
    """Two workers, and what is known of them: beats and a watchdog."""

    def __init__(self, own_seconds: tuple[float, float], notes: str) -> None:
        self.record, self.watchdog, self.lock = GroupRecord(), watchdog.Watchdog(), threading.Lock()
        self.record.begin("a")
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(rank), str(seconds), notes],
                cwd=ROOT,
                stdout=subprocess.PIPE,
            )
            for rank, seconds in enumerate(own_seconds)
        ]
        for process in self.processes:
            threading.Thread(target=self._listen, args=(process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        try:
            while True:
                beat = pickle.load(process.stdout)
                with self.lock:
                    self.record.hear(beat)
        except EOFError:
            return

    def beats(self) -> list[Beat]:
        with self.lock:
            return [h.beat for h in self.record.heard()]

    def wait_until(self, condition: str, seconds: float = 30) -> list[str]:
        """Looks at the workers until both have made ten steps (`work`) or a line is said (`line`).
        Returns the lines."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self.lock:
                lines = self.watchdog.look(self.record.heard())
            beats = self.beats()
            works = len(beats) == 2 and all((b.step or 0) >= 10 for b in beats)
            if lines or (condition == "work" and works):
                return lines
            time.sleep(0.01)
        raise TimeoutError(condition)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    monkeypatch.setattr(watchdog, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(watchdog, "WINDOW_SECONDS", 0.5)
    made = Workers(*request.param)
    yield made
    made.end()


EQUAL, UNEQUAL = (0.02, 0.02), (0.01, 0.05)


@pytest.mark.slow
@pytest.mark.fault(33)
@pytest.mark.control(33)
@pytest.mark.parametrize("workers", [(EQUAL, "notes")], indirect=True)
def test_a_stopped_worker_is_named_with_its_stack(workers: Workers) -> None:
    workers.wait_until("work")
    workers.processes[1].send_signal(signal.SIGSTOP)
    (line,) = workers.wait_until("line")
    assert "worker 1 on host-1" in line
    assert "in train" in line, "its last stack"
    assert workers.processes[1].poll() is None, "a check that it lives finds nothing"


@pytest.mark.slow
@pytest.mark.fault(41)
@pytest.mark.control(41)
@pytest.mark.parametrize("workers", [(UNEQUAL, "notes")], indirect=True)
def test_a_worker_that_is_three_times_slower_is_named(workers: Workers) -> None:
    (line,) = workers.wait_until("line")
    assert "worker 1 on host-1" in line
    assert "for its part of a step, the others" in line
    first, second = (beat.step or 0 for beat in workers.beats())
    assert abs(first - second) <= 0.2 * first + 5, "both make as many steps, so steps don't tell"


@pytest.mark.fault(34)
@pytest.mark.parametrize("workers", [(EQUAL, "notes")], indirect=True)
def test_a_worker_that_is_told_to_end_says_so_and_goes_on(workers: Workers) -> None:
    workers.wait_until("work")
    workers.processes[1].terminate()
    deadline = time.monotonic() + 30
    while not workers.beats()[1].is_terminating and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [beat.is_terminating for beat in workers.beats()] == [False, True]
    assert workers.processes[1].poll() is None


@pytest.mark.control(34)
@pytest.mark.parametrize("workers", [(EQUAL, "dies")], indirect=True)
def test_without_a_handler_it_dies_at_once(workers: Workers) -> None:
    workers.wait_until("work")
    workers.processes[1].terminate()
    assert workers.processes[1].wait(30) == -signal.SIGTERM
