"""Marks a training that starts again from step 0 although it had come further.

In: the events of a training, and its event log. Out: the same events, and after a "start" that
repeats steps a warning and a tag. Must not know MLflow, Ray or torch.

MLflow keeps every point it ever got, and of a repeated step the first line of the log counts. So
the curves of such a run have the points of the lost attempt up to the step that it had reached, and
those of the new one from there on. The tag says where:

    events in the log                         MLflow
    start; metrics of steps 1 to 43           steps 1-43
    start, "no checkpoint": a warning, and    tessera.restarts = [{"after_step": 43, "reason": …}]
    metrics of steps 1 to 60                  steps 44-60
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import tag_names
from pipelines.interfaces import Emit
from pipelines.tracking.events import read_events


@dataclass(frozen=True)
class MarkRestarts:
    """An `Emit` that writes to the event log at `log`, and marks restarts in it."""

    emit: Emit
    log: Path

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.emit(event)
        if event.get("kind") == "start":
            restarts = find_restarts(self.log)
            if restarts and restarts[-1]["is_newest"]:
                self._mark(restarts)

    def flush(self) -> None:
        self.emit.flush()

    def _mark(self, restarts: list[dict[str, Any]]) -> None:
        last = restarts[-1]
        text = (
            f"training starts again from step 0, although step {last['after_step']} was reached: "
            f"{last['reason']}. MLflow keeps the first value of each step"
        )
        self.emit({"kind": "notice", "level": "warning", "text": text})
        facts = [{name: each[name] for name in ("after_step", "reason")} for each in restarts]
        self.emit({"kind": "tags", "values": {tag_names.RESTARTS: json.dumps(facts)}})


def find_restarts(log: Path) -> list[dict[str, Any]]:
    """The starts in an event log that repeat steps, each with the step that was reached before and
    the reason; `is_newest` if nothing was trained since."""
    restarts: list[dict[str, Any]] = []
    reached = 0
    for event, _ in read_events(log):
        if event["kind"] == "metrics":
            reached = max(reached, int(event["step"]))
            for restart in restarts[-1:]:
                restart["is_newest"] = False
        elif event["kind"] == "start" and reached:
            restarts.append(
                {"after_step": reached, "reason": event.get("reason", ""), "is_newest": True}
            )
    return restarts
