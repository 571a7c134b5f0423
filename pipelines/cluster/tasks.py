"""A function mapped over many parts, as Ray tasks.

In: a function, what all calls share, and the parts. Out: each part's result, in the order in which
the calls finish. Must not know what the function does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from models.core.errors import TesseraError

TASK_RETRIES = 3

Shared = TypeVar("Shared")
Part = TypeVar("Part")
Result = TypeVar("Result")


def map_tasks(
    work: Callable[[Shared, Part], Result], shared: Shared, parts: Iterable[Part], *, workers: int
) -> Generator[tuple[int, Result], None, None]:
    """Calls `work(shared, part)` for each part, as tasks of one CPU, at most `workers` at a time.

    Yields (index of the part, its result) as the calls finish. `shared` is sent to each node once.
    A task whose worker dies is tried again, up to `TASK_RETRIES` times. Closing the generator
    cancels all tasks.

    Raises:
        TesseraError, OSError: As the function raised them; any other exception of the function
            becomes a TesseraError that names it.
    """
    import ray
    from ray.exceptions import RayError

    task = ray.remote(
        num_cpus=1,
        max_retries=TASK_RETRIES,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )(work)
    for index, finished in _run_tasks(task, shared, parts, workers):
        try:
            result: Result = ray.get(finished)
        except RayError as error:
            raise _explain_task(error, index) from error
        yield index, result


def map_local_tasks(
    work: Callable[[Shared, Part], Result], shared: Shared, parts: Iterable[Part], *, at_once: int
) -> Generator[tuple[int, Result | BaseException], None, None]:
    """As `map_tasks`, but on this node and without a CPU, which is left to workers that the calls
    start. A call whose process dies is tried once more. A part that fails yields its exception,
    and the others continue."""
    import ray
    from ray.exceptions import RayError

    task = ray.remote(num_cpus=0, max_retries=1, scheduling_strategy=on_this_node())(work)
    for index, finished in _run_tasks(task, shared, parts, at_once):
        result: Result | BaseException
        try:
            result = ray.get(finished)
        except RayError as error:
            result = _explain_task(error, index, attempts=2)
        yield index, result


def _run_tasks(
    task: Any, shared: Any, parts: Iterable[Any], at_once: int
) -> Generator[tuple[int, Any], None, None]:
    """Yields (index of the part, reference to its result) as the tasks finish."""
    import ray

    shared_ref = ray.put(shared)
    remaining = enumerate(parts)
    running: dict[Any, int] = {}
    try:
        while True:
            while len(running) < at_once and (following := next(remaining, None)):
                index, part = following
                running[task.remote(shared_ref, part)] = index
            if not running:
                return
            for finished in ray.wait(list(running))[0]:
                yield running.pop(finished), finished
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)


def _explain_task(
    error: BaseException, index: int, attempts: int = TASK_RETRIES + 1
) -> BaseException:
    cause = getattr(error, "cause", None)
    if isinstance(cause, TesseraError | OSError):
        return cause
    lines = [x for x in str(cause or error).splitlines() if x.strip()] or [""]
    if cause is not None:
        return TesseraError(f"part {index} failed: {type(cause).__name__}: {lines[-1].strip()}")
    return TesseraError(
        f"the worker of part {index} died {attempts} times: {lines[0].strip()[:200]}",
        hint="perhaps it ran out of memory: use fewer --workers",
    )


def on_this_node() -> Any:
    """A scheduling strategy that allows only the node of the calling process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
