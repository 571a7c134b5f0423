"""What `doctor` runs on every machine of a cluster.

In: `ProbeOptions`. Out: `MachineFacts`, and what the machine sees of the others. Facts only:
`doctor.py` judges them. Must not know Ray, nor that there are machines that don't answer.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from models.core.errors import TesseraError
from pipelines.storage.base import Storage
from pipelines.workflows.context import Context

Result = TypeVar("Result")

SHARED_MEMORY = Path("/dev/shm")
CONNECT_SECONDS = 5.0
_AT_ONCE = 16
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


@dataclass(frozen=True)
class ProbeOptions:
    """What to check on each machine.

    Args:
        context: The settings of the process that asks.
        libraries: Distributions whose versions are compared.
        storage: Where runs are kept, a folder or an address.
        data: A packed data set, or None.
        mlflow_run: The run that all machines write to; empty if none could be created.
        token: Marks everything that this check writes.
    """

    context: Context
    libraries: Sequence[str]
    storage: str
    data: str | None
    mlflow_run: str
    token: str


@dataclass(frozen=True)
class MachineFacts:
    """What a machine found out about itself. `problems` has a sentence for each check that failed.

    Args:
        versions: Of Python and each library; empty for one that is missing.
        gpus: Names of the GPUs that torch can use.
        shared_memory_bytes: Size of /dev/shm; None if the system has none.
        free_bytes: Free space of each scratch folder.
        data_digest: Of the data set's card; empty if it wasn't asked for, or can't be read.
        port: Where this machine answers the others.
    """

    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    shared_memory_bytes: int | None = None
    free_bytes: dict[str, int] = field(default_factory=dict)
    data_digest: str = ""
    port: int = 0
    problems: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """Another machine, where it answers, and whether it could write into the storage."""

    id: str
    name: str
    address: str
    port: int
    has_written: bool


@dataclass(frozen=True)
class PeerFacts:
    """What a machine sees of others: who doesn't answer, and why; whose file it doesn't find."""

    unreachable: dict[str, str]
    unseen: list[str]


class MachineProbe:
    """An agent on one machine. The calls come in this order: `collect` on all machines, `visit` on
    all machines, `clock`, `clean`."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._storage: Storage | None = None
        self._mark, self._token = "", b""

    def collect(self, id: str, address: str, gpus: float, options: ProbeOptions) -> MachineFacts:
        """The facts about this machine, which has this id and address and, in Ray's view, so many
        GPUs. Writes a file into the storage, which the other machines should see."""
        from pipelines.workflows import services

        services.apply_settings(options.context)
        self._token, self._mark = options.token.encode(), f".doctor-{options.token}-"
        problems: dict[str, str] = {}
        free = {}
        for folder in sorted(scratch_folders(options.context)):
            free[str(folder)] = _attempt(problems, "disk", partial(free_bytes, folder), 0)
        self._storage = _attempt(
            problems, "storage", lambda: self._write(options.storage, id), None
        )
        _attempt(problems, "mlflow", lambda: _try_mlflow(options, id), None)
        return MachineFacts(
            versions={"python": platform.python_version(), **versions(options.libraries)},
            gpus=_usable_gpus() if gpus or _has_gpu_driver() else [],
            shared_memory_bytes=shared_memory_bytes(),
            free_bytes=free,
            data_digest=_attempt(problems, "data", lambda: _data_digest(options.data), ""),
            port=_attempt(problems, "network", lambda: self._listen(address), 0),
            problems=problems,
        )

    def visit(self, peers: Sequence[Peer]) -> PeerFacts:
        """What this machine sees of the others: whose file, and who answers."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            answers = list(pool.map(lambda peer: _connect(peer, self._token), peers))
        unreachable = {peer.name: reason for peer, reason in zip(peers, answers) if reason}
        unseen = [peer.name for peer in peers if peer.has_written and not self._sees(peer)]
        return PeerFacts(unreachable, unseen if self._storage else [])

    def clock(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def clean(self, id: str) -> None:
        """Removes what `collect` wrote."""
        if self._listener:
            self._listener.close()
        if self._storage:
            with suppress(TesseraError, OSError):
                self._storage.remove(self._mark + id)

    def _write(self, where: str, id: str) -> Storage:
        from pipelines.storage.open import open_storage

        storage = open_storage(where)
        storage.write(self._mark + id, self._token)
        return storage

    def _sees(self, peer: Peer) -> bool:
        if self._storage is None:
            return False
        try:
            return self._storage.read(self._mark + peer.id) == self._token
        except TesseraError:
            return False

    def _listen(self, address: str) -> int:
        """Answers each connection at this address with the token; returns the port."""
        self._listener = socket.create_server((address, 0))
        threading.Thread(
            target=_answer_all, args=(self._listener, self._token), daemon=True
        ).start()
        return int(self._listener.getsockname()[1])


def _attempt(
    problems: dict[str, str], check: str, work: Callable[[], Result], otherwise: Result
) -> Result:
    """The result of `work`. If it fails, `otherwise`, and the problem of the check is recorded."""
    try:
        return work()
    except (TesseraError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        problems[check] = lines[0]
        return otherwise


# ── one machine ───────────────────────────────────────────────────────────────────────────────


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """The versions of distributions; empty for one that is missing."""
    found = {}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def shared_memory_bytes() -> int | None:
    """The size of /dev/shm; None if the system has none."""
    return shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None


def scratch_folders(context: Context) -> set[Path]:
    """The folders on each machine's own disk that a training writes to."""
    return {context.home, context.cache.folder, Path(tempfile.gettempdir())}


def free_bytes(folder: Path) -> int:
    """Free space in a folder, or where it would be created. Raises OSError if it can't be
    written."""
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"doctor")
    return shutil.disk_usage(folder).free


def _has_gpu_driver() -> bool:
    return any(Path(path).exists() for path in _GPU_DRIVERS)


def _usable_gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _try_mlflow(options: ProbeOptions, id: str) -> None:
    from pipelines.tracking import mlflow_probe, mlflow_runs

    uri = options.context.tracking_uri
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.exists():
        raise TesseraError(f"the embedded store {database} is not on this machine")
    if options.mlflow_run:
        mlflow_probe.try_run(uri, options.mlflow_run, id)
    else:
        mlflow_runs.connect(uri)


def _data_digest(data: str | None) -> str:
    from pipelines.data import card

    return card.read(data).digest if data else ""


# ── between machines ──────────────────────────────────────────────────────────────────────────


def _answer_all(listener: socket.socket, token: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, suppress(OSError):
            connection.sendall(token)


def _connect(peer: Peer, token: bytes) -> str:
    """Why a machine can't be reached; empty if it can."""
    if not peer.port:
        return "it can't listen there"
    try:
        where = (peer.address, peer.port)
        with socket.create_connection(where, timeout=CONNECT_SECONDS) as connection:
            got = connection.makefile("rb").read()
    except TimeoutError:
        return f"no answer in {CONNECT_SECONDS:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return "" if got == token else "another program answers there"
