"""A cluster whose machines have only the network in common: an S3 server, an MLflow server, a Ray
head, Ray workers, and a user's laptop.

In: an empty folder, and how many workers. Out: a running `Cluster`, with a bucket `data`. It takes
about a minute to start. Its machines end with it.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import lab
import s3_server
from lab import Lab, Machine

BUCKET = "data"
DATA, STORAGE = f"s3://{BUCKET}/digits", f"s3://{BUCKET}/storage"
MOST_WORKERS = 200
S3_PORT, MLFLOW_PORT, RAY_PORT, DASHBOARD_PORT = 5733, 5000, 6379, 8265
_TOKEN = "0123456789abcdef" * 4
_READY_SECONDS = 180


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    return lab.missing() or s3_server.missing()


@dataclass(frozen=True)
class MlflowRun:
    """A run as MLflow shows it. `points` are the steps of `val/accuracy` in the order in which
    MLflow has them, `losses` the values of `val/loss`, `files` the artifacts at the top."""

    name: str
    status: str
    tags: dict[str, str]
    metrics: dict[str, float]
    points: list[int]
    losses: list[float]
    files: list[str]


_RUNS = """
import json, mlflow
client = mlflow.MlflowClient()
ids = [each.experiment_id for each in client.search_experiments()]
print(json.dumps([
    {
        "name": run.info.run_name,
        "status": run.info.status,
        "tags": run.data.tags,
        "metrics": run.data.metrics,
        "points": [p.step for p in client.get_metric_history(run.info.run_id, "val/accuracy")],
        "losses": [p.value for p in client.get_metric_history(run.info.run_id, "val/loss")],
        "files": [each.path for each in client.list_artifacts(run.info.run_id)],
    }
    for run in client.search_runs(ids)
]))
"""
_AUTH = """[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:////srv/auth.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""
_MAKE_BUCKET = f"import boto3; boto3.client('s3').create_bucket(Bucket={BUCKET!r})"


@dataclass
class Cluster:
    """The machines of a running cluster. `workers` are those that were not killed."""

    lab: Lab
    store: Machine
    mlflow: Machine
    head: Machine
    laptop: Machine
    workers: list[Machine] = field(default_factory=list)
    driver: Machine | None = None
    _added: int = 0

    # ── its parts ─────────────────────────────────────────────────────────────────────────────

    def start_store(self) -> None:
        program = f"{lab.CHECKOUT}/tests/support/s3_server.py"
        self.store.start(f"python {program} /srv/s3 {self.store.address} {S3_PORT}")

    def kill_store(self) -> None:
        """Kills the S3 server's process that answers requests; what it stores stays."""
        self.store.run("pkill -KILL -x radosgw", check=True)

    def restart_store(self) -> None:
        self.store.start("radosgw -c /srv/s3/ceph.conf -n client.rgw -f", log="s3.again.log")

    def kill_mlflow(self) -> None:
        self.mlflow.run("pkill -KILL -f '[m]lflow.server'", check=True)

    def start_mlflow(self) -> None:
        self.mlflow.start(
            f"mlflow server --host 0.0.0.0 --port {MLFLOW_PORT} --workers 1 --allowed-hosts '*'"
            " --backend-store-uri sqlite:////srv/mlflow.db --artifacts-destination /srv/artifacts",
            {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )

    def start_secured_mlflow(self) -> dict[str, str]:
        """Starts another MLflow server, which requires a login. Returns the environment of a client
        who has one."""
        port, password = MLFLOW_PORT + 1, "correct horse battery"
        self.mlflow.run(f"cat > /srv/auth.ini <<'END'\n{_AUTH}\nEND", check=True)
        self.mlflow.start(
            f"mlflow server --host 0.0.0.0 --port {port} --workers 1 --allowed-hosts '*'"
            " --app-name basic-auth --backend-store-uri sqlite:////srv/secured.db"
            " --artifacts-destination /srv/secured",
            {
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "MLFLOW_AUTH_CONFIG_PATH": "/srv/auth.ini",
                "MLFLOW_AUTH_ADMIN_PASSWORD": password,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret",
            },
            log="secured-mlflow.log",
        )
        uri = f"http://{self.mlflow.address}:{port}"
        wait(lambda: self.lab.get(f"{uri}/health") is not None, "MLflow with a login")
        return {
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": password,
        }

    def start_head(self) -> None:
        ports = f"--port={RAY_PORT} --dashboard-port={DASHBOARD_PORT} --dashboard-host=0.0.0.0"
        self._start_ray(self.head, f"--head {ports}", cpus=0)

    def add_worker(self, *, cpus: int = 1, gpus: int = 0, disk_bytes: int = 2**31) -> Machine:
        """A new machine that joins Ray. `gpus` are only counted by Ray."""
        self._added += 1
        machine = self.lab.machine(f"worker-{self._added}", disk_bytes=disk_bytes)
        self._start_ray(machine, f"--address={self.head.address}:{RAY_PORT}", cpus=cpus, gpus=gpus)
        self.workers.append(machine)
        return machine

    def start_driver(self) -> Machine:
        """A new machine without CPUs for Ray, on which `tessera train` can run as on a login node.
        The one before it is killed."""
        if self.driver:
            self.driver.kill()
        self.driver = self.lab.machine("driver")
        self._start_ray(self.driver, f"--address={self.head.address}:{RAY_PORT}", cpus=0)
        return self.driver

    def _start_ray(self, machine: Machine, options: str, *, cpus: int, gpus: int = 0) -> None:
        machine.start(
            f"ray start --block --disable-usage-stats --node-ip-address={machine.address}"
            f" --num-cpus={cpus} --num-gpus={gpus} {options}",
            self._address,
        )

    def kill(self, worker: Machine) -> None:
        worker.kill()
        self.workers.remove(worker)

    def replace_head(self, *, workers: int) -> None:
        """Kills all machines of Ray, and starts a new cluster at the same address, without a
        driver's machine."""
        if self.driver:
            self.driver.kill()
        if self.head.name in self.lab.machines:
            self.head.kill()
        for worker in list(self.workers):
            self.kill(worker)
        self.driver, self.head = None, self.lab.machine("head")
        self.start_head()
        for _ in range(workers):
            self.add_worker()
        self.wait_for_nodes(1 + workers)

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    @property
    def _address(self) -> dict[str, str]:
        return {"RAY_API_SERVER_ADDRESS": self.dashboard}

    # ── what its user does ────────────────────────────────────────────────────────────────────

    def user(
        self, command: str, *, timeout_seconds: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the laptop to its end, and prints what it was and how it ended."""
        began = time.monotonic()
        environment = {**self._address, **environment}
        done = self.laptop.run(command, environment, timeout_seconds=timeout_seconds)
        took = time.monotonic() - began
        print(f"$ {command}\n{done.stdout}{done.stderr}status {done.returncode} in {took:.0f} s")
        return done

    def start(self, command: str, *, log: str, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a command on the laptop in the background; `lab.log(log)` has its output."""
        environment = {**self._address, **environment}
        return self.laptop.start(f"timeout 900 {command}", environment, log=log)

    def python(self, program: str) -> str:
        """The output of a Python program on the laptop."""
        return self.laptop.run(f'python - <<"END"\n{program}\nEND', check=True).stdout.strip()

    def runs(self, model: str = "") -> list[MlflowRun]:
        """The runs in MLflow, of one model's trainings or all."""
        runs = [MlflowRun(**each) for each in json.loads(self.python(_RUNS).splitlines()[-1])]
        return [run for run in runs if run.tags.get("tessera.model") == model or not model]

    # ── waiting ───────────────────────────────────────────────────────────────────────────────

    def wait_for_nodes(self, count: int) -> None:
        wait(lambda: self.nodes() == count, f"{count} nodes of Ray")

    def nodes(self) -> int:
        """The nodes that are alive in Ray's view."""
        answer = self.lab.get(f"{self.dashboard}/nodes?view=summary", token=_TOKEN)
        nodes = json.loads(answer)["data"]["summary"] if answer else []
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def wait_for_log(self, name: str, text: str, *, timeout_seconds: float = 180) -> None:
        """Waits until the log has the text; the error has the end of the log."""
        try:
            wait(lambda: text in self.lab.log(name), repr(text), timeout_seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.lab.log(name)[-3000:]}") from error

    def training_machines(self) -> list[Machine]:
        """The workers on which a training runs."""
        return [w for w in self.workers if any("RayTrainWorker" in p for p in w.processes())]


@contextmanager
def cluster(
    folder: Path, *, workers: int, shared: bool = False, **environment: str
) -> Iterator[Cluster]:
    """Starts a cluster. `shared`: TESSERA_HOME is one folder for all machines. `environment` is set
    on all machines."""
    numbered = [f"worker-{i}" for i in range(1, MOST_WORKERS + 1)]
    with Lab(
        folder, ["s3", "mlflow", "head", "laptop", "driver", *numbered], shared=shared
    ) as machines:
        addresses = machines.addresses
        machines.environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": _TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_URI": f"http://{addresses['mlflow']}:{MLFLOW_PORT}",
            **s3_server.environment(f"http://{addresses['s3']}:{S3_PORT}"),
            **environment,
        }
        store, mlflow = machines.machine("s3"), machines.machine("mlflow")
        made = Cluster(
            machines, store, mlflow, machines.machine("head"), machines.machine("laptop")
        )
        made.start_store()
        made.start_mlflow()
        made.start_head()
        for _ in range(workers):
            made.add_worker()
        began = time.monotonic()
        uri = machines.environment["MLFLOW_TRACKING_URI"]
        wait(lambda: machines.get(f"{uri}/health") is not None, "MLflow")
        wait(lambda: machines.get(f"http://{addresses['s3']}:{S3_PORT}/") is not None, "S3")
        made.python(_MAKE_BUCKET)
        made.wait_for_nodes(1 + workers)
        print(f"cluster of {workers} workers started in {time.monotonic() - began:.0f} s")
        yield made


def wait(is_ready: Callable[[], bool], what: str, timeout_seconds: float = _READY_SECONDS) -> None:
    """Raises TimeoutError, which names `what`, if it isn't ready in time."""
    deadline = time.monotonic() + timeout_seconds
    while not is_ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not in {timeout_seconds:g} s")
        time.sleep(0.3)


def end_of(process: subprocess.Popen[bytes], *, timeout_seconds: float) -> int:
    """The exit status of a process; kills it and raises TimeoutExpired if it doesn't end."""
    try:
        return process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
