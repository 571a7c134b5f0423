"""The uploader: what reaches the listeners and the tracker, and what happens when they fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.interfaces import Point
from pipelines.tracking.events import FILE, Event, EventLog
from pipelines.tracking.memory import MemoryTracker
from pipelines.tracking.uploader import FAILED_EVENTS, SeenSteps, Uploader


class Outage(Exception):
    pass


class Refusal(Exception):
    pass


class FlakyTracker(MemoryTracker):
    """Raises `Outage` while `is_down`, refuses metrics called "bad", and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.is_down = False
        self.calls = 0
        self.slow_seconds = 0.0

    def metrics(self, points: Sequence[Point]) -> None:
        self.calls += 1
        time.sleep(self.slow_seconds)
        if self.is_down:
            raise Outage("no response")
        if any("bad" in point.values for point in points):
            raise Refusal("a bad name")
        super().metrics(points)


def is_refusal(error: BaseException) -> bool:
    return isinstance(error, Refusal)


def start_uploader(folder: Path, tracker: MemoryTracker, **options: Any) -> Uploader:
    options = {"is_permanent": is_refusal, "interval_seconds": 0.02, **options}
    return Uploader(folder / FILE, tracker, **options).start()


def metric(step: int, **values: float) -> Event:
    return {"kind": "metrics", "step": step, "time_ms": 1000 + step, "values": values}


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.01)


def values_of(tracker: MemoryTracker, key: str) -> dict[int, list[float]]:
    return {s: [v for _, v in points] for (k, s), points in tracker.points.items() if k == key}


def test_everything_reaches_the_tracker_and_the_listeners(tmp_path: Path) -> None:
    for name in ("grid.png", "val-00003.png"):
        (tmp_path / name).write_bytes(b"png")
    tracker, received = MemoryTracker(), list[Event]()
    uploader = start_uploader(tmp_path, tracker, listeners=[received.append])
    emit = EventLog(tmp_path / FILE)
    for step in range(1200):
        emit(metric(step, loss=step / 2, rate=1.0))
    emit({"kind": "artifact", "path": "grid.png", "folder": "images"})
    emit({"kind": "image", "path": "val-00003.png", "key": "val", "step": 3, "time_ms": 5})
    emit({"kind": "image", "path": "val-00003.png", "key": "val"})
    emit({"kind": "tags", "values": {"epoch": 3}})
    emit({"kind": "progress", "epoch": 1})
    assert uploader.close(10) == 1  # an image without a step
    assert tracker.images == {("val", 3): "val-00003.png"}
    assert values_of(tracker, "loss") == {step: [step / 2] for step in range(1200)}
    assert tracker.points["rate", 7] == [(1007, 1.0)]
    assert tracker.artifacts == ["images/grid.png"]
    assert tracker.logged_tags == {"epoch": "3"}
    assert sum(event["kind"] != "notice" for event in received) == 1205
    assert [e["kind"] for e in received if e["kind"] != "notice"][-1] == "progress"


def test_nan_and_infinite_values_are_delivered(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    EventLog(tmp_path / FILE)(metric(1, a=math.nan, b=math.inf, c=-math.inf))
    assert start_uploader(tmp_path, tracker).close(10) == 0
    assert math.isnan(values_of(tracker, "a")[1][0])
    assert (values_of(tracker, "b"), values_of(tracker, "c")) == ({1: [math.inf]}, {1: [-math.inf]})


def test_the_first_value_of_a_metric_and_step_is_kept(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    emit = EventLog(tmp_path / FILE)
    for step in (10, 20, 30):
        emit(metric(step, loss=1.0))
    emit(metric(20, loss=2.0, other=5.0))  # repeated after a restart, with a new metric
    emit(metric(15, loss=3.0))
    assert start_uploader(tmp_path, tracker).close(10) == 0
    emit(metric(30, loss=4.0))
    emit(metric(15, loss=4.0))
    emit(metric(40, loss=4.0))
    assert (
        start_uploader(tmp_path, tracker).close(10) == 0
    )  # knows what the previous uploader delivered
    assert values_of(tracker, "loss") == {10: [1.0], 15: [3.0], 20: [1.0], 30: [1.0], 40: [4.0]}
    assert values_of(tracker, "other") == {20: [5.0]}


def test_an_outage_loses_no_event_and_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.tracking.uploader._OUTAGE_NOTICE_SECONDS", 0.2)
    tracker, received = FlakyTracker(), list[Event]()
    tracker.is_down = True
    uploader = start_uploader(tmp_path, tracker, listeners=[received.append])
    emit = EventLog(tmp_path / FILE)
    slowest = 0.0
    for step in range(200):
        start = time.perf_counter()
        emit(metric(step, loss=1.0))
        slowest = max(slowest, time.perf_counter() - start)
    wait_for(lambda: sum(event["kind"] == "notice" for event in received) == 1)
    tracker.is_down = False
    assert uploader.close(10) == 0
    assert len(values_of(tracker, "loss")) == 200
    assert slowest < 1.0
    assert [e["level"] for e in received if e["kind"] == "notice"] == ["warning", "info"]


def test_a_hanging_tracker_never_delays_listeners(tmp_path: Path) -> None:
    tracker, received = FlakyTracker(), list[float]()
    tracker.slow_seconds = 3.0
    uploader = start_uploader(
        tmp_path, tracker, listeners=[lambda event: received.append(time.time())]
    )
    emit = EventLog(tmp_path / FILE)
    emit(metric(1, loss=1.0))
    wait_for(lambda: tracker.calls == 1)
    sent = time.time()
    emit({"kind": "progress"})
    wait_for(lambda: len(received) == 2)
    assert received[1] - sent < 1.0
    start = time.monotonic()
    assert uploader.close(0.2) == 1
    assert time.monotonic() - start < 2.5


def test_refused_events_are_kept_and_the_rest_arrives(tmp_path: Path) -> None:
    tracker, received = FlakyTracker(), list[Event]()
    emit = EventLog(tmp_path / FILE)
    for step in range(20):
        emit(metric(step, loss=1.0, **({"bad": 1.0} if step == 7 else {})))
    emit({"kind": "artifact", "path": "gone.png", "folder": ""})
    emit({"kind": "artifact", "path": "../secret", "folder": ""})
    emit({"kind": "metrics", "step": "x", "values": {}})
    (tmp_path.parent / "secret").write_text("outside of the run")
    assert start_uploader(tmp_path, tracker, listeners=[received.append]).close(10) == 4
    assert sorted(values_of(tracker, "loss")) == list(range(20))
    assert tracker.artifacts == []
    failed = [json.loads(line) for line in (tmp_path / FAILED_EVENTS).read_text().splitlines()]
    assert [row for row in failed if row["kind"] == "metrics" and row["step"] == 7] == [
        {**metric(7, bad=1.0), "error": "a bad name"}
    ]
    assert {row.get("path") for row in failed} == {None, "gone.png", "../secret"}
    assert any(event["kind"] == "notice" for event in received)


def test_a_folder_with_a_link_is_not_uploaded(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    (tmp_path / "secret").write_text("outside")
    run = tmp_path / "run"
    for name in ("plain", "linked"):
        (run / name / "deep").mkdir(parents=True)
        (run / name / "deep" / "a.txt").write_text("a")
    (run / "linked" / "deep" / "b.txt").symlink_to(tmp_path / "secret")
    (run / "file.txt").symlink_to(tmp_path / "secret")
    emit = EventLog(run / FILE)
    for path in ("plain", "linked", "file.txt"):  # the first one is the control
        emit({"kind": "artifact", "path": path, "folder": ""})
    assert start_uploader(run, tracker).close(10) == 2
    assert len(tracker.artifacts) == 1
    assert "b.txt is a link" in (run / FAILED_EVENTS).read_text()


def test_an_image_that_cannot_be_stored_delays_no_metric(tmp_path: Path) -> None:
    class NoFiles(MemoryTracker):
        def artifact(self, path: Path, folder: str) -> None:
            raise Outage("the object store is down")

    tracker = NoFiles()
    (tmp_path / "a.png").write_bytes(b"png")
    uploader = start_uploader(tmp_path, tracker)
    emit = EventLog(tmp_path / FILE)
    emit({"kind": "artifact", "path": "a.png", "folder": ""})
    emit(metric(1, loss=1.0))
    wait_for(lambda: bool(tracker.points))
    assert uploader.close(0.2) == 1


def test_a_listener_that_fails_is_removed(tmp_path: Path) -> None:
    calls, received, tracker = [0], list[Event](), MemoryTracker()

    def broken(event: Event) -> None:
        calls[0] += 1
        raise RuntimeError("display")

    uploader = start_uploader(tmp_path, tracker, listeners=[broken, received.append])
    emit = EventLog(tmp_path / FILE)
    for step in range(3):
        emit(metric(step, loss=1.0))
    assert uploader.close(10) == 0
    assert calls == [1]
    assert [event["kind"] for event in received] == ["metrics"] * 3 + ["notice"]
    assert len(values_of(tracker, "loss")) == 3


def test_waiting_events_are_delivered_by_the_next_uploader(tmp_path: Path) -> None:
    tracker = FlakyTracker()
    tracker.is_down = True
    emit = EventLog(tmp_path / FILE)
    for step in range(10):
        emit(metric(step, loss=1.0))
    assert start_uploader(tmp_path, tracker).close(0.3) == 10
    tracker.is_down = False
    received = list[Event]()
    assert start_uploader(tmp_path, tracker, listeners=[received.append]).close(10) == 0
    assert values_of(tracker, "loss") == {step: [1.0] for step in range(10)}
    assert len(received) == 10


@pytest.mark.slow
def test_no_event_is_lost_or_repeated_when_the_driver_is_killed(tmp_path: Path) -> None:
    """The driver is killed several times while it delivers; a file records what was delivered."""
    emit = EventLog(tmp_path / FILE)
    for step in range(3000):
        emit(metric(step, loss=float(step)))
    code = (
        "import json, sys, time; from pathlib import Path\n"
        "from pipelines.tracking.memory import MemoryTracker\n"
        "from pipelines.tracking.uploader import Uploader\n"
        "folder = Path(sys.argv[1])\n"
        "class Tracker(MemoryTracker):\n"
        "    def metrics(self, points):\n"
        "        with open(folder / 'arrived', 'a') as file:\n"
        "            file.writelines(f'{p.step} {p.time_ms}\\n' for p in points)\n"
        "        time.sleep(0.15)\n"
        "uploader = Uploader(folder / 'events.jsonl', Tracker(), is_permanent=lambda _: False,\n"
        "               interval_seconds=0.01).start()\n"
        "print('up', flush=True)\n"
        "sys.exit(uploader.close(60) if len(sys.argv) > 2 else time.sleep(60))\n"
    )
    for attempt in range(3):
        driver = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"up\n"
        time.sleep(0.03 * (attempt + 1))
        driver.kill()
        driver.wait()
        driver.stdout.close()
    assert 0 < (tmp_path / "arrived").read_text().count("\n") < 3000, "killed in mid-way"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path), "end"]).returncode == 0
    arrived = [line.split() for line in (tmp_path / "arrived").read_text().splitlines()]
    assert {int(step) for step, _ in arrived} == set(range(3000))
    # A batch whose offset wasn't saved is sent again with the same times: one point each.
    assert len({(step, time_ms) for step, time_ms in arrived}) == 3000
    assert len(arrived) < 3000 + 3 * 500 + 1


def test_an_offset_beyond_the_end_of_the_file_is_ignored(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    (tmp_path / f"{FILE}.metrics.offset").write_text("99999")
    EventLog(tmp_path / FILE)(metric(1, loss=1.0))
    assert start_uploader(tmp_path, tracker).close(10) == 0
    assert len(tracker.points) == 1


def test_many_steps_need_little_memory() -> None:
    import tracemalloc

    tracemalloc.start()
    seen = SeenSteps()
    assert all(seen.add("loss", step) for step in range(0, 1_000_000, 10))
    size_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size_bytes < 16 * 100_000
    assert not any(seen.add("loss", step) for step in (0, 10, 999_990))
    assert seen.add("loss", 5)
    assert not seen.add("loss", 5)
