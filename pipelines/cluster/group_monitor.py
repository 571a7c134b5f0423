"""Watches a running group from the driver, and asks it to stop when it should be formed again.

In: what the workers say about themselves, the nodes that are drained, and free places on the
cluster. Out: a request to stop, and events of kind `group`, `tags` and `notice`. Must not know what
the workers do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pipelines import tag_names
from pipelines.cluster.connection import draining_nodes, head_answers
from pipelines.cluster.event_sink import on_beats
from pipelines.cluster.group_control import Heard
from pipelines.cluster.watchdog import Watchdog
from pipelines.cluster.worker_count import SETTLE_SECONDS, Places, WorkerGroup
from pipelines.interfaces import Emit

POLL_SECONDS = 1.0
ANSWER_SECONDS = 10.0
HEAD_EVERY_SECONDS = 5.0
GROW_AFTER_SECONDS = 30.0
"""How long a group trains before it is stopped to grow, which costs about half as long."""


@dataclass(frozen=True)
class Change:
    """Why a group is stopped. A preemption is no failure."""

    reason: str
    is_preemption: bool = False


@dataclass(frozen=True)
class Forming:
    """A group that is being formed.

    Args:
        size: Its number of workers.
        number: How many groups there were before it.
        before: Number of workers of the group before it, 0 for none.
        since: When that group stopped working, in seconds of `time.monotonic`.
        reason: Why it is formed.
    """

    size: int
    number: int = 0
    before: int = 0
    since: float = 0.0
    reason: str = ""


def taken_away(heard: Sequence[Heard], draining: Collection[str]) -> str | None:
    """Which machine or worker of the group is about to be taken away, as text; None if none is."""
    drained = sorted({h.beat.host for h in heard if h.beat.node in draining})
    if drained:
        return f"{' and '.join(drained)} {'is' if len(drained) == 1 else 'are'} being drained"
    ended = [h.beat for h in heard if h.beat.is_terminating]
    return f"worker {ended[0].rank} on {ended[0].host} is told to end" if ended else None


def is_working(heard: Sequence[Heard], size: int) -> bool:
    """Whether all workers have completed a step of this group."""
    beats = [h.beat for h in heard]
    return len(beats) == size and all(
        b.step is not None and b.began is not None and b.step > b.began for b in beats
    )


class GroupMonitor:
    """A thread that watches one group, while the block runs. `change` says why it was stopped."""

    def __init__(self, sink: Any, group: WorkerGroup, forming: Forming, emit: Emit) -> None:
        self._sink, self._group, self._forming, self._emit = sink, group, forming, emit
        self.change: Change | None = None
        self._working_since: float | None = None
        self._nodes: set[str] = set()
        self._watchdog = Watchdog()
        self._head_is_there, self._head_asked = True, time.monotonic()
        self._room, self._room_since = 0, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="group-monitor", daemon=True)

    def __enter__(self) -> GroupMonitor:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(ANSWER_SECONDS + POLL_SECONDS)

    def was_preempted(self) -> bool:
        """Whether the group ended because a machine was taken away after a notice."""
        noticed = self.change is not None and self.change.is_preemption
        return noticed or bool(self._nodes & draining_nodes().keys())

    def _watch(self) -> None:
        import ray

        with Places(self._group, gpus=int(self._group.gpus)) as places:
            while not self._ended.wait(POLL_SECONDS):
                if not self._head_answers():
                    continue
                try:
                    heard = ray.get(on_beats(self._sink.heard).remote(), timeout=ANSWER_SECONDS)
                    self._look(heard, draining_nodes(), places)
                except Exception:  # a head that doesn't answer now may answer at the next look
                    continue

    def _head_answers(self) -> bool:
        """Asks the head now and then, and says once if it doesn't answer. Ray's own calls would
        wait for it, and end this process after a minute."""
        now = time.monotonic()
        if self._head_is_there and now < self._head_asked + HEAD_EVERY_SECONDS:
            return True
        self._head_asked, was_there = now, self._head_is_there
        self._head_is_there = head_answers()
        if was_there and not self._head_is_there:
            text = "the head of the cluster doesn't answer; the training ends in a minute"
            self._emit({"kind": "notice", "text": f"{text} without it, and --resume continues it"})
        return self._head_is_there

    def _look(self, heard: Sequence[Heard], draining: Mapping[str, int], places: Places) -> None:
        self._nodes |= {h.beat.node for h in heard}
        if self._working_since is None and is_working(heard, self._forming.size):
            self._working_since = time.monotonic()
            self._report()
        for line in self._watchdog.look(heard):
            self._emit({"kind": "notice", "text": line})
        if self.change is not None:
            return
        if reason := taken_away(heard, draining):
            self._stop(Change(reason, is_preemption=True))
        elif room := self._growth(places):
            self._stop(Change(f"the cluster has room for {room} more"))

    def _growth(self, places: Places) -> int:
        """How many workers the group is to grow by now."""
        missing = self._group.largest - self._forming.size
        if not missing or self._working_since is None:
            return 0
        places.request(missing)
        now, room = time.monotonic(), places.ready()
        if room != self._room:
            self._room, self._room_since = room, now
        is_settled = room == missing or now - self._room_since >= SETTLE_SECONDS
        is_due = now - self._working_since >= GROW_AFTER_SECONDS
        return room if is_settled and is_due else 0

    def _stop(self, change: Change) -> None:
        self.change = change
        self._emit({"kind": "notice", "level": "info", "text": f"{change.reason}: saving"})
        on_beats(self._sink.ask_to_stop).remote()

    def _report(self) -> None:
        forming, seconds = self._forming, time.monotonic() - self._forming.since
        tags = {tag_names.GROUP_SIZE: str(forming.size)}
        if forming.before:
            self._emit(
                {
                    "kind": "group",
                    "workers": forming.size,
                    "before": forming.before,
                    "seconds": round(seconds, 1),
                    "reason": forming.reason,
                }
            )
            change = f"{forming.before} to {forming.size} workers in {seconds:.1f} s"
            tags[f"{tag_names.GROUP_PREFIX}{forming.number}"] = f"{change}: {forming.reason}"
        self._emit({"kind": "tags", "values": tags})
