"""Workers agree on the step at which they stop, whatever each of them is doing when asked."""

from __future__ import annotations

import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable

import pytest

from pipelines.cluster import group_control
from pipelines.cluster.group_control import Beat, GroupRecord, Orders, WorkerControl
from pipelines.interfaces import Control, NullControl

SIZE = 3


def beat(rank: int, **more: object) -> Beat:
    own = Beat(attempt="a", rank=rank, size=SIZE, node=f"n{rank}", host=f"h{rank}", pid=rank)
    return Beat(**{**vars(own), **more})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_step_to_stop_at_is_the_largest_promise_of_all() -> None:
    record = GroupRecord()
    record.begin("a")
    assert record.hear(beat(0, step=7)) == Orders()
    record.ask_to_stop()
    assert record.hear(beat(0, step=7, promise=8)) == Orders(hold=True)
    assert record.hear(beat(1, step=8, promise=9)) == Orders(hold=True)
    assert record.hear(beat(2, step=7)) == Orders(hold=True), "it has not promised anything yet"
    assert record.hear(beat(2, step=7, promise=8)) == Orders(True, stop_at=9)
    assert record.hear(beat(0, step=8, promise=8)) == Orders(True, stop_at=9)


def test_a_group_knows_nothing_of_the_group_before() -> None:
    record = GroupRecord()
    record.begin("a")
    record.ask_to_stop()
    record.hear(beat(0, promise=4))
    record.begin("b")
    assert record.hear(beat(1, promise=5)) == Orders(), "a worker that has not ended yet"
    assert record.heard() == []
    assert record.hear(beat(0, attempt="b")) == Orders()


def test_how_long_a_worker_is_silent_and_how_long_it_is_stuck() -> None:
    clock = Clock()
    record = GroupRecord(clock)
    record.begin("a")
    record.hear(beat(0, step=1, phase="data"))
    record.hear(beat(1, step=1, phase="sync"))
    clock.now = 4
    record.hear(beat(0, step=1, phase="data"))
    record.hear(beat(1, step=2, phase="sync"))
    clock.now = 5
    assert [(h.silent_seconds, h.stuck_seconds) for h in record.heard()] == [(1, 5), (1, 1)]


class Group:
    """Workers as threads, which wait for each other in each step, as DDP makes them do."""

    def __init__(self, last_step: int) -> None:
        self.record = GroupRecord()
        self.record.begin("a")
        self.lock = threading.Lock()
        self.barrier = threading.Barrier(SIZE)
        self.last_step = last_step
        self.stopped_at: dict[int, int | None] = {}
        self.controls = [WorkerControl(self.hear, beat(rank)) for rank in range(SIZE)]
        self.threads = [threading.Thread(target=self.work, args=(r,)) for r in range(SIZE)]

    def hear(self, sent: Beat) -> Orders:
        with self.lock:
            return self.record.hear(sent)

    def work(self, rank: int) -> None:
        control = self.controls[rank].start()
        control.begin(0)
        self.stopped_at[rank] = None
        for step in range(1, self.last_step + 1):
            time.sleep(random.random() * 0.004)  # each worker is somewhere else in its step
            self.barrier.wait(10)
            if control.stops_after(step):
                self.stopped_at[rank] = step
                break
        control.close()

    def run(self, meanwhile: Callable[[], None]) -> None:
        for thread in self.threads:
            thread.start()
        meanwhile()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive(), "a worker waits for another one that has stopped"


@pytest.mark.parametrize("seed", range(8))
def test_all_workers_stop_at_the_same_step(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_control, "BEAT_SECONDS", 0.005)
    monkeypatch.setattr(group_control, "HURRIED_SECONDS", 0.001)
    random.seed(seed)
    group = Group(last_step=10_000)

    def ask() -> None:
        time.sleep(random.random() * 0.1)
        with group.lock:
            group.record.ask_to_stop()

    group.run(ask)
    steps = set(group.stopped_at.values())
    assert len(steps) == 1
    assert None not in steps


def test_a_training_that_ends_while_a_stop_is_agreed_upon_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group_control, "BEAT_SECONDS", 0.005)
    monkeypatch.setattr(group_control, "HURRIED_SECONDS", 0.001)
    for last_step in range(1, 12):
        group = Group(last_step)
        group.run(group.record.ask_to_stop)
        assert len(set(group.stopped_at.values())) == 1, "some stopped, others went on"


def test_without_a_driver_nobody_waits() -> None:
    def send(sent: Beat) -> Orders:
        if sent.promise is not None:
            raise ConnectionError
        return Orders(hold=True)

    control = WorkerControl(send, beat(0))
    control.begin(4)
    control.start()
    assert control.stops_after(5) is False


def test_a_control_in_another_process_asks_for_nothing() -> None:
    control: Control = WorkerControl(lambda sent: Orders(), beat(0))
    assert isinstance(pickle.loads(pickle.dumps(control)), NullControl)


def test_own_seconds_leave_out_the_wait_for_others() -> None:
    sent: list[Beat] = []
    control = WorkerControl(lambda b: sent.append(b) or Orders(), beat(0))
    for phase, seconds in (("data", 0.02), ("compute", 0.02), ("sync", 0.3), ("", 0.1)):
        control.phase(phase)
        time.sleep(seconds)
    control.begin(0)
    control.start()
    while not sent:
        time.sleep(0.001)
    control.close()
    assert 0.04 <= sent[0].own_seconds < 0.3
    assert any("test_own_seconds" in line for line in sent[0].stack)


def test_sigterm_is_noted_and_does_not_end_the_process() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        group_control.note_termination()
        os.kill(os.getpid(), signal.SIGTERM)
        assert group_control._terminating.wait(5)
    finally:
        signal.signal(signal.SIGTERM, before)
        group_control._terminating.clear()
