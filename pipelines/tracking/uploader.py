"""Delivers the event log to listeners and to the tracker, in threads of its own.

In: RUN_DIR/events.jsonl (events.py) and a `Tracker`. Out: each event once at every listener, within
a tenth of a second, and metrics, tags, artifacts and images at the tracker, however long it is
unreachable. Must not know MLflow, Ray or torch.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from models.core.errors import TesseraError, hide_passwords
from pipelines.interfaces import Point, Tracker
from pipelines.storage.atomic import write_atomic
from pipelines.tracking.events import Event, read_events, to_json_values

FAILED_EVENTS = "failed_events.jsonl"
"""Beside the event log: the events that the tracker refused, each with the error."""

_POINTS_PER_CALL = 500
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 15.0
_LISTENER_POLL_SECONDS = 0.1
_OUTAGE_NOTICE_SECONDS = 5.0
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, FileNotFoundError)


class Uploader:
    """Follows an event log: call `start`, let the training write, then `close`.

    `is_permanent(error)` returns True if retrying can't help. Such an event goes to
    RUN_DIR/failed_events.jsonl; every other error is retried for as long as it takes. Each (metric,
    step) is delivered once: the first line in the file counts, so steps that are repeated after a
    restart don't appear twice. The offset up to which events were delivered is saved beside the
    log, and a new Uploader and its listeners resume there. A listener that raises is removed.

    `readable` returns the bytes of the log that may be delivered to the tracker; by default all.
    `fetch` is called with the path of a file that an event names and that isn't here.
    """

    def __init__(
        self,
        log_path: Path,
        tracker: Tracker,
        *,
        is_permanent: Callable[[BaseException], bool],
        listeners: Sequence[Callable[[Event], None]] = (),
        interval_seconds: float = 1.0,
        readable: Callable[[], int] | None = None,
        fetch: Callable[[str], None] | None = None,
    ) -> None:
        self._path = log_path
        self._listeners = list(listeners)
        self._notices: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._done = threading.Event()
        # Two channels, so that an image that can't be stored never delays a metric.
        self._channels = [
            _Channel(
                log_path,
                kinds,
                tracker,
                is_permanent,
                self._notices.put,
                interval_seconds,
                readable,
                fetch,
            )
            for kinds in (("metrics", "tags"), ("artifact", "image"))
        ]
        self._listener_thread = threading.Thread(
            target=self._follow, name="event-listeners", daemon=True
        )

    def start(self) -> Uploader:
        for thread in (self._listener_thread, *self._channels):
            thread.start()
        return self

    def close(self, deadline_seconds: float = 60.0) -> int:
        """Delivers what is left, for at most `deadline_seconds`. Returns the number of events that
        the tracker doesn't have: those not delivered yet plus those it refused."""
        deadline = time.monotonic() + deadline_seconds
        for channel in self._channels:
            channel.closing.set()
        for channel in self._channels:
            channel.join(max(0.0, deadline - time.monotonic()))
            channel.abandoned.set()
        self._done.set()
        self._listener_thread.join(_LISTENER_POLL_SECONDS * 50)
        return sum(channel.waiting() + channel.failed for channel in self._channels)

    def _follow(self) -> None:
        offset = min(channel.offset for channel in self._channels)
        while True:
            # Read the flag before the file: every event written before `close` is then delivered.
            last = self._done.is_set()
            for event, end in read_events(self._path, offset):
                self._notify(event)
                offset = end
            while not self._notices.empty():
                self._notify(self._notices.get())
            if last:
                return
            self._done.wait(_LISTENER_POLL_SECONDS)

    def _notify(self, event: Event) -> None:
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception as error:  # a display must never stop the delivery
                self._listeners.remove(listener)
                self._notices.put(_notice(f"a listener failed and was dropped: {error!r}"))


class _Channel(threading.Thread):
    """Delivers the events of some kinds, in the order of the file."""

    def __init__(
        self,
        log_path: Path,
        kinds: tuple[str, ...],
        tracker: Tracker,
        is_permanent: Callable[[BaseException], bool],
        notify: Callable[[Event], None],
        interval_seconds: float,
        readable: Callable[[], int] | None,
        fetch: Callable[[str], None] | None,
    ) -> None:
        super().__init__(name=f"upload-{kinds[0]}", daemon=True)
        self._path = log_path
        self._kinds = kinds
        self._tracker = tracker
        self._is_permanent = is_permanent
        self._notify = notify
        self._interval_seconds = interval_seconds
        self._readable, self._fetch = readable, fetch
        self._offset_path = log_path.with_name(f"{log_path.name}.{kinds[0]}.offset")
        self._seen = SeenSteps()
        self._failing_since: float | None = None
        self._is_outage_announced = False
        self.closing = threading.Event()
        self.abandoned = threading.Event()
        self.failed = 0
        self.offset = _read_offset(self._offset_path, log_path)

    def waiting(self) -> int:
        """The number of events of this channel that were not delivered yet."""
        return sum(e["kind"] in self._kinds for e, _ in read_events(self._path, self.offset))

    def run(self) -> None:
        for event, end in read_events(self._path):
            if end > self.offset:
                break
            self._new_points(event)
        while True:
            # Read the flag before the file: every event written before `close` is then delivered.
            last = self.closing.is_set()
            if not self._deliver_new() or last:
                return
            self.closing.wait(self._interval_seconds)

    def _deliver_new(self) -> bool:
        """Delivers all new events; False if the deadline of `close` has passed."""
        points: list[Point] = []
        end = self.offset
        readable = self._readable() if self._readable else None
        for event, after in read_events(self._path, self.offset):
            if readable is not None and after > readable:
                break
            end = after
            if event["kind"] not in self._kinds:
                continue
            if event["kind"] == "metrics":
                points += self._new_points(event)
                if sum(len(point.values) for point in points) < _POINTS_PER_CALL:
                    continue
            if not self._deliver_points(points):
                return False
            points = []
            if event["kind"] != "metrics" and not self._deliver_event(event):
                return False
            self._advance(end)
        if not self._deliver_points(points):
            return False
        self._advance(end)
        return True

    def _new_points(self, event: Event) -> list[Point]:
        """The values of a metrics event whose (metric, step) is new in the file."""
        if event["kind"] != "metrics" or "metrics" not in self._kinds:
            return []
        try:
            step, time_ms = int(event["step"]), int(event["time_ms"])
            values = {str(key): float(value) for key, value in event["values"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._record_failure(event, error)
            return []
        values = {key: value for key, value in values.items() if self._seen.add(key, step)}
        return [Point(step, time_ms, values)] if values else []

    def _deliver_points(self, points: list[Point]) -> bool:
        """Delivers all points in one call; if it is refused, halves them to find the bad value."""
        if not points:
            return True
        done, failure = self._retry(lambda: self._tracker.metrics(points))
        if failure is None:
            return done
        if len(points) > 1:
            middle = len(points) // 2
            parts = [points[:middle], points[middle:]]
        elif len(points[0].values) > 1:
            point = points[0]
            parts = [[Point(point.step, point.time_ms, {k: v})] for k, v in point.values.items()]
        else:
            point = points[0]
            self._record_failure({"kind": "metrics", **vars(point)}, failure)
            return True
        return all(self._deliver_points(part) for part in parts)

    def _deliver_event(self, event: Event) -> bool:
        try:
            action = self._action(event)
        except _MALFORMED as error:
            self._record_failure(event, error)
            return True
        done, failure = self._retry(action)
        if failure is not None:
            self._record_failure(event, failure)
        return done or failure is not None

    def _action(self, event: Event) -> Callable[[], None]:
        if event["kind"] == "tags":
            values = {str(key): str(value) for key, value in event["values"].items()}
            return lambda: self._tracker.tags(values)
        folder = self._path.parent.resolve()
        path = (folder / event["path"]).resolve()
        if not path.is_relative_to(folder):
            raise ValueError(f"{event['path']} lies outside of the run's folder")
        if not path.exists() and self._fetch is not None:
            with suppress(TesseraError):
                self._fetch(event["path"])
        if not path.exists():
            raise FileNotFoundError(f"{event['path']} doesn't exist any more")
        if path.is_dir() and (link := next(filter(Path.is_symlink, path.rglob("*")), None)):
            raise ValueError(f"{link.relative_to(folder)} is a link, which is not uploaded")
        if event["kind"] == "image":
            key, step, time_ms = str(event["key"]), int(event["step"]), int(event["time_ms"])
            return lambda: self._tracker.image(path, key, step, time_ms)
        return lambda: self._tracker.artifact(path, str(event.get("folder", "")))

    def _retry(self, action: Callable[[], None]) -> tuple[bool, BaseException | None]:
        """Returns (True, None) if done, (False, error) if refused, (False, None) if abandoned.

        Not storage's `retry_call`: this one has no limit of tries, and `close` cuts its pauses
        short.
        """
        pause_seconds = _FIRST_PAUSE_SECONDS
        while not self.abandoned.is_set():
            try:
                action()
            except Exception as error:
                if self._is_permanent(error):
                    return False, error
                self._announce_outage(error)
                # `close` cuts the current pause short, and later pauses stay short.
                wakes = self.abandoned if self.closing.is_set() else self.closing
                wakes.wait(pause_seconds)
                longest = 1.0 if self.closing.is_set() else _MAX_PAUSE_SECONDS
                pause_seconds = min(pause_seconds * 2, longest)
            else:
                self._announce_recovery()
                return True, None
        return False, None

    def _announce_outage(self, error: Exception) -> None:
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if not self._is_outage_announced and now - self._failing_since >= _OUTAGE_NOTICE_SECONDS:
            self._is_outage_announced = True
            what = " ".join(str(error).split())[:200]
            self._notify(
                _notice(f"tracking is unreachable: {self._kinds[0]} are kept for later ({what})")
            )

    def _announce_recovery(self) -> None:
        self._failing_since = None
        if self._is_outage_announced:
            self._is_outage_announced = False
            self._notify(
                _notice(f"tracking is back: {self._kinds[0]} are being uploaded", level="info")
            )

    def _record_failure(self, event: Event, error: BaseException) -> None:
        what = hide_passwords(" ".join(str(error).split()))[:500]
        line = json.dumps(to_json_values({**event, "error": what}), allow_nan=False) + "\n"
        file = self._path.with_name(FAILED_EVENTS)
        with suppress(OSError), open(file, "a", encoding="utf-8") as failed:
            failed.write(line)
        self.failed += 1
        if self.failed == 1:
            self._notify(
                _notice(f"tracking refused an event, which is now in {FAILED_EVENTS}: {what}")
            )

    def _advance(self, offset: int) -> None:
        if offset == self.offset:
            return
        self.offset = offset
        # On a full disk the next uploader delivers these events again, which changes nothing.
        with suppress(OSError), write_atomic(self._offset_path) as file:
            file.write(str(offset))


class SeenSteps:
    """The (metric, step) pairs seen so far, 8 bytes each: steps nearly always come sorted."""

    def __init__(self) -> None:
        self._steps: dict[str, array[int]] = {}

    def add(self, key: str, step: int) -> bool:
        """Returns False if the pair was there already."""
        steps = self._steps.setdefault(key, array("q"))
        index = bisect_left(steps, step) if steps and step <= steps[-1] else len(steps)
        if index < len(steps) and steps[index] == step:
            return False
        steps.insert(index, step)
        return True


def _notice(text: str, level: str = "warning") -> Event:
    now = int(time.time() * 1000)
    return {"kind": "notice", "level": level, "text": hide_passwords(text), "time_ms": now}


def _read_offset(path: Path, log_path: Path) -> int:
    try:
        offset = int(path.read_text(encoding="ascii"))
        return offset if offset <= log_path.stat().st_size else 0
    except (FileNotFoundError, ValueError):
        return 0
