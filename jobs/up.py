"""`tessera up`: starts a Ray head and an MLflow server on this machine, on loopback only.

In: ports. Out: two healthy services, their record in `.tessera/services.json`, and the exports
that a shell needs. If one of them can't start, neither is left running.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click

from jobs.cli import run
from jobs.shared import local_services
from jobs.shared.local_services import HOST, Service, Services
from models.core.errors import TesseraError
from pipelines.workflows.context import Context

_START_SECONDS = 120
USER = "tessera"
"""Of MLflow's server."""


GROUP = "services"


@click.command(short_help="Start a local Ray and MLflow.")
@click.option("--cpus", type=click.IntRange(1), help="CPUs that Ray may use; by default all.")
@click.option("--ray-port", type=int, default=6379, show_default=True, help="Port of Ray.")
@click.option(
    "--dashboard-port", type=int, default=8265, show_default=True, help="Port of Ray's dashboard."
)
@click.option("--mlflow-port", type=int, default=5000, show_default=True, help="Port of MLflow.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
def command(
    cpus: int | None, ray_port: int, dashboard_port: int, mlflow_port: int, verbose: bool
) -> None:
    """Start a local Ray head and an MLflow server.

    Both listen on loopback only. MLflow also shows what was logged without a server. Logs and the
    record of the services are in .tessera. `tessera down` stops both.
    """
    del verbose  # read by jobs.cli.run
    home = Context.from_environment().home
    with local_services.alone(home):
        known = local_services.load(home)
        if known and all(map(local_services.is_alive, known.services)) and len(known.services) == 2:
            click.echo("up already")
            show(known, home)
            return
        if known:  # what is left of services that died
            local_services.end_all(known, home)
        started = start(home, cpus, ray_port, dashboard_port, mlflow_port)
    show(started, home)


def start(
    home: Path, cpus: int | None, ray_port: int, dashboard_port: int, mlflow_port: int
) -> Services:
    """Starts both services and waits until they are healthy. After an error neither is left."""
    ports = {"--ray-port": ray_port, "--dashboard-port": dashboard_port}
    for option, port in ports.items():
        local_services.require_free(port, service="Ray", option=option)
    local_services.require_free(mlflow_port, service="MLflow", option="--mlflow-port")

    from pipelines.cluster import session

    scratch = session.make_private_folder()
    environment = environment_of(home, scratch, ray_port, dashboard_port, mlflow_port)
    up = Services((), environment, str(scratch))
    deadline = time.monotonic() + _START_SECONDS
    try:
        for name, address, argv in (
            ("ray", environment["RAY_API_SERVER_ADDRESS"], ray_command(up, cpus)),
            ("mlflow", environment["MLFLOW_TRACKING_URI"], mlflow_command(home, mlflow_port)),
        ):
            if name == "mlflow":  # while Ray starts
                prepare_store(home)
            service = spawn(home, name, address, argv, up)
            up = replace(up, services=(*up.services, service))
            local_services.save(up, home)
        for service in up.services:
            local_services.wait_until_healthy(service, environment, deadline)
    except BaseException:
        with contextlib.suppress(KeyboardInterrupt):
            local_services.end_all(up, home)
        raise
    return up


def prepare_store(home: Path) -> None:
    from pipelines.tracking import mlflow_runs, mlflow_store

    for name, value in mlflow_runs.settings().items():
        os.environ.setdefault(name, value)
    try:
        mlflow_store.prepare(home)
    except Exception as error:  # MLflow, SQLAlchemy and SQLite have no common base error
        text = str(error).strip() or type(error).__name__
        raise TesseraError(
            f"MLflow's store {home / 'mlflow.db'} can't be opened: {text.splitlines()[0]}",
            hint="restore a good copy, or move the file away to start with an empty store",
        ) from error


def environment_of(
    home: Path, scratch: Path, ray_port: int, dashboard_port: int, mlflow_port: int
) -> dict[str, str]:
    """What a shell or a job needs to find the services, without the password of MLflow, which is in
    a file."""
    from pipelines.cluster import session

    password = session.write_private(scratch / "mlflow-password", secrets.token_hex(16))
    return {
        "RAY_ADDRESS": f"{HOST}:{ray_port}",
        "RAY_API_SERVER_ADDRESS": f"http://{HOST}:{dashboard_port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(write_token(home)),
        # Ray takes a loopback address for the machine's own on Linux, and then listens on all of
        # them; this switch, made for macOS and Windows, keeps it on loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{mlflow_port}",
        "MLFLOW_TRACKING_USERNAME": USER,
        local_services.PASSWORD_PATH: str(password),
    }


def write_token(home: Path) -> Path:
    """The token that the shell already uses, or a new one, readable by its owner only."""
    path = home / "ray-token"
    value = os.environ.get("RAY_AUTH_TOKEN") or ""
    if not value and os.environ.get("RAY_AUTH_TOKEN_PATH"):
        value = local_services.token(os.environ)
    if not value and path.exists():
        value = path.read_text()
    from pipelines.cluster import session

    return session.write_private(path, value.strip() or secrets.token_hex(32))


def ray_command(up: Services, cpus: int | None) -> list[str]:
    from pipelines.cluster import jobs

    return jobs.head_command(
        address=up.environment["RAY_ADDRESS"],
        dashboard=up.environment["RAY_API_SERVER_ADDRESS"],
        client_port=local_services.free_port(),
        scratch=up.scratch,
        cpus=cpus,
    )


def mlflow_command(home: Path, port: int) -> list[str]:
    from pipelines.tracking import mlflow_store

    store = ["--backend-store-uri", mlflow_store.embedded_uri(home)]
    # Artifacts go to the same folder as without a server, so that both share one store.
    artifacts = str(mlflow_store.embedded_artifacts(home))
    files = ["--default-artifact-root", artifacts, "--no-serve-artifacts"]
    where = ["--host", HOST, "--port", str(port), "--workers", "1", "--app-name", "basic-auth"]
    return [sys.executable, "-m", "mlflow", "server", *where, *store, *files]


def login_variables(scratch: Path, password: str) -> dict[str, str]:
    """What MLflow's server needs for a login of its own, without which every user of the machine
    could change runs and move aliases. Its users are in `scratch`, new with every start."""
    from pipelines.cluster import session

    settings = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": f"sqlite:///{scratch}/mlflow-users.db",
        "admin_username": USER,
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "grant_default_workspace_access": "false",
        "auth_cache_ttl_seconds": "300",  # otherwise each request costs the hash of a password
    }
    lines = [f"{name} = {value}" for name, value in settings.items()]
    file = session.write_private(scratch / "mlflow-login.ini", "\n".join(["[mlflow]", *lines]))
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(file),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }


def spawn(home: Path, name: str, address: str, argv: list[str], up: Services) -> Service:
    """Starts one service as the leader of a session of its own, its output in a log."""
    import psutil

    from pipelines.tracking import mlflow_runs

    log = home / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.parent.chmod(0o700)
    inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    own = local_services.with_password(up.environment)
    own.pop(local_services.PASSWORD_PATH)
    if name == "ray":
        own.pop("RAY_ADDRESS")  # each job gets it from the cluster
    # All jobs inherit this environment, so they use the same Python and the same folders.
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own["TESSERA_HOME"] = str(home)
    server = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    if name == "mlflow":
        server |= login_variables(Path(up.scratch), own["MLFLOW_TRACKING_PASSWORD"])
    with log.open("w") as out:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=home,
            env={**mlflow_runs.settings(), **inherited, **server, **own},
            start_new_session=True,
        )
    began = local_services.start_time(psutil.Process(child.pid))
    return Service(name, child.pid, began, address, str(log))


def show(up: Services, home: Path) -> None:
    from jobs.shared.terminal import show_facts

    dashboard = up.environment["RAY_API_SERVER_ADDRESS"]
    password = local_services.with_password(up.environment).get("MLFLOW_TRACKING_PASSWORD", "")
    login = f"{USER}:{password}"
    pages = local_services.mlflow_pages(up.environment["MLFLOW_TRACKING_URI"], login=login)
    file = up.environment[local_services.PASSWORD_PATH]
    show_facts(
        {
            "ray": dashboard,
            "mlflow": pages,
            "login": f"user {USER}, and what is in {file}",
            "logs": str(home / "logs"),
        }
    )
    click.echo('\nfor this shell (or: eval "$(tessera status --exports)"):\n')
    click.echo(local_services.exports(up.environment))


if __name__ == "__main__":
    run(command, "tessera up")
