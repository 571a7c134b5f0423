"""An event log in a storage: the tracker never knows more than another machine would."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from pipelines.interfaces import NullEmit
from pipelines.storage.open import open_storage
from pipelines.storage.retry import RetryPolicy
from pipelines.tracking import published_log
from pipelines.tracking.events import read_events
from pipelines.tracking.memory import MemoryTracker
from pipelines.tracking.published_log import EmitFiles, PublishedEventLog, Publisher
from pipelines.tracking.uploader import Uploader

ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"memory://bucket/{tmp_path.name}"


def log_in(folder: Path, address: str) -> PublishedEventLog:
    return PublishedEventLog(folder / "events.jsonl", address, ONCE)


def point(step: int, value: float = 1.0) -> dict[str, Any]:
    return {"kind": "metrics", "step": step, "values": {"loss": value}}


def deliver(log: PublishedEventLog, tracker: MemoryTracker, *, with_limit: bool = True) -> int:
    def fetch(path: str) -> None:
        file = log.path.parent / path
        file.parent.mkdir(parents=True, exist_ok=True)
        open_storage(log._address).download(path, file)

    uploader = Uploader(
        log.path,
        tracker,
        is_permanent=lambda error: False,
        readable=log.published if with_limit else None,
        fetch=fetch,
    )
    return uploader.start().close(5.0)


def steps(tracker: MemoryTracker) -> list[int]:
    return sorted(step for _, step in tracker.points)


def test_the_tracker_gets_what_is_published(tmp_path: Path, address: str) -> None:
    log, tracker = log_in(tmp_path, address), MemoryTracker("run")
    log(point(1))
    log.flush()
    log(point(2))
    assert deliver(log, tracker) == 1
    assert steps(tracker) == [1]
    pickle.loads(pickle.dumps(log)).flush()  # in the process that the workers' events go to
    assert deliver(log, tracker) == 0
    assert steps(tracker) == [1, 2]


@pytest.mark.fault(35)
def test_no_point_is_delivered_twice_when_the_drivers_machine_is_lost(
    tmp_path: Path, address: str
) -> None:
    tracker = MemoryTracker("run")
    log = log_in(tmp_path / "lost", address)
    for step in (1, 2, 3):
        log({**point(step), "time_ms": step})
    log.flush()
    log({**point(4), "time_ms": 4})
    deliver(log, tracker)
    again = tmp_path / "another" / "events.jsonl"
    published_log.restore(again, open_storage(address))
    log = log_in(again.parent, address)
    for step in (3, 4, 5):  # trained again from the checkpoint after step 2
        log({**point(step), "time_ms": 100 + step})
    log.flush()
    deliver(log, tracker)
    assert {step: [time for time, _ in found] for (_, step), found in tracker.points.items()} == {
        1: [1],
        2: [2],
        3: [3],
        4: [104],
        5: [105],
    }


@pytest.mark.control(35)
def test_control_without_the_limit_a_step_is_delivered_twice(tmp_path: Path, address: str) -> None:
    tracker = MemoryTracker("run")
    log = log_in(tmp_path / "lost", address)
    log({**point(1), "time_ms": 1})
    deliver(log, tracker, with_limit=False)
    again = tmp_path / "another" / "events.jsonl"
    published_log.restore(again, open_storage(address))
    log = log_in(again.parent, address)
    log({**point(1), "time_ms": 101})
    deliver(log, tracker, with_limit=False)
    assert len(tracker.points["loss", 1]) == 2


def test_files_travel_with_their_events(tmp_path: Path, address: str) -> None:
    picture = tmp_path / "worker" / "pictures" / "one.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"png")
    event = {"kind": "artifact", "path": "pictures/one.png", "folder": "pictures"}
    log = log_in(tmp_path / "driver", address)
    emit = EmitFiles(log, tmp_path / "worker")
    emit(event)
    emit(point(1))
    assert (tmp_path / "driver" / "pictures" / "one.png").read_bytes() == b"png"
    first = next(read_events(log.path))[0]
    assert {name: first[name] for name in event} == event
    assert published_log.CONTENT not in first
    emit.flush()
    published_log.restore(tmp_path / "other" / "events.jsonl", open_storage(address))
    tracker = MemoryTracker("run")
    assert deliver(log_in(tmp_path / "other", address), tracker) == 0
    assert [Path(name).name for name in tracker.artifacts] == ["one.png"]


def test_a_file_outside_of_the_runs_folder_is_not_written(tmp_path: Path, address: str) -> None:
    log = log_in(tmp_path / "driver", address)
    outside = {"kind": "artifact", "path": "../stolen", published_log.CONTENT: b"x"}
    log(outside)
    log.flush()
    assert not (tmp_path / "stolen").exists()
    emitted = EmitFiles(NullEmit(), tmp_path / "driver")
    emitted({"kind": "artifact", "path": "/etc/hostname"})


def test_the_offsets_are_restored(tmp_path: Path, address: str) -> None:
    log, tracker = log_in(tmp_path / "one", address), MemoryTracker("run")
    log(point(1))
    log.flush()
    deliver(log, tracker)
    log.flush()
    again = tmp_path / "two" / "events.jsonl"
    published_log.restore(again, open_storage(address))
    for file in published_log.offset_files(log.path):
        assert again.with_name(file.name).read_text() == file.read_text()


def test_a_publisher_publishes_in_the_background_and_reports_failures(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_log, "PUBLISH_SECONDS", 0.01)
    log, notices = log_in(tmp_path, address), []
    publisher = Publisher(log, notices.append).start()
    log(point(1))
    publisher.close(10.0)
    assert log.published() == log.path.stat().st_size
    refused = PublishedEventLog(tmp_path / "log.jsonl", "s3://127.0.0.1/none", ONCE)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    refused(point(1))
    Publisher(refused, notices.append).start().close(10.0)
    assert len(notices) >= 1
    assert "events can't be published" in notices[0]
