"""Fixtures that many tests share: an MLflow store, a Ray cluster, packed digits, a trained model.

Expensive fixtures are created once. A Ray cluster lives as long as tests need it, and all tests
that need it run in one worker process. Stores, data sets and trained homes are created once for
all worker processes; a test that writes uses a copy.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cluster_lab
import pytest
from cli_runner import Call, Done
from data_fixtures import make_folder, make_image, make_set  # noqa: F401  (fixtures)
from once_per_run import copy_home, shared_folder
from s3_server import S3Server, environment

# Before torch is imported: several thread pools on few cores are slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from mlflow_server import MlflowServer

from pipelines.tracking import mlflow_runs, mlflow_store

if TYPE_CHECKING:
    from xdist.scheduler import Scheduling

SLOW = {
    "ray_cluster",
    "mlflow_server",
    "start_mlflow",
    "make_server",
    "s3_server",
    "prepared_store",
}
"""Fixtures that start processes, train a model or make a store of MLflow; a test that needs one is
slow, as it takes seconds alone. Quick tests use `MemoryTracker` and `MemoryRegistry`."""

LOADS_MLFLOW = re.compile(
    r"\bmlflow_settings\b|\b(own_home|prepared_store|store|trained|trained_home): Path\b"
)
"""Fixtures with an embedded store."""

MACHINES = Path(__file__).parent / "cluster"
"""Tests that need a cluster of machines."""

RAY_IS_HELD = pytest.StashKey[bool]()
PRIORITY_IS_SET = pytest.StashKey[bool]()


# ── which worker process runs what, and when ──────────────────────────────────────────────────


@cache
def _text(file: str) -> str:
    return (Path(__file__).parents[1] / file).read_text(encoding="utf-8")


@cache
def _group(file: str) -> str:
    """Files of one group run in the same worker process, because they share something that takes
    long to start: the Ray cluster, the S3 server, the MLflow server, or the process that others
    are forked from. Files that only load MLflow or an exporter join those with its server: to load
    both takes a process seconds."""
    source = _text(file)
    if "ray_cluster" in source:
        return "ray"
    if "s3_server" in source:
        return "s3"
    if "gloo_ranks" in source or "fresh_process" in source:
        return "forked"
    if "mlflow_server" in source or file.endswith("/test_export.py"):
        return "mlflow"
    return "mlflow" if LOADS_MLFLOW.search(source) and "/integration/" not in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(super()._split_scope(nodeid))

    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs a service as slow, and sorts the slow files first, so that the worker
    processes end together; of them those first that share the Ray cluster, and of these those that
    share its two kept workers."""
    for item in items:
        if item.path.is_relative_to(MACHINES):
            item.add_marker("cluster")
            item.add_marker("slow")
        needs = SLOW & set(getattr(item, "fixturenames", ()))
        if needs or item.path.parent.name == "integration":
            item.add_marker("slow")
    files = {item: item.nodeid.split("::")[0] for item in items}
    groups = {item: _group(files[item]) for item in items}
    slow = {groups[item] for item in items if item.get_closest_marker("slow")}
    items.sort(
        key=lambda item: (
            groups[item] != "ray",
            groups[item] not in slow,
            "kept_workers" not in _text(files[item]),
        )
    )


def pytest_collection_finish() -> None:
    """What was imported and collected stays: the garbage collector need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    # With a handler, the root logger keeps its level when mlflow.pytorch is imported, so that what
    # one test imports doesn't hide the warnings of another.
    logging.root.addHandler(logging.NullHandler())


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries report what is left at the end of the process as leaked


# ── Ray ───────────────────────────────────────────────────────────────────────────────────────


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs machines of namespaces where there can be none."""
    _give_way_to_ray(item)
    if item.path.is_relative_to(MACHINES) and (reason := cluster_lab.missing()):
        pytest.skip(reason)


def _give_way_to_ray(item: pytest.Item) -> None:
    """Lowers the priority of each worker process but the one with Ray's cluster, whose tests, one
    after the other, take longest."""
    if "PYTEST_XDIST_WORKER" in os.environ and not item.config.stash.get(PRIORITY_IS_SET, False):
        item.config.stash[PRIORITY_IS_SET] = True
        if _group(item.nodeid.split("::")[0]) != "ray":
            os.nice(3)


def _needs(item: pytest.Item | None, fixture: str) -> bool:
    return fixture in getattr(item, "fixturenames", ())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """Ends the kept workers, and the Ray cluster, after the last test that needs them."""
    yield
    if _needs(item, "kept_workers") and not _needs(nextitem, "kept_workers"):
        import persistent_workers

        persistent_workers.end()
    if _needs(item, "ray_cluster") and not _needs(nextitem, "ray_cluster"):
        from pipelines.cluster import connection

        connection.disconnect()
        item.config.stash[RAY_IS_HELD] = False


@pytest.fixture(scope="module")
def ray_cluster(mlflow_settings: None, pytestconfig: pytest.Config) -> None:
    """A Ray cluster with room for four workers on any machine, for all tests of a file and
    of the next one. It ends when the next test needs none."""
    from pipelines.cluster import connection

    os.environ.update(connection.settings())  # Ray reads them once, when it is imported
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    os.environ.pop("RAY_ADDRESS", None)
    opened = connection.connect(cpus=4)
    held = pytestconfig.stash.get(RAY_IS_HELD, False)
    assert opened is not held, "a test left a Ray cluster behind, or ended that of the tests"
    pytestconfig.stash[RAY_IS_HELD] = True


@pytest.fixture(scope="module")
def kept_workers(ray_cluster: None) -> Iterator[None]:
    """Every training on two workers of this process runs on the same two Ray Train workers, which
    are kept for the next test and the next file. They end when the next test doesn't need them."""
    import persistent_workers

    from pipelines.workflows import services

    usual = services.executor

    @contextmanager
    def executor(context: Any, work: Any, group: Any, **more: Any) -> Iterator[Any]:
        if group.workers == 2:
            services.apply_settings(context)
            yield lambda payload, emit: persistent_workers.execute(2, work, payload, emit)
            return
        with usual(context, work, group, **more) as execute:
            yield execute

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "executor", executor)
        yield


# ── MLflow ────────────────────────────────────────────────────────────────────────────────────


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
    """An empty embedded store. Making one takes seconds, so tests take copies."""

    def make(folder: Path) -> None:
        folder.mkdir()
        mlflow_store.prepare(folder)

    return shared_folder(tmp_path_factory, "store", make)


@pytest.fixture(scope="module")
def own_home(prepared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty store for all tests of a file; TESSERA_HOME names it while they run."""
    root = tmp_path_factory.mktemp("home") / ".tessera"
    shutil.copytree(prepared_store, root)
    yield from _as_home(root)


def _as_home(root: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_HOME", str(root))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield root


@pytest.fixture
def store(prepared_store: Path, tmp_path: Path) -> Path:
    """The root of an empty embedded store for one test."""
    root = tmp_path / "store"
    shutil.copytree(prepared_store, root)
    return root


@pytest.fixture(scope="session")
def make_server() -> Iterator[Callable[[Path], MlflowServer]]:
    """Makes a server over the store in a folder, not started yet; killed at the end."""
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
    """A running MLflow server with an empty store, for many tests."""
    root = tmp_path_factory.mktemp("server") / "store"
    shutil.copytree(prepared_store, root)
    server = MlflowServer(root)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def start_mlflow(prepared_store: Path, tmp_path: Path) -> Iterator[MlflowServer]:
    """A running MLflow server for one test, which may kill it."""
    root = tmp_path / "server"
    shutil.copytree(prepared_store, root)
    server = MlflowServer(root)
    server.start()
    yield server
    server.kill()


# ── S3 ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server; tests make buckets of their own."""
    server = S3Server(tmp_path_factory.mktemp("s3") / "server")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a folder in an empty bucket; each test has its own bucket and cache."""
    import boto3

    from pipelines.storage.base import CacheSettings, use_cache

    for name, value in environment(s3_server.endpoint).items():
        monkeypatch.setenv(name, value)
    bucket = "b" + hashlib.sha256(os.fsencode(tmp_path)).hexdigest()[:20]
    boto3.client("s3").create_bucket(Bucket=bucket)
    use_cache(CacheSettings(tmp_path / "cache"))
    yield f"s3://{bucket}/set"
    use_cache(None)


# ── data and a trained model ──────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled digits, packed: 1,439 train, 179 val and 179 test images of 8 x 8. Only read."""

    def make(folder: Path) -> None:
        from pipelines.data.packing import pack

        pack.pack("digits", folder)

    return shared_folder(tmp_path_factory, "digits", make)


@pytest.fixture(scope="session")
def trained(prepared_store: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TESSERA_HOME with one small model: `digits`, version 1, alias `challenger`, trained for two
    epochs with `cnn` tiny and not evaluated. Only read: `trained_home` is a copy."""

    def make(root: Path) -> None:
        from pipelines import recipe as recipes
        from pipelines.workflows import train

        shutil.copytree(prepared_store, root)
        recipe = recipes.start("cnn", "tiny").with_overrides(
            {"data.path": str(digits), "train.epochs": 2, "workers.count": 0}
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TESSERA_HOME", str(root))
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            train.train(recipe, model="digits", progress=False)

    return shared_folder(tmp_path_factory, "trained", make)


@pytest.fixture(scope="module")
def trained_home(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of `trained` for all tests of a file; TESSERA_HOME names it while they run."""
    yield from _as_home(copy_home(trained, tmp_path_factory.mktemp("trained") / ".tessera"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `tessera ARGUMENTS` in this process, in the same way as the command does."""
    from jobs.cli import run, tessera

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run(tessera, "tessera", [str(a) for a in arguments])
        assert isinstance(left.value.code, int)
        return Done(left.value.code, *capsys.readouterr())

    return call
