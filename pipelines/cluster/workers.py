"""A function run by a group of data-parallel workers, on Ray Train or in this process.

In: a function of (payload, `World`, `Emit`), its payload, and a `WorkerGroup`. Out: rank 0's
result. Must not know what the function does, nor MLflow or WebDataset.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypedDict, TypeVar

from models.core.errors import TesseraError
from pipelines.cluster.tasks import on_this_node
from pipelines.cluster.worker_count import WorkerGroup, wait_until_fits
from pipelines.interfaces import Emit, World

Payload = TypeVar("Payload")
Result = TypeVar("Result")
Work: TypeAlias = Callable[[Payload, World, Emit], Result]
"""What every worker runs. Payload and result are pickled; the result of rank 0 is kept."""

FLUSH_SECONDS = 600.0
"""Longer than a run's storage may be down: with one, a flush waits until it has the events."""


def run_local(work: Work[Payload, Result], payload: Payload, emit: Emit) -> Result:
    """Runs the function in this process, in a world of one, without Ray."""
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        return work(payload, World(0, 1, device), emit)
    finally:
        # torch keeps freed GPU memory for this process; others may train on the same GPU.
        torch.cuda.empty_cache()


def run_group(
    work: Work[Payload, Result],
    payload: Payload,
    group: WorkerGroup,
    *,
    name: str,
    storage: Path,
    emit: Emit,
    verbose: bool = False,
) -> Result:
    """Runs the function on the group's workers with Ray Train; returns rank 0's result.

    Events go through an actor beside this process, so they survive the workers. When a worker
    dies, the whole group is started again, up to `max_failures` times without a new checkpoint in
    between; the function itself finds its newest checkpoint. A TesseraError in a worker is final,
    because it would occur again. Machines that are missing are waited for, `wait_seconds` long.

    Raises:
        TesseraError: The worker's own one; or the group doesn't fit, or failed too often.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError

    def say(text: str) -> None:
        emit({"kind": "notice", "text": text})

    group = replace(group, gpus=wait_until_fits(group, say))
    event_sink = _start_event_sink(emit)
    config: _LoopConfig[Payload, Result] = {"work": work, "payload": payload, "sink": event_sink}
    failures = FailureCount(group.max_failures)
    try:
        while True:
            trainer = _make_trainer(config, group, name=name, storage=storage, verbose=verbose)
            try:
                result: Result = trainer.fit().return_value
                return result
            except (TrainingFailedError, RayActorError) as error:
                refusal, line = _explain(error)
                if refusal is not None:
                    raise refusal from None
                failures.add(ray.get(event_sink.committed.remote()))
                if failures.are_too_many:
                    raise TesseraError(
                        f"the workers failed {failures}, the last time with: {line}",
                        hint="--verbose shows the traceback; --resume continues from the last "
                        "checkpoint",
                    ) from error
                emit({"kind": "restart", "attempt": failures.in_all, "reason": line})
            wait_until_fits(group, say)
    finally:
        ray.kill(event_sink)


class FailureCount:
    """Counts failures of a group since its last progress.

    A long training on machines that may be taken away fails often, and still ends: only failures
    without a new checkpoint in between say that it can't go on.
    """

    def __init__(self, allowed: int) -> None:
        self._allowed = allowed
        self._committed = 0
        self.in_a_row = 0
        self.in_all = 0

    def add(self, committed: int) -> None:
        """Counts a failure, at a time when so many checkpoints are committed."""
        self.in_a_row = 1 if committed > self._committed else self.in_a_row + 1
        self.in_all += 1
        self._committed = committed

    @property
    def are_too_many(self) -> bool:
        return self.in_a_row > self._allowed

    def __str__(self) -> str:
        times = "once" if self.in_a_row == 1 else f"{self.in_a_row} times"
        return f"{times} since the last checkpoint" if self._committed else times


class _LoopConfig(TypedDict, Generic[Payload, Result]):
    """`train_loop_config` of Ray Train, which must be a dict."""

    work: Work[Payload, Result]
    payload: Payload
    sink: Any


def _make_trainer(
    config: _LoopConfig[Payload, Result],
    group: WorkerGroup,
    *,
    name: str,
    storage: Path,
    verbose: bool,
) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    gpus = int(group.gpus)
    return TorchTrainer(
        _loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=group.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": group.cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            # A new name for each attempt: the function resumes from its own checkpoints, never
            # from Ray's record of a run, which may be truncated after a crash.
            name=f"{name}-{uuid.uuid4().hex[:6]}",
            storage_path=str(storage.absolute()),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
            logging_config=LoggingConfig(log_level="INFO" if verbose else "ERROR"),
            worker_runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
        ),
    )


def _explain(error: BaseException) -> tuple[TesseraError | None, str]:
    """The TesseraError among the workers' failures, if there is one; and a line on the failure."""
    failures = dict(getattr(error, "worker_failures", {}))
    for failure in failures.values():
        for cause in (failure, getattr(failure, "cause", None)):
            if isinstance(cause, TesseraError):
                return cause, str(cause)
    if not failures:
        return None, f"{type(error).__name__}: {_last_line(error)}"
    rank, first = min(failures.items())
    return None, f"worker {rank}: {type(first).__name__}: {_last_line(first)}"


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].strip()[:200]


def _start_event_sink(emit: Emit) -> Any:
    """An actor on this node that passes the workers' events on to `emit`."""
    import ray

    return (
        ray.remote(num_cpus=0)(_EventSink).options(scheduling_strategy=on_this_node()).remote(emit)
    )


class _EventSink:
    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._committed = 0

    def write(self, event: Mapping[str, Any]) -> None:
        self._committed += event["kind"] == "checkpoint"
        self._emit(event)

    def committed(self) -> int:
        """How many checkpoints were committed so far."""
        return self._committed

    def flush(self) -> None:
        self._emit.flush()


class _SinkEmit:
    """A worker's `Emit`. A call returns at once; `flush` waits until all events are on disk."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink

    def __call__(self, event: Mapping[str, Any]) -> None:
        self._sink.write.remote(dict(event))

    def flush(self) -> None:
        import ray

        # An actor runs the calls of one caller in order, so this one comes after all writes.
        ray.get(self._sink.flush.remote(), timeout=FLUSH_SECONDS)


def _loop(config: _LoopConfig[Payload, Result]) -> Result:
    """What Ray Train runs in each worker."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device = str(ray.train.torch.get_device())
    world = World(context.get_world_rank(), context.get_world_size(), device)
    return config["work"](config["payload"], world, _SinkEmit(config["sink"]))
