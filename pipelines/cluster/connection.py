"""The Ray room: run one function as a group of data-parallel workers, or over many parts.

In: a function that a job hands over, and how many workers. Out: what rank 0's call gave, or what
each part's call gave. Must not know what the function does, nor MLflow or WebDataset.
"""

from __future__ import annotations

import random
import socket
import threading
from contextlib import closing

from models.core.errors import TesseraError

LOOPBACK = ("127.0.0.1", "localhost")


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
                hint="start one with `tessera up`, or unset RAY_ADDRESS to use an embedded one",
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
                    hint="--verbose shows what it says; with --workers 0 nothing of Ray is needed",
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


def cpus() -> int:
    """Of the cluster."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def gpus() -> int:
    """Of the cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))
