"""Delivers the event log to listeners and to the tracker, in a thread of its own."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.interfaces import Point, Tracker
from pipelines.tracking.events import (
    _AWAY_SECONDS,
    _BATCH_VALUES,
    _MALFORMED,
    _MAX_BACKOFF_SECONDS,
    _TELL_SECONDS,
    FAILED_EVENTS,
    Event,
    _plain,
    read_events,
)


class Uploader:
    """Tails a spool: `start` it, let the training write, `close` it.

    `is_permanent(error)` says that asking the tracker again can't help: such an event goes to
    RUN_DIR/failed_events.jsonl; every other error is retried for as long as it takes. Each (metric,
    step) is shipped once, the first in the file wins, so that steps that are redone after a restart
    aren't there twice. How far it came is kept beside the spool: a new Uploader goes on from there,
    and its listeners hear the events from there on. A listener that raises hears nothing more.
    """

    def __init__(
        self,
        spool_path: Path,
        tracker: Tracker,
        *,
        is_permanent: Callable[[BaseException], bool],
        listeners: Sequence[Callable[[Event], None]] = (),
        interval_seconds: float = 1.0,
    ) -> None:
        self._path = spool_path
        self._listeners = list(listeners)
        self._notices: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._done = threading.Event()
        # Two lanes, so that a picture that can't be stored never holds up a metric.
        self._lanes = [
            _Channel(spool_path, kinds, tracker, is_permanent, self._notices.put, interval_seconds)
            for kinds in (("metrics", "tags"), ("artifact", "image"))
        ]
        self._teller = threading.Thread(target=self._tell, name="spool-listeners", daemon=True)

    def start(self) -> Uploader:
        for thread in (self._teller, *self._lanes):
            thread.start()
        return self

    def close(self, deadline_seconds: float = 60.0) -> int:
        """Ships what is left, for `deadline_seconds` at most; gives the number of events that the
        tracker doesn't have: those still waiting in the spool and those that it refused."""
        deadline = time.monotonic() + deadline_seconds
        for lane in self._lanes:
            lane.closing.set()
        for lane in self._lanes:
            lane.join(max(0.0, deadline - time.monotonic()))
            lane.abandoned.set()
        self._done.set()
        self._teller.join(_TELL_SECONDS * 50)
        return sum(lane.waiting() + lane.refused for lane in self._lanes)

    def _tell(self) -> None:
        told = min(lane.offset for lane in self._lanes)
        while True:
            last = self._done.is_set()  # asked before reading: what came before it is told
            for event, end in read_events(self._path, told):
                self._hand(event)
                told = end
            while not self._notices.empty():
                self._hand(self._notices.get())
            if last:
                return
            self._done.wait(_TELL_SECONDS)

    def _hand(self, event: Event) -> None:
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception as error:  # a display must never end the shipping
                self._listeners.remove(listener)
                self._notices.put(_notice(f"a listener failed and was dropped: {error!r}"))


class _Channel(threading.Thread):
    """Ships the events of some kinds, in the order of the file."""

    def __init__(
        self,
        spool_path: Path,
        kinds: tuple[str, ...],
        tracker: Tracker,
        is_permanent: Callable[[BaseException], bool],
        notify: Callable[[Event], None],
        interval_seconds: float,
    ) -> None:
        super().__init__(name=f"spool-{kinds[0]}", daemon=True)
        self._path = spool_path
        self._kinds = kinds
        self._tracker = tracker
        self._is_permanent = is_permanent
        self._notify = notify
        self._interval_seconds = interval_seconds
        self._offset_path = spool_path.with_name(f"{spool_path.name}.{kinds[0]}.offset")
        self._seen = _Seen()
        self._away_since: float | None = None
        self._told_away = False
        self.closing = threading.Event()
        self.abandoned = threading.Event()
        self.refused = 0
        self.offset = _read_offset(self._offset_path, spool_path)

    def waiting(self) -> int:
        """Events of this lane that weren't shipped."""
        return sum(e["kind"] in self._kinds for e, _ in read_events(self._path, self.offset))

    def run(self) -> None:
        for event, end in read_events(self._path):
            if end > self.offset:
                break
            self._fresh(event)
        while True:
            last = self.closing.is_set()  # asked before reading: what came before it is shipped
            if not self._ship_new() or last:
                return
            self.closing.wait(self._interval_seconds)

    def _ship_new(self) -> bool:
        """Ships all there is; False when it was told to give up."""
        points: list[Point] = []
        end = self.offset
        for event, end in read_events(self._path, self.offset):
            if event["kind"] not in self._kinds:
                continue
            if event["kind"] == "metrics":
                points += self._fresh(event)
                if sum(len(point.values) for point in points) < _BATCH_VALUES:
                    continue
            if not self._deliver_points(points):
                return False
            points = []
            if event["kind"] != "metrics" and not self._deliver(event):
                return False
            self._advance(end)
        if not self._deliver_points(points):
            return False
        self._advance(end)
        return True

    def _fresh(self, event: Event) -> list[Point]:
        """What of a metrics event wasn't in the file before."""
        if event["kind"] != "metrics" or "metrics" not in self._kinds:
            return []
        try:
            step, time_ms = int(event["step"]), int(event["time_ms"])
            values = {str(key): float(value) for key, value in event["values"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._refuse(event, error)
            return []
        values = {key: value for key, value in values.items() if self._seen.add(key, step)}
        return [Point(step, time_ms, values)] if values else []

    def _deliver_points(self, points: list[Point]) -> bool:
        """One call for all; if that is refused, ever smaller ones, to find what is at fault."""
        if not points:
            return True
        done, refusal = self._insist(lambda: self._tracker.metrics(points))
        if refusal is None:
            return done
        if len(points) > 1:
            middle = len(points) // 2
            parts = [points[:middle], points[middle:]]
        elif len(points[0].values) > 1:
            point = points[0]
            parts = [[Point(point.step, point.time_ms, {k: v})] for k, v in point.values.items()]
        else:
            point = points[0]
            self._refuse({"kind": "metrics", **vars(point)}, refusal)
            return True
        return all(self._deliver_points(part) for part in parts)

    def _deliver(self, event: Event) -> bool:
        try:
            action = self._action(event)
        except _MALFORMED as error:
            self._refuse(event, error)
            return True
        done, refusal = self._insist(action)
        if refusal is not None:
            self._refuse(event, refusal)
        return done or refusal is not None

    def _action(self, event: Event) -> Callable[[], None]:
        if event["kind"] == "tags":
            values = {str(key): str(value) for key, value in event["values"].items()}
            return lambda: self._tracker.tags(values)
        folder = self._path.parent.resolve()
        path = (folder / event["path"]).resolve()
        if not path.is_relative_to(folder):
            raise ValueError(f"{event['path']} lies outside the run's folder")
        if not path.exists():
            raise FileNotFoundError(f"{event['path']} isn't there any more")
        if event["kind"] == "image":
            key, step, time_ms = str(event["key"]), int(event["step"]), int(event["time_ms"])
            return lambda: self._tracker.image(path, key, step, time_ms)
        return lambda: self._tracker.artifact(path, str(event.get("folder", "")))

    def _insist(self, action: Callable[[], None]) -> tuple[bool, BaseException | None]:
        """(True, None) when done, (False, error) when refused, (False, None) when given up."""
        pause_seconds = 0.5
        while not self.abandoned.is_set():
            try:
                action()
            except Exception as error:
                if self._is_permanent(error):
                    return False, error
                self._say_away(error)
                # Being closed cuts a pause short, and later pauses stay short.
                wakes = self.abandoned if self.closing.is_set() else self.closing
                wakes.wait(pause_seconds)
                longest = 1.0 if self.closing.is_set() else _MAX_BACKOFF_SECONDS
                pause_seconds = min(pause_seconds * 2, longest)
            else:
                self._say_back()
                return True, None
        return False, None

    def _say_away(self, error: Exception) -> None:
        now = time.monotonic()
        self._away_since = self._away_since or now
        if not self._told_away and now - self._away_since >= _AWAY_SECONDS:
            self._told_away = True
            what = " ".join(str(error).split())[:200]
            self._notify(_notice(f"tracking is away: {self._kinds[0]} are kept for later ({what})"))

    def _say_back(self) -> None:
        self._away_since = None
        if self._told_away:
            self._told_away = False
            self._notify(_notice(f"tracking is back: {self._kinds[0]} follow", level="info"))

    def _refuse(self, event: Event, error: BaseException) -> None:
        what = " ".join(str(error).split())[:500]
        with open(self._path.with_name(FAILED_EVENTS), "a", encoding="utf-8") as file:
            file.write(json.dumps(_plain({**event, "error": what}), allow_nan=False) + "\n")
        self.refused += 1
        if self.refused == 1:
            self._notify(_notice(f"tracking refused an event, now in {FAILED_EVENTS}: {what}"))

    def _advance(self, offset: int) -> None:
        if offset == self.offset:
            return
        self.offset = offset
        fresh = self._offset_path.with_name(self._offset_path.name + ".new")
        fresh.write_text(str(offset), encoding="ascii")
        os.replace(fresh, self._offset_path)


class _Seen:
    """Which (metric, step) there was: eight bytes for each, in order as they nearly always come."""

    def __init__(self) -> None:
        self._steps: dict[str, array[int]] = {}

    def add(self, key: str, step: int) -> bool:
        """False if it was there already."""
        steps = self._steps.setdefault(key, array("q"))
        place = bisect_left(steps, step) if steps and step <= steps[-1] else len(steps)
        if place < len(steps) and steps[place] == step:
            return False
        steps.insert(place, step)
        return True


def _notice(text: str, level: str = "warning") -> Event:
    return {"kind": "notice", "level": level, "text": text, "time_ms": int(time.time() * 1000)}


def _read_offset(path: Path, spool_path: Path) -> int:
    try:
        offset = int(path.read_text(encoding="ascii"))
        return offset if offset <= spool_path.stat().st_size else 0
    except (FileNotFoundError, ValueError):
        return 0
