"""A worker that is stopped, stuck or slow is named once, within a minute, with its stack."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.cluster.group_control import Beat, GroupRecord
from pipelines.cluster.watchdog import Watchdog

STACK = ("/x/pipelines/a.py:1 in f", "/x/pipelines/loaders.py:7 in read")


class Group:
    """Three workers, second by second. A worker's step takes it 0.5 s of its own; the others wait
    for the slowest one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.record = GroupRecord(lambda: self.now)
        self.record.begin("a")
        self.watchdog = Watchdog(lambda: self.now)
        self.beats = [
            Beat("a", r, 3, f"n{r}", f"h{r}", 100 + r, began=0, step=0, stack=STACK)
            for r in range(3)
        ]

    def run(
        self,
        seconds: int,
        *,
        stopped: int | None = None,
        phases: tuple[str, str, str] | None = None,
        own: tuple[float, float, float] = (0.5, 0.5, 0.5),
    ) -> list[tuple[float, str]]:
        """What is reported in that time. `phases` are those of workers that don't advance."""
        said = []
        for _ in range(seconds):
            self.now += 1
            for rank, beat in enumerate(self.beats):
                if phases:
                    beat = replace(beat, phase=phases[rank])
                elif stopped is None:
                    beat = replace(
                        beat, step=(beat.step or 0) + 1, own_seconds=beat.own_seconds + own[rank]
                    )
                self.beats[rank] = beat
                if rank != stopped:
                    self.record.hear(beat)
            said += [(self.now, line) for line in self.watchdog.look(self.record.heard())]
        return said


def test_a_healthy_group_is_not_reported() -> None:
    assert Group().run(300, own=(0.5, 0.8, 0.6)) == []


def test_a_stopped_worker_is_named_with_its_last_stack() -> None:
    group = Group()
    group.run(30)
    [(at, line)] = group.run(60, stopped=1)
    assert at - 30 <= 60
    assert "worker 1 on h1 (pid 101) has been silent for 20 s" in line
    assert "it is at loaders.py:7 in read, called at a.py:1 in f" in line


@pytest.mark.parametrize("phase", ["data", "compute"])
def test_a_stuck_worker_is_named_and_not_those_that_wait_for_it(phase: str) -> None:
    group = Group()
    group.run(30)
    [(at, line)] = group.run(60, phases=("sync", "sync", phase))
    assert at - 30 <= 60
    assert "worker 2 on h2 (pid 102) has been in one place of step 31 for 40 s" in line
    assert "loaders.py:7 in read" in line


def test_workers_that_all_wait_have_a_network_that_is_cut() -> None:
    group = Group()
    group.run(30)
    [(_, line)] = group.run(60, phases=("sync", "sync", "sync"))
    assert "all 3 workers have waited for each other for 40 s in step 31" in line


def test_validation_and_checkpoints_may_take_their_time() -> None:
    group = Group()
    group.run(30)
    assert group.run(600, phases=("", "sync", "sync")) == []


def test_a_slow_worker_is_named_once_and_again_after_it_was_well() -> None:
    group = Group()
    group.run(30)
    [(at, line)] = group.run(100, own=(0.5, 0.5, 2.0))
    assert at - 30 <= 60
    assert "worker 2 on h2 (pid 102) takes 2.00 s for its part of a step, the others 0.50" in line
    assert group.run(60) == []
    assert len(group.run(60, own=(2.0, 0.5, 0.5))) == 1


def test_nothing_is_said_before_all_have_started() -> None:
    group = Group()
    group.beats.pop()
    assert group.run(300, stopped=1) == []


def test_a_driver_that_was_asleep_accuses_nobody() -> None:
    group = Group()
    group.run(10)
    group.now += 1000
    assert group.watchdog.look(group.record.heard()) == []
