"""A training that starts again from step 0 is marked in its event log, once for each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines import tag_names
from pipelines.tracking.events import EventLog, read_events
from pipelines.tracking.restarts import MarkRestarts


def kinds(log: Path) -> list[str]:
    return [event["kind"] for event, _ in read_events(log)]


def tags(log: Path) -> list[Any]:
    return [
        json.loads(event["values"][tag_names.RESTARTS])
        for event, _ in read_events(log)
        if event["kind"] == "tags"
    ]


def test_a_start_after_progress_is_marked_with_step_and_reason(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    emit = MarkRestarts(EventLog(log), log)
    emit({"kind": "start", "reason": "there is no checkpoint"})
    emit({"kind": "start", "reason": "there is no checkpoint"})
    assert kinds(log) == ["start", "start"], "nothing was trained yet"
    emit({"kind": "metrics", "step": 43, "values": {"loss": 1.0}})
    emit({"kind": "resume", "step": 40})
    assert tags(log) == []
    emit({"kind": "start", "reason": "damaged: step-000000040"})
    warning = [e for e, _ in read_events(log) if e["kind"] == "notice"][-1]
    assert warning["level"] == "warning"
    assert "from step 0, although step 43 was reached: damaged: step-000000040" in warning["text"]
    emit({"kind": "metrics", "step": 50, "values": {"loss": 1.0}})
    emit({"kind": "start", "reason": "there is no checkpoint in x"})
    assert tags(log)[-1] == [
        {"after_step": 43, "reason": "damaged: step-000000040"},
        {"after_step": 50, "reason": "there is no checkpoint in x"},
    ]
    assert len(tags(log)) == 2
