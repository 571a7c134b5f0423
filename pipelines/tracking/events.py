"""The event log: the file between a training and the services that show it.

In: events, flat JSON objects with a "kind". Out: RUN_DIR/events.jsonl, one line per event, and a
reader that resumes at any byte offset. Must not know MLflow, Ray or torch.

A training never waits for a service. It appends events here; an `Uploader` (uploader.py) in the
driver reads them and delivers them. A run through an outage and a killed driver:

    time  who       what happens                              file    offset  MLflow
    0 s   worker    appends metrics of step 1 (80 bytes)        80       0    -
    1 s   uploader  delivers step 1, then saves the offset      80      80    step 1
    2 s   worker    appends metrics of step 2                  160      80    step 1
    2 s   uploader  MLflow is unreachable: retries             160      80    step 1
    7 s   uploader  still unreachable after 5 s: one warning   160      80    step 1
    8 s   worker    appends step 3; it notices nothing         240      80    step 1
    9 s   uploader  MLflow is back: delivers steps 2 and 3     240      80    steps 1-3
    9 s   driver    is killed before the offset is saved       240      80    steps 1-3
    20 s  uploader  a new one starts at offset 80 and delivers steps 2 and 3 again. Each point
                    carries its own time, so MLflow stores the same point once.
    21 s  worker    resumes at step 2 and appends 2 again: the first line of a step counts
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models.core.errors import TesseraError

FILE = "events.jsonl"
Event = dict[str, Any]


class EventLog:
    """An `interfaces.Emit` that appends each event to a file as one JSON line, in one write.

    Any number of threads and processes may append to the same file. An event without "time_ms" is
    stamped with the current time. JSON has no NaN and no infinities: they are written as strings,
    and the uploader turns the values of metrics back into numbers. A call raises TesseraError if
    the disk is full.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size_bytes = os.fstat(self._file).st_size
        if size_bytes and os.pread(self._file, 1, size_bytes - 1) != b"\n":
            os.write(self._file, b"\n")  # end a line that a crash cut, or it would swallow the next

    def __call__(self, event: Mapping[str, Any]) -> None:
        stamped = {"time_ms": int(time.time() * 1000), **event}
        text = json.dumps(to_json_values(stamped), allow_nan=False, separators=(",", ":"))
        line = text.encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise TesseraError(
                f"{self.path} can't be written: {error.strerror}",
                hint="the last checkpoint is intact; free some space and use --resume",
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return (EventLog, (self.path,))

    def flush(self) -> None:
        """Does nothing: a write that has returned survives the end of this process."""

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_events(path: Path, start: int = 0) -> Iterator[tuple[Event, int]]:
    """Yields (event, byte offset after its line) for the complete lines from byte `start` on.

    A last line without a newline is not complete yet and is left for later; a line that is not an
    event is skipped. Yields nothing if the file doesn't exist.
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


def to_json_values(value: Any) -> Any:
    """Converts to what JSON can hold: numpy and torch scalars become Python numbers, NaN "nan"."""
    if isinstance(value, Mapping):
        return {str(key): to_json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_values(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return to_json_values(value.item()) if hasattr(value, "item") else str(value)
