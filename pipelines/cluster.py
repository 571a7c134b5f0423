"""The Ray room: run one function as a group of data-parallel workers, or over many parts.

In: a function that a job hands over, and how many workers. Out: what rank 0's call gave, or what
each part's call gave. Must not know what the function does, nor MLflow or WebDataset.
"""

from __future__ import annotations

import random
import socket
import threading
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.core.errors import TesseraError
from pipelines.interfaces import Emit, World

LOOPBACK = ("127.0.0.1", "localhost")
TASK_RETRIES = 3
Work = Callable[[dict[str, Any], World, Emit], dict[str, Any]]


def settings(address: str | None = None) -> dict[str, str]:
    """Environment variables that must be set before Ray is imported; a user's own stay. `address`
    is the cluster's, None for one that is started here."""
    host = (address or "127.0.0.1").rpartition("//")[2].partition(":")[0]
    # Ray takes a loopback address for the machine's own on Linux, and then listens on all of them;
    # this switch, made for macOS and Windows, keeps it on loopback.
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if host in LOOPBACK else {}
    return {
        **loopback,
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Reports and deaths are noticed at the next poll; Ray's default is 2 s.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # How far Tune's own record of a search may lag behind, in seconds; its default is 10.
        "TUNE_GLOBAL_CHECKPOINT_S": "1",
    }


SHUTDOWN_SECONDS = 30.0
START_ATTEMPTS = 3


@dataclass(frozen=True)
class Group:
    """How many workers, and what each of them gets."""

    workers: int
    cpus: int = 1
    gpus: Literal["auto"] | int = "auto"
    max_failures: int = 3


def connect(address: str | None = None, *, cpus: int | None = None, verbose: bool = False) -> bool:
    """Joins the cluster at `address`, or starts one in this process. False if it had one already."""
    import ray

    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise TesseraError(
                f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}",
                mend="start one with `tessera up`, or unset RAY_ADDRESS to use an embedded one",
            ) from error
        return True
    for attempt in range(1, START_ATTEMPTS + 1):
        port = _free_port()
        # "local" never joins another cluster of this machine, and the address tells Ray Train's
        # clean-up which of several clusters is its own (facts about stale placement groups).
        here = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=True,  # else Ray goes on without one where the port is taken
                dashboard_port=port,
                runtime_env={"env_vars": here},
                **quiet,
            )
            break
        except Exception as error:  # Ray's own have no kind; one is that the port was just taken
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise TesseraError(
                    f"Ray didn't start here, {attempt} times: {lines[0][:200]}",
                    mend="--verbose shows what it says; with --workers 0 nothing of Ray is needed",
                ) from error
    return True


def _free_port() -> int:
    """A port of loopback that nobody has, and that the system doesn't give to who asks for any."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def disconnect() -> None:
    """Leaves the cluster, and ends it where it was started here. One whose head doesn't answer is
    left after `SHUTDOWN_SECONDS`: Ray itself would wait for ever. Its processes end with this one."""
    import ray

    leaving = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    leaving.start()
    leaving.join(SHUTDOWN_SECONDS)


def job_id() -> str:
    """Ray's id of this job."""
    import ray

    return str(ray.get_runtime_context().get_job_id())


def check(group: Group) -> int:
    """GPUs per worker, or a TesseraError where the cluster can never place the group."""
    import ray

    has = ray.cluster_resources()
    wanted_cpus = group.workers * group.cpus
    if wanted_cpus > has.get("CPU", 0):
        raise TesseraError(
            f"{group.workers} workers with {group.cpus} CPU each were asked for, "
            f"but the cluster has {has.get('CPU', 0):g} CPUs",
            mend=f"use --workers {int(has.get('CPU', 0)) // group.cpus or 1}, or a larger cluster",
        )
    gpus = has.get("GPU", 0)
    if group.gpus == "auto":
        return gpus_each(group)
    if group.workers * group.gpus > gpus:
        raise TesseraError(
            f"{group.workers} workers with {group.gpus} GPU each were asked for, "
            f"but the cluster has {gpus:g} GPUs",
            mend="use fewer workers, or --set workers.gpus=0 to train on the CPU",
        )
    return group.gpus


def gpus_each(group: Group) -> int:
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


def cpus() -> int:
    """Of the cluster."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def gpus() -> int:
    """Of the cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def spread(
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
    for number, done in _dealt(task, shared, parts, workers):
        try:
            result = ray.get(done)
        except RayError as error:
            raise _explain_task(error, number) from error
        yield number, result


def beside(
    work: Callable[[Any, Any], Any], shared: Any, parts: Iterable[Any], *, at_once: int
) -> Generator[tuple[int, Any], None, None]:
    """As `spread`, but on this machine, and without a CPU: the calls start workers, which take
    them. A call whose process dies is tried once more; then an exception is what the part gave, and
    the others go on."""
    import ray
    from ray.exceptions import RayError

    task = ray.remote(num_cpus=0, max_retries=1, scheduling_strategy=_here())(work)
    for number, done in _dealt(task, shared, parts, at_once):
        try:
            result = ray.get(done)
        except RayError as error:
            result = _explain_task(error, number, attempts=2)
        yield number, result


def _dealt(
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
        mend="perhaps it ran out of memory: use fewer --workers",
    )


def train(
    work: Work,
    payload: dict[str, Any],
    group: Group,
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
                        mend="see the traceback with --verbose; --resume goes on from the last "
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
    told: dict[str, Any], group: Group, gpus: int, *, name: str, storage: Path, verbose: bool
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


def _here() -> Any:
    """Only on this node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(here, soft=False)


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
