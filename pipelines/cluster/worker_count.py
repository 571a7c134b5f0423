"""How many workers a group has: what fits on a cluster, and waiting until enough of them do.

In: a `WorkerGroup` and the resources of a cluster. Out: a number of workers and their GPUs, or a
TesseraError with the numbers. Must not know what the workers do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from models.core.errors import TesseraError
from pipelines.cluster.connection import Resources, cluster_resources

WAIT_SECONDS = 600.0
"""How long a group waits for machines of a cluster that was joined, unless it says otherwise."""
POLL_SECONDS = 0.5
MESSAGE_SECONDS = 30.0
BUSY_SECONDS = 240.0
"""How long a group waits at least for places that other jobs hold."""
SETTLE_SECONDS = 3.0
"""How long an elastic group waits for one more worker once it has enough of them."""


@dataclass(frozen=True)
class WorkerGroup:
    """How many workers there are, and the resources of each.

    Args:
        workers: Number of workers, the smallest one if `max_workers` is given. 0 runs the function
            in the calling process, without Ray.
        cpus: CPUs per worker.
        gpus: GPUs per worker; "auto" is 1 if the cluster has one for each worker, otherwise 0.
        max_failures: How often in a row the group is started again after a worker died, without a
            new checkpoint in between.
        max_workers: Largest number of workers of an elastic group; None for a fixed number.
        wait_seconds: How long to wait for machines if the group doesn't fit on the cluster.
    """

    workers: int
    cpus: int = 1
    gpus: Literal["auto"] | int = "auto"
    max_failures: int = 3
    max_workers: int | None = None
    wait_seconds: float | None = None

    @property
    def largest(self) -> int:
        return self.max_workers or self.workers

    @property
    def is_elastic(self) -> bool:
        return self.largest > self.workers

    def __str__(self) -> str:
        count = f"{self.workers} to {self.largest}" if self.is_elastic else f"{self.workers}"
        return f"{count} worker{'s' * (self.largest != 1)}"


def check_fits(group: WorkerGroup, resources: Resources) -> int:
    """GPUs per worker. Raises TesseraError if the group can never be placed on `resources`."""
    if group.workers * group.cpus > resources.cpus:
        fitting = int(resources.cpus) // group.cpus
        fewer = f"use --workers {fitting}, or a larger cluster" if fitting else ""
        raise TesseraError(
            f"{group.workers} workers with {group.cpus} CPU each don't fit: "
            f"there are {resources.cpus:g} CPUs",
            hint=fewer or "add machines to the cluster; --wait SECONDS waits for them",
        )
    gpus = gpus_per_worker(group, resources)
    if group.workers * gpus > resources.gpus:
        raise TesseraError(
            f"{group.workers} workers with {gpus} GPU each don't fit: "
            f"there are {resources.gpus:g} GPUs",
            hint="use fewer workers, or --set workers.gpus=0 to train on the CPU",
        )
    return gpus


def gpus_per_worker(group: WorkerGroup, resources: Resources) -> int:
    """GPUs that each worker of the group gets."""
    if group.gpus == "auto":
        return int(0 < group.workers <= resources.gpus)
    return group.gpus


def gpu_notice(group: WorkerGroup, resources: Resources) -> str | None:
    """A line about GPUs of the cluster that `gpus="auto"` leaves unused; None if there are none."""
    found = int(resources.gpus)
    if group.gpus != "auto" or not found or not group.workers:
        return None
    gpus = f"{found} GPU{'s' * (found > 1)}"
    if found < group.workers:
        uses = "uses the GPU" if found == 1 else "uses the GPUs"
        return f"{gpus} for {group}: training on CPUs; --workers {found} {uses}"
    if found < group.largest:
        return f"{gpus} for {group}: starting with {found}, and growing with the cluster"
    if found > group.largest:
        return f"using {group.largest} of {gpus}; --workers {found} uses all"
    return None


def wait_until_fits(group: WorkerGroup, say: Callable[[str], None]) -> int:
    """Waits until the cluster has the resources of the (smallest) group, in use or not. Returns
    GPUs per worker. Meanwhile the cluster's autoscaler, if there is one, is asked for them.

    `say` gets a line at once, and another one each `MESSAGE_SECONDS`. Raises TesseraError, as
    `check_fits`, after `group.wait_seconds`.
    """
    waited, reminder = _Clock(group.wait_seconds or 0.0), _Reminder(say)
    with Places(group, gpus=0 if group.gpus == "auto" else group.gpus) as places:
        while True:
            resources = cluster_resources()
            try:
                gpus = check_fits(group, resources)
            except TesseraError as error:
                if waited.is_over():
                    raise _after_wait(error, group) from None
                places.request(group.workers)
                reminder.say(f"{_waiting(group)}; the cluster has {_amounts(group, resources)} now")
                time.sleep(POLL_SECONDS)
                continue
            if notice := gpu_notice(group, resources):
                say(notice)
            return gpus


def count_places(group: WorkerGroup, say: Callable[[str], None]) -> int:
    """How many workers a group can have now: what is free on the cluster, at most `group.largest`.
    Waits until it is at least `group.workers`, and then `SETTLE_SECONDS` for more. `group.gpus`
    must be a number.

    Raises TesseraError after `group.wait_seconds`, or `BUSY_SECONDS` if that is longer.
    """
    waited, reminder = _Clock(max(group.wait_seconds or 0.0, BUSY_SECONDS)), _Reminder(say)
    ready, settled = 0, _Clock(SETTLE_SECONDS)
    with Places(group, gpus=int(group.gpus)) as places:
        places.request(group.largest)
        while True:
            before, ready = ready, places.ready()
            if ready != before:
                settled = _Clock(SETTLE_SECONDS)
            if ready == group.largest or (ready >= group.workers and settled.is_over()):
                return ready
            if ready < group.workers and waited.is_over():
                raise TesseraError(
                    f"{group} don't fit: the cluster has free places for {ready}",
                    hint="add machines, or wait until other jobs have ended",
                )
            if ready < group.workers and settled.is_over():
                reminder.say(f"{_waiting(group)}; the cluster has free places for {ready} now")
            time.sleep(POLL_SECONDS)


def _after_wait(error: TesseraError, group: WorkerGroup) -> TesseraError:
    if not group.wait_seconds:
        return error
    return TesseraError(f"{error.message} after {group.wait_seconds:g} s", hint=error.hint)


def _waiting(group: WorkerGroup) -> str:
    gpus = "" if group.gpus in ("auto", 0) else f" and {group.gpus} GPU"
    workers = f"{group.workers} worker{'s' * (group.workers != 1)}"
    return f"waiting for {workers} with {group.cpus} CPU{gpus} each"


def _amounts(group: WorkerGroup, resources: Resources) -> str:
    gpus = "" if group.gpus in ("auto", 0) else f" and {resources.gpus:g} GPUs"
    return f"{resources.cpus:g} CPUs{gpus}"


class _Clock:
    """Whether so many seconds are over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def is_over(self) -> bool:
        return time.monotonic() >= self._end


class _Reminder:
    """Passes on the first message, and then one each `MESSAGE_SECONDS`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._said_at = say, float("-inf")

    def say(self, text: str) -> None:
        if time.monotonic() - self._said_at >= MESSAGE_SECONDS:
            self._said_at = time.monotonic()
            self._say(text)


class Places:
    """Places for workers that are reserved on the cluster, one placement group each. A place that
    is not there yet is demand for the cluster's autoscaler. Released at the end of the block."""

    def __init__(self, group: WorkerGroup, *, gpus: int) -> None:
        self._bundle = {"CPU": group.cpus, **({"GPU": gpus} if gpus else {})}
        self._groups: list[Any] = []

    def __enter__(self) -> Places:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def request(self, count: int) -> None:
        """Asks for places until there are `count`, of which some may not be ready yet."""
        from ray.util.placement_group import placement_group

        while len(self._groups) < count:
            self._groups.append(placement_group([self._bundle]))

    def ready(self) -> int:
        """How many of the places are reserved now."""
        from ray.util.placement_group import placement_group_table

        return sum(placement_group_table(g)["state"] == "CREATED" for g in self._groups)

    def release(self) -> None:
        """Gives all places back."""
        from ray.util.placement_group import remove_placement_group

        for group in self._groups:
            remove_placement_group(group)
        self._groups.clear()
