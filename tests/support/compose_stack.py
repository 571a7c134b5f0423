"""The services of docker-compose.yml in real containers, by Docker or podman.

In: an empty folder, and a folder with images. Out: a running `Stack` with secrets of its own, under
a project name of its own, whose containers, volumes and networks end with it. The images must be
there (`make compose-test` builds them). It takes two minutes to start. Podman needs root and
podman-compose; what podman-compose can't do (wait for conditions, check health without systemd,
give each container an anonymous volume of its own) is done here.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
PROJECT = "tesseratest"
RAY, MLFLOW = "http://127.0.0.1:8265", "http://127.0.0.1:5000"
RAY_IMAGE = "tessera-ray:0.1.0"
MEMORY_MIB = 3072
_READY_SECONDS = 300.0
_STAGED = ("docker-compose.yml", "deploy/docker", "mlflow")
_PODMAN = """#!{python}
import os, re, sys
words = [word for word in sys.argv[1:] if not word.startswith("--requires=")]
shared = re.compile(r",source={project}_[\\w-]+_[0-9a-f]{{64}},")
words = [shared.sub(",", word) for word in words]
if words[:1] == ["rm"]:
    words.insert(1, "--volumes")
os.execvp("podman", ["podman", *words])
"""
"""podman for podman-compose. A service starts without waiting for one that has ended, anonymous
volumes belong to a container instead of a service, and are removed with it."""


def settings() -> dict[str, Any]:
    text = (CHECKOUT / "docker-compose.yml").read_text()
    parsed: dict[str, Any] = yaml.safe_load(text)
    return parsed


def images() -> list[str]:
    """The images of the services, by their default names."""
    named = {str(service["image"]) for service in settings()["services"].values()}
    return sorted(name.rpartition(":-")[2].rstrip("}") for name in named)


@functools.cache
def engine() -> str:
    """`docker`, `podman`, or nothing."""
    if _works("docker", "compose", "version") and _works("docker", "info"):
        return "docker"
    if os.geteuid() == 0 and shutil.which("podman-compose") and _works("podman", "info"):
        return "podman"
    return ""


@functools.cache
def missing() -> str:
    """Why the services can't run here; empty if they can."""
    if not engine():
        return "no container engine: needs Docker with compose, or root, podman and podman-compose"
    absent = [name for name in images() if not _works(engine(), "image", "inspect", name)]
    return f"no image {absent[0]} (make compose-test builds them)" if absent else ""


def _works(*command: str) -> bool:
    if not shutil.which(command[0]):
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Stack:
    """The services, as a context. `up` starts them.

    Args:
        folder: An empty folder, for the files of the services and the secrets.
        pictures: A folder that Ray's containers see as /import.
    """

    def __init__(self, folder: Path, pictures: Path) -> None:
        self.folder = folder
        self.services: dict[str, dict[str, Any]] = settings()["services"]
        for name in _STAGED:
            source, target = CHECKOUT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
        subprocess.run([folder / "deploy/docker/make-secrets.sh"], check=True)
        self.secrets = {path.name: path.read_text() for path in (folder / "secrets").iterdir()}
        self._environment = {
            **os.environ,
            "RAY_WORKER_CPUS": "1",
            "RAY_WORKER_MEMORY_MIB": str(MEMORY_MIB),
            "TESSERA_IMPORT": str(pictures),
        }
        self._compose = ["docker", "compose"]
        if engine() == "podman":
            wrapper = folder / "podman"
            wrapper.write_text(_PODMAN.format(python=sys.executable, project=PROJECT))
            wrapper.chmod(0o755)
            self._compose = ["podman-compose", "--podman-path", str(wrapper)]

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # ── start and end ─────────────────────────────────────────────────────────────────────────

    def up(self, workers: int) -> None:
        """Starts all services and returns when they are healthy. Raises RuntimeError."""
        scale = ["--scale", f"ray-worker={workers}"]
        if engine() == "docker":
            more = ["--no-build", "--wait", *scale]
            self.compose("up", "--detach", *more, timeout_seconds=_READY_SECONDS)
            return
        for name, service in self.services.items():
            more = scale if name == "ray-worker" else []
            self.compose("up", "--detach", "--no-deps", "--no-build", *more, name)
            self._wait(name, _is_healthy if "healthcheck" in service else _is_done)

    def scale(self, workers: int) -> None:
        """Has that many containers for Ray's workers, without waiting for new ones."""
        more = ["--no-deps", "--no-recreate", "--no-build", "--scale", f"ray-worker={workers}"]
        self.compose("up", "--detach", *more, "ray-worker")

    def _wait(self, service: str, reached: Callable[[str], bool]) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not (names := self.containers(service)) or not all(map(reached, names)):
            if time.monotonic() > deadline:
                logs = "\n".join(self.log(name)[-2000:] for name in names)
                raise RuntimeError(f"{service} did not start:\n{logs}")
            time.sleep(1)

    def down(self) -> None:
        more = ["--remove-orphans"] if engine() == "podman" else []
        self.compose("down", "--volumes", "--timeout", "5", *more)

    def left(self) -> list[str]:
        """Containers, volumes and networks of the project."""
        label = ("--filter", f"label=com.docker.compose.project={PROJECT}")
        kinds = (("ps", "--all"), ("volume", "ls"), ("network", "ls"))
        found = [run(engine(), *kind, "--quiet", *label).stdout.split() for kind in kinds]
        return [name for names in found for name in names]

    def compose(self, *arguments: str, timeout_seconds: float = 300) -> str:
        """Runs `docker compose ARGUMENTS`; raises RuntimeError if it fails."""
        command = [*self._compose, "--project-name", PROJECT, *arguments]
        done = run(
            *command,
            environment=self._environment,
            folder=self.folder,
            timeout_seconds=timeout_seconds,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    # ── look ──────────────────────────────────────────────────────────────────────────────────

    def containers(self, service: str = "") -> list[str]:
        """The names of the containers of a service, or of all, also of those that have ended."""
        labels = [f"label=com.docker.compose.project={PROJECT}"]
        labels += [f"label=com.docker.compose.service={service}"] * bool(service)
        filters = [word for label in labels for word in ("--filter", label)]
        done = run(engine(), "ps", "--all", "--format", "{{.Names}}", *filters)
        return sorted(done.stdout.split())

    def running(self) -> Iterator[tuple[str, str]]:
        """Each running container, with the name of its service."""
        for service in self.services:
            for name in self.containers(service):
                if inspect(name)["State"]["Status"] == "running":
                    yield service, name

    def execute(
        self, container: str, *command: str, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in a container, with `text` as its standard input."""
        return run(engine(), "exec", "--interactive", container, *command, text=text)

    def run_beside(self, program: str, *arguments: str) -> str:
        """Runs a Python program in a new container on the network of Ray and MLflow."""
        networks = inspect(self.containers("ray-worker")[0])["NetworkSettings"]["Networks"]
        (front,) = [name for name in networks if name.endswith("front")]
        where = ["--rm", "--interactive", "--network", front, "--entrypoint", "python"]
        done = run(engine(), "run", *where, RAY_IMAGE, "-", *arguments, text=program)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def addresses(self, service: str) -> list[str]:
        """Of all containers of a service, in all their networks."""
        networks = [
            network
            for name in self.containers(service)
            for network in inspect(name)["NetworkSettings"]["Networks"].values()
        ]
        return [network["IPAddress"] for network in networks if network["IPAddress"]]

    def log(self, container: str) -> str:
        done = run(engine(), "logs", container)
        return done.stdout + done.stderr

    # ── use ───────────────────────────────────────────────────────────────────────────────────

    def user(self) -> dict[str, str]:
        """The variables of a user who sends jobs, as the docs name them."""
        dropped = ("MLFLOW_", "AWS_", "RAY_", "TESSERA_")
        own = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        return {
            **own,
            "RAY_API_SERVER_ADDRESS": RAY,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "secrets/ray_auth_token"),
            "TESSERA_HOME": str(self.folder / "home"),
            "MLFLOW_TRACKING_PASSWORD": self.secrets["mlflow_trainer_password"],
        }

    def submit(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """Starts `tessera submit ARGUMENTS`; its output goes to the file `log`."""
        command = [sys.executable, "-m", "jobs.submit", *arguments]
        with log.open("wb") as out:
            return subprocess.Popen(
                command, env=self.user(), cwd=CHECKOUT, stdout=out, stderr=subprocess.STDOUT
            )


def inspect(container: str) -> dict[str, Any]:
    (found,) = json.loads(run(engine(), "inspect", container).stdout)
    return dict(found)


def _is_done(container: str) -> bool:
    state = inspect(container)["State"]
    # podman says "stopped" for a moment, without systemd for long.
    return state["Status"] in ("exited", "stopped") and state["ExitCode"] == 0


def _is_healthy(container: str) -> bool:
    """Podman checks health, and starts again what failed, by itself only with systemd: here it is
    told to."""
    if inspect(container)["State"]["Status"] in ("exited", "stopped"):
        print(f"{container} failed and is started again")
        run(engine(), "start", container)
    run(engine(), "healthcheck", "run", container)
    state = inspect(container)["State"]
    health = state.get("Health") or state.get("Healthcheck") or {}
    return bool(health.get("Status") == "healthy")


def run(
    *command: str,
    text: str = "",
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout_seconds: float = 300,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_seconds,
        check=False,
    )
