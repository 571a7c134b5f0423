"""Names a worker that is stopped, stuck or slow, and where it is.

In: what the workers of a group have said, about once a second. Out: a line for each new trouble.
Must not know Ray, nor what a step is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from pipelines.cluster.group_control import Beat, Heard

SILENT_SECONDS = 20.0
STUCK_SECONDS = 40.0
STUCK_STEPS = 5.0
"""A worker is stuck after `STUCK_SECONDS`, or the time of so many steps if that is longer."""
WINDOW_SECONDS = 20.0
"""Over at least this time, and `WINDOW_STEPS` steps, the workers are compared."""
WINDOW_STEPS = 3
SLOW_RATIO = 3.0
SLOW_SECONDS = 0.01
"""A worker is slow if a step takes it `SLOW_RATIO` times the median of the others, and this much
longer."""
SHOWN_FRAMES = 3


class Watchdog:
    """Looks at a group again and again. Each trouble of a worker is reported once, and again only
    after it was over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reported: set[tuple[str, int]] = set()
        self._first: tuple[float, int] | None = None
        self._window: tuple[float, dict[int, Beat]] | None = None
        self._slow: dict[int, str] = {}

    def look(self, heard: Sequence[Heard]) -> list[str]:
        """The lines for what is wrong now and wasn't before."""
        if not heard or len(heard) < heard[0].beat.size:
            return []  # some workers have not started yet
        troubles = {**self._silent(heard), **self._stuck(heard), **self._slow_workers(heard)}
        lines = [line for key, line in troubles.items() if key not in self._reported]
        self._reported = set(troubles)
        return lines

    def _silent(self, heard: Sequence[Heard]) -> dict[tuple[str, int], str]:
        silent = [h for h in heard if h.silent_seconds >= SILENT_SECONDS]
        if len(silent) == len(heard) > 1:
            return {}  # it is the driver that didn't hear
        return {
            ("silent", h.beat.rank): f"{_name(h.beat)} has been silent for "
            f"{h.silent_seconds:.0f} s: it is stopped, or its machine is cut off; {_place(h.beat)}"
            for h in silent
        }

    def _stuck(self, heard: Sequence[Heard]) -> dict[tuple[str, int], str]:
        """Workers that are busy with their own work while nothing moves; if all wait for each
        other, rank 0 stands for them."""
        limit = max(STUCK_SECONDS, STUCK_STEPS * self._seconds_per_step(heard))
        if any(h.stuck_seconds < limit for h in heard):
            return {}
        busy = [h for h in heard if h.beat.phase in ("data", "compute")]
        if not busy and all(h.beat.phase == "sync" for h in heard):
            first = heard[0]
            return {
                ("stuck", -1): f"all {len(heard)} workers have waited for each other for "
                f"{first.stuck_seconds:.0f} s in step {(first.beat.step or 0) + 1}: the network "
                "between them may be cut"
            }
        return {
            ("stuck", h.beat.rank): f"{_name(h.beat)} has been in one place of step "
            f"{(h.beat.step or 0) + 1} for {h.stuck_seconds:.0f} s; {_place(h.beat)}"
            for h in busy
        }

    def _seconds_per_step(self, heard: Sequence[Heard]) -> float:
        """Mean time of a step of this group so far; 0 before the first one."""
        step = min(h.beat.step or 0 for h in heard)
        if self._first is None:
            self._first = (self._clock(), step)
        began, first_step = self._first
        moving = self._clock() - began - min(h.stuck_seconds for h in heard)
        return moving / (step - first_step) if step > first_step else 0.0

    def _slow_workers(self, heard: Sequence[Heard]) -> dict[tuple[str, int], str]:
        now, beats = self._clock(), {h.beat.rank: h.beat for h in heard}
        if self._window is None:
            self._window = (now, beats)
        since, before = self._window
        steps = {rank: (b.step or 0) - (before[rank].step or 0) for rank, b in beats.items()}
        if now - since >= WINDOW_SECONDS and min(steps.values()) >= WINDOW_STEPS:
            own = {
                rank: (beats[rank].own_seconds - before[rank].own_seconds) / count
                for rank, count in steps.items()
            }
            self._slow = {rank: line for rank in own if (line := _slowness(rank, own))}
            self._window = (now, beats)
        return {
            ("slow", rank): f"{_name(beats[rank])} {line}; {_place(beats[rank])}"
            for rank, line in self._slow.items()
        }


def _slowness(rank: int, own: dict[int, float]) -> str:
    """How slow a worker is, by the seconds that a step takes each; empty if it isn't."""
    others = [seconds for other, seconds in own.items() if other != rank]
    if not others:
        return ""
    mine, median = own[rank], statistics.median(others)
    if mine < SLOW_RATIO * median or mine - median < SLOW_SECONDS:
        return ""
    return f"takes {mine:.2f} s for its part of a step, the others {median:.2f} s"


def _name(beat: Beat) -> str:
    return f"worker {beat.rank} on {beat.host} (pid {beat.pid})"


def _place(beat: Beat) -> str:
    frames = [frame.rpartition("/")[2] for frame in reversed(beat.stack[-SHOWN_FRAMES:])]
    return f"it is at {', called at '.join(frames)}" if frames else "it has sent no stack"
