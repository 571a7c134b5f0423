"""Another user of the same machine reads, changes, connects to and submits nothing.

Needs root, which starts processes as two users without names. What they must not reach is made by
the first; for each attempt a control shows that the owner, or a folder that is open, can.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.shared import local_services

ROOT = Path(__file__).parents[2]
OWNER, OTHER = 54321, 54322
pytestmark = [pytest.mark.slow, pytest.mark.e2e]

EMBEDDED = """
import os, sys, time
from pathlib import Path
from pipelines.cluster import connection, session
from pipelines.workflows import services
from pipelines.workflows.context import Context

services.apply_settings(Context.from_environment())
connection.connect(cpus=1)
import ray

folder = connection._private_folders[0]
print(folder, ray.get_runtime_context().gcs_address, flush=True)
print(ray.get(ray.remote(lambda: os.environ["SECRET"]).remote()), flush=True)
print(repr(connection.open_session_folder()), flush=True)
sys.stdin.read()
connection.disconnect()
print(folder.exists(), flush=True)
os._exit(0)
"""
JOIN = """
import os, sys
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = sys.argv[2]
import ray
from ray._raylet import GcsClient
try:
    client = GcsClient(address=sys.argv[1])
    print("joined", len(client.internal_kv_keys(b"", None, timeout=10)))
except BaseException as error:
    print("refused", type(error).__name__)
"""


def environment(home: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    for name in ("USER", "LOGNAME", "TESSERA_HOME"):
        clean.pop(name, None)
    return {
        **clean,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "SECRET": "hunter2",
        "OMP_NUM_THREADS": "1",
    }


AS_USER = """
hidden=$1 name=$2 user=$3
shift 3
if [ -n "$name" ]; then
    kept=$(mktemp -d)
    mount --bind "$hidden/$name" "$kept"
    mount -t tmpfs -o mode=755 none "$hidden"
    mkdir "$hidden/$name"
    mount --move "$kept" "$hidden/$name"
    rmdir "$kept"
fi
exec setpriv --reuid="$user" --regid="$user" --clear-groups "$@"
"""
"""Runs a command as a user, who sees Python even where it is in a folder of root's home."""


def as_user(user: int, *words: str) -> list[str]:
    base, hidden = Path(sys.base_prefix).resolve(), Path.home().resolve()
    is_hidden = base.is_relative_to(hidden) and not hidden.stat().st_mode & 0o001
    name = base.relative_to(hidden).parts[0] if is_hidden else ""
    script = ["unshare", "--mount", "sh", "-ec", AS_USER, "sh", str(hidden), name, str(user)]
    return [*script, *words]


def run_as(user: int, *words: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        as_user(user, *words),
        env=environment(home),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def home() -> Iterator[Path]:
    """A home of the owner that everybody may enter, as many systems make it."""
    if os.geteuid():
        pytest.skip("needs root, to start processes of other users")
    folder = Path(tempfile.mkdtemp(prefix="home-", dir="/tmp"))
    folder.chmod(0o755)
    os.chown(folder, OWNER, OWNER)
    try:
        if run_as(OWNER, sys.executable, "-c", "import pipelines.recipe", home=folder).returncode:
            pytest.skip("other users can't read this checkout and its Python")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def attempts(folder: Path) -> list[str]:
    """What the other user gets from a folder: names, and what could be written."""
    code = (
        "import os, sys\n"
        "found = []\n"
        "for root, folders, files in os.walk(sys.argv[1]):\n"
        "    for name in files:\n"
        "        path = os.path.join(root, name)\n"
        "        try: open(path, 'rb').read(1); found.append('reads ' + path)\n"
        "        except OSError: pass\n"
        "    if os.access(root, os.W_OK): found.append('writes ' + root)\n"
        "print('\\n'.join(found))\n"
    )
    done = run_as(OTHER, sys.executable, "-c", code, str(folder), home=Path("/tmp"))
    return done.stdout.split("\n") if done.stdout.strip() else []


def test_nobody_else_reaches_an_embedded_ray(home: Path) -> None:
    process = subprocess.Popen(
        as_user(OWNER, sys.executable, "-c", EMBEDDED),
        env=environment(home),
        cwd=home,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        line = process.stdout.readline().split()
        if not line:
            raise AssertionError(process.communicate()[1][-3000:])
        folder, address = Path(line[0]), line[1]
        assert process.stdout.readline() == "hunter2\n", "the owner's tasks work"
        assert process.stdout.readline() == "''\n", "doctor has nothing to warn of"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert attempts(folder) == []
        token = (folder / "token").read_text()
        assert not (home / ".ray").exists(), "Ray's own token would be readable"
        for given, is_joined in ((token, True), ("0" * 64, False)):
            joined = run_as(OTHER, sys.executable, "-c", JOIN, address, given, home=Path("/tmp"))
            assert joined.stdout.startswith("joined") == is_joined, joined
        folder.chmod(0o755)  # the control: Ray itself leaves the way open
        reached = attempts(folder)
        assert any(name.startswith("writes ") and "session_" in name for name in reached)
        folder.chmod(0o700)
        out, _ = process.communicate("", timeout=100)
        assert out == "False\n"
    finally:
        process.kill()
        process.communicate()


def test_nobody_else_reaches_what_up_started(home: Path) -> None:
    ports = [
        word
        for option in ("--ray-port", "--dashboard-port", "--mlflow-port")
        for word in (option, str(local_services.free_port()))
    ]
    tessera = [sys.executable, "-m"]
    started = run_as(OWNER, *tessera, "jobs.up", "--cpus", "1", *ports, home=home)
    try:
        assert started.returncode == 0, started.stderr
        store = home / ".tessera"
        known = local_services.load(store)
        assert known
        password = local_services.with_password(known.environment)["MLFLOW_TRACKING_PASSWORD"]
        token = Path(known.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        for shown in (started.stdout, (store / "services.json").read_text()):
            assert password not in shown
            assert token not in shown
        assert attempts(Path(known.scratch)) == []
        assert attempts(store) == []
        searched = f"{known.environment['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search"
        jobs = f"{known.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/"
        assert _status(f"{searched}?max_results=1") == 401
        assert _status(f"{searched}?max_results=1", f"tessera:{password}x") == 401
        assert _status(f"{searched}?max_results=1", f"tessera:{password}") == 200
        assert _status(jobs) == 401
        words = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
        assert password not in words.stdout
        assert token not in words.stdout
        used = run_as(
            OWNER,
            "bash",
            "-c",
            f'eval "$({sys.executable} -m jobs.status --exports)" && '
            f"{sys.executable} -m jobs.doctor --json",
            home=home,
        )
        found = {each["check"]: each for each in json.loads(used.stdout)}
        assert found["private files"]["state"] == "ok"
        assert found["mlflow"]["state"] == "ok", "it has logged in"
        assert "session folder" not in found
        (store / "ray-token").chmod(0o644)  # the control
        again = run_as(OWNER, *tessera, "jobs.doctor", "--timeout", "1", "--json", home=home)
        finding = {each["check"]: each for each in json.loads(again.stdout)}["private files"]
        assert finding["state"] == "fail"
        assert "ray-token is open to other users (mode 644)" in finding["detail"]
    finally:
        run_as(OWNER, *tessera, "jobs.down", home=home)


def _status(url: str, login: str = "") -> int:
    from base64 import b64encode

    request = urllib.request.Request(url)
    if login:
        encoded = b64encode(login.encode()).decode()
        request.add_header("Authorization", f"Basic {encoded}")
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_a_user_without_a_name_and_without_a_home_trains(home: Path, digits: Path) -> None:
    """As in a container: no entry in the list of users, and a HOME that isn't there."""
    shutil.copytree(digits, home / "data")
    for path in (home / "data", *(home / "data").rglob("*")):
        os.chown(path, OWNER, OWNER)
    variables = {**environment(home), "HOME": "/nonexistent", "TESSERA_HOME": str(home / "runs")}
    short = ["--set", "train.epochs=1", "--variant", "tiny", "--workers", "0"]
    for missing in ((), ("HOME",)):
        done = subprocess.run(
            as_user(OWNER, sys.executable, "-m", "jobs.train", "cnn", "--data", "data", *short),
            env={k: v for k, v in variables.items() if k not in missing},
            cwd=home,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "models:/digits/" in done.stdout
