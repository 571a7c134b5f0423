"""Two workers of Ray Train that are kept from one training to the next.

What a training costs on Ray is mostly the start of its processes: where many small ones are tested,
they take turns on the same workers.

    with gang.open_gang(2, storage) as call:
        call(worker.run, payload, emit)        as `cluster.train` does it
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.cluster import workers as cluster_workers
from pipelines.interfaces import Emit, World

Call = Callable[[cluster_workers.Work, dict[str, Any], Emit], dict[str, Any]]


class Desk:
    """An actor where the work lies: each rank takes every piece, rank 0 brings what came of it."""

    def __init__(self) -> None:
        self._pieces: list[Any] = []
        self._answers: dict[int, Any] = {}
        self._changed = asyncio.Condition()

    async def put(self, piece: Any) -> int:
        async with self._changed:
            self._pieces.append(piece)
            self._changed.notify_all()
            return len(self._pieces) - 1

    async def take(self, number: int) -> Any:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._pieces) > number)
            return self._pieces[number]

    async def bring(self, number: int, answer: Any) -> None:
        async with self._changed:
            self._answers.setdefault(number, answer)
            self._changed.notify_all()

    async def fetch(self, number: int) -> Any:
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._answers)
            return self._answers.pop(number)


class _Mute:
    """Of the workers themselves: each training that they are given brings an `Emit` of its own."""

    def __call__(self, event: Any) -> None:
        pass

    def flush(self) -> None:
        pass


def _serve(payload: dict[str, Any], world: World, emit: Emit) -> dict[str, Any]:
    """What each worker does until there is no more."""
    import ray

    desk, number = payload["desk"], 0
    while (piece := ray.get(desk.take.remote(number))) is not None:
        work, told, speak = piece
        try:
            answer = work(told, world, speak)
        except BaseException as error:
            ray.get(desk.bring.remote(number, error))
            raise
        if world.leads:
            ray.get(desk.bring.remote(number, answer))
        number += 1
    return {}


@contextmanager
def open_gang(workers: int, storage: Path) -> Iterator[Call]:
    import ray  # which reads its environment when it is imported

    # The tests' own modules aren't on the workers' path.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    desk = ray.remote(num_cpus=0, max_concurrency=100)(Desk).remote()
    ended: list[BaseException | None] = []

    def run() -> None:
        group = cluster_workers.WorkerGroup(workers, max_failures=0)
        try:
            cluster_workers.train(
                _serve, {"desk": desk}, group, name="gang", storage=storage, emit=_Mute()
            )
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, name="gang")
    thread.start()

    def call(work: cluster_workers.Work, payload: dict[str, Any], emit: Emit) -> dict[str, Any]:
        number = ray.get(desk.put.remote((work, payload, emit)))
        fetched = desk.fetch.remote(number)
        while not ray.wait([fetched], timeout=1.0)[0]:
            assert not ended, f"the workers ended: {ended}"
        answer = ray.get(fetched)
        if isinstance(answer, BaseException):
            raise answer
        return dict(answer)

    try:
        yield call
    finally:
        ray.get(desk.put.remote(None))
        thread.join()
        ray.kill(desk)
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
