"""A real MLflow server on loopback that a test can kill and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from jobs.shared import local_services
from pipelines.tracking import mlflow_store


class MlflowServer:
    """Serves the embedded store in `root`; not started yet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = local_services.free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_seconds: float = 120.0) -> None:
        """Starts the server, and returns when it is healthy."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "-w", "1"]
        command += [
            "--port",
            str(self.port),
            "--backend-store-uri",
            mlflow_store.prepare(self.root),
        ]
        command += ["--artifacts-destination", str(self.root / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.root / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + timeout_seconds
        while not self._is_healthy():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError((self.root / "server.log").read_text()[-2000:])
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to the server and its worker."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False
