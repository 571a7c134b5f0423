"""docker-compose.yml, the images, their scripts and .env.example, as far as that shows without
running containers. tests/integration/test_mlflow_auth.py runs the MLflow server of it."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
GPU: dict[str, Any] = yaml.safe_load((ROOT / "deploy/docker/compose.gpu.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOT = {name for name, s in SERVICES.items() if s["restart"].startswith("on-failure")}
DOCKERFILES = ("mlflow/Dockerfile", "deploy/docker/ray.Dockerfile")
SCRIPTS = sorted([*(ROOT / "mlflow").glob("*.sh"), *(ROOT / "deploy/docker").glob("*.sh")])
VARIABLE = re.compile(r"\$\{(\w+)([^}]*)\}")
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY")
WITH_SECRETS = ROOT / "deploy/docker/with-secrets.sh"


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


# ── what reaches what ─────────────────────────────────────────────────────────────────────────


def reached_from_outside(services: dict[str, dict[str, Any]]) -> list[str]:
    """Ports that more than this machine reaches."""
    return [
        f"{name}: {port}"
        for name, service in services.items()
        for port in [*service.get("ports", ()), *[service.get("network_mode")]]
        if port is not None and not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", str(port))
    ]


@pytest.mark.fault(56)
def test_ports_are_published_on_loopback_only() -> None:
    assert reached_from_outside(SERVICES) == []
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert published == {
        "mlflow": ["127.0.0.1:5000:5000"],
        "ray-head": ["127.0.0.1:8265:8265"],
    }


@pytest.mark.fault(56)
def test_each_store_is_reached_only_by_those_that_use_it() -> None:
    internal = {name for name, network in COMPOSE["networks"].items() if network.get("internal")}
    assert internal == {"back", "objects"}
    members = {
        network: {name for name, s in SERVICES.items() if network in s["networks"]}
        for network in COMPOSE["networks"]
    }
    assert members["back"] == {"postgres", "mlflow-prepare", "mlflow"}
    assert members["objects"] == {
        "object-store",
        "mlflow-prepare",
        "mlflow",
        "ray-head",
        "ray-worker",
    }
    assert members["front"] == {"mlflow", "mlflow-user", "ray-head", "ray-worker"}


@pytest.mark.control(56)
def test_a_port_for_everybody_is_noticed() -> None:
    """Control: Docker publishes a port without an address on all of the machine's addresses."""
    for wrong in ({"ports": ["5000:5000"]}, {"ports": [8265]}, {"network_mode": "host"}):
        assert reached_from_outside({"x": wrong})


# ── hardening ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_gains_no_right_and_writes_only_where_it_may(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    granted = set(service.get("cap_add", ()))
    # To become a user without rights, and to own its folder; nothing of the network or the kernel.
    assert granted <= {"CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"}
    assert not granted or name == "object-store"
    written = [*service["tmpfs"], *service.get("volumes", ())]
    assert any(entry.partition(":")[0] == "/tmp" for entry in written)
    for entry in service["tmpfs"]:
        assert "size=" in entry, "a tmpfs without a size may take half of the machine's memory"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_limits_and_its_logs_rotate(name: str) -> None:
    service = SERVICES[name]
    assert service["mem_limit"]
    assert service["cpus"]
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}


def test_a_ray_node_claims_what_its_container_has() -> None:
    worker = SERVICES["ray-worker"]
    assert worker["environment"]["RAY_NODE_CPUS"] == worker["cpus"]
    assert f"{worker['environment']['RAY_NODE_MEMORY_MIB']}m" == worker["mem_limit"]
    assert worker["shm_size"] == worker["mem_limit"], "objects that don't fit would go to a disk"
    assert SERVICES["ray-head"]["environment"]["RAY_NODE_CPUS"] == "0"
    (gpu,) = GPU["services"]["ray-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu["count"] == GPU["services"]["ray-worker"]["environment"]["RAY_NODE_GPUS"]
    assert set(GPU["services"]) <= set(SERVICES)


def start_node(tmp_path: Path, role: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ray-node.sh with a `ray` that prints its arguments, in a mount namespace of its own
    where /run/secrets has the files of `tmp_path`/secrets."""
    for folder in ("bin", "home", "secrets"):
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "bin" / "ray").write_text('#!/bin/sh\nfor word; do echo "$word"; done\nenv >&2\n')
    (tmp_path / "bin" / "ray").chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    script = (
        f'mount -t tmpfs none /run && mkdir /run/secrets && cp "{tmp_path}"/secrets/* /run/secrets'
    )
    node = str(ROOT / "deploy/docker/ray-node.sh")
    return subprocess.run(
        [*UNSHARE, "sh", "-c", f'{script}; exec sh "$@"', "sh", node, role],
        env={"PATH": path, "HOME": str(tmp_path / "home"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


UNSHARE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
NEEDS_NAMESPACE = pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode,
    reason="no mount namespace can be made here",
)
RAY_SECRETS = SERVICES["ray-worker"]["secrets"]


@NEEDS_NAMESPACE
@pytest.mark.fault(55)
def test_a_node_logs_in_from_files_and_shows_no_secret(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    for name in RAY_SECRETS:
        (tmp_path / "secrets" / name).write_text(f"s3cr3t-{name}")
    node = {"RAY_NODE_CPUS": "2", "RAY_NODE_MEMORY_MIB": "1000"}
    done = start_node(tmp_path, "worker", **node)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[:2] == ["start", "--address=ray-head:6379"]
    assert {"--num-cpus=2", "--num-gpus=0", "--block"} <= set(words)
    memory = {name: int(size) for name, size in re.findall(r"--(\S*memory)=(\d+)", done.stdout)}
    assert memory == {"object-store-memory": 314572800, "memory": 629145600}
    assert "s3cr3t" not in done.stdout + done.stderr, "in a command line or in a variable"
    login = tmp_path / "home" / ".mlflow" / "credentials"
    assert "mlflow_tracking_password = s3cr3t-mlflow_trainer_password\n" in login.read_text()
    keys = tmp_path / "home" / ".aws" / "credentials"
    assert "aws_secret_access_key = s3cr3t-object_store_secret_key\n" in keys.read_text()
    for file in (login, keys):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert start_node(tmp_path, "head", **node).stdout.split()[:2] == ["start", "--head"]


@NEEDS_NAMESPACE
@pytest.mark.fault(55)
@pytest.mark.parametrize("unset", RAY_SECRETS)
def test_a_node_without_a_secret_names_it_and_does_not_start(unset: str, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    for name in RAY_SECRETS:
        (tmp_path / "secrets" / name).write_text("" if name == unset else "x")
    done = start_node(tmp_path, "worker", RAY_NODE_CPUS="2", RAY_NODE_MEMORY_MIB="1000")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip() == (
        f"secret {unset} is missing or empty: run deploy/docker/make-secrets.sh"
    )


# ── secrets ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(55)
def test_every_secret_is_a_file_and_none_is_in_a_setting() -> None:
    secrets = COMPOSE["secrets"]
    for name, source in secrets.items():
        assert source == {"file": f"./secrets/{name}"}
    used = {name for service in SERVICES.values() for name in service.get("secrets", ())}
    assert used == set(secrets)
    for name, service in SERVICES.items():
        read = set()
        for key, value in service.get("environment", {}).items():
            if SECRET_NAME.search(key) or key.startswith("PGPASS"):
                assert str(value).startswith("/run/secrets/"), f"{name}: {key}"
                assert key.endswith(("_FILE", "_PATH")), f"{name}: {key}"
                read.add(Path(value).name)
        assert read <= set(service.get("secrets", ())), f"{name} isn't given a file that it reads"
    assert not [v for v, _ in VARIABLE.findall(TEXT) if SECRET_NAME.search(v)]
    for path in (ROOT / "docker-compose.yml", *(ROOT / "mlflow").iterdir(), *SCRIPTS):
        assert not re.search(r"://[^\s/@:]+:[^\s/@]+@", path.read_text()), path


def with_secrets(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """The environment of a command behind with-secrets.sh, for files in `folder`."""
    script = folder / "with-secrets.sh"
    script.write_text(
        WITH_SECRETS.read_text()
        .replace("/run/secrets", str(folder))
        .replace(r"\/run\/secrets", str(folder).replace("/", r"\/"))
    )
    variables = {f"{name.upper()}_FILE": str(folder / name) for name in names}
    return subprocess.run(
        ["sh", str(script), "env"],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.fault(55)
def test_a_secret_reaches_its_service_or_is_named(tmp_path: Path) -> None:
    (tmp_path / "admin_password").write_text("a $(b) 'c'")
    (tmp_path / "flask_key").write_text("")
    done = with_secrets(tmp_path, "admin_password")
    assert "ADMIN_PASSWORD=a $(b) 'c'\n" in done.stdout
    assert "_FILE" not in done.stdout
    for name in ("flask_key", "never_made"):
        refused = with_secrets(tmp_path, "admin_password", name)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert f"secret {name} is missing or empty" in refused.stderr


@pytest.mark.control(55)
def test_a_shell_alone_starts_with_an_empty_secret(tmp_path: Path) -> None:
    """Control: without the check a service would start with no password at all."""
    command = f'PASSWORD="$(cat {tmp_path}/none 2>/dev/null)" exec env'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "PASSWORD=\n" in done.stdout


def test_secrets_are_made_once_and_stay_private(tmp_path: Path) -> None:
    (tmp_path / "deploy/docker").mkdir(parents=True)
    script = tmp_path / "deploy/docker/make-secrets.sh"
    shutil.copy(ROOT / "deploy/docker/make-secrets.sh", script)
    subprocess.run([script], check=True)
    folder = tmp_path / "secrets"
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(made) == set(COMPOSE["secrets"])
    assert len(set(made.values())) == len(made)
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in made.values())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    subprocess.run([script], check=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == made
    for path in ("secrets/ray_auth_token", ".env"):
        ignored = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False)
        assert ignored.returncode == 0, path


def test_the_example_has_every_setting_with_its_default() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    found = {name: rest.removeprefix(":-") for name, rest in VARIABLE.findall(TEXT)}
    found["TESSERA_IMPORT"] = ""  # unset, a volume of that name is used
    assert example == found
    for name, rest in VARIABLE.findall(TEXT):
        assert rest.startswith(":-"), f"{name} has no default"


# ── how they start ────────────────────────────────────────────────────────────────────────────


def test_every_lasting_service_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        if name not in ONE_SHOT:
            assert service["healthcheck"]["test"][0] == "CMD", name
            assert service["restart"] == "unless-stopped"
        for waited, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if waited in ONE_SHOT else "service_healthy"
            assert how["condition"] == wanted, (name, waited)


def test_postgres_is_healthy_only_once_it_answers_over_tcp() -> None:
    assert "--host=127.0.0.1" in SERVICES["postgres"]["healthcheck"]["test"]


def test_images_are_pinned_and_can_be_pinned_by_digest() -> None:
    images = [service["image"] for service in SERVICES.values()]
    for path in DOCKERFILES:
        text = (ROOT / path).read_text()
        assert re.findall(r"(?m)^FROM (.+)", text) == ["${PYTHON_IMAGE}"]
        images += re.findall(r"(?m)^ARG PYTHON_IMAGE=(\S+)", text)
    assert len(images) == len(SERVICES) + 2
    for image in images:
        default = re.sub(r"^\$\{\w+:-(.+)\}$", r"\1", image)
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", default), image
        assert image != default or image.startswith(("tessera-", "python:")), "a digest fits in"


def test_the_docs_say_how_each_image_is_pinned() -> None:
    page = (ROOT / "docs" / "clusters.md").read_text()
    example = (ROOT / ".env.example").read_text()
    images = re.findall(r"(?m)^(\w+_IMAGE)=(.+)$", example)
    assert len(images) == 3
    for variable, image in images:
        assert f"imagetools inspect --format '{{{{.Manifest.Digest}}}}' {image}\n" in page
        assert f"`{variable}" in page
    digests = (TEXT, page, example, *((ROOT / path).read_text() for path in DOCKERFILES))
    assert not [text for text in digests if re.search("sha256:[0-9a-f]{8}", text)]


@pytest.mark.fault(57)
def test_ray_requires_its_token_and_workers_can_be_many() -> None:
    for name in ("ray-head", "ray-worker"):
        service = SERVICES[name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_auth_token"
        assert "container_name" not in service
        assert "data:/data" in service["volumes"]
    assert "ports" not in SERVICES["ray-worker"]


def test_postgres_has_room_for_mlflows_pools() -> None:
    environment = SERVICES["mlflow"]["environment"]
    pool = int(environment["MLFLOW_SQLALCHEMYSTORE_POOL_SIZE"])
    pool += int(environment["MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW"])
    assert pool >= 2 * 40  # two for each request, forty requests at once
    (room,) = re.findall(r"max_connections=(\d+)", " ".join(SERVICES["postgres"]["command"]))
    assert int(room) >= 2 * pool + 20
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


# ── the images ────────────────────────────────────────────────────────────────────────────────


def test_no_python_file_shadows_mlflow() -> None:
    assert list((ROOT / "mlflow").rglob("*.py")) == []


def copied(dockerfile: str) -> list[str]:
    text = (ROOT / dockerfile).read_text()
    return " ".join(re.findall(r"(?m)^COPY (.+) \S+$", text)).split()


def test_the_images_copy_only_what_may_travel() -> None:
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for path in DOCKERFILES:
        for source in copied(path):
            assert source in allowed or source.split("/")[0] in allowed, source
            assert (ROOT / source).exists(), source
    assert not {".env", "secrets", "deploy", "deploy/docker"} & allowed


def test_the_ray_image_has_all_that_the_wheel_is_made_of() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = [pattern.removesuffix("*") for pattern in settings["packages"]["find"]["include"]]
    modules = [f"{name}.py" for name in settings["py-modules"]]
    assert {*packages, *modules} <= {*copied("deploy/docker/ray.Dockerfile")}


def test_the_ray_image_has_no_tools_of_the_tests() -> None:
    """It installs the project's dependencies, and the lock only bounds their versions."""
    text = (ROOT / "deploy/docker/ray.Dockerfile").read_text()
    assert "--constraint requirements.lock" in text
    assert "--requirement requirements.lock" not in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = " ".join(project["dependencies"])
    assert not [tool for tool in ("pytest", "ruff", "mypy", "playwright") if tool in needed]
    locked = (ROOT / "requirements.lock").read_text()
    assert len(re.findall(r"(?m)^torch(?:vision)?==", locked)) == 2, "what TORCH_INDEX replaces"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
    for body in re.findall(r"<<'PYTHON'\n(.*?)\nPYTHON\n", script.read_text(), re.S):
        compile(body, script.name, "exec")


def test_no_file_names_a_package_registry() -> None:
    texts = [TEXT, *((ROOT / path).read_text() for path in (*DOCKERFILES, ".env.example"))]
    for text in texts:
        assert not re.search(r"https?://(?!127\.|mlflow|ray-head|object-store|postgres)", text)


def test_docker_compose_accepts_the_files() -> None:
    """By docker compose itself, where it is."""
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no `docker compose` here")
    for overlay in ([], ["-f", "deploy/docker/compose.gpu.yml"]):
        files = ["-f", "docker-compose.yml", *overlay]
        config = [docker, "compose", *files, "--env-file", os.devnull, "config", "--quiet"]
        assert subprocess.run(config, cwd=ROOT, check=False).returncode == 0
