"""What several tests need of MLflow: its settings, an embedded store, a server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from cli_runner import Call, Done
from data_fixtures import make_folder, make_image, make_set  # noqa: F401  (fixtures)

# Before torch is imported: several thread pools on few cores are slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pipelines.tracking import mlflow_runs

RAY_IS_HELD = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files first, so that workers that begin with them end together; of them those first
    that share a Ray cluster."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    on_ray = {item.path for item in items if _on_ray(item)}
    items.sort(key=lambda item: (item.path not in on_ray, item.path not in slow))


def _on_ray(item: pytest.Item | None) -> bool:
    return "ray_cluster" in getattr(item, "fixturenames", ())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """Ends the Ray cluster after the last test that needs it."""
    yield
    if _on_ray(item) and not _on_ray(nextitem):
        from pipelines.cluster import connection

        connection.disconnect()
        item.config.stash[RAY_IS_HELD] = False


@pytest.fixture(scope="session")
def mlflow_settings() -> Iterator[None]:
    """The environment that every job sets before it imports MLflow."""
    before = dict(os.environ)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ.update(mlflow_runs.settings())
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def prepared_store(mlflow_settings: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty embedded store; making one takes seconds, so tests take copies."""
    root = tmp_path_factory.mktemp("store")
    mlflow_runs.prepare(root)
    return root


@pytest.fixture(scope="module")
def own_home(prepared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty store for all tests of a file: what TESSERA_HOME names meanwhile."""
    root = tmp_path_factory.mktemp("home") / ".tessera"
    shutil.copytree(prepared_store, root)
    before = os.environ.get("TESSERA_HOME")
    os.environ["TESSERA_HOME"] = str(root)
    yield root
    os.environ.pop("TESSERA_HOME")
    if before:
        os.environ["TESSERA_HOME"] = before


@pytest.fixture
def store(prepared_store: Path, tmp_path: Path) -> Path:
    """The root of an embedded store of the test's own."""
    root = tmp_path / "store"
    shutil.copytree(prepared_store, root)
    return root


class MlflowServer:
    """A real MLflow server on loopback that can be killed and started again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_seconds: float = 120.0) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "-w", "1"]
        command += ["--port", str(self.port), "--backend-store-uri", mlflow_runs.prepare(self.root)]
        command += ["--artifacts-destination", str(self.root / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.root / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + timeout_seconds
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError((self.root / "server.log").read_text()[-2000:])
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to the server and its worker."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture(scope="session")
def make_server() -> Iterator[Callable[[Path], MlflowServer]]:
    """Makes a server over the store in a folder, not started yet; killed in the end."""
    made: list[MlflowServer] = []

    def make(root: Path) -> MlflowServer:
        made.append(MlflowServer(root))
        return made[-1]

    yield make
    for server in made:
        server.kill()


@pytest.fixture(scope="session")
def mlflow_server(
    prepared_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    root = tmp_path_factory.mktemp("server") / "store"
    shutil.copytree(prepared_store, root)
    server = MlflowServer(root)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def ray_cluster(mlflow_settings: None, pytestconfig: pytest.Config) -> None:
    """A Ray cluster with room for four workers whatever the machine has, for all tests of a file and
    of the next one. It ends when the next test needs none."""
    from pipelines.cluster import connection

    os.environ.update(connection.settings())  # Ray reads them once, when it is imported
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    os.environ.pop("RAY_ADDRESS", None)
    opened = connection.connect(cpus=4)
    held = pytestconfig.stash.get(RAY_IS_HELD, False)
    assert opened is not held, "a test left a Ray cluster behind, or ended that of the tests"
    pytestconfig.stash[RAY_IS_HELD] = True


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled digits, packed."""
    from pipelines.data.packing import pack

    folder = tmp_path_factory.mktemp("data") / "digits"
    pack.pack("digits", folder)
    return folder


@pytest.fixture
def start_mlflow(prepared_store: Path, tmp_path: Path) -> Iterator[MlflowServer]:
    """An MLflow server of the test's own, to be killed."""
    root = tmp_path / "server"
    shutil.copytree(prepared_store, root)
    server = MlflowServer(root)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `tessera ARGUMENTS` in this process, by the way that the command takes."""
    from jobs.cli import run, tessera

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run(tessera, "tessera", [str(a) for a in arguments])
        assert isinstance(left.value.code, int)
        return Done(left.value.code, *capsys.readouterr())

    return call
