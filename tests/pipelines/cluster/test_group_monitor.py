"""When a group is formed again, and what is said of it. Real groups are in tests/cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pipelines.cluster import group_monitor
from pipelines.cluster.group_control import Beat, Heard
from pipelines.cluster.group_monitor import Change, Forming, GroupMonitor, is_working, taken_away
from pipelines.cluster.worker_count import WorkerGroup
from pipelines.interfaces import NullEmit


def heard(rank: int, size: int = 2, began: int | None = 10, step: int = 11, **more: Any) -> Heard:
    own = Beat("a", rank, size, node=f"n{rank}", host=f"h{rank}", pid=rank, began=began, step=step)
    return Heard(Beat(**{**vars(own), **more}), silent_seconds=0, stuck_seconds=0)


class ListEmit(NullEmit):
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.events.append(dict(event))


class FreePlaces:
    """Free places of a cluster."""

    def __init__(self, free: int) -> None:
        self.free, self.requested = free, 0

    def request(self, count: int) -> None:
        self.requested = count

    def ready(self) -> int:
        return min(self.free, self.requested)


class Requests:
    """The actor's handle, of which the monitor calls `ask_to_stop.remote()`."""

    count = 0

    @property
    def ask_to_stop(self) -> Requests:
        return self

    def options(self, **options: str) -> Requests:
        return self

    def remote(self) -> None:
        self.count += 1


class Watched:
    """A monitor of a group, without its thread and with a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, group: WorkerGroup, size: int) -> None:
        self.now, self.asked, self.events = 100.0, Requests(), ListEmit()
        monkeypatch.setattr(group_monitor.time, "monotonic", lambda: self.now)
        forming = Forming(size, number=2, before=3, since=86.0, reason="h2 is being drained")
        self.monitor = GroupMonitor(self.asked, group, forming, self.events)

    def look(self, beats: list[Heard], *, draining: str = "", free: int = 0) -> Change | None:
        drained = {draining: 0} if draining else {}
        self.monitor._look(beats, drained, FreePlaces(free))  # type: ignore[arg-type]
        return self.monitor.change


def test_a_group_works_once_all_workers_have_made_a_step() -> None:
    assert is_working([heard(0), heard(1)], 2)
    assert not is_working([heard(0)], 2)
    assert not is_working([heard(0), heard(1, step=10)], 2), "it has resumed, and made no step yet"
    assert not is_working([heard(0), heard(1, began=None)], 2)


def test_a_machine_that_is_drained_is_left_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, WorkerGroup(2, gpus=0), size=2)
    beats = [heard(0), heard(1)]
    assert watched.look(beats, draining="another node") is None
    assert watched.look(beats, draining="n1") == Change("h1 is being drained", is_preemption=True)
    watched.look(beats, draining="n1")
    assert watched.asked.count == 1, "asked once"


def test_a_worker_that_is_told_to_end_is_a_preemption() -> None:
    beats = [heard(0), heard(1, is_terminating=True)]
    assert taken_away(beats, []) == "worker 1 on h1 is told to end"
    assert taken_away([heard(0), heard(1)], []) is None


def test_an_elastic_group_grows_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, WorkerGroup(1, gpus=0, max_workers=5), size=2)
    assert watched.look([heard(0), heard(1)], free=1) is None
    watched.now += group_monitor.GROW_AFTER_SECONDS
    change = watched.look([heard(0), heard(1)], free=1)
    assert change == Change("the cluster has room for 1 more")


def test_a_machine_that_has_just_come_may_not_be_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, WorkerGroup(1, gpus=0, max_workers=5), size=2)
    watched.look([heard(0), heard(1)])
    watched.now += group_monitor.GROW_AFTER_SECONDS
    assert watched.look([heard(0), heard(1)], free=1) is None
    watched.now += group_monitor.SETTLE_SECONDS - 1
    assert watched.look([heard(0), heard(1)], free=2) is None
    watched.now += group_monitor.SETTLE_SECONDS
    change = watched.look([heard(0), heard(1)], free=2)
    assert change == Change("the cluster has room for 2 more")


def test_a_fixed_group_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, WorkerGroup(2, gpus=0), size=2)
    watched.look([heard(0), heard(1)], free=8)
    watched.now += 1000
    assert watched.look([heard(0), heard(1)], free=8) is None


def test_a_new_group_is_reported_once_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, WorkerGroup(2, gpus=0), size=2)
    for _ in range(3):
        watched.look([heard(0), heard(1)])
    group, tags = watched.events.events
    assert (group["kind"], group["before"], group["workers"]) == ("group", 3, 2)
    assert group["seconds"] == 14.0
    assert tags["values"]["tessera.group.size"] == "2"
    assert tags["values"]["tessera.group.2"] == "3 to 2 workers in 14.0 s: h2 is being drained"


def test_a_head_that_is_gone_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, WorkerGroup(2, gpus=0), size=2)
    answers = iter([True, False, False, True, False])
    monkeypatch.setattr(group_monitor, "head_answers", lambda: next(answers))
    results = []
    for _ in range(5):
        watched.now += group_monitor.HEAD_EVERY_SECONDS
        results.append(watched.monitor._head_answers())
    assert results == [True, False, False, True, False]
    first, second = [event["text"] for event in watched.events.events]
    assert first == second
    assert "the head of the cluster doesn't answer" in first
