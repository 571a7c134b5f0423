"""`up`, `status`, `submit` and `down` with a real Ray head and a real MLflow server.

The commands on the page about clusters run here, on the same services.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from pages import commands

from jobs import status
from jobs.shared import local_services
from pipelines.workflows.context import Context

ROOT = Path(__file__).parents[2]
NAMES = ("RAY_", "MLFLOW_", "TESSERA_")


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of this process without variables about services."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(NAMES)}
    return {**clean, "TESSERA_HOME": str(home), "OMP_NUM_THREADS": "1", **more}


def tessera(
    home: Path, verb: str, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{verb}", *arguments],
        env=environment(home, **more),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def ports() -> list[str]:
    options = ("--ray-port", "--dashboard-port", "--mlflow-port")
    return [word for option in options for word in (option, str(local_services.free_port()))]


def state(home: Path) -> dict[str, object]:
    """What `tessera status` prints, run in this process."""
    ran = CliRunner().invoke(status.command, ["--json"], env={"TESSERA_HOME": str(home)})
    return json.loads(ran.stdout)


def members(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[psutil.Process]:
    monkeypatch.setenv("TESSERA_HOME", str(home))
    known = local_services.load(Context.from_environment().home)
    return [p for s in (known.services if known else ()) for p in local_services.processes(s)]


@pytest.fixture(scope="module")
def home(prepared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of running services."""
    folder = tmp_path_factory.mktemp("home") / ".tessera"
    shutil.copytree(prepared_store, folder)
    try:
        started = tessera(folder, "up", "--cpus", "2", *ports())
        assert started.returncode == 0, started.stderr
        assert "export RAY_AUTH_MODE=token" in started.stdout
        yield folder
    finally:
        tessera(folder, "down")


def test_up_starts_healthy_services_and_a_second_up_changes_nothing(home: Path) -> None:
    before = tessera(home, "status", "--json")
    assert before.returncode == 0
    assert json.loads(before.stdout)["up"] is True
    again = tessera(home, "up", *ports())
    assert again.returncode == 0
    assert again.stdout.startswith("up already")
    assert state(home) == json.loads(before.stdout)


@pytest.mark.fault(57)
def test_ray_refuses_requests_without_the_token(home: Path) -> None:
    known = state(home)["environment"]
    assert isinstance(known, dict)
    token = Path(known["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    jobs = f"{known['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    assert local_services.probe_url(jobs) == "requires a token"
    assert local_services.probe_url(jobs, bearer="0" * 64) == "refuses the token"
    assert local_services.probe_url(jobs, bearer=token.read_text()) == ""


@pytest.mark.fault(57)
@pytest.mark.control(57)
def test_no_port_of_ray_takes_a_job_without_the_token(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dashboard and each agent, on every port that listens; the control is the token."""
    known = state(home)["environment"]
    assert isinstance(known, dict)
    token = Path(known["RAY_AUTH_TOKEN_PATH"]).read_text()
    listening = {
        connection.laddr.port
        for process in members(home, monkeypatch)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    } - {urllib.parse.urlsplit(known["MLFLOW_TRACKING_URI"]).port}
    routes = ("/api/jobs/", "/api/job_agent/jobs/")

    def statuses(bearer: str) -> set[int]:
        """Of a POST to each route of each port. Ports that speak no HTTP are left out; 405 is the
        reply of those that only show metrics."""
        found = set()
        for port in listening:
            for path in routes:
                request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=b"{}")
                request.add_header("Authorization", f"Bearer {bearer}")
                try:
                    with urllib.request.urlopen(request, timeout=2) as response:
                        found.add(response.status)
                except urllib.error.HTTPError as error:
                    error.close()
                    found.add(error.code)
                except (OSError, http.client.HTTPException):
                    continue
        return found

    refused = {401, 403, 404, 405}
    assert statuses("0" * 64) <= refused
    assert statuses(token) - refused, "with the token a job without a command is read, and refused"


def test_services_listen_on_loopback_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listening = [
        connection.laddr.ip
        for process in members(home, monkeypatch)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


def test_mlflow_serves_the_embedded_store(home: Path) -> None:
    known = state(home)["environment"]
    assert isinstance(known, dict)
    address = known["MLFLOW_TRACKING_URI"]
    body = json.dumps({"name": "seen in both"}).encode()
    password = local_services.with_password(known)["MLFLOW_TRACKING_PASSWORD"]
    login = base64.b64encode(f"{known['MLFLOW_TRACKING_USERNAME']}:{password}".encode()).decode()
    made = urllib.request.Request(
        f"{address}/api/2.0/mlflow/experiments/create",
        data=body,
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(made, timeout=20)
    made.add_header("Authorization", f"Basic {login}")
    with urllib.request.urlopen(made, timeout=20) as response:
        assert json.load(response)["experiment_id"]
    import sqlite3

    store = sqlite3.connect(home / "mlflow.db")
    rows = store.execute("select artifact_location from experiments where name = 'seen in both'")
    # Not the server's own address for files: without the server it would lead nowhere.
    assert rows.fetchone()[0].startswith(str(home / "artifacts"))
    store.close()


def test_submit_prints_the_log_and_returns_the_exit_status(home: Path) -> None:
    """A job that succeeds, one that fails, and one of Ray's own command, all at once."""
    known = state(home)["environment"]
    assert isinstance(known, dict)
    ours = [sys.executable, "-m", "jobs.submit"]
    plain = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", "."]
    commands = {
        "good": ([*ours, "formats"], environment(home)),
        "bad": ([*ours, "inspect", "no-such-set"], environment(home)),
        "ray": ([*plain, "--", "python", "-m", "jobs.formats"], environment(home, **known)),
    }
    running = {
        name: subprocess.Popen(
            argv, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name, (argv, env) in commands.items()
    }
    printed = {name: process.communicate(timeout=150) for name, process in running.items()}
    assert running["good"].returncode == 0, printed["good"]
    here = tessera(home, "formats")  # a job's log has both streams, and nothing but its output
    assert printed["good"][0] == here.stdout + here.stderr
    assert running["bad"].returncode == 1, printed["bad"]
    assert "no-such-set is not a packed data set" in printed["bad"][0]
    assert "Traceback" not in "".join(printed["bad"])
    assert running["ray"].returncode == 0, printed["ray"]
    assert "image_folder" in printed["ray"][0]


@pytest.mark.e2e
def test_the_commands_on_the_page_about_clusters(home: Path, digits: Path, tmp_path: Path) -> None:
    """In a project with a packed data set. `tessera up` finds the services of the other tests up,
    and `tessera down`, which is the last one on the page, is left to the last test."""
    shutil.copytree(digits, tmp_path / "data" / "photos")
    *lines, last = [command.text for command in commands(ROOT / "docs" / "clusters.md")]
    assert (lines[0], last) == ("tessera up", "tessera down")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", "\n".join(["set -ex", *lines])],
        cwd=tmp_path,
        env=environment(home, PATH=path),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("up already")
    assert "models:/digits/1" in done.stdout
    table = done.stdout.partition("\nmachine  ")[2].partition("\n\n")[0].splitlines()
    assert len(table) == 2, "its head, and a row for this machine"


def test_control_c_confirms_before_it_stops_the_job(home: Path) -> None:
    """After the first Ctrl-C, "n" continues to follow the log; after the second, "y" stops the
    job."""
    keyboard, terminal = pty.openpty()
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.submit", "doctor", "--timeout", "100"],
        env=environment(home),
        cwd=ROOT,
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert job.stdout
        assert job.stderr
        next(line for line in job.stdout if "python" in line)
        for reply in (b"n\n", b"y\n"):
            job.send_signal(signal.SIGINT)
            question = ""
            while not question.endswith("stop the job? [y/N]: "):
                letter = job.stderr.read(1)
                assert letter, question
                question += letter
            os.write(keyboard, reply)
            time.sleep(0.5)  # for the first reply: it follows the log again
        assert job.wait(60) == 130
        log = job.stdout.read()
        assert log.count("python  ") <= 1  # no line twice
        assert "worker's clock" not in log  # it did not come to its end
    finally:
        job.kill()
        job.communicate()
        os.close(keyboard)
        os.close(terminal)


def test_down_ends_all_processes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs last, because it ends the services of the other tests."""
    running = members(home, monkeypatch)
    known = local_services.load(Context.from_environment().home)
    assert len(running) > 10
    assert known
    assert Path(known.scratch).exists()
    ended = tessera(home, "down")
    assert ended.returncode == 0
    assert ended.stdout.startswith("ended: ray, mlflow")
    assert [p for p in running if p.is_running()] == []
    assert not Path(known.scratch).exists()
    assert tessera(home, "status").returncode == 1
    assert tessera(home, "down").stdout == "nothing is up\n"


def test_if_one_service_fails_the_other_is_ended(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 500)
    before = {p.pid for p in psutil.process_iter()}
    refused = tessera(tmp_path, "up", *ports())
    assert refused.returncode == 1
    assert "mlflow.db can't be opened" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "services.json").exists()
    left = [p for p in psutil.process_iter() if p.pid not in before]
    assert [p for p in left if str(tmp_path) in " ".join(_words(p))] == []
    assert (tmp_path / "logs" / "ray.log").exists()  # it had begun


def _words(process: psutil.Process) -> list[str]:
    try:
        return [*process.cmdline(), process.environ().get("TESSERA_HOME", "")]
    except psutil.Error:
        return []
