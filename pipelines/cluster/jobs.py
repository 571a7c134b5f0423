"""A Ray cluster as a service: the command of its head, and its jobs.

In: addresses and commands as plain data. Out: a command line, or a job's id, log and exit status.
Must not know what a job does, nor MLflow.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.core.errors import TesseraError
from pipelines.cluster import session

PACKAGES = ("jobs", "models", "pipelines")
"""The folders of a checkout that travel with a job: no data, no `.env`, no history."""

_REFUSED_SECONDS = 60
"""How long a cluster may refuse before following its log is given up."""


@dataclass(frozen=True)
class JobResult:
    """How a job ended. `exit_code` is that of its command; None if the command was killed."""

    status: str
    exit_code: int | None
    message: str


def head_command(
    *, address: str, dashboard: str, client_port: int, scratch: str, cpus: int | None
) -> list[str]:
    """The command that runs a cluster's head in the foreground. SIGTERM ends it and its workers.

    `address` is HOST:PORT, `dashboard` http://HOST:PORT. Ray chooses all other ports. `scratch` is
    a folder that only this user may enter.
    """
    host, port = address.rsplit(":", 1)
    python = session.python(Path(scratch))
    command = [python, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--node-ip-address={host}", f"--port={port}"]
    command += [f"--dashboard-host={host}", f"--dashboard-port={dashboard.rsplit(':', 1)[1]}"]
    command += ["--dashboard-agent-listen-port=0", f"--ray-client-server-port={client_port}"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    command += ["--disable-usage-stats", f"--temp-dir={session.ray_folder(Path(scratch))}"]
    return command if cpus is None else [*command, f"--num-cpus={cpus}"]


class LostJobError(TesseraError):
    """A job that can't be followed any more, because its cluster is gone."""


class Jobs:
    """The jobs of the cluster whose dashboard is at `address` (http://HOST:PORT).

    Ray reads its token from RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH. Raises TesseraError for a
    cluster that can't be reached, or that refuses.
    """

    def __init__(self, address: str) -> None:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # it would override the client's argument
        from ray.job_submission import JobSubmissionClient

        for name in list(logging.root.manager.loggerDict):
            if name.startswith("ray."):
                logging.getLogger(name).setLevel(logging.ERROR)
        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError) as error:
            raise _unreachable(address, error) from error
        self.address = address

    def submit(
        self,
        entrypoint: str,
        *,
        source: Path | None,
        environment: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> str:
        """Starts `entrypoint`, a shell command, on the cluster; returns the job's id. With
        `source`, the packages in that folder are uploaded and the command runs in the copy."""
        runtime: dict[str, Any] = {"env_vars": dict(environment)}
        with tempfile.TemporaryDirectory() as staged:
            if source:
                for name in PACKAGES:
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(source / name, Path(staged, name), ignore=ignored)
                shutil.copy(source / "tessera.py", staged)
                runtime["working_dir"] = staged
            try:
                job: str = self._client.submit_job(
                    entrypoint=entrypoint, runtime_env=runtime, metadata=dict(metadata)
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise _unreachable(self.address, error) from error
        return job

    def follow(self, job: str, write: Callable[[str], None], *, skip: int = 0) -> int:
        """Passes the job's log to `write` as it grows, until the job has ended, without the first
        `skip` characters. Returns the length of the log, for the next `skip`.

        A head that doesn't answer is waited for, `_REFUSED_SECONDS` long. Raises LostJobError if
        it doesn't come back, or comes back as a new cluster.
        """
        return asyncio.run(self._follow(job, write, skip))

    async def _follow(self, job: str, write: Callable[[str], None], skip: int) -> int:
        from aiohttp import ClientError

        seen, refused_since = 0, time.monotonic()
        while True:
            position = 0
            try:
                async for text in self._client.tail_job_logs(job):
                    fresh = text[max(0, max(skip, seen) - position) :]
                    position += len(text)
                    seen = max(seen, position)
                    if fresh:
                        write(fresh)
                    refused_since = time.monotonic()
                if self.has_ended(job):
                    return max(seen, skip)
            except (OSError, RuntimeError, ClientError) as error:
                if self._is_unknown(job):
                    raise LostJobError(
                        f"the cluster at {self.address} was started again and has lost job {job}"
                    ) from error
                if time.monotonic() - refused_since > _REFUSED_SECONDS:
                    raise LostJobError(
                        f"the head of the cluster at {self.address} has not answered for "
                        f"{_REFUSED_SECONDS} s"
                    ) from error
            await asyncio.sleep(1)

    def _is_unknown(self, job: str) -> bool:
        """Whether the cluster answers that it has no such job."""
        try:
            self._client.get_job_status(job)
        except RuntimeError as error:
            return "does not exist" in str(error)
        except OSError:
            return False
        return False

    def has_ended(self, job: str) -> bool:
        return bool(self._client.get_job_status(job).is_terminal())

    def result(self, job: str) -> JobResult:
        details = self._client.get_job_info(job)
        code = details.driver_exit_code
        return JobResult(details.status.value, code, details.message or "")

    def stop(self, job: str, *, timeout_seconds: float = 20) -> bool:
        """Asks a job to end; returns whether it ended within the timeout. Ray kills it after 3 s,
        but not a job that still waits for its resources."""
        self._client.stop_job(job)
        deadline = time.monotonic() + timeout_seconds
        while not self.has_ended(job):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True


def _unreachable(address: str, error: BaseException) -> TesseraError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return TesseraError(
        f"the Ray cluster at {address} can't be reached, or refuses: {lines[0]}",
        hint="see `tessera status`; its token comes from RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH",
    )
