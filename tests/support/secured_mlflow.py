"""The MLflow server of docker-compose.yml, with its command line, its auth.ini and its user, over
SQLite. With an S3 server, its files are there, under a host name that only the server resolves.

In: a folder with an empty store, and the address of an S3 server. Out: an address, users, and the
environment of a client. Each password is made of the user's name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import s3_server
import yaml

from jobs.shared import local_services

ROOT = Path(__file__).parents[2]
STORE_HOST = "object-store.invalid"
BUCKET = "mlflow"
DEFAULT = re.compile(r"\$\{\w+:-([^}]*)\}")
"""A variable of the compose file, with its default."""
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"


def can_hide_the_store() -> bool:
    """Whether a process here can have a file of host names of its own."""
    return not subprocess.run([*_unshare(), "true"], capture_output=True, check=False).returncode


def password(user: str) -> str:
    return f"{user}-{user}-{user}"


def _unshare() -> list[str]:
    return ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]


class SecuredMlflow:
    """Not started yet. `s3` is the address of an S3 server, or None to keep files in `home`."""

    def __init__(self, store: Path, home: Path, s3: str | None) -> None:
        shutil.copy(store / "mlflow.db", home / "runs.db")
        self.home = home
        self.port = local_services.free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._s3 = s3
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_seconds: float = 120.0) -> None:
        """Starts the server, waits until it is healthy, and makes the user `trainer` with the
        script of the compose file."""
        command = [sys.executable, "-m", "mlflow", "server", *self._arguments()]
        if self._s3:
            hosts = self.home / "hosts"
            hosts.write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {STORE_HOST}\n")
            mount = f'mount --bind "{hosts}" /etc/hosts && exec "$@"'
            command = [*_unshare(), "sh", "-c", mount, "sh", *command]
        environment = self._environment()
        with open(self.home / "log", "wb") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout_seconds
        while not self._is_healthy():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError((self.home / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.2)
        user = {"TRAINER_USERNAME": "trainer", "TRAINER_PASSWORD": password("trainer")}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment |= {**self.client("admin"), **user, "PATH": path}
        script = str(ROOT / "mlflow" / "make-user.sh")
        for _ in range(2):  # the second time it finds the user and changes nothing
            subprocess.run([script], env=environment, check=True, cwd=self.home)

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def client(self, user: str) -> dict[str, str]:
        """The environment of a client that logs in as `user`."""
        return {
            "MLFLOW_TRACKING_URI": self.address,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password(user),
        }

    def ask(
        self,
        path: str,
        user: str = "",
        body: dict[str, Any] | None = None,
        *,
        method: str | None = None,
        **headers: str,
    ) -> tuple[int, Any]:
        """Status and JSON of a request; as nobody without `user`."""
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.address + path, data=data, method=method)
        request.add_header("Content-Type", "application/json")
        if user:
            login = b64encode(f"{user}:{password(user)}".encode()).decode()
            request.add_header("Authorization", f"Basic {login}")
        for name, value in headers.items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                text = response.read().decode()
                return response.status, json.loads(text) if text.startswith("{") else text
        except urllib.error.HTTPError as error:
            error.close()
            return error.code, None

    def _arguments(self) -> list[str]:
        """Those of the compose file, with another port and other files."""
        services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        replaced = {"--host": "127.0.0.1", "--port": str(self.port)}
        replaced["--artifacts-destination"] = (
            f"s3://{BUCKET}/artifacts" if self._s3 else str(self.home / "artifacts")
        )
        words = [DEFAULT.sub(r"\1", word) for word in services["mlflow"]["command"]]
        pairs = (word.partition("=") for word in words[words.index("server") + 1 :])
        return [f"{name}={replaced.get(name, value)}" for name, _, value in pairs]

    def _environment(self) -> dict[str, str]:
        settings = (ROOT / "mlflow" / "auth.ini").read_text()
        users = f"sqlite:///{self.home}/users.db"
        (self.home / "auth.ini").write_text(re.sub(r"postgresql://\S+", users, settings))
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")},
            "MLFLOW_AUTH_CONFIG_PATH": str(self.home / "auth.ini"),
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.home}/runs.db",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 64,
            "MLFLOW_AUTH_ADMIN_PASSWORD": password("admin"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        if self._s3:
            environment |= s3_server.environment(self._s3)
            del environment["AWS_ENDPOINT_URL"]
            endpoint = f"http://{STORE_HOST}:{urlsplit(self._s3).port}"
            environment["MLFLOW_S3_ENDPOINT_URL"] = endpoint
            environment["MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"] = "path"
        return environment

    def _is_healthy(self) -> bool:
        try:
            return self.ask("/health")[0] == 200
        except OSError:
            return False
