"""The connection to a Ray cluster: joining one, starting one here, and what it has.

In: an address, or none. Out: a process that is connected to Ray, and the cluster's `Resources`.
Must not know what runs on the cluster, nor MLflow or WebDataset.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import threading
from contextlib import closing
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from models.core.errors import TesseraError
from pipelines.cluster import session

LOOPBACK = ("127.0.0.1", "localhost")
SHUTDOWN_SECONDS = 30.0
HEAD_SECONDS = 3.0
GREETING_SECONDS = 5.0
START_ATTEMPTS = 3
_FRAME_BYTES, _SETTINGS_FRAME = 9, 4
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _SETTINGS_FRAME, *[0] * 5])
"""With these a client begins, and a server answers with a frame of settings (RFC 9113, 3.4)."""


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs of a whole cluster, in use or not."""

    cpus: float
    gpus: float = 0


def settings(address: str | None = None) -> dict[str, str]:
    """Environment variables that must be set before Ray is imported, unless the user set them.
    `address` is the cluster's, None for one that is started here."""
    host = (address or "127.0.0.1").rpartition("//")[2].partition(":")[0]
    # On Linux Ray replaces a loopback address by the machine's own one and listens on all
    # interfaces. This switch, meant for macOS and Windows, keeps it on loopback.
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if host in LOOPBACK else {}
    return {
        **loopback,
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        # A worker's result or death is noticed at the next poll; Ray's default is every 2 s.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # Seconds after which a worker that doesn't answer, as one that was stopped, is given up.
        # Ray's default is 600.
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "180",
        # Drained nodes are noticed by `group_monitor`, without another process.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # Seconds by which Tune's own record of a search may lag behind; Tune's default is 10.
        "TUNE_GLOBAL_CHECKPOINT_S": "1",
    }


def connect(address: str | None = None, *, cpus: int | None = None, verbose: bool = False) -> bool:
    """Joins the cluster at `address`, or starts one in this process, with `cpus` or those of the
    machine. Returns False if this process was connected already.

    Raises TesseraError if the cluster doesn't answer or can't be started.
    """
    import ray

    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    session.protect_token()
    if address:
        _check_answers(address)
        try:
            ray.init(address=address, runtime_env=_runtime_env() or None, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise TesseraError(
                f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}",
                hint="start one with `tessera up`, or unset RAY_ADDRESS to use an embedded one",
            ) from error
        return True
    for attempt in range(1, START_ATTEMPTS + 1):
        folder = session.make_private_folder()
        try:
            _start(cpus, quiet, folder)
            _private_folders.append(folder)
            break
        except Exception as error:  # Ray raises no specific type, e.g. if the port was just taken
            ray.shutdown()
            session.forget(folder)
            if attempt == START_ATTEMPTS:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise TesseraError(
                    f"Ray could not be started here in {attempt} attempts: {lines[0][:200]}",
                    hint="--verbose shows Ray's output; --workers 0 trains without Ray",
                ) from error
    return True


def _check_answers(address: str) -> None:
    """Raises TesseraError within seconds if no head of Ray listens at the address. Ray itself
    tries for many minutes."""
    from ray._private.services import canonicalize_bootstrap_address

    where = address.removeprefix("ray://").partition("?")[0]
    try:
        target = canonicalize_bootstrap_address(where) or ""
        host, _, port = target.rpartition(":")
        problem = _greet(host.strip("[]"), int(port))
    except (ConnectionError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        problem = lines[0] if "://" not in where else "it is no address of a Ray cluster"
    if problem:
        raise TesseraError(
            f"no Ray cluster answers at {address}: {problem}",
            hint="start one with `tessera up`, or unset RAY_ADDRESS to use an embedded one",
        )


def _greet(host: str, port: int) -> str:
    """What is wrong with a server that should speak HTTP/2, as gRPC does; empty if nothing is."""
    try:
        with socket.create_connection((host, port), timeout=GREETING_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return ""
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(_FRAME_BYTES)
    except TimeoutError:
        return f"no response in {GREETING_SECONDS:.0f} s"
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        return "nothing listens there" if refused else str(error.strerror or error)
    is_settings = len(answer) == _FRAME_BYTES and answer[3] == _SETTINGS_FRAME
    return "" if is_settings else "what listens there is not the head of a Ray cluster"


def _runtime_env() -> dict[str, Any]:
    """What Ray's workers are told. Ray puts the current folder first on their `sys.path`: if one of
    the user's folders hides a package of ours there, a worker first makes sure to import ours."""
    root = Path(__file__).resolve().parents[2]
    for name in ("models", "pipelines"):
        spec = PathFinder.find_spec(name, [os.getcwd(), *sys.path])
        folders = list((spec and spec.submodule_search_locations) or [])
        if folders and Path(folders[0]).resolve() != root / name:
            return {"worker_process_setup_hook": "tessera.use_own_packages"}
    return {}


_private_folders: list[Path] = []
"""Of the Ray that this process has started."""


def _start(cpus: int | None, quiet: dict[str, Any], folder: Path) -> None:
    import ray

    port = _free_port()
    session.use_own_token(folder)
    # "local" never joins another cluster of this machine. The address tells the clean-up of Ray
    # Train, which looks for stale placement groups, which of several clusters is its own.
    own_address = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
    with session.started_by(session.python(folder)):
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=True,  # otherwise Ray continues without one if the port is taken
            dashboard_port=port,
            runtime_env={"env_vars": own_address, **_runtime_env()},
            _temp_dir=str(session.ray_folder(folder)),
            **quiet,
        )


def _free_port() -> int:
    """A free port of loopback, below those that the system hands out for port 0."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def disconnect() -> None:
    """Leaves the cluster, and stops it if it was started here. Waits at most `SHUTDOWN_SECONDS`
    for a head that doesn't answer: Ray itself would wait forever. Its processes end with this
    one."""
    import ray

    leaving = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    leaving.start()
    leaving.join(SHUTDOWN_SECONDS)
    while _private_folders:
        session.forget(_private_folders.pop())


def open_session_folder() -> str:
    """The folder of the Ray on this machine that this process is connected to, if other users of
    the machine may write to it; otherwise empty."""
    from ray._private.worker import global_worker

    node = global_worker.node
    folder = Path(node.get_session_dir_path()) if node else None
    is_open = folder is not None and folder.exists() and session.is_open_to_others(folder)
    return str(folder) if is_open else ""


def job_id() -> str:
    """Ray's id of this job."""
    import ray

    return str(ray.get_runtime_context().get_job_id())


def submission_id() -> str | None:
    """Id of the submitted Ray job that this process belongs to; None outside of one."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    submitted: str | None = config.get("metadata", {}).get("job_submission_id")
    return submitted


def cluster_resources() -> Resources:
    """Resources of the cluster that this process is connected to, without nodes that are being
    drained."""
    import ray

    draining = draining_nodes()
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in draining]
    return Resources(*(sum(n.get(kind, 0) for n in nodes) for kind in ("CPU", "GPU")))


def head_answers() -> bool:
    """Whether the head of the cluster accepts connections. Ray itself ends a process that can't
    reach it for a minute."""
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=HEAD_SECONDS).close()
    except OSError:
        return False
    return True


def draining_nodes() -> dict[str, int]:
    """Ray's id of each node that will be taken away, with the time in ms since 1970, 0 if it isn't
    known."""
    from ray._private.state import state

    draining: dict[str, int] = state.get_draining_nodes()
    return draining


def known_resources(address: str | None) -> Resources | None:
    """Resources of the cluster that `connect(address)` would start, or has started. None for the
    address of another cluster, which may get more machines when they are needed."""
    if address:
        return None
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            return cluster_resources()
    return local_resources()


def local_resources() -> Resources:
    """Resources of a cluster that is started on this machine, by Ray's own count."""
    import torch
    from ray._private.utils import get_num_cpus

    return Resources(get_num_cpus(override_docker_cpu_warning=True), torch.cuda.device_count())
