"""A function mapped over many parts, as Ray tasks.

In: a function and its parts. Out: each part's result, as they finish. Must not know what the
function does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

from models.core.errors import TesseraError

TASK_RETRIES = 3


def map_tasks(
    work: Callable[[Any, Any], Any], shared: Any, parts: Iterable[Any], *, workers: int
) -> Generator[tuple[int, Any], None, None]:
    """Calls `work(shared, part)` for each part as tasks of one CPU, at most `workers` at a time.

    Gives (the part's number, what the call gave) as they come. `shared` goes to each node once. A
    task whose worker dies is tried again, up to `TASK_RETRIES` times. What the function raises is
    raised here, a TesseraError and an OSError as they were. Whoever closes it stops all tasks.
    """
    import ray
    from ray.exceptions import RayError

    task = ray.remote(
        num_cpus=1,
        max_retries=TASK_RETRIES,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )(work)
    for number, done in _run_tasks(task, shared, parts, workers):
        try:
            result = ray.get(done)
        except RayError as error:
            raise _explain_task(error, number) from error
        yield number, result


def map_local_tasks(
    work: Callable[[Any, Any], Any], shared: Any, parts: Iterable[Any], *, at_once: int
) -> Generator[tuple[int, Any], None, None]:
    """As `map_tasks`, but on this machine, and without a CPU: the calls start workers, which take
    them. A call whose process dies is tried once more; then an exception is what the part gave, and
    the others go on."""
    import ray
    from ray.exceptions import RayError

    task = ray.remote(num_cpus=0, max_retries=1, scheduling_strategy=_here())(work)
    for number, done in _run_tasks(task, shared, parts, at_once):
        try:
            result = ray.get(done)
        except RayError as error:
            result = _explain_task(error, number, attempts=2)
        yield number, result


def _run_tasks(
    task: Any, shared: Any, parts: Iterable[Any], at_once: int
) -> Generator[tuple[int, Any], None, None]:
    """(the part's number, its reference) as the tasks end."""
    import ray

    held = ray.put(shared)
    todo = enumerate(parts)
    running: dict[Any, int] = {}
    try:
        while True:
            while len(running) < at_once and (following := next(todo, None)):
                running[task.remote(held, following[1])] = following[0]
            if not running:
                return
            for done in ray.wait(list(running))[0]:
                yield running.pop(done), done
    finally:
        for task_left in running:
            ray.cancel(task_left, force=True)


def _explain_task(
    error: BaseException, number: int, attempts: int = TASK_RETRIES + 1
) -> BaseException:
    cause = getattr(error, "cause", None)
    if isinstance(cause, TesseraError | OSError):
        return cause
    lines = [x for x in str(cause or error).splitlines() if x.strip()] or [""]
    if cause is not None:
        return TesseraError(f"part {number} failed: {type(cause).__name__}: {lines[-1].strip()}")
    return TesseraError(
        f"the worker of part {number} died {attempts} times: {lines[0].strip()[:200]}",
        hint="perhaps it ran out of memory: use fewer --workers",
    )


def _here() -> Any:
    """Only on this node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(here, soft=False)
