"""The line between the workers of a group and their driver: events and beats, through an actor.

In: an `Emit` on the driver's machine. Out: an actor beside the driver, which outlives the workers,
and for each worker an `Emit` and a `WorkerControl` that use it. Must not know what the workers do.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from pipelines.cluster.group_control import Beat, GroupRecord, Heard, Orders, WorkerControl
from pipelines.cluster.tasks import on_this_node
from pipelines.interfaces import Emit

FLUSH_SECONDS = 600.0
"""Longer than a run's storage may be down: with one, a flush waits until it has the events."""
ANSWER_SECONDS = 60.0
BEATS = "beats"


class EventSink:
    """The actor's class. Its last five methods run in a thread of their own (`on_beats`), because
    `flush` may take minutes."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._committed = 0
        self._group = GroupRecord()

    def write(self, event: Mapping[str, Any]) -> None:
        self._committed += event["kind"] == "checkpoint"
        self._emit(event)

    def flush(self) -> None:
        self._emit.flush()

    def committed(self) -> int:
        """How many checkpoints were committed so far."""
        return self._committed

    def begin(self, attempt: str) -> None:
        """A new group is formed, of this name."""
        self._group.begin(attempt)

    def ask_to_stop(self) -> None:
        self._group.ask_to_stop()

    def hear(self, beat: Beat) -> Orders:
        return self._group.hear(beat)

    def heard(self) -> list[Heard]:
        return self._group.heard()


def start_event_sink(emit: Emit) -> Any:
    """The actor, on this node, that passes the workers' events on to `emit`."""
    import ray

    actor = ray.remote(num_cpus=0, concurrency_groups={BEATS: 1})(EventSink)
    return actor.options(scheduling_strategy=on_this_node()).remote(emit)


def on_beats(method: Any) -> Any:
    """A method of the actor that is called in the thread of beats: `on_beats(sink.heard).remote()`.
    The calls of that thread are not ordered with those of the other one."""
    return method.options(concurrency_group=BEATS)


class SinkEmit:
    """A worker's `Emit`. A call returns at once; `flush` waits until all events are on disk."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink

    def __call__(self, event: Mapping[str, Any]) -> None:
        self._sink.write.remote(dict(event))

    def flush(self) -> None:
        import ray

        # An actor runs the calls of one caller in order, so this one comes after all writes.
        ray.get(self._sink.flush.remote(), timeout=FLUSH_SECONDS)


def start_control(sink: Any, attempt: str, rank: int, size: int) -> WorkerControl:
    """The control of the worker that this process is."""
    import ray

    own = Beat(
        attempt=attempt,
        rank=rank,
        size=size,
        node=ray.get_runtime_context().get_node_id(),
        host=socket.gethostname(),
        pid=os.getpid(),
    )

    def send(beat: Beat) -> Orders:
        orders: Orders = ray.get(on_beats(sink.hear).remote(beat), timeout=ANSWER_SECONDS)
        return orders

    return WorkerControl(send, own).start()
