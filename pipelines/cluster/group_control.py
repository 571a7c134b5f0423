"""How a running group of workers is watched, and asked to stop at a step that all of them reach.

In: beats, which each worker sends about once a second, and the driver's request to stop. Out: what
each worker is to do. Must not know Ray, nor what a step is.

A stop costs the steps nothing: there is no collective call. Example with two workers, asked at t=1:

    t   worker A                            worker B                             stop_at
    0   completes step 41                   completes step 41                       -
    1   its beat is answered with `hold`    in step 42
    1   promises not to go past 42          completes 42, begins 43
    2   completes 42, waits                 its beat is answered with `hold`
    2   waits                               promises not to go past 43              43
    3   hears 43, completes it, stops       hears 43, completes it, stops

A worker's promise is the step that it is in. All have promised before `stop_at` becomes their
largest promise, so none is past it, and a worker that waits goes on to it.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType

BEAT_SECONDS = 1.0
HURRIED_SECONDS = 0.1
"""Between the beats of a worker that was asked to stop."""
NEVER = 1 << 62
"""The promise of a worker whose training has ended: no step to stop at is beyond it."""
STACK_LINES = 8
"""How many of the innermost frames of a training are sent with a beat."""


@dataclass(frozen=True)
class Beat:
    """What a worker says about itself.

    Args:
        attempt: Name of its group; each new group has another.
        size: Number of workers in the group.
        node: Ray's id of its machine.
        host: Name of its machine.
        began: Steps that were completed before this group started; None before the first one.
        step: Steps that are completed; None before the first one.
        phase: What the training does now: "data", "compute", "sync" or "" for something else.
        own_seconds: Time that its steps took it in all, without waiting for other workers.
        promise: The step that it doesn't go past without knowing `stop_at`.
        is_terminating: Whether its process was told to end.
        stack: Where the training is now, innermost frame last.
    """

    attempt: str
    rank: int
    size: int
    node: str
    host: str
    pid: int
    began: int | None = None
    step: int | None = None
    phase: str = ""
    own_seconds: float = 0.0
    promise: int | None = None
    is_terminating: bool = False
    stack: tuple[str, ...] = ()


@dataclass(frozen=True)
class Orders:
    """The answer to a beat: whether to promise a step, and the step to stop at once it is known."""

    hold: bool = False
    stop_at: int | None = None


@dataclass(frozen=True)
class Heard:
    """The newest beat of a worker.

    Args:
        silent_seconds: Time since it came.
        stuck_seconds: Time since its step or its phase changed.
    """

    beat: Beat
    silent_seconds: float
    stuck_seconds: float


class GroupRecord:
    """What the workers of the current group have said. Lives beside the driver."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin("")

    def begin(self, attempt: str) -> None:
        """Forgets the group before; beats of its workers are ignored from now on."""
        self._attempt = attempt
        self._is_asked = False
        self._stop_at: int | None = None
        self._beats: dict[int, tuple[Beat, float, float]] = {}

    def ask_to_stop(self) -> None:
        self._is_asked = True

    def hear(self, beat: Beat) -> Orders:
        if beat.attempt != self._attempt:
            return Orders()
        now = self._clock()
        before = self._beats.get(beat.rank)
        moved = before is None or (before[0].step, before[0].phase) != (beat.step, beat.phase)
        since = now if before is None or moved else before[2]
        self._beats[beat.rank] = (beat, now, since)
        promises = [b.promise for b, _, _ in self._beats.values() if b.promise is not None]
        if self._stop_at is None and self._is_asked and len(promises) == beat.size:
            self._stop_at = max(promises)
        return Orders(self._is_asked, self._stop_at)

    def heard(self) -> list[Heard]:
        """By rank; fewer than the size of the group until all workers have started."""
        now = self._clock()
        return [
            Heard(beat, now - at, now - since)
            for _, (beat, at, since) in sorted(self._beats.items())
        ]


class WorkerControl:
    """A worker's end; see `interfaces.Control`. Sends beats from a thread of its own, and counts
    as absent in a copy of it that was pickled to another process.

    Args:
        send: Delivers a beat and returns the answer. If it raises, there is no driver any more.
        own: The constant part of the beats.
    """

    def __init__(self, send: Callable[[Beat], Orders], own: Beat) -> None:
        self._send, self._own = send, own
        self._changed = threading.Condition()
        self._orders = Orders()
        self._began: int | None = None
        self._step: int | None = None
        self._promise: int | None = None
        self._phase, self._phase_at, self._own_seconds = "", time.perf_counter(), 0.0
        self._training_thread = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="beats", daemon=True)

    def start(self) -> WorkerControl:
        self._thread.start()
        return self

    def close(self) -> None:
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def begin(self, step: int) -> None:
        with self._changed:
            self._began = self._step = step
        self._training_thread = threading.get_ident()

    def phase(self, name: str) -> None:
        now = time.perf_counter()
        if self._phase in ("data", "compute"):
            self._own_seconds += now - self._phase_at
        self._phase, self._phase_at = name, now

    def stops_after(self, step: int) -> bool:
        with self._changed:
            self._step = step
            while (
                self._orders.stop_at is None
                and self._promise is not None
                and step >= self._promise
                and not self._closed.is_set()
            ):
                self._changed.wait()
            return self._orders.stop_at is not None and step >= self._orders.stop_at

    def __reduce__(self) -> tuple[object, ...]:
        from pipelines.interfaces import NullControl

        return (NullControl, ())

    def _beat(self) -> None:
        try:
            while not self._closed.is_set():
                with self._changed:
                    if self._orders.hold and self._promise is None and self._step is not None:
                        self._promise = self._step + 1
                orders = self._send(self._now())
                with self._changed:
                    self._orders = orders
                    self._changed.notify_all()
                hurried = orders.hold and orders.stop_at is None
                self._closed.wait(HURRIED_SECONDS if hurried else BEAT_SECONDS)
            # The others, if they are asked to stop from now on, aren't to wait for this one.
            self._send(replace(self._now(), promise=NEVER))
        except Exception:  # the group ends with its driver; no worker is to wait for an answer
            self.close()

    def _now(self) -> Beat:
        with self._changed:
            return replace(
                self._own,
                began=self._began,
                step=self._step,
                promise=self._promise,
                phase=self._phase,
                own_seconds=self._own_seconds,
                is_terminating=_terminating.is_set(),
                stack=stack_of(self._training_thread),
            )


def stack_of(thread: int) -> tuple[str, ...]:
    """The innermost frames of a thread, as `FILE:LINE in FUNCTION`; empty if there is none."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ()
    frames = traceback.extract_stack(frame, limit=STACK_LINES)
    return tuple(f"{f.filename}:{f.lineno} in {f.name}" for f in frames)


_terminating = threading.Event()


def note_termination() -> None:
    """Makes SIGTERM a request to this process to commit and stop; its main thread calls this.

    The sender kills the process later anyway, as a cloud does with a spot machine.
    """

    def note(number: int, frame: FrameType | None) -> None:
        _terminating.set()

    signal.signal(signal.SIGTERM, note)
