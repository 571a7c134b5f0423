"""A function run by a group of data-parallel workers, on Ray Train or in this process.

In: a function of (payload, `World`, `Emit`), its payload, and a `WorkerGroup`. Out: rank 0's
result. Must not know what the function does, nor MLflow or WebDataset.
"""

from __future__ import annotations

import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar

from models.core.errors import TesseraError
from pipelines.cluster.event_sink import SinkEmit, on_beats, start_control, start_event_sink
from pipelines.cluster.group_monitor import Forming, GroupMonitor
from pipelines.cluster.group_start import make_trainer
from pipelines.cluster.network import GroupNotFormedError
from pipelines.cluster.worker_count import WorkerGroup, count_places, wait_until_fits
from pipelines.interfaces import Emit, GroupStopped, World

Payload = TypeVar("Payload")
Result = TypeVar("Result")
Work: TypeAlias = Callable[[Payload, World, Emit], Result]
"""What every worker runs. Payload and result are pickled; the result of rank 0 is kept."""


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
    dies, the whole group is formed again, up to `max_failures` times without a new checkpoint in
    between; the function itself finds its newest checkpoint. A TesseraError in a worker is final,
    because it would occur again. Machines that are missing are waited for, `wait_seconds` long.

    The group is also formed again when a machine is about to be taken away, which is no failure,
    and an elastic one when it can grow. The workers then commit at their next step and stop.

    Raises:
        TesseraError: The worker's own one; or the group doesn't fit, or failed too often.
    """
    import ray

    def say(text: str) -> None:
        emit({"kind": "notice", "text": text})

    group = replace(group, gpus=wait_until_fits(group, say))
    sink = start_event_sink(emit)
    packed = ray.cloudpickle.dumps((work, payload))
    failures = FailureCount(group.max_failures)
    forming = Forming(size=0)
    try:
        while True:
            forming = replace(forming, size=_size(group, say))
            attempt = f"{ascii_name(name)}-{uuid.uuid4().hex[:6]}"
            ray.get(on_beats(sink.begin).remote(attempt))
            config: _LoopConfig = {"work": packed, "sink": sink, "attempt": attempt}
            trainer = _make_trainer(config, group, forming.size, storage=storage, verbose=verbose)
            with GroupMonitor(sink, group, forming, emit) as monitor:
                end = _fit(trainer)
            if isinstance(end, _Finished):
                result: Result = end.result
                return result
            reason = monitor.change.reason if monitor.change else "the workers stopped"
            if isinstance(end, Failed):
                if not (end.is_preemption or monitor.was_preempted()):
                    failures.add(ray.get(on_beats(sink.committed).remote()), end)
                reason = end.reason
                emit({"kind": "restart", "attempt": forming.number + 1, "reason": reason})
            forming = Forming(0, forming.number + 1, forming.size, time.monotonic(), reason)
            wait_until_fits(group, say)
    finally:
        ray.kill(sink)


def ascii_name(name: str) -> str:
    """A name like this one for Ray, which puts it into headers of requests: ASCII and short."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:80]


def _size(group: WorkerGroup, say: Callable[[str], None]) -> int:
    """How many workers the next group has. A fixed group on a Ray of our own doesn't wait for
    places here: Ray Train does."""
    return count_places(group, say) if group.is_elastic or group.wait_seconds else group.workers


@dataclass(frozen=True)
class _Finished:
    result: Any


@dataclass(frozen=True)
class _Stopped:
    """The workers have committed and stopped."""


@dataclass(frozen=True)
class Failed:
    """The workers, or one of them, died or raised an error."""

    reason: str
    error: BaseException
    is_preemption: bool = False


@contextmanager
def _own_interrupt() -> Iterator[None]:
    """Puts the handler of SIGINT back. Ray Train sets one and keeps it: later a Ctrl-C in this
    process would call a controller that is gone, and start a cluster for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _fit(trainer: Any) -> _Finished | _Stopped | Failed:
    """Runs one group to its end. Raises a worker's TesseraError."""
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError

    try:
        with _own_interrupt():
            result = trainer.fit().return_value
    except (TrainingFailedError, RayActorError) as error:
        refusal, line = _explain(error)
        if refusal is not None:
            raise refusal from None
        causes = getattr(error, "worker_failures", {}).values()
        return Failed(line, error, any(getattr(c, "preempted", False) for c in causes))
    return result if isinstance(result, _Stopped) else _Finished(result)


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

    def add(self, committed: int, failure: Failed) -> None:
        """Counts a failure, at a time when so many checkpoints are committed. Raises TesseraError
        if it is one too many."""
        self.in_a_row = 1 if committed > self._committed else self.in_a_row + 1
        self.in_all += 1
        self._committed = committed
        if self.in_a_row > 1 and failure.reason.endswith(OUT_OF_MEMORY):
            raise TesseraError(
                f"the workers failed {self}, the last time with: {failure.reason}",
                hint="use a smaller --batch-size, fewer data.loader_workers, or larger machines; "
                "--resume continues from the last checkpoint",
            ) from failure.error
        if self.in_a_row > self._allowed:
            raise TesseraError(
                f"the workers failed {self}, the last time with: {failure.reason}",
                hint="--verbose shows the traceback; --resume continues from the last checkpoint",
            ) from failure.error

    def __str__(self) -> str:
        times = "once" if self.in_a_row == 1 else f"{self.in_a_row} times"
        return f"{times} since the last checkpoint" if self._committed else times


class _LoopConfig(TypedDict):
    """`train_loop_config` of Ray Train, which must be a dict. `work` is the function with its
    payload, pickled: Ray Train's controller unpickles the rest, and would load torch for it."""

    work: bytes
    sink: Any
    attempt: str


def _make_trainer(
    config: _LoopConfig,
    group: WorkerGroup,
    size: int,
    *,
    storage: Path,
    verbose: bool,
) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    gpus = int(group.gpus)
    return make_trainer(
        _loop,
        dict(config),
        scaling_config=ScalingConfig(
            num_workers=size,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": group.cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            # A new name for each attempt: the function resumes from its own checkpoints, never
            # from Ray's record of a run, which may be truncated after a crash.
            name=config["attempt"],
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
        failed: BaseException = getattr(error, "controller_failure", error)
        if isinstance(failed, GroupNotFormedError):
            return None, str(failed)
        return None, f"{type(failed).__name__}: {_last_line(failed)}"
    # When a worker dies, those that it was connected to fail too, and may be noticed before it.
    lost = {r: f for r, f in failures.items() if "gloo/transport" not in str(f)}
    if not lost:
        return None, f"worker {min(failures)} lost its connection to another worker"
    rank, first = min(lost.items())
    for text, line in _DEATHS.items():
        if text in str(first):
            return None, f"worker {rank}: {line}"
    return None, f"worker {rank}: {type(first).__name__}: {_last_line(first)}"


OUT_OF_MEMORY = "its machine ran out of memory"
"""After two failures with it and no checkpoint in between, a third attempt would end as well."""
_DEATHS = {
    "running low on memory": OUT_OF_MEMORY,
    "node has died": "its machine is gone",
    "worker process has died": "its process died",
    "temporarily unavailable": "it can't be reached any more",
    "HEALTH_CHECK_TIMEOUT": "it has not answered for three minutes",
}
"""What Ray says, in a paragraph, when it loses an actor, and the same in a few words."""


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].strip()[:200]


def _loop(config: _LoopConfig) -> Any:
    """What Ray Train runs in each worker."""
    import ray
    import ray.train.torch

    work, payload = ray.cloudpickle.loads(config["work"])
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    control = start_control(config["sink"], config["attempt"], rank, size)
    world = World(rank, size, str(ray.train.torch.get_device()), control)
    try:
        return work(payload, world, SinkEmit(config["sink"]))
    except GroupStopped:
        return _Stopped()
    finally:
        control.close()
