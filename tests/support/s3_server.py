"""A real S3 server: Ceph's radosgw over one monitor and one store in memory, or moto's server where
that is installed. Debian: `make s3`.

In: an empty folder. Out: an endpoint with one user, on loopback or at an address of this machine.
It takes about 15 seconds to start. `python s3_server.py FOLDER HOST PORT` runs one until it is
killed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

KEY, SECRET = "testkey", "testsecret"
_TOOLS = ("ceph-authtool", "monmaptool", "ceph-mon", "ceph-osd", "ceph", "radosgw", "radosgw-admin")
_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_v1}]
public addr = 127.0.0.1
keyring = {root}/keyring
run dir = {root}
admin socket = {root}/$name.asok
log file = {root}/$name.log
pid file = {root}/$name.pid
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
auth allow insecure global id reclaim = false
[mon.a]
mon data = {root}/mon
[osd.0]
osd data = {root}/osd
osd objectstore = memstore
memstore device bytes = 1073741824
[client.rgw]
rgw frontends = beast endpoint={host}:{port}
"""
_CAPS = {
    "mon.": ("mon", "allow *"),
    "client.admin": ("mon", "allow *", "osd", "allow *", "mgr", "allow *"),
    "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
    "client.rgw": ("mon", "allow rwx", "osd", "allow rwx"),
}


def missing() -> str:
    """Why a server can't run here; empty if it can."""
    lacking = [tool for tool in _TOOLS if not shutil.which(tool)]
    if not lacking or importlib.util.find_spec("moto"):
        return ""
    return f"no S3 server here: {lacking[0]} is not installed (make s3), nor moto"


class S3Server:
    """After `start`, `endpoint` accepts requests signed with KEY and SECRET."""

    def __init__(self, root: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        self.root, self.host = root, host
        self.kind = "moto" if any(not shutil.which(tool) for tool in _TOOLS) else "radosgw"
        free, self._mon, self._mon_v1 = free_ports(3)
        self.port = port or free
        self.endpoint = f"http://{host}:{self.port}"
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if self.kind == "moto":
            moto = (sys.executable, "-m", "moto.server", "-H", self.host, "-p", str(self.port))
            self._spawn(*moto)
        else:
            self._start_ceph()
        deadline = time.monotonic() + 120
        while not self._is_ready():
            if time.monotonic() > deadline:
                raise RuntimeError(self._log())
            time.sleep(0.1)

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self._processes.clear()

    def _start_ceph(self) -> None:
        fsid, conf, keyring = str(uuid.uuid4()), self.root / "ceph.conf", self.root / "keyring"
        ports = {"mon": self._mon, "mon_v1": self._mon_v1, "host": self.host, "port": self.port}
        conf.write_text(_CONF.format(fsid=fsid, root=self.root, **ports))
        for at, (name, caps) in enumerate(_CAPS.items()):
            pairs = [
                word for at in range(0, len(caps), 2) for word in ("--cap", *caps[at : at + 2])
            ]
            create = [] if at else ["--create-keyring"]
            self._run("ceph-authtool", *create, str(keyring), "--gen-key", "-n", name, *pairs)
        address = f"[v2:127.0.0.1:{self._mon},v1:127.0.0.1:{self._mon_v1}]"
        monmap = str(self.root / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        (self.root / "mon").mkdir()
        (self.root / "osd").mkdir()
        mon = ("ceph-mon", "-c", str(conf), "-i", "a")
        self._run(*mon, "--mkfs", "--monmap", monmap, "--keyring", str(keyring))
        self._spawn(*mon, "-f")
        osd_id = str(uuid.uuid4())
        self._run("ceph", "-c", str(conf), "osd", "new", osd_id)
        osd = ("ceph-osd", "-c", str(conf), "-i", "0")
        self._run(*osd, "--mkfs", "--osd-uuid", osd_id)
        self._spawn(*osd, "-f")
        user = ("--uid", "test", "--display-name", "test")
        keys = ("--access-key", KEY, "--secret-key", SECRET)
        self._run("radosgw-admin", "-c", str(conf), "user", "create", *user, *keys)
        self._spawn("radosgw", "-c", str(conf), "-n", "client.rgw", "-f")

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(f"{command[0]}: {done.stderr[-2000:]}")

    def _spawn(self, *command: str) -> None:
        with (self.root / "server.log").open("ab") as log:
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log))

    def _is_ready(self) -> bool:
        for process in self._processes:
            if process.poll() is not None:
                raise RuntimeError(self._log())
        try:
            urllib.request.urlopen(self.endpoint, timeout=2).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code < 500
        except OSError:
            return False
        return True

    def _log(self) -> str:
        return (self.root / "server.log").read_text(errors="replace")[-2000:]


def free_ports(count: int) -> list[int]:
    """Free ports on loopback."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def environment(endpoint: str) -> dict[str, str]:
    """Environment variables that make a client use this server and ignore the user's settings."""
    nowhere = os.devnull
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": nowhere,
        "AWS_SHARED_CREDENTIALS_FILE": nowhere,
    }


if __name__ == "__main__":
    server = S3Server(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    server.start()
    signal.pause()
