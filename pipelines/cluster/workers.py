"""A function run as a group of data-parallel workers, on Ray Train or in this process.

In: a function of (payload, `World`, `Emit`) and a group. Out: rank 0's result. Must not know what
the function does, nor MLflow or WebDataset.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.core.errors import TesseraError
from pipelines.cluster.connection import gpus
from pipelines.cluster.tasks import _here
from pipelines.interfaces import Emit, World

Work = Callable[[dict[str, Any], World, Emit], dict[str, Any]]


@dataclass(frozen=True)
class WorkerGroup:
    """How many workers, and what each of them gets."""

    workers: int
    cpus: int = 1
    gpus: Literal["auto"] | int = "auto"
    max_failures: int = 3


def check(group: WorkerGroup) -> int:
    """GPUs per worker, or a TesseraError where the cluster can never place the group."""
    import ray

    has = ray.cluster_resources()
    wanted_cpus = group.workers * group.cpus
    if wanted_cpus > has.get("CPU", 0):
        raise TesseraError(
            f"{group.workers} workers with {group.cpus} CPU each were asked for, "
            f"but the cluster has {has.get('CPU', 0):g} CPUs",
            hint=f"use --workers {int(has.get('CPU', 0)) // group.cpus or 1}, or a larger cluster",
        )
    gpus = has.get("GPU", 0)
    if group.gpus == "auto":
        return gpus_each(group)
    if group.workers * group.gpus > gpus:
        raise TesseraError(
            f"{group.workers} workers with {group.gpus} GPU each were asked for, "
            f"but the cluster has {gpus:g} GPUs",
            hint="use fewer workers, or --set workers.gpus=0 to train on the CPU",
        )
    return group.gpus


def gpus_each(group: WorkerGroup) -> int:
    """GPUs that a worker of the group gets."""
    if group.gpus == "auto":
        return int(0 < group.workers <= gpus())
    return group.gpus


def local(work: Work, payload: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Runs the function here, in a world of one, with nothing of Ray."""
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        return work(payload, World(0, 1, device), emit)
    finally:
        torch.cuda.empty_cache()  # this process may go on with something else, beside others


def train(
    work: Work,
    payload: dict[str, Any],
    group: WorkerGroup,
    *,
    name: str,
    storage: Path,
    emit: Emit,
    verbose: bool = False,
) -> dict[str, Any]:
    """Runs the function on the group's workers with Ray Train; gives rank 0's result.

    `emit` is sent to an actor beside this process, so that events survive the workers. When a
    worker dies the group is started again, up to `max_failures` times; the function finds its own
    way back. A TesseraError in a worker is not tried again, since it would come again.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError as Failed

    gpus = check(group)
    sink = _start_sink(emit)
    try:
        for attempt in range(group.max_failures + 1):
            told = {"work": work, "payload": payload, "sink": sink}
            trainer = _trainer(told, group, gpus, name=name, storage=storage, verbose=verbose)
            try:
                result = trainer.fit()
            except (Failed, RayActorError) as error:
                refused, line = _explain(error)
                if refused is not None:
                    raise refused from None
                if attempt == group.max_failures:
                    raise TesseraError(
                        f"the workers failed {attempt + 1} times, the last time with: {line}",
                        hint="see the traceback with --verbose; --resume goes on from the last "
                        "checkpoint",
                    ) from error
                emit({"kind": "restart", "attempt": attempt + 1, "reason": line})
                continue
            value: dict[str, Any] = result.return_value
            return value
        raise AssertionError("unreachable")
    finally:
        ray.kill(sink)


def _trainer(
    told: dict[str, Any], group: WorkerGroup, gpus: int, *, name: str, storage: Path, verbose: bool
) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    return TorchTrainer(
        _loop,
        train_loop_config=told,
        scaling_config=ScalingConfig(
            num_workers=group.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": group.cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            # A name of its own each time: the function resumes from its own checkpoints, never
            # from Ray's record of a run, which may be cut.
            name=f"{name}-{uuid.uuid4().hex[:6]}",
            storage_path=str(storage.absolute()),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
            logging_config=LoggingConfig(log_level="INFO" if verbose else "ERROR"),
            worker_runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
        ),
    )


def _explain(error: BaseException) -> tuple[TesseraError | None, str]:
    """The user's own mistake among the workers' failures, if one is; and a line on the failure."""
    failures = dict(getattr(error, "worker_failures", {}))
    for failure in failures.values():
        if isinstance(failure, TesseraError):
            return failure, str(failure)
        cause = getattr(failure, "cause", None)
        if isinstance(cause, TesseraError):
            return cause, str(cause)
    if failures:
        rank, first = min(failures.items())
        lines = [x for x in str(first).splitlines() if x.strip()] or [type(first).__name__]
        return None, f"worker {rank}: {type(first).__name__}: {lines[-1].strip()[:200]}"
    lines = [x for x in str(error).splitlines() if x.strip()] or [type(error).__name__]
    return None, f"{type(error).__name__}: {lines[-1].strip()[:200]}"


def _start_sink(emit: Emit) -> Any:
    """An actor on this node that passes events on to `emit`."""
    import ray

    return ray.remote(num_cpus=0)(_Sink).options(scheduling_strategy=_here()).remote(emit)


class _Sink:
    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def write(self, event: Mapping[str, Any]) -> None:
        self._emit(event)

    def flush(self) -> None:
        self._emit.flush()


class _SinkEmit:
    """A worker's `Emit`: calls don't wait; `flush` waits until all of them are on disk."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink

    def __call__(self, event: Mapping[str, Any]) -> None:
        self._sink.write.remote(dict(event))

    def flush(self) -> None:
        import ray

        ray.get(self._sink.flush.remote(), timeout=60)  # an actor's calls run in order


def _loop(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs in each worker."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device = str(ray.train.torch.get_device())
    world = World(context.get_world_rank(), context.get_world_size(), device)
    result: dict[str, Any] = config["work"](config["payload"], world, _SinkEmit(config["sink"]))
    return result
