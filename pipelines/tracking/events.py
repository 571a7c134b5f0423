"""From the run's spool file to a Tracker.

In: events, flat JSON objects with a "kind", appended to RUN_DIR/events.jsonl by the training.
Out: the same events to listeners at once, and metrics, artifacts and tags to the tracker from a
thread of its own, however long the tracker is away. Must not know MLflow, Ray or torch.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = "events.jsonl"
FAILED_EVENTS = "failed_events.jsonl"
Event = dict[str, Any]

_BATCH_VALUES = 500
_MAX_BACKOFF_SECONDS = 15.0
_TELL_SECONDS = 0.1
_AWAY_SECONDS = 5.0
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, FileNotFoundError)


class EventLog:
    """`ports.Emit` that appends one JSON line for each event, in one write.

    Any number of threads and processes may append to one file. An event without "time_ms" gets the
    time of its making. NaN and infinities, which JSON hasn't, become strings; `read_events` turns
    those of metrics back.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size_bytes = os.fstat(self._file).st_size
        if size_bytes and os.pread(self._file, 1, size_bytes - 1) != b"\n":
            os.write(self._file, b"\n")  # a line cut by a crash must not swallow the next one

    def __call__(self, event: Mapping[str, Any]) -> None:
        stamped = {"time_ms": int(time.time() * 1000), **event}
        line = json.dumps(_plain(stamped), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[os.write(self._file, line) :]

    def __reduce__(self) -> tuple[Any, ...]:
        return (EventLog, (self.path,))

    def flush(self) -> None:
        """Nothing to do: a write that has returned outlives this process."""

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_events(path: Path, start: int = 0) -> Iterator[tuple[Event, int]]:
    """The whole lines of a spool from byte `start` on, each with the offset after it.

    A last line without its end isn't there yet; a line that is no event is passed over.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(start)
        offset = start
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            event = _parse(line)
            if event is not None:
                yield event, offset


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("kind"), str) else None


def _plain(value: Any) -> Any:
    """The same as JSON can say it: numpy's and torch's numbers as Python's, NaN as "nan"."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return _plain(value.item()) if hasattr(value, "item") else str(value)
