"""What `up`, `down`, `status`, `submit` and `doctor` share: the record of the local services.

In: `.tessera/services.json`, the process table, HTTP responses. Out: `Services`, and which of them
are alive and healthy. Must not load Ray or MLflow: the state must be there within milliseconds.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psutil

from models.core.errors import TesseraError
from pipelines.storage.atomic import write_json_atomic

HOST = "127.0.0.1"
PASSWORD_PATH = "TESSERA_MLFLOW_PASSWORD_PATH"
"""The variable with the file of the password of MLflow's server."""
_VIEW = "workflowType=machine_learning"  # without it MLflow opens its GenAI view
_STOP_SECONDS = 45  # Ray drains a node for up to 30 s after SIGTERM


@dataclass(frozen=True)
class Service:
    """A process that we started, with its children. `began` is its `start_time`: it distinguishes
    the process from a later one with the same number."""

    name: str
    pid: int
    began: float
    address: str
    log: str


@dataclass(frozen=True)
class Services:
    """What `tessera up` started. `environment` is what a shell or a job needs to use it;
    `scratch` is Ray's session folder, removed by `down`."""

    services: tuple[Service, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    scratch: str = ""

    def named(self, name: str) -> Service | None:
        return next((s for s in self.services if s.name == name), None)


def record_path(home: Path) -> Path:
    return home / "services.json"


def load(home: Path) -> Services | None:
    """The recorded services, running or not; None without a record."""
    try:
        raw = json.loads(record_path(home).read_text())
        services = tuple(Service(**entry) for entry in raw["services"])
        return Services(services, dict(raw["environment"]), str(raw["scratch"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise TesseraError(
            f"{record_path(home)} can't be read: {error}",
            hint="end the services that it names by hand, then remove the file",
        ) from error


def save(services: Services, home: Path) -> None:
    write_json_atomic(record_path(home), dataclasses.asdict(services))
    record_path(home).chmod(0o600)


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """Lets only one `up` or `down` work in a folder at a time."""
    home.parent.mkdir(parents=True, exist_ok=True)
    home.mkdir(mode=0o700, exist_ok=True)
    with open(home / "services.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TesseraError(
                f"another `tessera up` or `down` is at work in {home}",
                hint="wait for it, then run `tessera status`",
            ) from None
        yield


def with_password(environment: dict[str, str]) -> dict[str, str]:
    """The environment with MLflow's password, from the file that it names, if it can be read."""
    complete = dict(environment)
    with contextlib.suppress(KeyError, OSError):
        complete["MLFLOW_TRACKING_PASSWORD"] = Path(environment[PASSWORD_PATH]).read_text()
    return complete


def exports(environment: dict[str, str]) -> str:
    """Lines for a shell. They read the password from its file: what is printed has none."""
    lines = [f"export {name}={shlex.quote(v)}" for name, v in environment.items()]
    if path := environment.get(PASSWORD_PATH):
        lines.append(f'export MLFLOW_TRACKING_PASSWORD="$(cat {shlex.quote(path)})"')
    return "\n".join(lines)


# ── processes ─────────────────────────────────────────────────────────────────────────────────


def start_time(process: psutil.Process) -> float:
    """When a process was started, in seconds since the machine was, which no change of the clock
    moves; without /proc by the clock, in seconds since 1970. Raises psutil.NoSuchProcess."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return float(process.create_time())
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def is_alive(service: Service) -> bool:
    try:
        process = psutil.Process(service.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(abs(start_time(process) - service.began) < 2)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False


def processes(service: Service) -> list[psutil.Process]:
    """The service and its children, orphans too: it leads a session of its own, and the number of a
    session isn't reused while a process of the session lives."""
    try:
        leader: psutil.Process | None = psutil.Process(service.pid)
        if leader and abs(start_time(leader) - service.began) >= 2:
            return []  # another process has the number now: ours has ended
        members = {leader.pid: leader} if leader else {}
    except psutil.NoSuchProcess:
        leader, members = None, {}
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getsid(process.pid) == service.pid:
                members[process.pid] = process
    if leader:
        with contextlib.suppress(psutil.NoSuchProcess):
            members |= {child.pid: child for child in leader.children(recursive=True)}
    return list(members.values())


def end(service: Service, *, timeout_seconds: float = _STOP_SECONDS) -> int:
    """Ends a service and its children. Returns how many processes had to be killed."""
    members = processes(service)
    leaders = [process for process in members if process.pid == service.pid]
    _send(leaders, signal.SIGTERM)
    psutil.wait_procs(leaders, timeout=timeout_seconds)
    # Children that it should have ended itself, and those that it started while it ended.
    rest = list({p.pid: p for p in [*members, *processes(service)]}.values())
    _send([process for process in rest if process not in leaders], signal.SIGTERM)
    _, left = psutil.wait_procs(rest, timeout=min(timeout_seconds, 5))
    _send(left, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)
    return len(left)


def _send(members: list[psutil.Process], number: signal.Signals) -> None:
    for process in members:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil also recognises a reused number
            process.send_signal(number)


def end_all(services: Services, home: Path) -> int:
    """Ends the recorded services, the newest first, and removes the record. Returns how many
    processes had to be killed."""
    killed = sum(end(service) for service in reversed(services.services))
    if services.scratch:
        shutil.rmtree(services.scratch, ignore_errors=True)
    record_path(home).unlink(missing_ok=True)
    return killed


# ── health ────────────────────────────────────────────────────────────────────────────────────


def token(environment: dict[str, str] | os._Environ[str]) -> str:
    """Ray's token, from the places where Ray looks for it; empty if there is none."""
    if value := environment.get("RAY_AUTH_TOKEN"):
        return value.strip()
    try:
        path = environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
        return Path(path).read_text().strip()
    except (OSError, RuntimeError):  # there is no file, or no home
        return ""


def probe_url(url: str, *, bearer: str = "", timeout_seconds: float = 3) -> str:
    """Requests `url`. Returns an empty text for status 2xx, otherwise the problem in short."""
    request = urllib.request.Request(url)
    if bearer:
        request.add_header("Authorization", f"Bearer {bearer}")
    # Without a proxy: the address is on this machine or on the cluster.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_seconds):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        refused = {401: "requires a token", 403: "refuses the token"}
        return refused.get(error.code, f"returns status {error.code}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return f"no response in {timeout_seconds:g} s"
        if isinstance(reason, ConnectionRefusedError):
            return "nothing listens there"
        return str(getattr(reason, "strerror", None) or reason or "no response")


def health(service: Service, environment: dict[str, str]) -> str:
    """Empty if a service is healthy, otherwise the problem."""
    if service.name == "ray":
        return probe_url(f"{service.address}/api/jobs/", bearer=token(environment))
    return probe_url(f"{service.address}/health")


def mlflow_pages(address: str, experiment: str = "tessera", *, login: str = "") -> str:
    """The page of the trainings: the runs of the experiment, once it exists. `login` is
    USER:PASSWORD."""
    url = f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name={quote(experiment)}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url)
    if login:
        encoded = base64.b64encode(login.encode()).decode("ascii")
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    try:
        with opener.open(request, timeout=3) as response:
            number = json.load(response)["experiment"]["experiment_id"]
    except (OSError, ValueError, KeyError):
        return f"{address}/#/experiments?{_VIEW}"
    return f"{address}/#/experiments/{number}/runs?{_VIEW}"


def wait_until_healthy(service: Service, environment: dict[str, str], deadline: float) -> None:
    """Waits until a service is healthy. Raises TesseraError if it ends, or at the deadline."""
    while reason := health(service, environment):
        if not is_alive(service) or time.monotonic() > deadline:
            state = "did not start" if not is_alive(service) else f"is not healthy: {reason}"
            raise TesseraError(
                f"{service.name} {state}; the end of its log:\n{tail(Path(service.log))}",
                hint=f"the whole log: {service.log}",
            )
        time.sleep(0.3)


def tail(log: Path, lines: int = 6) -> str:
    try:
        content = log.read_text(errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return "\n".join(f"  {line}" for line in [x for x in content if x.strip()][-lines:])


def require_free(port: int, *, service: str, option: str) -> None:
    """Raises TesseraError if something listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError as error:
            raise TesseraError(
                f"port {port}, which {service} needs, is not free: {error.strerror}",
                hint=f"end what uses it, or choose another with {option}",
            ) from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
