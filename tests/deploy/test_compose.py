"""docker-compose.yml, the images and .env.example, as far as that shows without running them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOT = {name for name, service in SERVICES.items() if service.get("restart") == "no"}
VARIABLE = re.compile(r"\$\{(\w+)([^}]*)\}")
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY")


def required() -> set[str]:
    return {name for name, _ in VARIABLE.findall(TEXT)}


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    else:
        yield str(value)


def test_the_services_are_those_of_the_design() -> None:
    assert set(SERVICES) == {
        "postgres",
        "object-store",
        "mlflow-prepare",
        "mlflow",
        "mlflow-user",
        "ray-head",
        "ray-worker",
    }
    assert {"mlflow-prepare", "mlflow-user"} == ONE_SHOT


def test_ports_are_published_on_loopback_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) == 2
    for port in published:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port
    assert not [name for name, s in SERVICES.items() if s.get("network_mode") or "expose" in s]


def test_every_secret_is_required_and_none_has_a_default() -> None:
    found = VARIABLE.findall(TEXT)
    assert found
    for name, rest in found:
        assert rest.startswith(":?"), f"{name}{rest}"
    bare = re.sub(r"\$\{\w+:\?[^}]*\}", "", TEXT)
    assert "$" not in bare


def test_no_secret_is_literal() -> None:
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if SECRET_NAME.search(key) or key.startswith("PGPASS"):
                assert VARIABLE.fullmatch(str(value)), f"{name}: {key}"
        # Nothing secret on a command line or in an address: process lists and logs show those.
        assert not VARIABLE.search(json.dumps(service.get("command", "")))
    for text in (TEXT, *(p.read_text() for p in sorted((ROOT / "mlflow").iterdir()))):
        assert not re.search(r"://[^\s/@:]+:[^\s/@]+@", text)


def test_the_example_names_every_secret_and_gives_none() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert set(given) == required()
    assert set(given.values()) == {""}
    ignored = subprocess.run(["git", "check-ignore", "-q", ".env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0


def test_every_lasting_service_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        if name not in ONE_SHOT:
            assert service["healthcheck"]["test"][0] == "CMD", name
            assert service["restart"] == "unless-stopped"
        for waited, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if waited in ONE_SHOT else "service_healthy"
            assert how["condition"] == wanted, (name, waited)


def test_images_are_pinned() -> None:
    images = [service["image"] for service in SERVICES.values()]
    for path in ("mlflow/Dockerfile", "deploy/docker/ray.Dockerfile"):
        images += re.findall(r"(?m)^FROM (\S+)", (ROOT / path).read_text())
    assert len(images) == len(SERVICES) + 2
    for image in images:
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", image), image


def test_only_mlflow_reaches_the_stores() -> None:
    assert COMPOSE["networks"]["back"]["internal"] is True
    behind = {name for name, service in SERVICES.items() if "back" in service["networks"]}
    assert behind == {"postgres", "object-store", "mlflow-prepare", "mlflow"}
    assert SERVICES["postgres"]["networks"] == SERVICES["object-store"]["networks"] == ["back"]


def test_ray_asks_for_its_token_and_workers_can_be_many() -> None:
    for name in ("ray-head", "ray-worker"):
        service = SERVICES[name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert "container_name" not in service
        assert service["volumes"] == ["data:/data"]
    assert "ports" not in SERVICES["ray-worker"]


def test_postgres_has_room_for_mlflows_pools() -> None:
    environment = SERVICES["mlflow"]["environment"]
    pool = int(environment["MLFLOW_SQLALCHEMYSTORE_POOL_SIZE"])
    pool += int(environment["MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW"])
    assert pool >= 2 * 40  # two for each request, forty requests at once
    (room,) = re.findall(r"max_connections=(\d+)", " ".join(SERVICES["postgres"]["command"]))
    assert int(room) >= 2 * pool + 20


def test_no_python_file_shadows_mlflow() -> None:
    assert list((ROOT / "mlflow").rglob("*.py")) == []


def test_the_images_copy_only_what_may_travel() -> None:
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for path in ("mlflow/Dockerfile", "deploy/docker/ray.Dockerfile"):
        for sources in re.findall(r"(?m)^COPY (.+) \S+$", (ROOT / path).read_text()):
            for source in sources.split():
                assert source.split("/")[0] in allowed, source
                assert (ROOT / source).exists(), source
    assert ".env" not in allowed


def test_the_ray_image_has_all_that_the_wheel_is_made_of() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = [pattern.removesuffix("*") for pattern in settings["packages"]["find"]["include"]]
    modules = [f"{name}.py" for name in settings["py-modules"]]
    dockerfile = (ROOT / "deploy/docker/ray.Dockerfile").read_text()
    copied = " ".join(re.findall(r"(?m)^COPY (.+) \S+$", dockerfile)).split()
    assert {*packages, *modules} <= {*copied}


@pytest.mark.parametrize("script", ["prepare.sh", "make-user.sh"])
def test_scripts_are_sound(script: str) -> None:
    path = ROOT / "mlflow" / script
    assert os.access(path, os.X_OK)
    assert subprocess.run(["sh", "-n", str(path)], check=False).returncode == 0
    (body,) = re.findall(r"<<'PYTHON'\n(.*?)\nPYTHON\n", path.read_text(), re.S)
    compile(body, script, "exec")


def test_a_missing_secret_stops_it() -> None:
    """By docker compose itself, where it is."""
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no `docker compose` here")
    config = [docker, "compose", "--env-file", os.devnull, "config", "--quiet"]
    clean = {k: v for k, v in os.environ.items() if k not in required()}
    secrets = dict.fromkeys(required(), "0" * 64)
    assert subprocess.run(config, cwd=ROOT, env=clean | secrets).returncode == 0
    for name in required():
        rest = {k: v for k, v in secrets.items() if k != name}
        refused = subprocess.run(config, cwd=ROOT, env=clean | rest, capture_output=True, text=True)
        assert refused.returncode != 0
        assert name in refused.stderr


# ── the MLflow server with this configuration, on SQLite instead of PostgreSQL ────────────────


class Server:
    def __init__(self, address: str) -> None:
        self.address = address

    def ask(
        self, path: str, user: str = "", body: dict[str, Any] | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Status and JSON; `user` logs in with a password made of its name."""
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.address + path, data=data)
        request.add_header("Content-Type", "application/json")
        if user:
            login = b64encode(f"{user}:{password(user)}".encode()).decode()
            request.add_header("Authorization", f"Basic {login}")
        for name, value in headers.items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read().decode()
                return answer.status, json.loads(text) if text.startswith("{") else text
        except urllib.error.HTTPError as error:
            error.close()
            return error.code, None


def password(user: str) -> str:
    return f"{user}-{user}-{user}"


@pytest.fixture(scope="module")
def server(prepared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("mlflow")
    shutil.copy(prepared_store / "mlflow.db", home / "runs.db")
    settings = (ROOT / "mlflow" / "auth.ini").read_text()
    users = f"sqlite:///{home}/users.db"
    (home / "auth.ini").write_text(re.sub(r"postgresql://\S+", users, settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    replaced = {"--host": "127.0.0.1", "--port": str(port), "--artifacts-destination": str(home)}
    arguments = SERVICES["mlflow"]["command"][2:]
    arguments = [f"{a}={replaced.get(a, b)}" for a, _, b in (x.partition("=") for x in arguments)]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")},
        "MLFLOW_AUTH_CONFIG_PATH": str(home / "auth.ini"),
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{home}/runs.db",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 64,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password("admin"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments],
            env=environment,
            cwd=home,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        found = Server(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline
            try:
                if found.ask("/health")[0] == 200:
                    break
            except urllib.error.URLError:
                time.sleep(0.3)
        trainer = {
            "MLFLOW_TRACKING_URI": found.address,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": password("admin"),
            "TRAINER_USERNAME": "trainer",
            "TRAINER_PASSWORD": password("trainer"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        for _ in range(2):  # the second time it finds the user and says nothing
            made = ROOT / "mlflow" / "make-user.sh"
            subprocess.run([str(made)], env={**environment, **trainer}, check=True, cwd=home)
        yield found
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_nobody_gets_in_without_a_login(server: Server) -> None:
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert server.ask("/health")[0] == 200
    assert server.ask(search)[0] == 401
    assert server.ask("/api/2.0/mlflow/users/create", body={"username": "x"})[0] == 401
    assert server.ask(search, "stranger")[0] == 401
    assert server.ask(search, "trainer")[0] == 200


@pytest.mark.slow
def test_only_the_named_hosts_are_answered(server: Server) -> None:
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    for host in ("mlflow", "mlflow:5000", "localhost", "localhost:5000", "127.0.0.1:9"):
        assert server.ask(search, "trainer", Host=host)[0] == 200, host
    for host in ("evil.example", "10.evil.com", "mlflow:80", "mlflow.evil.com", "10.0.0.3"):
        assert server.ask(search, "trainer", Host=host)[0] == 403, host


@pytest.mark.slow
def test_a_user_sees_nothing_of_anothers(server: Server) -> None:
    status, made = server.ask("/api/2.0/mlflow/experiments/create", "trainer", {"name": "mine"})
    assert status == 200
    get = f"/api/2.0/mlflow/experiments/get?experiment_id={made['experiment_id']}"
    assert server.ask(get, "trainer")[0] == 200
    other = {"username": "other", "password": password("other")}
    assert server.ask("/api/2.0/mlflow/users/create", "trainer", other)[0] == 403
    assert server.ask("/api/2.0/mlflow/users/create", "admin", other)[0] == 200
    assert server.ask(get, "other")[0] == 403
