"""The spool: what is written, what is told, what is shipped."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.interfaces import Point
from pipelines.tracking.events import FAILED_EVENTS, FILE, Event, EventLog, read_events
from pipelines.tracking.memory import MemoryTracker
from pipelines.tracking.uploader import Uploader


class Outage(Exception):
    pass


class Refusal(Exception):
    pass


class FlakyTracker(MemoryTracker):
    """Away while `away`; refuses metrics called "bad"; counts how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.calls = 0
        self.slow_seconds = 0.0

    def metrics(self, points: Sequence[Point]) -> None:
        self.calls += 1
        time.sleep(self.slow_seconds)
        if self.away:
            raise Outage("no answer")
        if any("bad" in point.values for point in points):
            raise Refusal("a bad name")
        super().metrics(points)


def refused(error: BaseException) -> bool:
    return isinstance(error, Refusal)


def shipper(folder: Path, tracker: MemoryTracker, **options: Any) -> Uploader:
    options = {"is_permanent": refused, "interval_seconds": 0.02, **options}
    return Uploader(folder / FILE, tracker, **options).start()


def metric(step: int, **values: float) -> Event:
    return {"kind": "metrics", "step": step, "time_ms": 1000 + step, "values": values}


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.01)


def values_of(tracker: MemoryTracker, key: str) -> dict[int, list[float]]:
    return {s: [v for _, v in found] for (k, s), found in tracker.points.items() if k == key}


def test_events_are_lines_of_plain_json(tmp_path: Path) -> None:
    emit = EventLog(tmp_path / "run" / FILE)
    emit({"kind": "metrics", "step": np.int64(3), "values": {"a": np.float32(0.5), "b": math.nan}})
    emit({"kind": "progress", "worst": [math.inf, -math.inf], "path": tmp_path, "none": None})
    emit.flush()

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} isn't JSON")

    lines = (tmp_path / "run" / FILE).read_text().splitlines()
    first, second = (json.loads(line, parse_constant=no_constant) for line in lines)
    assert first["step"] == 3
    assert first["values"] == {"a": 0.5, "b": "nan"}
    assert abs(first["time_ms"] - time.time() * 1000) < 60_000
    assert second["worst"] == ["inf", "-inf"]
    assert (second["path"], second["none"]) == (str(tmp_path), None)


def test_a_cut_line_is_passed_over_and_healed(tmp_path: Path) -> None:
    path = tmp_path / FILE
    EventLog(path)(metric(1, a=1.0))
    with open(path, "ab") as file:
        file.write(b'{"kind":"metrics","st')  # a crash in mid-write
    assert [event["step"] for event, _ in read_events(path)] == [1]
    EventLog(path)(metric(2, a=2.0))
    assert [event["step"] for event, _ in read_events(path)] == [1, 2]


def test_reading_goes_on_from_every_offset(tmp_path: Path) -> None:
    path = tmp_path / FILE
    emit = EventLog(path)
    for step in range(5):
        emit(metric(step, a=float(step)))
    whole = list(read_events(path))
    for place, (_, offset) in enumerate(whole):
        assert list(read_events(path, offset)) == whole[place + 1 :]
    assert list(read_events(tmp_path / "none")) == []


def test_writers_in_threads_and_processes_keep_lines_whole(tmp_path: Path) -> None:
    path = tmp_path / FILE
    code = (
        "import sys; from pathlib import Path; from pipelines.tracking.events import EventLog\n"
        "emit = EventLog(Path(sys.argv[1]))\n"
        "for i in range(300): emit({'kind': 'p', 'i': i, 'fill': 'x' * 3000})\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(2)]
    emit = EventLog(path)
    threads = [
        threading.Thread(target=lambda: [emit({"kind": "t", "i": i}) for i in range(300)])
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [writer.wait() for writer in writers] == [0, 0]
    # A line that another is just writing looks cut to one who opens: that leaves an empty one.
    kinds = [json.loads(line)["kind"] for line in path.read_bytes().splitlines() if line]
    assert [event["kind"] for event, _ in read_events(path)] == kinds
    assert (kinds.count("p"), kinds.count("t")) == (600, 600)


def test_everything_arrives_and_listeners_hear_it(tmp_path: Path) -> None:
    for name in ("grid.png", "val-00003.png"):
        (tmp_path / name).write_bytes(b"png")
    tracker, heard = MemoryTracker(), list[Event]()
    ship = shipper(tmp_path, tracker, listeners=[heard.append])
    emit = EventLog(tmp_path / FILE)
    for step in range(1200):
        emit(metric(step, loss=step / 2, rate=1.0))
    emit({"kind": "artifact", "path": "grid.png", "folder": "pictures"})
    emit({"kind": "image", "path": "val-00003.png", "key": "val", "step": 3, "time_ms": 5})
    emit({"kind": "image", "path": "val-00003.png", "key": "val"})
    emit({"kind": "tags", "values": {"epoch": 3}})
    emit({"kind": "progress", "epoch": 1})
    assert ship.close(10) == 1  # a picture that doesn't say of which step it is
    assert tracker.images == {("val", 3): "val-00003.png"}
    assert values_of(tracker, "loss") == {step: [step / 2] for step in range(1200)}
    assert tracker.points["rate", 7] == [(1007, 1.0)]
    assert tracker.artifacts == ["pictures/grid.png"]
    assert tracker.logged_tags == {"epoch": "3"}
    assert sum(event["kind"] != "notice" for event in heard) == 1205
    assert [e["kind"] for e in heard if e["kind"] != "notice"][-1] == "progress"


def test_values_that_are_no_numbers_arrive(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    EventLog(tmp_path / FILE)(metric(1, a=math.nan, b=math.inf, c=-math.inf))
    assert shipper(tmp_path, tracker).close(10) == 0
    assert math.isnan(values_of(tracker, "a")[1][0])
    assert (values_of(tracker, "b"), values_of(tracker, "c")) == ({1: [math.inf]}, {1: [-math.inf]})


def test_the_first_of_a_metric_and_step_wins(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    emit = EventLog(tmp_path / FILE)
    for step in (10, 20, 30):
        emit(metric(step, loss=1.0))
    emit(metric(20, loss=2.0, other=5.0))  # redone after a restart, with a metric that is new
    emit(metric(15, loss=3.0))
    assert shipper(tmp_path, tracker).close(10) == 0
    emit(metric(30, loss=4.0))
    emit(metric(15, loss=4.0))
    emit(metric(40, loss=4.0))
    assert shipper(tmp_path, tracker).close(10) == 0  # knows what the one before has shipped
    assert values_of(tracker, "loss") == {10: [1.0], 15: [3.0], 20: [1.0], 30: [1.0], 40: [4.0]}
    assert values_of(tracker, "other") == {20: [5.0]}


def test_an_outage_costs_nothing_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.tracking.events._AWAY_SECONDS", 0.2)
    tracker, heard = FlakyTracker(), list[Event]()
    tracker.away = True
    ship = shipper(tmp_path, tracker, listeners=[heard.append])
    emit = EventLog(tmp_path / FILE)
    slowest = 0.0
    for step in range(200):
        began = time.perf_counter()
        emit(metric(step, loss=1.0))
        slowest = max(slowest, time.perf_counter() - began)
    wait_for(lambda: sum(event["kind"] == "notice" for event in heard) == 1)
    tracker.away = False
    assert ship.close(10) == 0
    assert len(values_of(tracker, "loss")) == 200
    assert slowest < 1.0
    assert [e["level"] for e in heard if e["kind"] == "notice"] == ["warning", "info"]


def test_a_hanging_tracker_never_delays_listeners(tmp_path: Path) -> None:
    tracker, heard = FlakyTracker(), list[float]()
    tracker.slow_seconds = 3.0
    ship = shipper(tmp_path, tracker, listeners=[lambda event: heard.append(time.time())])
    emit = EventLog(tmp_path / FILE)
    emit(metric(1, loss=1.0))
    wait_for(lambda: tracker.calls == 1)
    sent = time.time()
    emit({"kind": "progress"})
    wait_for(lambda: len(heard) == 2)
    assert heard[1] - sent < 1.0
    began = time.monotonic()
    assert ship.close(0.2) == 1
    assert time.monotonic() - began < 2.5


def test_what_is_refused_is_kept_and_the_rest_arrives(tmp_path: Path) -> None:
    tracker, heard = FlakyTracker(), list[Event]()
    emit = EventLog(tmp_path / FILE)
    for step in range(20):
        emit(metric(step, loss=1.0, **({"bad": 1.0} if step == 7 else {})))
    emit({"kind": "artifact", "path": "gone.png", "folder": ""})
    emit({"kind": "artifact", "path": "../secret", "folder": ""})
    emit({"kind": "metrics", "step": "x", "values": {}})
    (tmp_path.parent / "secret").write_text("not of this run")
    assert shipper(tmp_path, tracker, listeners=[heard.append]).close(10) == 4
    assert sorted(values_of(tracker, "loss")) == list(range(20))
    assert tracker.artifacts == []
    lost = [json.loads(line) for line in (tmp_path / FAILED_EVENTS).read_text().splitlines()]
    assert [row for row in lost if row["kind"] == "metrics" and row["step"] == 7] == [
        {**metric(7, bad=1.0), "error": "a bad name"}
    ]
    assert {row.get("path") for row in lost} == {None, "gone.png", "../secret"}
    assert any(event["kind"] == "notice" for event in heard)


def test_a_picture_that_cannot_be_stored_holds_up_no_metric(tmp_path: Path) -> None:
    class NoFiles(MemoryTracker):
        def artifact(self, path: Path, folder: str) -> None:
            raise Outage("the object store is away")

    tracker = NoFiles()
    (tmp_path / "a.png").write_bytes(b"png")
    ship = shipper(tmp_path, tracker)
    emit = EventLog(tmp_path / FILE)
    emit({"kind": "artifact", "path": "a.png", "folder": ""})
    emit(metric(1, loss=1.0))
    wait_for(lambda: bool(tracker.points))
    assert ship.close(0.2) == 1


def test_a_listener_that_fails_hears_nothing_more(tmp_path: Path) -> None:
    calls, heard, tracker = [0], list[Event](), MemoryTracker()

    def broken(event: Event) -> None:
        calls[0] += 1
        raise RuntimeError("display")

    ship = shipper(tmp_path, tracker, listeners=[broken, heard.append])
    emit = EventLog(tmp_path / FILE)
    for step in range(3):
        emit(metric(step, loss=1.0))
    assert ship.close(10) == 0
    assert calls == [1]
    assert [event["kind"] for event in heard] == ["metrics"] * 3 + ["notice"]
    assert len(values_of(tracker, "loss")) == 3


def test_what_waited_is_shipped_by_the_next_one(tmp_path: Path) -> None:
    tracker = FlakyTracker()
    tracker.away = True
    emit = EventLog(tmp_path / FILE)
    for step in range(10):
        emit(metric(step, loss=1.0))
    assert shipper(tmp_path, tracker).close(0.3) == 10
    tracker.away = False
    heard = list[Event]()
    assert shipper(tmp_path, tracker, listeners=[heard.append]).close(10) == 0
    assert values_of(tracker, "loss") == {step: [1.0] for step in range(10)}
    assert len(heard) == 10


def test_a_killed_driver_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """The driver is killed again and again while it ships; what arrived is in a file."""
    emit = EventLog(tmp_path / FILE)
    for step in range(3000):
        emit(metric(step, loss=float(step)))
    code = (
        "import json, sys, time; from pathlib import Path\n"
        "from pipelines.tracking.uploader import Uploader; from pipelines.tracking.memory import MemoryTracker\n"
        "folder = Path(sys.argv[1])\n"
        "class Tracker(MemoryTracker):\n"
        "    def metrics(self, points):\n"
        "        with open(folder / 'arrived', 'a') as file:\n"
        "            file.writelines(f'{p.step} {p.time_ms}\\n' for p in points)\n"
        "        time.sleep(0.15)\n"
        "ship = Uploader(folder / 'events.jsonl', Tracker(), is_permanent=lambda error: False,\n"
        "               interval_seconds=0.01).start()\n"
        "print('up', flush=True)\n"
        "sys.exit(ship.close(60) if len(sys.argv) > 2 else time.sleep(60))\n"
    )
    for life in range(3):
        driver = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"up\n"
        time.sleep(0.03 * (life + 1))
        driver.kill()
        driver.wait()
        driver.stdout.close()
    assert 0 < (tmp_path / "arrived").read_text().count("\n") < 3000, "killed in mid-way"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path), "end"]).returncode == 0
    arrived = [line.split() for line in (tmp_path / "arrived").read_text().splitlines()]
    assert {int(step) for step, _ in arrived} == set(range(3000))
    # A batch whose offset wasn't noted comes again, the same to the millisecond: one point.
    assert len({(step, time_ms) for step, time_ms in arrived}) == 3000
    assert len(arrived) < 3000 + 3 * 500 + 1


def test_the_offset_of_another_file_is_not_believed(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    (tmp_path / f"{FILE}.metrics.offset").write_text("99999")
    EventLog(tmp_path / FILE)(metric(1, loss=1.0))
    assert shipper(tmp_path, tracker).close(10) == 0
    assert len(tracker.points) == 1


def test_many_steps_cost_little_memory() -> None:
    import tracemalloc

    from pipelines.tracking.uploader import _Seen

    tracemalloc.start()
    seen = _Seen()
    assert all(seen.add("loss", step) for step in range(0, 1_000_000, 10))
    size_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size_bytes < 16 * 100_000
    assert not any(seen.add("loss", step) for step in (0, 10, 999_990))
    assert seen.add("loss", 5)
    assert not seen.add("loss", 5)


def test_importing_loads_no_service() -> None:
    code = (
        "import sys, pipelines.tracking.events, pipelines.tracking.mlflow_runs, pipelines.tracking.mlflow_registry, pipelines.workflows.context\n"
        "print({'mlflow', 'ray', 'torch', 'webdataset', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
