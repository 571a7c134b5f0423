"""Ray Train workers that are kept from one training to the next.

Starting processes takes most of the time of a small training on Ray. Tests with many small
trainings run them one after the other on the same workers.

    persistent_workers.execute(2, worker.run, payload, emit)
                                                  does what `cluster.workers.run_group` does
    persistent_workers.end()
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipelines.cluster import workers as cluster_workers
from pipelines.cluster.worker_count import WorkerGroup
from pipelines.interfaces import Emit, NullEmit, World

Execute = Callable[[cluster_workers.Work[Any, Any], Any, Emit], Any]


class Queue:
    """An actor with the trainings to run: every rank takes each one, rank 0 puts its result."""

    def __init__(self) -> None:
        self._jobs: list[Any] = []
        self._results: dict[int, Any] = {}
        self._changed = asyncio.Condition()

    async def put(self, job: Any) -> int:
        async with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
            return len(self._jobs) - 1

    async def take(self, number: int) -> Any:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._jobs) > number)
            return self._jobs[number]

    async def put_result(self, number: int, result: Any) -> None:
        async with self._changed:
            self._results.setdefault(number, result)
            self._changed.notify_all()

    async def result(self, number: int) -> Any:
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._results)
            return self._results.pop(number)


def _serve(payload: dict[str, Any], world: World, emit: Emit) -> dict[str, Any]:
    """What each worker does: runs trainings until there are no more."""
    import ray

    queue, number = payload["queue"], 0
    while (job := ray.get(queue.take.remote(number))) is not None:
        work, job_payload, job_emit = job
        try:
            result = work(job_payload, world, job_emit)
        except BaseException as error:
            ray.get(queue.put_result.remote(number, error))
            raise
        if world.leads:
            ray.get(queue.put_result.remote(number, result))
        number += 1
    return {}


_kept = ExitStack()
_groups: dict[int, Execute] = {}


def execute(workers: int, work: cluster_workers.Work[Any, Any], payload: Any, emit: Emit) -> Any:
    """Runs a training on kept workers, which are started for the first one."""
    if workers not in _groups:
        scratch = Path(_kept.enter_context(tempfile.TemporaryDirectory()))
        _groups[workers] = _kept.enter_context(_open_workers(workers, scratch))
    return _groups[workers](work, payload, emit)


def end() -> None:
    """Ends all kept workers."""
    _groups.clear()
    _kept.close()


@contextmanager
def _open_workers(workers: int, storage: Path) -> Iterator[Execute]:
    """Starts the workers, and ends them afterwards. A training that fails ends them too."""
    import ray  # which reads its environment when it is imported

    # The tests' own modules aren't on the workers' path.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    queue = ray.remote(num_cpus=0, max_concurrency=100)(Queue).remote()
    ended: list[BaseException | None] = []

    def run() -> None:
        group = WorkerGroup(workers, max_failures=0)
        try:
            cluster_workers.run_group(
                _serve, {"queue": queue}, group, name="kept", storage=storage, emit=NullEmit()
            )
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, name="persistent-workers")
    thread.start()

    def execute(work: cluster_workers.Work[Any, Any], payload: Any, emit: Emit) -> Any:
        number = ray.get(queue.put.remote((work, payload, emit)))
        result = queue.result.remote(number)
        while not ray.wait([result], timeout=1.0)[0]:
            assert not ended, f"the workers ended: {ended}"
        value = ray.get(result)
        if isinstance(value, BaseException):
            raise value
        return value

    try:
        yield execute
    finally:
        ray.get(queue.put.remote(None))
        thread.join()
        ray.kill(queue)
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
